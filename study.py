"""Accuracy over many seeds: train each with script.py, and print the mean and the spread.

    python study.py --seeds 1-20                                       one seed after another
    torchrun --nproc-per-node 2 study.py --seeds 1-20                  two at a time
    python study.py --seeds 1-10 --recipe source                       script.py's training flags pass through

Each seed has a run folder of its own under the study's folder. Run again, the same command takes the finished
seeds from there and goes on with the others, from their last epoch.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for a Ctrl-C in the imports, which take seconds

import argparse
import contextlib
import csv
import io
import json
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

MAX_SEEDS = 1000  # a day of training and more; a longer list is a slip of the hand
COLUMNS = "seed", "accuracy", "errors", "loss", "seconds"
Result = tuple[tuple, list[float]]  # a seed's row of the table, and its accuracy after each epoch, in percent


def seed_list(text: str) -> list[int]:
    """An argparse type: "1-3,7" -> [1, 2, 3, 7]."""
    seeds = set()
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < min(first + MAX_SEEDS, 2**63):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of at most {MAX_SEEDS:,} seeds, as 1-20 or 1,2,5-8")
        seeds.update(range(first, last + 1))
    if len(seeds) > MAX_SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} has more than {MAX_SEEDS:,} seeds")
    return sorted(seeds)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The arguments, with the flags for script.py and the recipe that they make; exits with 2 on bad usage."""
    text = "script.py's flags for training pass through: see python script.py --help"
    parser = script.Parser("study.py", description="Accuracy over many seeds.", epilog=text, allow_abbrev=False)
    parser.add_argument("--seeds", type=seed_list, required=True, metavar="LIST", help="as 1-20 or 1,2,5-8")
    parser.add_argument("--out-dir", type=Path, help="the study's folder (default: runs/study-<the other flags>)")
    args, args.flags = parser.parse_known_args(argv)
    theirs, args.recipe = script.parse_arguments(args.flags)
    if theirs.seed is not None or theirs.resume or theirs.evaluate or theirs.out_dir:
        parser.error("of script.py's flags, only those that make a recipe, --device and --data-dir have a meaning here")
    args.resume_flags = ["--device", theirs.device, f"--data-dir={theirs.data_dir}"]
    args.out_dir = args.out_dir or Path("runs", "-".join(["study", *(re.sub(r"[^\w.]", "", f) for f in args.flags)]))
    return args


def check_recipe(run: Path, recipe: script.Recipe) -> None:
    """Raise Failure where the run was trained by another recipe, or does not tell by which."""
    try:
        found, wanted = json.loads((run / "recipe.json").read_bytes()), asdict(recipe)
        told = [f"{name} is {found[name]} there, {wanted[name]} here" for name in wanted if found[name] != wanted[name]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        told = ["its recipe.json is missing or damaged"]
    if told:
        raise script.Failure(f"{run} is no run of this recipe: {told[0]}; move it away or choose another --out-dir")


def result(run: Path, recipe: script.Recipe) -> Result:
    """What a finished run reached; Failure where its history.csv is not whole."""
    path, names = run / "history.csv", ("test_accuracy", "test_loss", "seconds")
    try:
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text)))
        history = np.array([[float(row[name]) for name in names] for row in rows])  # (epochs, 3)
        if len(rows) != recipe.epochs or not text.endswith("\n"):
            raise ValueError("cut")
        accuracies, losses, seconds = history.T.tolist()
        if not (np.isfinite(history).all() and 0 <= min(accuracies) <= max(accuracies) <= 100):
            raise ValueError("altered")
    except (OSError, ValueError, TypeError, KeyError, csv.Error) as error:
        raise script.Failure(f"{path} is missing, cut or damaged; move its folder away to train anew") from error
    errors = round((recipe.holdout or 10_000) * (1 - accuracies[-1] / 100))
    return (recipe.seed, f"{accuracies[-1]:.2f}", errors, f"{losses[-1]:.4f}", round(sum(seconds))), accuracies


def survey(folder: Path, seeds: list[int], recipe: script.Recipe) -> tuple[dict[int, Result], dict[int, Path]]:
    """What each finished seed in the folder reached, and the run of each that can be resumed."""
    finished, begun = {}, {}
    for seed in seeds:
        for run in sorted(folder.glob(f"*-seed{seed}")):
            if (run / "model.pt").exists():
                check_recipe(run, replace(recipe, seed=seed))
                finished[seed] = result(run, replace(recipe, seed=seed))
            elif (run / "checkpoint.pt").exists():
                check_recipe(run, replace(recipe, seed=seed))
                begun[seed] = run
    return finished, begun


def gather(value: object) -> list:
    """Every rank's value, by rank."""
    values = [value] * (dist.get_world_size() if dist.is_initialized() else 1)
    try:
        if dist.is_initialized():
            dist.all_gather_object(values, value)
    except RuntimeError as error:  # gloo's, when it waits in vain
        raise script.Failure("another rank has ended; its own message says why") from error
    return values


def shares(seeds: list[int], begun: list[dict[int, Path]]) -> list[list[int]]:
    """The seeds for each rank, evenly; a begun one goes to a rank that has its run: machines need not share a disk."""
    parts = [[] for _ in begun]
    for seed in sorted(seeds, key=lambda seed: not any(seed in runs for runs in begun)):  # the begun ones first
        able = [part for part, runs in zip(parts, begun, strict=True) if seed in runs]
        min(able or parts, key=len).append(seed)
    return parts


