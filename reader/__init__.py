"""Handwritten digits in a picture: segment.py finds the ink and its marks, read.py what digits they are."""

from reader.read import Reading, classify, committed_net, digits, read_picture

__all__ = ["Reading", "classify", "committed_net", "digits", "read_picture"]
