"""Strategies: how a stream is predicted from its history, and what is held of it. One a file."""
