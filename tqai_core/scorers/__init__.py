"""Scorers: importance in [0, 1] a token, a head or a step. One a file."""
