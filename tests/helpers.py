"""What the suites share besides the fixtures of conftest.py."""

import subprocess
import sys

import torch

from script import HERE

CPU = torch.device("cpu")


def command(*arguments, **options):
    """`python script.py ...` in a process of its own, its output captured as text."""
    line = [sys.executable, str(HERE / "script.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, encoding="utf-8", check=False, **options)


def only_run(folder):
    """The one run in the folder."""
    (run,) = folder.iterdir()
    return run
