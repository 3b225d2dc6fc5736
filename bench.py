"""What a training step costs: script.py beside the loop that everybody writes.

    python bench.py              prints one table, in under five minutes on two cores
    python bench.py --scaling    images a second by batch size and threads, and assets/scaling.png

Every row trains the same network on the same images, the stock loop with the source document's values and
augmentation, script.py with its own. The rows take turns in one process, and the medians of their repeats are
compared, so that a noisy machine slows all of them alike.
"""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
import torchvision
from matplotlib.figure import Figure
from torch.utils.data import DataLoader, Subset
from torchvision import transforms
from tqdm import tqdm

import script

IMAGES, REPEATS = 9600, 5  # 300 steps of 32 images a repeat
SCALING_IMAGES = 10_240  # whole batches of any size
MULTIPLICATIONS = (
    784 * (1 * 10 * 9 + 10 * 20 * 9) + 196 * (20 * 10 + 10 * 20 * 9 + 20 * 20 * 9) + 49 * 20 * 40 * 9 + 400
)
FLOP_PER_IMAGE = 2 * 3 * MULTIPLICATIONS  # each with an addition, forward and twice backward


def network(recipe: script.Recipe, device: torch.device):
    """A fresh network on the device with its optimizer and schedule, as fit() makes them."""
    net = script.Net().to(device, memory_format=torch.channels_last if device.type == "cpu" else None)
    return net, *script.make_optimizer(net, recipe, 37_500)


def stock(workers: int, device: torch.device) -> Callable[[], None]:
    """The usual loop: a DataLoader, torchvision's transforms image by image, loss.item() for the bar."""
    augmentation = [transforms.RandomRotation(5), transforms.RandomAffine(5, shear=5)]
    transform = transforms.Compose(
        [*augmentation, transforms.ToTensor(), transforms.Normalize((script.MEAN,), (script.STD,))]
    )
    data = torchvision.datasets.MNIST(script.HERE / "data", train=True, transform=transform)
    loader = DataLoader(
        Subset(data, range(IMAGES)), 32, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )
    net = script.Net().to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=37_500)

    def epoch() -> None:
        net.train()
        with open(os.devnull, "w") as nowhere:
            bar = tqdm(loader, file=nowhere)
            for images, labels in bar:
                images, labels = images.to(device), labels.to(device)
                optimizer.zero_grad()
                loss = F.nll_loss(net(images), labels)
                loss.backward()
                optimizer.step()
                scheduler.step()
                bar.set_description(f"loss={loss.item()}")

    return epoch


def ours(recipe: script.Recipe, device: torch.device, data) -> tuple[Callable[[], None], Callable[[], None], str]:
    """script.py's epoch, its bare step on one resident batch, and the line with which it names its step."""
    said = []
    net, optimizer, scheduler = network(recipe, device)
    step = script.make_step(net, optimizer, scheduler, recipe, said.append)
    loader = script.Loader(*data, recipe.batch_size, recipe)
    batch = [part.contiguous() for part in next(iter(loader))]

    def epoch() -> None:
        script.train(net, loader, step, scheduler, 1)

    def bare() -> None:
        net.train()
        for _ in range(len(loader)):
            loss, _ = step(*batch)
        loss.item()

    return epoch, bare, said[0]


