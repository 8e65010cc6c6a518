"""Codecs: tensor <-> packed bytes. One a file; ``packing``, ``levels`` and ``rotation`` are what they are made of."""
