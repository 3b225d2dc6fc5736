"""What training costs on a processor: script.py beside the loop that everybody writes.

It prints one table, in under five minutes on two cores. Every row trains the same network on the same images and then
evaluates it on a sixth as many, as an epoch does on 60,000 and 10,000; the stock loop with the source document's
values and augmentation, script.py with its own. The rows take turns in one process, and the medians of their repeats
are compared, so that a noisy machine slows all alike.
"""

import argparse
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import MNIST
from tqdm import tqdm

import script

IMAGES, REPEATS = 3840, 7  # 120 steps of 32 images, an evaluation of 640
STEPS = 37_500  # of the schedule: as in a whole run, and more than are taken here
CPU = torch.device("cpu")
Work = Callable[[], None]


def stock_data(images: int) -> tuple[Dataset, Dataset]:
    """torchvision's MNIST with its usual transforms: the first training images, and a sixth as many test images.

    torchvision wants extracted files, and gets a folder that is gone when it has read them.
    """
    usual = [transforms.ToTensor(), transforms.Normalize((script.MEAN,), (script.STD,))]
    augmentation = [transforms.RandomRotation(5), transforms.RandomAffine(5, shear=5)]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "MNIST", "raw")
        raw.mkdir(parents=True)
        for archive in (script.HERE / "data" / "MNIST" / "raw").glob("*.gz"):
            shutil.copy(archive, raw)
        train_set = MNIST(folder, train=True, download=True, transform=transforms.Compose([*augmentation, *usual]))
        test_set = MNIST(folder, train=False, transform=transforms.Compose(usual))
    return Subset(train_set, range(images)), Subset(test_set, range(images // 6))


def stock(data: tuple[Dataset, Dataset], workers: int) -> Work:
    """The usual epoch: a DataLoader that transforms image by image, loss.item() for the bar, then the evaluation."""
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    train_loader = DataLoader(data[0], batch_size=32, shuffle=True, **options)
    test_loader = DataLoader(data[1], batch_size=1000, **options)
    net = script.Net("relu")
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=STEPS)

    def epoch() -> None:
        net.train()
        with open(os.devnull, "w") as nowhere:
            bar = tqdm(train_loader, file=nowhere)
            for images, labels in bar:
                optimizer.zero_grad()
                loss = F.nll_loss(net(images), labels)
                loss.backward()
                optimizer.step()
                scheduler.step()
                bar.set_description(f"loss={loss.item()}")
        net.eval()
        test_loss, right = 0.0, 0
        with torch.no_grad():
            for images, labels in test_loader:
                output = net(images)
                test_loss += F.nll_loss(output, labels, reduction="sum").item()
                right += (output.argmax(dim=1) == labels).sum().item()

    return epoch


def ours(recipe: script.Recipe, images: int) -> tuple[Work, Work, str]:
    """script.py's epoch, as many bare steps on one batch that is ready, and the backend in words."""
    train_set, test_set = (script.load_mnist(script.HERE / "data", train, CPU) for train in (True, False))
    train_loader = script.Loader(*(part[:images] for part in train_set), recipe.batch_size, recipe)
    test_loader = script.Loader(*(part[: images // 6] for part in test_set))
    script.seed_torch(recipe.seed, 0)
    net = script.Net(recipe.activation)
    backend, reason = script.make_backend(script.EagerBackend(net), recipe)
    optimizer, scheduler = script.make_optimizer(net, recipe, STEPS)
    batch = next(iter(train_loader))

    def epoch() -> None:
        script.train(backend, train_loader, optimizer, scheduler, 1)
        script.test(backend, test_loader)

    def bare_steps() -> None:
        net.train()
        for _ in range(len(train_loader)):
            backend.forward_backward(*batch)
            backend.step(optimizer)
            scheduler.step()

    return epoch, bare_steps, f"{backend.kind}, float32, threads: {torch.get_num_threads()} ({reason})"


@dataclass
class Row:
    """A row of the table: work equivalent to `images` training images, and the milliseconds for 32 in each repeat."""

    name: str
    threads: int
    work: Work
    images: float
    times: list[float] = field(default_factory=list)


def make_rows(images: int) -> tuple[list[Row], str]:
    """The table's rows, and the backend of "script.py, as run" in words."""
    cores = torch.get_num_threads()
    eager_epoch, _, _ = ours(script.Recipe(cpp=False), images)  # first, for it verifies the archives
    data = stock_data(images)
    rows = [Row(f"stock loop, workers: {n}", cores, stock(data, n), images) for n in (0, 1, 2)]
    rows.append(Row("script.py, eager", cores, eager_epoch, images))
    # The limit: a step's arithmetic as one large matrix product, which is as fast as the machine gets.
    with FlopCounterMode(display=False) as counter:
        script.Net()(torch.rand(1, 1, 28, 28))
    worth = 2 * 2048**3 / (3 * counter.get_total_flops())  # images: forward, and twice as much backward
    matrix = torch.rand(2048, 2048)
    for threads in sorted({1, cores}):
        torch.set_num_threads(threads)
        epoch, bare_steps, line = ours(script.Recipe(), images)
        rows.append(Row("script.py, as run", threads, epoch, images))
        rows.append(Row("bare step", threads, bare_steps, images))
        rows.append(Row("matrix-rate limit", threads, lambda: (matrix @ matrix)[0, 0].item(), worth))
    return rows, line


def measure(rows: list[Row], repeats: int) -> None:
    """Time the rows in turns; torch is left with the threads of the last."""
    for repeat in range(1 + repeats):
        for row in rows:
            torch.set_num_threads(row.threads)
            start = time.perf_counter()
            row.work()
            if repeat > 0:  # the first warms up
                row.times.append(1000 * (time.perf_counter() - start) / (row.images / 32))


def print_table(rows: list[Row]) -> None:
    """Print each row's rate, median, extremes and ratios."""
    print(f"{'':24}{'threads':>8}{'images/s':>10}{'ms/step':>9}{'spread':>15}{'times stock':>13}{'of the limit':>14}")
    medians = {(row.name, row.threads): statistics.median(row.times) for row in rows}
    stock_best = min(median for (name, _), median in medians.items() if name.startswith("stock"))
    for row in rows:
        median, limit = medians[row.name, row.threads], medians["matrix-rate limit", row.threads]
        numbers = f"{row.threads:8}{32_000 / median:10,.0f}{median:9.2f}"
        spread = f"{min(row.times):.2f}-{max(row.times):.2f}"
        print(f"{row.name:24}{numbers}{spread:>15}{stock_best / median:13.2f}{limit / median:14.1%}")
    bare, whole = (medians[name, rows[-1].threads] for name in ("bare step", "script.py, as run"))
    print(f"\nof an epoch, all but its bare steps: {1 - bare / whole:.1%}")


def bench() -> int:
    """Measure, and print the machine and the table."""
    rows, line = make_rows(IMAGES)
    measure(rows, REPEATS)
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    print(f"{cpu}; torch {torch.__version__}; backend: {line}")
    print(f"{REPEATS} repeats of {IMAGES:,} images, in turns: milliseconds for 32 of them, medians and extremes\n")
    print_table(rows)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 success, 1 failure, 130 Ctrl-C."""
    argparse.ArgumentParser("bench.py", usage=argparse.SUPPRESS, description=__doc__).parse_args(argv)
    return script.run_command("bench.py", bench)


if __name__ == "__main__":
    sys.exit(main())
