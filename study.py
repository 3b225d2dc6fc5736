"""Accuracy over many seeds: train each with script.py, and print the mean and the spread.

    python study.py --seeds 1-20                                       one seed after another
    torchrun --nproc-per-node 2 study.py --seeds 1-20                  two at a time
    python study.py --seeds 1-10 --recipe source                       script.py's training flags pass through

Each seed has a run folder of its own in the study's folder, and the table there holds all finished seeds. Run again,
the same command goes on: with each unfinished seed from its last epoch. Several machines must share the folder.
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
from filelock import FileLock, Timeout
from matplotlib.figure import Figure

import script
from pictures import png

History = list[dict]  # a run's rows of history.csv, one an epoch
COLUMNS = "seed,accuracy,errors,loss,seconds\n"  # of study.csv


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
    theirs, args.recipe = script.parse_arguments(args.flags, "study.py")
    if theirs.seed is not None or theirs.resume or theirs.evaluate or theirs.out_dir:
        parser.error("of script.py's flags, only those that make a recipe, --device and --data-dir can be given here")
    args.resume_flags = ["--device", theirs.device, f"--data-dir={theirs.data_dir}"]
    args.out_dir = args.out_dir or Path("runs", "-".join(["study", *(re.sub(r"[^\w.]", "", f) for f in args.flags)]))
    return args


def survey(folder: Path, recipe: script.Recipe) -> tuple[dict[int, History], dict[int, Path]]:
    """Each finished seed's history in the folder, and each other seed's run. Raises Failure for another recipe."""
    finished, begun = {}, {}
    for checkpoint in sorted(folder.glob("*-seed*/checkpoint.pt")):
        run = checkpoint.parent
        try:
            content = script.load(checkpoint)
            history, theirs, seed = content["history"], content["recipe"], content["recipe"]["seed"]
            ours = asdict(replace(recipe, seed=seed))
            other = [name for name in ours if ours[name] != theirs[name]]
        except (script.Failure, TypeError, KeyError, ValueError) as error:
            raise script.Failure(f"{checkpoint} is damaged or from another version; move {run} away") from error
        if other:
            difference = f"{other[0]} is {theirs[other[0]]} there, {ours[other[0]]} here"
            raise script.Failure(f"{run} has another recipe: {difference}; move it away or choose another --out-dir")
        if (run / "model.pt").exists():
            finished[seed] = history
        else:
            begun[seed] = run
    return finished, begun


def table(results: dict[int, History], recipe: script.Recipe) -> str:
    """What each seed's last epoch reached, as study.csv has it."""
    images, text = recipe.holdout or 10_000, COLUMNS
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


def update_table(folder: Path, recipe: script.Recipe) -> tuple[dict[int, History], dict[int, Path]]:
    """Write study.csv and study.png for all finished seeds in the folder, and return what survey() does."""
    with FileLock(folder / ".table.lock"):  # so that the last process to finish writes the whole table
        results, begun = survey(folder, recipe)
        try:
            if results:
                script.save(folder / "study.csv", table(results, recipe).encode())
                script.save(folder / "study.png", picture(results, recipe))
        except script.Failure as failure:
            print(f"study.py: {failure}; the study goes on", file=sys.stderr)
    return results, begun


def train_seed(args: argparse.Namespace, seed: int, run: Path | None, bar: bool) -> None:
    """Train the seed, from the last epoch of its run if there is one; its train.log has what it would print."""
    anew = [*args.flags, "--seed", str(seed), f"--out-dir={args.out_dir}"]
    flags = [f"--resume={run}", *args.resume_flags] if run else anew
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(sys.stderr if bar else quiet):
            script.run_script(*script.parse_arguments(flags))
    except (script.Failure, OSError) as error:
        print(f"study.py: error: seed {seed}: {error}", file=sys.stderr)
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt("the same command goes on") from interrupt


def study(args: argparse.Namespace, rank: int, ranks: int) -> None:
    """Train this rank's share; the rank that ends last prints the table. Raises Failure if seeds failed."""
    results, begun = update_table(args.out_dir, args.recipe)
    mine = [seed for seed in args.seeds[rank::ranks] if seed not in results]
    for count, seed in enumerate(mine, start=1):
        train_seed(args, seed, begun.get(seed), bar=ranks == 1)  # the bars of several ranks would overwrite each other
        results, _ = update_table(args.out_dir, args.recipe)
        if seed in results:
            done, accuracy = len(set(args.seeds) & set(results)), results[seed][-1]["test_accuracy"]
            seconds = np.median([sum(row["seconds"] for row in history) for history in results.values()])
            left = timedelta(seconds=round(seconds * (len(mine) - count)))
            print(f"seed {seed}: {accuracy:.2f}%; {done} of {len(args.seeds)} done, {left} left")
    failed = [str(seed) for seed in mine if seed not in results]
    if failed:
        raise script.Failure(f"not finished: seeds {', '.join(failed)}")
    if set(args.seeds) <= set(results):
        print("\n" + table(results, args.recipe).replace(",", "\t").expandtabs(10))
        print(summary([history[-1]["test_accuracy"] for history in results.values()]))


def work(args: argparse.Namespace) -> int:
    """The study, or torchrun's rank of it, alone in its folder."""
    rank, ranks, local = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
    args.out_dir.mkdir(parents=True, exist_ok=True)
    file = args.out_dir / "study.csv"
    if file.is_file() and not file.read_bytes().startswith(COLUMNS.encode()):
        raise script.Failure(f"{file} is not as a study wrote it; move it away or choose another --out-dir")
    try:
        with FileLock(args.out_dir / f".rank{rank}.lock", blocking=False):  # dropped when this process is killed
            study(args, rank, max(1, ranks))
    except Timeout as error:
        raise script.Failure(f"another study is at work in {args.out_dir}; choose another --out-dir") from error
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 success, 1 failure, 130 Ctrl-C."""
    return script.run_command("study.py", lambda: work(parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
