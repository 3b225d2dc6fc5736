"""Accuracy over many seeds: train each with script.py, and print the mean and the spread.

    python study.py --seeds 1-20                                       one seed after another
    torchrun --nproc-per-node 2 study.py --seeds 1-20                  two at a time
    python study.py --seeds 1-10 --recipe source                       script.py's training flags pass through

Each seed has a run folder of its own under the study's folder. Run again, the same command takes the finished
seeds from there and goes on with the others, from their last epoch.
"""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import re
import signal
import statistics
import sys
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from matplotlib.figure import Figure

import script

COLUMNS = "seed", "accuracy", "errors", "loss", "seconds"


def seed_list(text: str) -> list[int]:
    """An argparse type: "1-3,7" -> [1, 2, 3, 7]."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds like 1-20 or 1,2,5-8")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return sorted(set(seeds))


def parse_arguments(argv: list[str] | None) -> tuple[list[int], Path, list[str], script.Recipe]:
    """The seeds, the study's folder, the flags for script.py and the recipe they make; exits with 2 on bad usage."""
    text = "script.py's flags for training pass through: see python script.py --help"
    parser = script.Parser("study.py", description="Accuracy over many seeds.", epilog=text, allow_abbrev=False)
    text = "seeds to train: a number, a range or a list, as 1-20 or 1,2,5-8"
    parser.add_argument("--seeds", type=seed_list, required=True, metavar="LIST", help=text)
    text = "the study's folder (default: runs/study, with the other flags in its name)"
    parser.add_argument("--out-dir", type=Path, help=text)
    args, flags = parser.parse_known_args(argv)
    _, theirs, given = script.parse_arguments(flags)
    if "seed" in given or theirs.resume or theirs.evaluate or theirs.predict:
        parser.error("of script.py's flags, only those that make a recipe, --device and --data-dir have a meaning here")
    folder = args.out_dir or Path("runs", "-".join(["study", *(re.sub(r"[^\w.]+", "", flag) for flag in flags)]))
    return args.seeds, folder, flags, script.Recipe(**given)


def runs_of(folder: Path, seed: int, recipe: script.Recipe) -> list[Path]:
    """The seed's run folders, oldest first; Failure where one was trained by another recipe."""
    runs = sorted(folder.glob(f"*-seed{seed}")) + sorted(folder.glob(f"*-seed{seed}-*"))
    for run in runs:
        with contextlib.suppress(OSError, ValueError):  # killed before it was written: nothing to compare
            found, wanted = json.loads((run / "recipe.json").read_text()), asdict(replace(recipe, seed=seed))
            for name in (field.name for field in fields(recipe) if found.get(field.name) != wanted[field.name]):
                told = f"{name} is {found.get(name)} there, {wanted[name]} here"
                raise script.Failure(f"{run} was trained by another recipe: {told}; choose another --out-dir")
    return runs


def result(run: Path, seed: int, recipe: script.Recipe) -> tuple[dict, list[float]]:
    """A finished run's row of the table, and its accuracy after each epoch in percent."""
    with open(run / "history.csv", newline="") as file:
        history = list(csv.DictReader(file))
    accuracies, images = [float(row["test_accuracy"]) for row in history], recipe.holdout or 10_000
    errors = round(images * (1 - accuracies[-1] / 100))
    seconds = round(sum(float(row["seconds"]) for row in history))
    numbers = seed, f"{accuracies[-1]:.2f}", errors, f"{float(history[-1]['test_loss']):.4f}", seconds
    return dict(zip(COLUMNS, numbers, strict=True)), accuracies


def results(folder: Path, seeds: list[int], recipe: script.Recipe) -> dict[int, tuple[dict, list[float]]]:
    """What each finished seed in the folder reached."""
    finished = {seed: [run for run in runs_of(folder, seed, recipe) if script.finished(run)] for seed in seeds}
    return {seed: result(runs[0], seed, recipe) for seed, runs in finished.items() if runs}


def train(seed: int, folder: Path, flags: list[str], recipe: script.Recipe) -> int:
    """Train a seed, from its last checkpoint where there is one; script.py's exit status."""
    begun = [run for run in runs_of(folder, seed, recipe) if (run / "checkpoint.pt").exists()]
    place = ["--resume", str(begun[-1])] if begun else ["--out-dir", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()):  # what it prints is in its train.log
        return script.main([*flags, "--seed", str(seed), *place])


def student(n: int) -> float:
    """The 97.5 % quantile of Student's t distribution with n - 1 degrees of freedom, integrated numerically."""
    nu, width = n - 1, 1e-4
    x = np.arange(width / 2, 20, width)  # the middles of the intervals
    scale = math.exp(math.lgamma((nu + 1) / 2) - math.lgamma(nu / 2)) / math.sqrt(nu * math.pi)
    share = np.cumsum(scale * (1 + x**2 / nu) ** (-(nu + 1) / 2)) * width
    return float(x[np.searchsorted(share, 0.475)])


