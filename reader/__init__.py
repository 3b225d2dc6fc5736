"""Handwritten digits in a picture: segment.py finds the ink and its marks, read.py what digits they are.

picture -> sheet      upright, over paper, a million pixels at most                          flatten
sheet -> ink, lines   what differs from its paper; of that, what is long and thin            find_ink, find_lines
ink -> marks          connected ink, joined over small gaps, or over large ones              find_marks
mark -> digit         drawn as MNIST's are, classified; if it fits, cut if two are likelier  read_marks, split
digits -> reading     in rows; of up to six the first that is sure, or else the best         readings, read_sheet
"""

from reader.read import Reading, classify, committed_net, digits, read_picture

__all__ = ["Reading", "classify", "committed_net", "digits", "read_picture"]
