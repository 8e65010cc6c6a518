"""Strategies: how a stream is predicted from its history, and what is kept of it. One a file."""
