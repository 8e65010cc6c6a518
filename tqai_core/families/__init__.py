"""Model families: all that any host must know of one. One a file."""
