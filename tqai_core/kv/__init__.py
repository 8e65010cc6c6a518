"""Packed caches of keys and values: torch alone, no model library."""
