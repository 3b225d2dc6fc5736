"""Handwritten digits in a picture: segment.py finds the ink and its marks, read.py what digits they are.

    picture -> sheet        upright, over paper, a million pixels at most                            flatten
    sheet -> ink            what differs from its paper, if strong enough to be a stroke              find_ink
    ink -> lines            long and thin, found in fainter ink; read with them and without          find_lines
    ink -> marks            connected ink, joined over small gaps, or over large ones                find_marks
    mark -> digit           a field as MNIST's own, classified; cut where it is likelier two         as_mnist, split
    digits -> reading       in rows; the first reading that is sure, or else the best                read_sheet

A sheet is read at most nine times: with three ideas of its paper and ink, and three times each.
"""

from reader.read import Reading, classify, committed_net, digits, read_picture

__all__ = ["Reading", "classify", "committed_net", "digits", "read_picture"]
