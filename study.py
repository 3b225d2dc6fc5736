"""Accuracy over many seeds: train each with script.py, and print the mean and the spread.

    python study.py --seeds 1-20                                       one seed after another
    torchrun --nproc-per-node 2 study.py --seeds 1-20                  two at a time
    python study.py --seeds 1-10 --recipe source                       script.py's training flags pass through

Each seed has a run folder of its own in the study's folder. Run again, the same command takes the finished seeds
from there and goes on with the others, from their last epoch.
"""

import argparse
import contextlib
import io
import os
import re
import sys
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import scipy.stats
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from matplotlib.figure import Figure

import script
from pictures import png

History = list[dict]  # a run's rows of history.csv, one an epoch


def seed_list(text: str) -> list[int]:
    """An argparse type: "1-3,7" -> [1, 2, 3, 7]."""
    seeds = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < first + 1000:  # which is a day of training
            raise argparse.ArgumentTypeError(f"{text!r} is no list of seeds, as 1-20 or 1,2,5-8, at most 1,000 a range")
        seeds.update(range(first, last + 1))
    return sorted(seeds)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with the flags for script.py and the recipe that they make; exits with 2 on bad usage."""
    parser = argparse.ArgumentParser("study.py", usage=argparse.SUPPRESS, description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the lines of __doc__
    parser.add_argument("--seeds", type=seed_list, required=True, metavar="LIST", help="as 1-20 or 1,2,5-8")
    parser.add_argument("--out-dir", type=Path, help="the study's folder (default: runs/study-<the other flags>)")
    args, args.flags = parser.parse_known_args(argv)
    theirs, args.recipe = script.parse_arguments(args.flags)
    if theirs.seed is not None or theirs.resume or theirs.evaluate or theirs.out_dir:
        parser.error("of script.py's flags, only those that make a recipe, --device and --data-dir have a meaning here")
    args.resume_flags = ["--device", theirs.device, f"--data-dir={theirs.data_dir}"]
    args.out_dir = args.out_dir or Path("runs", "-".join(["study", *(re.sub(r"[^\w.]", "", f) for f in args.flags)]))
    return args


def read_history(checkpoint: Path, recipe: script.Recipe) -> History:
    """What a run has done, from its checkpoint. Raises Failure where that is damaged or of another recipe."""
    run, wanted = checkpoint.parent, asdict(recipe).items()
    try:
        content = script.load(checkpoint)
        history, theirs = content["history"], content["recipe"]
        other = [f"{name} is {theirs[name]} there, {ours} here" for name, ours in wanted if theirs[name] != ours]
    except (script.Failure, TypeError, KeyError) as error:
        raise script.Failure(f"{checkpoint} is damaged or not script.py's; move {run} away to train anew") from error
    if other:
        raise script.Failure(f"{run} is a run of another recipe: {other[0]}; move it away or choose another --out-dir")
    return history


def survey(folder: Path, seeds: list[int], recipe: script.Recipe) -> tuple[dict[int, History], dict[int, Path]]:
    """The history of each finished seed in the folder, and the run of each that can be resumed. Raises Failure."""
    finished, begun = {}, {}
    for seed in seeds:
        for checkpoint in sorted(folder.glob(f"*-seed{seed}/checkpoint.pt")):
            history = read_history(checkpoint, replace(recipe, seed=seed))
            if checkpoint.with_name("model.pt").exists():
                finished[seed] = history
            else:
                begun[seed] = checkpoint.parent
    return finished, begun


def table(results: dict[int, History], recipe: script.Recipe) -> str:
    """What each seed's last epoch reached, as study.csv has it."""
    images, text = recipe.holdout or 10_000, "seed,accuracy,errors,loss,seconds\n"
    for seed, history in sorted(results.items()):
        accuracy, loss = history[-1]["test_accuracy"], history[-1]["test_loss"]
        errors, seconds = images * (1 - accuracy / 100), sum(row["seconds"] for row in history)
        text += f"{seed},{accuracy:.2f},{errors:.0f},{loss:.4f},{seconds:.0f}\n"
    return text


def summary(accuracies: list[float]) -> str:
    """n, mean, standard deviation, 95 % confidence interval of the mean, minimum and maximum, as one line."""
    mean, n = np.mean(accuracies), len(accuracies)
    text = f"n {n}; mean {mean:.3f}%"
    if n > 1:
        deviation = np.std(accuracies, ddof=1)
        half = scipy.stats.t.ppf(0.975, n - 1) * deviation / np.sqrt(n)
        text += f"; standard deviation {deviation:.3f}; 95% interval of the mean {mean - half:.3f} to {mean + half:.3f}"
    return text + f"; minimum {min(accuracies):.2f}%; maximum {max(accuracies):.2f}%"


def print_table(results: dict[int, History], recipe: script.Recipe) -> None:
    """Print the table in columns, and the summary."""
    print("\n" + table(results, recipe).replace(",", "\t").expandtabs(10))
    print(summary([history[-1]["test_accuracy"] for history in results.values()]))