def summary(accuracies: list[float]) -> str:
    """n, mean, standard deviation, 95 % confidence interval of the mean, minimum and maximum, as one line."""
    mean, n = statistics.fmean(accuracies), len(accuracies)
    text = f"n {n}; mean {mean:.3f}%"
    if n > 1:
        deviation = statistics.stdev(accuracies)
        half = student(n) * deviation / math.sqrt(n)
        text += f"; standard deviation {deviation:.3f}; 95% interval of the mean {mean - half:.3f} to {mean + half:.3f}"
    return text + f"; minimum {min(accuracies):.2f}%; maximum {max(accuracies):.2f}%"


def picture(curves: list[list[float]]) -> bytes:
    """Every seed's accuracy over the epochs, and how the last ones are distributed."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    for curve in curves:
        left.plot(range(1, len(curve) + 1), curve, color="tab:blue", alpha=0.4, linewidth=1)
    left.axhline(99.4, color="grey", linestyle="--", label="99.4")
    last = [curve[-1] for curve in curves]
    left.set(
        title=f"accuracy (%), {len(curves)} seeds", xlabel="epoch", ylim=(min(98.5, *last), max(99.7, *last) + 0.1)
    )
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    left.legend(loc="lower right")
    steps = np.arange(round(100 * min([99.4, *last])) - 1, round(100 * max(last)) + 3) / 100 - 0.005
    right.hist(last, bins=steps, color="tab:blue")
    right.axvline(99.4, color="grey", linestyle="--")
    right.axvline(statistics.fmean(last), color="tab:red")
    right.yaxis.get_major_locator().set_params(integer=True)
    right.set(title="the last epoch's; red: their mean", xlabel="accuracy (%)", ylabel="seeds")
    return script.png(figure)


def report(folder: Path, found: dict[int, tuple[dict, list[float]]]) -> None:
    """Print the table, and leave study.csv and study.png."""
    rows = [found[seed][0] for seed in sorted(found)]
    script.save(folder / "study.csv", script.as_csv(COLUMNS, rows))
    script.save(folder / "study.png", picture([curve for _, curve in found.values()]))
    print("\n" + "".join(f"{column:>10}" for column in COLUMNS))
    for row in rows:
        print("".join(f"{value:>10}" for value in row.values()))
    print("\n" + summary([float(row["accuracy"]) for row in rows]), flush=True)


def study(seeds: list[int], folder: Path, flags: list[str], recipe: script.Recipe) -> int:
    """Train what is not finished yet, this rank's share of it, and report on all; the exit status."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    def everywhere() -> dict[int, tuple[dict, list[float]]]:  # machines need not share a disk
        gathered = [results(folder, seeds, recipe)] * world
        if world > 1:
            dist.all_gather_object(gathered, gathered[0])
        return {seed: found for part in gathered for seed, found in part.items()}

    folder.mkdir(parents=True, exist_ok=True)
    done = everywhere()
    if done and rank == 0:
        print(f"{folder}: {len(done)} of {len(seeds)} seeds are finished already", flush=True)
    for seed in [seed for seed in seeds if seed not in done][rank::world]:
        status = train(seed, folder, flags, recipe)
        if status > 128:
            print("study.py: interrupted; the same command goes on with it", file=sys.stderr)
            return status
        if status == 0:
            row, _ = results(folder, [seed], recipe)[seed]
            print(f"seed {seed}: {row['accuracy']}%, {row['errors']} errors, {row['seconds']} s", flush=True)
    done = everywhere()
    missing = [str(seed) for seed in seeds if seed not in done]
    if rank == 0 and done:
        report(folder, done)
    if rank == 0 and missing:
        print(f"study.py: error: not finished: seeds {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 success, 1 failure, 130 Ctrl-C, 143 SIGTERM."""
    arguments = parse_arguments(argv)
    try:
        if dist.is_torchelastic_launched():
            # The ranks exchange a few rows, which gloo does on any machine; the first waits for the last.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
            local_rank, ranks = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // ranks))
            if torch.cuda.is_available():
                torch.cuda.set_device(local_rank % torch.cuda.device_count())
        return study(*arguments)
    except script.Failure as failure:
        print(f"study.py: error: {failure}", file=sys.stderr)
    except OSError as error:
        print(f"study.py: error: {error.filename or 'system'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt as interrupt:  # between two seeds; within one, script.main() has its own way
        return script.interrupt_status(interrupt)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, script.interrupt)
    sys.exit(main())