def matrix_rate(device: torch.device) -> float:
    """Single-precision matrix products, FLOP/s: the median of several."""
    size, times = 2048, []
    a = torch.rand(size, size, device=device)
    for _ in range(7):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def seconds(work: Callable[[], None]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_memory() -> str:
    """The peak resident memory of a process that compiles and trains one epoch of 60,000 images."""
    code = """if True:
        import resource, bench, script, torch
        device = torch.device("cpu")
        bench.ours(script.Recipe(), device, script.load_mnist(script.HERE / "data", True, device))[0]()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=script.HERE, check=False)
    return f"{int(done.stdout) / 1024**2:.2f} GB" if done.returncode == 0 else "not measured on this system"


def table(device: torch.device) -> None:
    """Print the machine, the rows and the ratios."""
    images, labels = script.load_mnist(script.HERE / "data", True, device)
    data = images[:IMAGES], labels[:IMAGES]
    recipe = script.Recipe()
    eager, _, _ = ours(replace(recipe, compile=False), device, data)
    fast, bare, way = ours(recipe, device, data)
    rows = {f"stock loop, {workers} workers": stock(workers, device) for workers in (0, 1, 2)}
    rows |= {"script.py, eager": eager, "script.py, as run": fast, "bare step, as run": bare}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    print(f"{name}; {device.type}; threads: {torch.get_num_threads()}; torch {torch.__version__}; {way}")
    print(f"{REPEATS} repeats of {IMAGES // 32} steps of 32 images, in turns; medians, and the fastest and slowest\n")
    times = {row: [] for row in rows}
    for work in rows.values():
        work()  # warm
    for _ in range(REPEATS):
        for row, work in rows.items():
            times[row].append(1000 * seconds(work) / (IMAGES / 32))
    limit = 1000 * 32 * FLOP_PER_IMAGE / matrix_rate(device)
    median = {row: statistics.median(values) for row, values in times.items()}
    stock_best = min(value for row, value in median.items() if row.startswith("stock"))
    print(f"{'':24}{'images/s':>10}{'ms/step':>9}{'spread':>15}{'times stock':>13}")
    for row, value in median.items():
        spread = f"{min(times[row]):.2f}-{max(times[row]):.2f}"
        print(f"{row:24}{32_000 / value:10,.0f}{value:9.2f}{spread:>15}{stock_best / value:13.2f}")
    print(f"{'matrix-rate limit':24}{32_000 / limit:10,.0f}{limit:9.2f}{'':>15}{stock_best / limit:13.2f}\n")
    paired = [a / b for a, b in zip(times["script.py, as run"], times["bare step, as run"], strict=True)]
    print(f"an epoch over its bare steps: {statistics.median(paired):.3f}")
    if device.type == "cpu":
        print(f"peak memory: {peak_memory()}")


def scaling(device: torch.device) -> None:
    """Print and draw the rate of whole training epochs against batch size, for each number of threads."""
    images, labels = script.load_mnist(script.HERE / "data", True, device)
    data = images[:SCALING_IMAGES], labels[:SCALING_IMAGES]
    sizes, cores = [32, 64, 128, 256, 512, 1024], torch.get_num_threads()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    print(f"{processor()}; {device.type}; torch {torch.__version__}; images/s, medians of {REPEATS} epochs")
    print(f"{'batch size':24}" + "".join(f"{size:>8,}" for size in sizes))
    for threads in range(1, cores + 1) if device.type == "cpu" else [cores]:
        torch.set_num_threads(threads)
        rates = []
        for size in sizes:
            epoch, _, way = ours(replace(script.Recipe(), batch_size=size), device, data)
            epoch()  # warm
            rates.append(SCALING_IMAGES / statistics.median(seconds(epoch) for _ in range(REPEATS)))
        print(f"{way.removeprefix('step: '):24}" + "".join(f"{rate:8,.0f}" for rate in rates), flush=True)
        axes.plot(sizes, rates, marker="o", label=way.removeprefix("step: "))
    axes.set(xscale="log", xlabel="batch size", ylabel="images a second", ylim=(0, None))
    axes.set_xticks(sizes, map(str, sizes), minor=False)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()
    script.save(script.HERE / "assets" / "scaling.png", script.png(figure))


def processor() -> str:
    """The processor's name, where the system tells it."""
    capabilities = torch.cpu.get_capabilities()
    return str(capabilities.get("cpu_name") or platform.processor() or platform.machine())


if __name__ == "__main__":
    parser = script.Parser("bench.py", description="What a training step costs.")
    parser.add_argument(
        "--scaling", action="store_true", help="the rate by batch size and threads instead of the table"
    )
    work = scaling if parser.parse_args().scaling else table
    work(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