def picture(results: dict[int, History], recipe: script.Recipe) -> bytes:
    """Every seed's accuracy over the epochs, and how the last ones are distributed."""
    curves = np.array([[row["test_accuracy"] for row in history] for history in results.values()])  # (seeds, epochs)
    epochs, last = range(1, recipe.epochs + 1), curves[:, -1]
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    left.plot(epochs, curves.T, color="tab:blue", alpha=len(curves) ** -0.4, linewidth=1)
    left.plot(epochs, np.median(curves, axis=0), color="black", label="median of the seeds")
    left.axhline(99.4, color="grey", linestyle="--", label="99.4 %")
    left.set(title=f"accuracy (%), seeds: {len(curves)}", xlabel="epoch")
    left.set_ylim(min(98.5, *last), max(99.7, *last) + 0.1)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    left.legend()
    values, seeds = np.unique(last, return_counts=True)
    right.bar(values, seeds, width=100 / (recipe.holdout or 10_000), color="tab:blue", edgecolor="tab:blue")
    right.axvline(99.4, color="grey", linestyle="--")
    right.axvline(np.mean(last), color="tab:red", label=f"mean {np.mean(last):.3f}")
    right.axvline(np.median(last), color="black", label=f"median {np.median(last):.3f}")
    right.set(title="after the last epoch", xlabel="accuracy (%)", ylabel="seeds")
    right.yaxis.get_major_locator().set_params(integer=True)
    right.set_ylim(0, 1.4 * max(seeds))  # room for the legend
    right.legend()
    return png(figure)


def start_rank() -> int:
    """Make this process one of torchrun's, with its share of the cores and a GPU; return its rank, 0 if it is alone."""
    if not dist.is_torchelastic_launched():
        return 0
    # The ranks exchange a few rows, which gloo does on any machine; the first waits for the last.
    dist.init_process_group("gloo", timeout=timedelta(days=7))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(max(1, cores // int(os.environ["LOCAL_WORLD_SIZE"])))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    return dist.get_rank()


def survey_all(args: argparse.Namespace) -> tuple[dict[int, History], list[dict[int, Path]]]:
    """survey() on every rank's disk: all finished seeds, and the begun ones by rank. Raises Failure."""
    found = [survey(args.out_dir, args.seeds, args.recipe)]
    if dist.is_initialized():
        found *= dist.get_world_size()
        try:
            dist.all_gather_object(found, found[0])
        except RuntimeError as error:  # gloo's
            raise script.Failure("another rank has ended; its own message says why") from error
    finished = {seed: history for histories, _ in found for seed, history in histories.items()}
    return finished, [begun for _, begun in found]


def shares(seeds: list[int], begun: list[dict[int, Path]]) -> list[list[int]]:
    """The seeds for each rank, evenly; a begun one goes to a rank that has its run: machines need not share a disk."""
    parts = [[] for _ in begun]
    for seed in sorted(seeds, key=lambda seed: not any(seed in runs for runs in begun)):  # the begun ones first
        able = [part for part, runs in zip(parts, begun, strict=True) if seed in runs]
        min(able or parts, key=len).append(seed)
    return parts


def train_seed(args: argparse.Namespace, seed: int, run: Path | None) -> bool:
    """Train the seed, from the last epoch of its run where there is one; whether it was finished."""
    anew = [*args.flags, "--seed", str(seed), f"--out-dir={args.out_dir}"]
    with contextlib.redirect_stdout(io.StringIO()):  # what it prints is in its train.log
        status = script.main([f"--resume={run}", *args.resume_flags] if run else anew)
    if status == 130:
        raise KeyboardInterrupt
    return status == 0


def study(args: argparse.Namespace, rank: int) -> None:
    """Train what is not finished yet, this rank's share of it, and report on all. Raises Failure where seeds failed."""
    results, begun = survey_all(args)
    if rank == 0:
        print(f"{args.out_dir}: {len(results)} of {len(args.seeds)} done; after Ctrl-C the same command goes on")
    parts = shares([seed for seed in args.seeds if seed not in results], begun)
    for count, seed in enumerate(parts[rank], start=1):
        if not train_seed(args, seed, begun[rank].get(seed)):
            continue  # script.py printed why
        results |= survey(args.out_dir, args.seeds, args.recipe)[0]  # with what other ranks finished on this disk
        running = min(len(parts), len(args.seeds) - len(results))
        seconds = np.median([sum(row["seconds"] for row in history) for history in results.values()])
        left = seconds * (max(map(len, parts)) - count)  # the other ranks are about as far
        progress = f"{len(results)} of {len(args.seeds)} done, {running} running, {timedelta(seconds=round(left))} left"
        print(f"seed {seed}: {results[seed][-1]['test_accuracy']:.2f}%; {progress}")
        if rank == 0:
            script.save(args.out_dir / "study.csv", table(results, args.recipe))
        if sys.stdout.isatty() and running:  # after the last seed it is printed below
            print_table(results, args.recipe)

    results, _ = survey_all(args)
    if rank == 0 and results:
        script.save(args.out_dir / "study.csv", table(results, args.recipe))
        script.save(args.out_dir / "study.png", picture(results, args.recipe))
        print_table(results, args.recipe)
    missing = [str(seed) for seed in args.seeds if seed not in results]
    if rank == 0 and missing:
        raise script.Failure(f"not finished: seeds {', '.join(missing)}")


def work(args: argparse.Namespace) -> int:
    """The study, alone in its folder: rank 0 holds the lock, which the system drops when a process is killed."""
    rank = start_rank()
    try:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        with FileLock(args.out_dir / ".lock", blocking=False) if rank == 0 else contextlib.nullcontext():
            study(args, rank)
        return 0
    except Timeout as error:
        raise script.Failure(f"another study is at work in {args.out_dir}; choose another --out-dir") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 success, 1 failure, 130 Ctrl-C."""
    return script.run_command("study.py", lambda: work(parse_arguments(argv)))


if __name__ == "__main__":
    exit_status = main()
    if dist.is_torchelastic_launched():  # gloo's threads sometimes abort a Python that is on its way out
        print(end="", flush=True)
        os._exit(exit_status)
    sys.exit(exit_status)
