"""What training costs: script.py beside the loop that everybody writes.

    python bench.py              prints one table, in under five minutes on two cores
    python bench.py --scaling    images a second by batch size and threads, and assets/scaling.png

Every row trains the same network on the same images and then evaluates it on a sixth as many, as an epoch does on
60,000 and 10,000; the stock loop with the source document's values and augmentation, script.py with its own. The
rows take turns in one process, and the medians of their repeats are compared, so that a noisy machine slows all alike.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for a Ctrl-C in the imports, which take seconds

import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import transforms
from torchvision.datasets import MNIST
from tqdm import tqdm

import script
from pictures import png

IMAGES, REPEATS = 3840, 7  # 120 steps of 32 images, an evaluation of 640
SCALING_IMAGES = 10_240  # whole batches of any size
STEPS = 37_500  # of the schedule: as in a whole run, and more than are taken here
# Multiplications in the seven convolutions, for one image: 784, 196 and 49 places, then one.
MULTIPLICATIONS = 784 * (90 + 1800) + 196 * (200 + 1800 + 3600) + 49 * 7200 + 400
FLOP_PER_IMAGE = 2 * 3 * MULTIPLICATIONS  # each with an addition; forward, and twice as much backward
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


def stock(data: tuple[Dataset, Dataset], workers: int, device: torch.device) -> Work:
    """The usual epoch: a DataLoader that transforms image by image, loss.item() for the bar, then the evaluation."""
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    train_loader = DataLoader(data[0], batch_size=32, shuffle=True, **options)
    test_loader = DataLoader(data[1], batch_size=1000, **options)
    net = script.Net("relu").to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=STEPS)

    def epoch() -> None:
        net.train()
        with open(os.devnull, "w") as nowhere:
            bar = tqdm(train_loader, file=nowhere)
            for images, labels in bar:
                images, labels = images.to(device), labels.to(device)
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
                images, labels = images.to(device), labels.to(device)
                output = net(images)
                test_loss += F.nll_loss(output, labels, reduction="sum").item()
                right += (output.argmax(dim=1) == labels).sum().item()

    return epoch


def ours(recipe: script.Recipe, images: int, device: torch.device) -> tuple[Work, Work, str]:
    """script.py's epoch, as many bare steps on a batch that is there already, and its words for how it steps."""
    train_set, test_set = (script.load_mnist(script.HERE / "data", train, device) for train in (True, False))
    train_loader = script.Loader(*(part[:images] for part in train_set), recipe.batch_size, recipe)
    test_loader = script.Loader(*(part[: images // 6] for part in test_set), 1000)
    script.seed_everything(recipe.seed, 0)
    net = script.Net(recipe.activation).to(device)
    step, line = script.make_step(net, recipe)
    optimizer, scheduler = script.make_optimizer(net, recipe, STEPS)
    batch = [part.contiguous() for part in next(iter(train_loader))]

    def epoch() -> None:
        script.train(step, train_loader, optimizer, scheduler, 1)
        script.test(step, test_loader)

    def bare_steps() -> None:
        net.train()
        for _ in range(len(train_loader)):
            optimizer.zero_grad()
            step.forward_backward(*batch)
            script.update(optimizer, scheduler)

    return epoch, bare_steps, line.removeprefix("step: ")


def seconds(work: Work) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@dataclass
class Row:
    """A row of the table: work worth so many images' steps, and the milliseconds for 32 of them in each repeat."""

    name: str
    threads: int
    work: Work
    images: float
    times: list[float] = field(default_factory=list)


def measure(images: int, repeats: int, device: torch.device) -> tuple[list[Row], str]:
    """The table's rows with their times, and script.py's words for how it steps."""
    cores = torch.get_num_threads()
    eager_epoch, _, _ = ours(script.Recipe(compile=False), images, device)  # first, for it verifies the archives
    data = stock_data(images)
    rows = [Row(f"stock loop, workers: {n}", cores, stock(data, n, device), images) for n in (0, 1, 2)]
    rows.append(Row("script.py, eager", cores, eager_epoch, images))
    matrix = torch.rand(2048, 2048, device=device)
    for threads in sorted({1, cores}) if device.type == "cpu" else [cores]:
        torch.set_num_threads(threads)
        epoch, bare_steps, way = ours(script.Recipe(), images, device)
        rows.append(Row("script.py, as run", threads, epoch, images))
        rows.append(Row("bare step", threads, bare_steps, images))
        # The limit: a step's arithmetic as one large matrix product, which is as fast as the machine gets.
        worth = 2 * 2048**3 / FLOP_PER_IMAGE
        rows.append(Row("matrix-rate limit", threads, lambda: (matrix @ matrix)[0, 0].item(), worth))
    for repeat in range(1 + repeats):
        for row in rows:
            torch.set_num_threads(row.threads)
            milliseconds = 1000 * seconds(row.work) / (row.images / 32)
            if repeat > 0:  # the first warms up
                row.times.append(milliseconds)
    torch.set_num_threads(cores)
    return rows, way


def table(device: torch.device) -> None:
    """Print the machine, the rows and the ratios."""
    rows, way = measure(IMAGES, REPEATS, device)
    print(f"{machine(device)}; step: {way}")
    print(f"{REPEATS} repeats of {IMAGES:,} images, in turns: milliseconds for 32 of them, medians and extremes\n")
    print(f"{'':24}{'threads':>8}{'images/s':>10}{'ms/step':>9}{'spread':>15}{'times stock':>13}{'of the limit':>14}")
    medians = {(row.name, row.threads): statistics.median(row.times) for row in rows}
    stock_best = min(median for (name, _), median in medians.items() if name.startswith("stock"))
    for row in rows:
        median, limit = medians[row.name, row.threads], medians["matrix-rate limit", row.threads]
        numbers = f"{row.threads:8}{32_000 / median:10,.0f}{median:9.2f}"
        spread = f"{min(row.times):.2f}-{max(row.times):.2f}"
        print(f"{row.name:24}{numbers}{spread:>15}{stock_best / median:13.2f}{limit / median:14.1%}")
    bare, whole = (medians[name, torch.get_num_threads()] for name in ("bare step", "script.py, as run"))
    print(f"\nof an epoch, all but its bare steps: {1 - bare / whole:.1%}")
    if device.type == "cpu":
        print(f"peak memory of a run of one epoch: {peak_memory()}")


def peak_memory() -> str:
    """The peak resident memory of `python script.py --epochs 1`, in a process of its own, where Linux tells it."""
    # Not getrusage's maximum, which a process inherits from the one that started it.
    code = """if True:
        import re, sys, script
        if script.main(sys.argv[1:]):
            sys.exit(1)
        print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])"""
    with tempfile.TemporaryDirectory() as folder:
        line = [sys.executable, "-c", code, "--epochs", "1", "--out-dir", folder]
        done = subprocess.run(line, capture_output=True, text=True, encoding="utf-8", cwd=script.HERE, check=False)
    if done.returncode:
        return "not measured on this system"
    return f"{int(done.stdout.split()[-1]) / 2**20:.2f} GiB"


def scaling(device: torch.device) -> None:
    """Print and draw the rate of whole epochs against batch size, for each number of threads."""
    sizes, cores = [32, 64, 128, 256, 512, 1024], torch.get_num_threads()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    print(f"{machine(device)}; images/s, medians of {REPEATS} epochs of {SCALING_IMAGES:,} images")
    print(f"{'batch size':12}" + "".join(f"{size:>8,}" for size in sizes))
    for threads in range(1, cores + 1) if device.type == "cpu" else [cores]:
        torch.set_num_threads(threads)
        rates = []
        for size in sizes:
            epoch, _, way = ours(script.Recipe(batch_size=size), SCALING_IMAGES, device)
            epoch()  # warm
            rates.append(SCALING_IMAGES / statistics.median(seconds(epoch) for _ in range(REPEATS)))
        print(f"threads: {threads:<3}" + "".join(f"{rate:8,.0f}" for rate in rates) + f"  {way}", flush=True)
        axes.plot(sizes, rates, marker="o", label=f"threads: {threads}")
    axes.set(xscale="log", xlabel="batch size", ylabel="images a second", ylim=(0, None))
    axes.set_xticks(sizes, map(str, sizes), minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    script.save(script.HERE / "assets" / "scaling.png", png(figure))


def machine(device: torch.device) -> str:
    """The name of the GPU or the processor, where the system tells it, the kind of device, and torch's version."""
    cpu = torch.cpu.get_capabilities().get("cpu_name") or platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return f"{name}; {device.type}; torch {torch.__version__}"


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 success, 1 failure, 130 Ctrl-C."""
    parser = script.Parser("bench.py", description="What training costs.")
    parser.add_argument("--scaling", action="store_true", help="the rate by batch size and threads, not the table")
    work = scaling if parser.parse_args(argv).scaling else table
    try:
        work(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        return 0
    except (script.Failure, OSError) as failure:
        print(f"bench.py: error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(script.run_program(main))
