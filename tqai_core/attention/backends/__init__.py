"""Kernels: each equals the eager form."""
