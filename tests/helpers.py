"""What the suites share besides the fixtures of conftest.py."""

import subprocess
import sys

import torch

from script import HERE

CPU = torch.device("cpu")

# A person's ten digits as strokes, lists of (x, y) in a box of 60 by 100; 4, 5 and 7 are drawn in two.
STROKES = {
    0: [[(35, 2), (15, 10), (4, 35), (5, 70), (20, 96), (40, 95), (56, 68), (55, 30), (42, 6), (33, 3)]],
    1: [[(36, 0), (33, 50), (28, 100)]],
    2: [[(5, 20), (18, 3), (42, 4), (52, 22), (40, 50), (5, 96), (60, 95)]],
    3: [[(5, 8), (35, 0), (52, 20), (42, 40), (22, 46), (48, 56), (55, 78), (38, 97), (4, 92)]],
    4: [[(22, 0), (3, 62), (40, 60)], [(47, 25), (44, 100)]],
    5: [[(12, 6), (8, 45), (35, 40), (54, 60), (50, 88), (28, 100), (2, 94)], [(16, 0), (56, 1)]],
    6: [[(44, 2), (18, 30), (6, 65), (14, 94), (38, 98), (54, 80), (45, 60), (24, 60), (8, 76)]],
    7: [[(2, 3), (57, 2), (40, 45), (26, 100)], [(20, 52), (54, 49)]],
    8: [[(50, 14), (30, 1), (12, 14), (18, 36), (46, 58), (54, 80), (36, 99), (12, 92), (10, 72), (40, 42), (50, 14)]],
    9: [[(52, 22), (32, 4), (10, 16), (10, 40), (30, 50), (50, 34), (53, 20), (50, 60), (42, 100)]],
}


def command(*arguments, **options):
    """`python script.py ...` in a process of its own, its output captured as text."""
    line = [sys.executable, str(HERE / "script.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, encoding="utf-8", check=False, **options)


def only_run(folder):
    """The one run in the folder."""
    (run,) = folder.iterdir()
    return run
