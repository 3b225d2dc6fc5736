"""How many digits draw.html reads right of those that people wrote with a pen: one at a time, and beside each other.

    python -m tests.strokes strokes.json [draw.html]

The file is an array of {"digit": 7, "strokes": [[[x, y], ...], ...]}, with y downwards; the digits are scaled to one
height. Without a page, the reference run's is used. Even and odd places in the array are counted apart.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

from script import REFERENCE
from tests.browser import Page

REFERENCE_PAGE = REFERENCE.with_name("draw.html")
HEIGHT = 0.2  # of a digit on the drawing area, in its widths
CODE = "return arguments[0].map((all) => readStrokes(all, classifyStrokes).map((line) => line.map((d) => d.value)))"


def scaled(strokes, size=1.0, shift=0.0):
    """The strokes with this height, or 1.4 times this width if that is more, moved down by a share of the height."""
    points = np.concatenate([np.reshape(stroke, (-1, 2)) for stroke in strokes])
    width, height = np.ptp(points, axis=0)
    scale = size / max(height, width / 1.4)
    return [(np.array(stroke) - points.min(axis=0)) * scale + (0, shift) for stroke in strokes]


def beside(digits, gap, rng):
    """Digits beside each other, all strokes in one list: this far apart where they are nearest, of unequal size."""
    placed = []
    for digit in digits:
        strokes = scaled(digit["strokes"], rng.uniform(0.9, 1.1), rng.uniform(-0.1, 0.1))
        if placed:
            left, points = np.concatenate(placed), np.concatenate(strokes)
            for x in np.arange(left[:, 0].max() + gap, left[:, 0].min() - 1, -0.02):
                if np.hypot(*(left[:, None] - points - (x, 0)).transpose(2, 0, 1)).min() < gap:
                    break
            strokes = [stroke + np.array((x + 0.02, 0)) for stroke in strokes]
        placed += strokes
    return placed


def report(page, name, drawings, truths):
    """Print a line: how many drawings have as many digits as written, and how many are read right."""
    drawings = [[(HEIGHT * stroke).round(4).tolist() for stroke in strokes] for strokes in drawings]
    read = []
    for start in range(0, len(drawings), 50):
        read += page.js(CODE, drawings[start : start + 50])
    for half in ("even", "odd"):
        pairs = list(zip(read, truths, strict=True))[half == "odd" :: 2]
        apart = [lines and len(lines) == 1 and len(lines[0]) == len(truth) for lines, truth in pairs]
        right = [lines == [truth] for lines, truth in pairs]
        share = np.mean(right)
        error = math.sqrt(share * (1 - share) / len(right))
        print(f"{name:24}{half:>6}{len(right):6}{np.mean(apart):9.1%}{share:8.1%} ± {error:.1%}", flush=True)


def main(strokes, page_file=REFERENCE_PAGE):
    """Print the table."""
    digits, rng, page = json.loads(Path(strokes).read_text()), np.random.default_rng(1), Page()
    try:
        page.open(Path(page_file).resolve())
        print(f"{'drawings':24}{'half':>6}{'n':>6}{'grouped':>9}{'right':>8}")
        report(
            page, "one digit", [scaled(digit["strokes"]) for digit in digits], [[digit["digit"]] for digit in digits]
        )
        for count, gap in ((2, 0.1), (2, 0.3), (3, 0.1), (3, 0.3)):
            # of one half of the digits each
            chosen = [[digits[2 * i + n % 2] for i in rng.integers(len(digits) // 2, size=count)] for n in range(400)]
            truths = [[digit["digit"] for digit in some] for some in chosen]
            report(page, f"{count} digits, gap {gap}", [beside(some, gap, rng) for some in chosen], truths)
    finally:
        page.driver.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])
