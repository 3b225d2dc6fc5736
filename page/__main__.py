"""Make draw.html from existing weights: a page to write digits on.

python -m page runs/<run> draw.html
"""

import argparse
import sys
from pathlib import Path

import torch

from page import build_page
from script import HERE, EagerBackend, Failure, Loader, load_mnist, load_net, run_command, save, test


def make_page(weights: Path, page: Path) -> int:
    """Write the page of these weights, with the test digits that they misclassify, to a new file. Raises Failure."""
    if page.exists():
        raise Failure(f"{page} exists already")
    net, loader = load_net(weights), Loader(*load_mnist(HERE / "data", False, torch.device("cpu")))
    try:
        html = build_page(net, loader, test(EagerBackend(net), loader).predicted)
    except ValueError as error:
        raise Failure(f"no page: {error}") from error
    save(page, html.encode())
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 success, 1 failure, 130 Ctrl-C."""
    parser = argparse.ArgumentParser("page", usage=argparse.SUPPRESS, description=__doc__.splitlines()[0])
    parser.add_argument("weights", type=Path, help="a run, or its model.pt")
    parser.add_argument("page", type=Path, help="the file to write")
    args = parser.parse_args(argv)
    return run_command("page", lambda: make_page(args.weights, args.page))


if __name__ == "__main__":
    sys.exit(main())