def summary(accuracies: list[float]) -> str:
    """n, mean, standard deviation, 95 % confidence interval of the mean, minimum and maximum, as one line."""
    mean, n = np.mean(accuracies), len(accuracies)
    text = f"n {n}; mean {mean:.3f}%"
    if n > 1:
        deviation = np.std(accuracies, ddof=1)
        half = scipy.stats.t.ppf(0.975, n - 1) * deviation / np.sqrt(n)
        text += f"; standard deviation {deviation:.3f}; 95% interval of the mean {mean - half:.3f} to {mean + half:.3f}"
    return text + f"; minimum {min(accuracies):.2f}%; maximum {max(accuracies):.2f}%"


def picture(curves: list[list[float]]) -> bytes:
    """Every seed's accuracy over the epochs, and how the last ones are distributed."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    last = [curve[-1] for curve in curves]
    left.plot(range(1, len(curves[0]) + 1), np.transpose(curves), color="tab:blue", alpha=0.4, linewidth=1)
    left.axhline(99.4, color="grey", linestyle="--")
    left.set(title=f"accuracy (%), {len(curves)} seeds", xlabel="epoch")
    left.set_ylim(min(98.5, *last), max(99.7, *last) + 0.1)
    left.xaxis.get_major_locator().set_params(integer=True)
    left.grid(alpha=0.3)
    steps = np.arange(round(100 * min([99.4, *last])) - 1, round(100 * max(last)) + 3) / 100 - 0.005
    right.hist(last, bins=steps, color="tab:blue")
    right.axvline(99.4, color="grey", linestyle="--")
    right.axvline(np.mean(last), color="tab:red")
    right.yaxis.get_major_locator().set_params(integer=True)
    right.set(title="the last epoch's; red: their mean", xlabel="accuracy (%)", ylabel="seeds")
    return png(figure)


def report(folder: Path, results: list[Result]) -> None:
    """Print the table, and leave study.csv and study.png."""
    table, curves = [COLUMNS, *(row for row, _ in results)], [accuracies for _, accuracies in results]
    script.save(folder / "study.csv", "".join(",".join(map(str, row)) + "\n" for row in table))
    script.save(folder / "study.png", picture(curves))
    print("\n" + "".join("".join(f"{value:>10}" for value in row) + "\n" for row in table))
    print(summary([accuracies[-1] for accuracies in curves]), flush=True)


def study(args: argparse.Namespace, rank: int) -> int:
    """Train what is not finished yet, this rank's share of it, and report on all; the exit status."""
    found = gather(survey(args.out_dir, args.seeds, args.recipe))
    done, begun = {seed for finished, _ in found for seed in finished}, [runs for _, runs in found]
    if done and rank == 0:
        print(f"{args.out_dir}: {len(done)} of {len(args.seeds)} seeds are finished already", flush=True)
    for seed in shares([seed for seed in args.seeds if seed not in done], begun)[rank]:
        run, anew = begun[rank].get(seed), [*args.flags, "--seed", str(seed), f"--out-dir={args.out_dir}"]
        with contextlib.redirect_stdout(io.StringIO()):  # what it prints is in its train.log
            status = script.main([f"--resume={run}", *args.resume_flags] if run else anew)
        if status > 128:
            raise KeyboardInterrupt(status)
        if status == 0:
            _, accuracy, errors, _, seconds = survey(args.out_dir, [seed], args.recipe)[0][seed][0]
            print(f"seed {seed}: {accuracy}%, {errors} errors, {seconds} s", flush=True)
    found = gather(survey(args.out_dir, args.seeds, args.recipe))
    results = {seed: result for finished, _ in found for seed, result in finished.items()}
    missing = [str(seed) for seed in args.seeds if seed not in results]
    if rank == 0 and results:
        report(args.out_dir, [results[seed] for seed in sorted(results)])
    if rank == 0 and missing:
        print(f"study.py: error: not finished: seeds {', '.join(missing)}", file=sys.stderr)
    return 1 if missing else 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 success, 1 failure, 130 Ctrl-C, 143 SIGTERM."""
    args, rank = parse_arguments(argv), 0
    lock = FileLock(args.out_dir / ".lock", blocking=False)  # the system drops it when a process is killed
    try:
        if dist.is_torchelastic_launched():
            # The ranks exchange a few rows, which gloo does on any machine; the first waits for the last.
            dist.init_process_group("gloo", timeout=timedelta(days=7))
            rank, local_rank, ranks = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
            torch.set_num_threads(max(1, cores // ranks))
            if torch.cuda.is_available():
                torch.cuda.set_device(local_rank % torch.cuda.device_count())
        args.out_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(Timeout):
            if rank == 0:
                lock.acquire()
        if not gather(lock.is_locked)[0]:
            raise script.Failure(f"another study is at work in {args.out_dir}; choose another --out-dir")
        return study(args, rank)
    except (script.Failure, OSError, dist.DistError) as error:
        print(f"study.py: error: {error}", file=sys.stderr)
    except KeyboardInterrupt as interrupt:
        print("study.py: interrupted; the same command goes on with it", file=sys.stderr)
        return interrupt.args[0] if interrupt.args else 130
    finally:
        lock.release()
        if dist.is_initialized():
            dist.destroy_process_group()
    return 1


if __name__ == "__main__":
    exit_status = script.run_program(main)
    if dist.is_torchelastic_launched():  # gloo's threads sometimes abort a Python that is on its way out
        print(end="", flush=True)
        os._exit(exit_status)
    sys.exit(exit_status)
