"""What each rule of reader/ earns: digits read right, and read where there is none, with one rule off at a time.

python -m tests.ablation [FOLDER] [--strokes PATH] [--digits N]

On the simulated sheets of tests/sheets.py, N digits a kind, drawn from MNIST and from a file of pen strokes, and on a
folder of pictures with truth.json, {picture: its digits in reading order}.
"""

import argparse
import json
from pathlib import Path
from unittest import mock

import numpy as np
from PIL import Image

from reader import committed_net, read, segment
from tests import sheets

RULES = {  # what is off: where, its name, and what stands there instead
    "nothing": (read, "SURE", read.SURE),
    "paper from nearby": (read, "PAPERS", read.PAPERS[:1]),
    "lines": (segment, "find_lines", np.zeros_like),
    "lines in fainter ink": (segment, "LINE", segment.WEAK),
    "lines are longer than digits": (segment, "LONGER", 0),
    "thick lines are strokes or paper": (segment, "THICK", 1),
    "ink connected to strong ink": (segment, "WEAK", segment.STRONG),
    "joining over gaps": (read, "GAPS", (0, 0)),
    "badly broken strokes": (read, "GAPS", read.GAPS[:1]),
    "the desk in the corners": (segment, "CORNERS", ([], [])),
    "the size and shape of a digit": (segment.Mark, "fits", lambda mark, usual: True),
    "noise and print refused": (read, "MANY", np.inf),
    "thin strokes drawn wider": (read, "PEN", 0),
    "wide marks are less likely": (read, "WIDE", np.inf),
    "digits that touch": (read, "split", lambda digit, net: [digit]),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--strokes", type=Path)
    parser.add_argument("--digits", type=int, default=20)
    args = parser.parse_args()
    sources = {}
    for name, path in {"MNIST": None, "strokes": args.strokes}.items():
        if path or name == "MNIST":
            kinds = sheets.KINDS + sheets.PAGES + sheets.FORMS
            digits = sheets.load(path)
            sources[name] = [case for kind in kinds for case in sheets.pictures(kind, *digits, args.digits, 13)]
    if args.folder:
        truth = json.loads((args.folder / "truth.json").read_text())
        sources["folder"] = [(digits, Image.open(args.folder / picture)) for picture, digits in truth.items()]
    print(f"{'off':40}" + "".join(f"{name:>18}" for name in sources))
    base = {}
    for rule, (place, name, instead) in RULES.items():
        with mock.patch.object(place, name, instead):
            counts = {source: sheets.count(cases, committed_net()) for source, cases in sources.items()}
        base = base or counts
        columns = [f"{100 * (n[1] - base[source][1]) / n[0]:+8.1f}; {n[2]:3d} extra" for source, n in counts.items()]
        print(f"{rule:40}" + "".join(f"{column:>18}" for column in columns), flush=True)
    for source, (number, right, extra) in base.items():
        print(f"{source}: {number} digits, {right / number:.1%} right, {extra} read where there is none")


if __name__ == "__main__":
    main()
