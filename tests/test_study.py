"""The companion suite of study.py; the slow tests run it over two ranks, in processes of their own."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from matplotlib.figure import Figure
from PIL import Image

import script
import study
from conftest import fault

STUDY = "--epochs", "2", "--holdout", "320", "--device", "cpu", "--seeds"


@pytest.fixture
def few(monkeypatch, few_images):
    """Few images, and no sheets of digits, which take longer than the training."""
    monkeypatch.setattr(script, "sheet", lambda images, titles: Figure())


def table_of(folder):
    """study.csv without the seconds, which no two runs share."""
    with open(folder / "study.csv", newline="") as file:
        return [{name: row[name] for name in row if name != "seconds"} for row in csv.DictReader(file)]


def begin(folder, seed, monkeypatch):
    """Train a seed in the folder, interrupted while it saves the first epoch of two, which is kept."""
    save, interrupts = script.save, []

    def interrupted(path, content):
        if path.name == "checkpoint.pt" and not interrupts:
            interrupts.append(path)
            raise KeyboardInterrupt
        save(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(script, "save", interrupted)
        assert study.main([*STUDY, str(seed), "--out-dir", str(folder)]) == 130


def finished_run(folder, seed, errors, recipe):
    """What study.py reads of a finished run that misread so many held-out images in the end."""
    run = folder / f"2026-01-01_00-00-00-seed{seed}"
    run.mkdir()
    for name in ("checkpoint.pt", "model.pt", *script.PICTURES):
        (run / name).touch()
    (run / "recipe.json").write_text(json.dumps(asdict(replace(recipe, seed=seed))))
    text = "epoch,train_loss,train_accuracy,test_loss,test_accuracy,learning_rate,seconds\n"
    for epoch in range(1, recipe.epochs + 1):
        accuracy = 100 * (recipe.holdout - errors - recipe.epochs + epoch) / recipe.holdout
        text += f"{epoch},0.1,97.5,0.05,{accuracy},0.01,12.25\n"
    (run / "history.csv").write_text(text)
    return run


def test_a_study_trains_each_seed_once_and_sums_them_up(tmp_path, capsys, few):
    folder = tmp_path / "a study"
    assert study.main([*STUDY, "1,3", "--out-dir", str(folder)]) == 0
    printed = capsys.readouterr().out
    runs = {path.name.split("-")[-1]: path for path in folder.iterdir() if path.is_dir()}
    assert runs.keys() == {"seed1", "seed3"}
    for seed, row in zip((1, 3), table_of(folder), strict=True):
        with open(runs[f"seed{seed}"] / "history.csv", newline="") as file:
            accuracy = float(list(csv.DictReader(file))[-1]["test_accuracy"])  # the last epoch's, not the best
        assert (row["seed"], row["accuracy"]) == (str(seed), f"{accuracy:.2f}")
        assert int(row["errors"]) == pytest.approx(320 * (1 - accuracy / 100), abs=1e-3)
        assert f"seed {seed}: {row['accuracy']}%, {row['errors']} errors" in printed
    assert Image.open(folder / "study.png").width > 500

    before = {path: path.read_bytes() for run in runs.values() for path in run.iterdir()}
    assert len({before[run / "model.pt"] for run in runs.values()}) == 2
    assert study.main([*STUDY, "1-3", "--out-dir", str(folder)]) == 0
    assert f"{folder}: 2 of 3 seeds are finished already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert [row["seed"] for row in table_of(folder)] == ["1", "2", "3"]
    assert len(list(folder.glob("*-seed*"))) == 3


def test_a_study_goes_on_with_a_seed_that_was_interrupted(tmp_path, monkeypatch, capsys, few):
    assert study.main([*STUDY, "5", "--out-dir", str(tmp_path / "unbroken")]) == 0
    begin(tmp_path / "broken", 5, monkeypatch)
    assert capsys.readouterr().err.endswith("study.py: interrupted; the same command goes on with it\n")
    assert study.main([*STUDY, "5", "--out-dir", str(tmp_path / "broken")]) == 0
    (broken,), (unbroken,) = ((tmp_path / name).glob("*-seed5") for name in ("broken", "unbroken"))
    assert (broken / "model.pt").read_bytes() == (unbroken / "model.pt").read_bytes()


def test_a_study_names_the_seeds_that_failed(tmp_path, capsys, few):
    assert study.main([*STUDY, "1,2", "--max-lr", "1e30", "--out-dir", str(tmp_path)]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "study.py: error: not finished: seeds 1, 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "study.py: error: the following arguments are required: --seeds"),
        ("--seeds 3-1", "study.py: error: argument --seeds: '3-1' is no list of at most 1,000 seeds, as 1-20 or"),
        ("--seeds x", "study.py: error: argument --seeds: 'x' is no list of"),
        ("--seeds 1-9999999999", "study.py: error: argument --seeds: '1-9999999999' is no list of"),
        ("--seeds 9223372036854775808", "study.py: error: argument --seeds: '9223372036854775808' is no list of"),
        ("--seeds 1 --max-lr nan", "script.py: error: "),
        ("--seeds 1 --seed 1", "study.py: error: of script.py's flags, only"),
        ("--seeds 1 --resume run", "study.py: error: of script.py's flags, only"),
    ],
)
def test_bad_usage_of_the_study(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        study.main(arguments.split())
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_seed_lists():
    assert study.seed_list("7,1-3, 2") == [1, 2, 3, 7]


@pytest.mark.parametrize(
    ("values", "quantile"),  # of Student's t, from a printed table
    [([99.5, 99.61], 12.706), ([99.5, 99.61, 99.44, 99.58, 99.57], 2.776), ([99.5, 99.6] * 10, 2.093)],
)
def test_the_summary_is_numpys_with_students_quantile(values, quantile):
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    half = quantile * deviation / np.sqrt(len(values))
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", study.summary(values))]
    assert numbers == pytest.approx([mean, deviation, mean - half, mean + half, min(values), max(values)], abs=6e-4)
    assert study.summary(values[:1]) == "n 1; mean 99.500%; minimum 99.50%; maximum 99.50%"


def test_mean_and_deviation_are_of_the_errors_not_of_rounded_accuracies(tmp_path, capsys):
    recipe, errors = script.Recipe(epochs=2, holdout=40_000), [397, 378, 398]
    for seed, count in enumerate(errors, start=1):
        finished_run(tmp_path, seed, count, recipe)
    assert study.main(["--epochs", "2", "--holdout", "40000", "--out-dir", str(tmp_path), "--seeds", "1-3"]) == 0
    assert [int(row["errors"]) for row in table_of(tmp_path)] == errors
    accuracies = 100 * (1 - np.array(errors) / 40_000)
    told = f"n 3; mean {accuracies.mean():.3f}%; standard deviation {accuracies.std(ddof=1):.3f};"
    assert told in capsys.readouterr().out


@fault(
    "a run in a study's folder is of another recipe, or its recipe.json or history.csv is missing, cut or altered",
    "the study names it and does not count it; status 1",
)
@pytest.mark.parametrize(
    ("file", "damaged"),
    [
        ("history.csv", lambda text: None),
        ("history.csv", lambda text: ""),
        ("history.csv", lambda text: "".join(text.splitlines(keepends=True)[:-1])),
        ("history.csv", lambda text: text[:-12]),  # a column short
        ("history.csv", lambda text: text[:-2]),  # 12 seconds of 12.25
        ("history.csv", lambda text: text.replace("12.25", "nan")),
        ("history.csv", lambda text: "\0" * 100),
        ("recipe.json", lambda text: None),
        ("recipe.json", lambda text: "[]"),
        ("recipe.json", lambda text: text[:100]),
        ("recipe.json", lambda text: text.replace('"max_lr": 0.02', '"max_lr": 0.03')),
    ],
)
def test_a_run_that_is_damaged_or_of_another_recipe_is_one_line(tmp_path, capsys, file, damaged):
    run = finished_run(tmp_path, 1, 40, script.Recipe(epochs=2, holdout=320))
    text = damaged((run / file).read_text())
    (run / file).unlink()
    if text is not None:
        (run / file).write_text(text)
    assert study.main([*STUDY, "1", "--out-dir", str(tmp_path)]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"study.py: error: {run}")
    assert "0.03" not in (text or "") or "max_lr is 0.03 there, 0.02 here" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "study.csv").exists()


def test_a_run_killed_in_its_first_epoch_is_not_in_the_way(tmp_path):
    (tmp_path / "2026-01-01_00-00-00-seed1").mkdir()
    assert study.survey(tmp_path, [1], script.Recipe()) == ({}, {})


@fault("a second study in the folder of one that lives", "refused; status 1; one that was killed does not hinder it")
def test_a_second_study_in_the_folder_is_refused(tmp_path, capsys):
    finished_run(tmp_path, 1, 40, script.Recipe(epochs=2, holdout=320))
    arguments = [*STUDY, "1", "--out-dir", str(tmp_path)]
    with FileLock(tmp_path / ".lock"):
        assert study.main(arguments) == 1
    assert capsys.readouterr().err.startswith(f"study.py: error: another study is at work in {tmp_path};")
    assert [study.main(arguments), study.main(arguments)] == [0, 0]  # the first does not keep the lock


def test_begun_seeds_go_where_their_run_is_and_the_rest_in_turn():
    run = Path("run")
    assert study.shares([1, 2, 3, 4, 5], [{}, {}]) == [[1, 3, 5], [2, 4]]
    assert study.shares([1, 2, 3, 4], [{}, {1: run}]) == [[2, 3], [1, 4]]
    assert study.shares([1, 2, 3], [{1: run, 2: run}, {1: run, 2: run}]) == [[1, 3], [2]]  # one disk
    assert study.shares([1, 2, 3], [{}, {1: run, 2: run, 3: run}]) == [[], [1, 2, 3]]


FEW = """\
import os, signal, sys, script, study
from matplotlib.figure import Figure
load = script.load_mnist
script.load_mnist = lambda *args: tuple(part[:960] for part in load(*args))
script.sheet = lambda images, titles: Figure()
signal.signal(signal.SIGTERM, script.interrupt)
sys.exit(study.main([argument.replace("RANK", os.environ["RANK"]) for argument in sys.argv[1:]]))
"""


def two_ranks(folder, seeds):
    """A study over two ranks on few images in processes of their own, one thread each."""
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", folder.parent / "few.py"
    launch[-1].write_text(FEW)
    line = map(str, [sys.executable, *launch, *STUDY, seeds, "--out-dir", folder])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.HERE)}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to find a rank, and kills it")
def test_a_killed_study_leaves_no_lock_and_the_next_goes_on(tmp_path, capsys, few):
    assert study.main([*STUDY, "1-3", "--out-dir", str(tmp_path / "alone")]) == 0
    folder = tmp_path / "ranks"
    ranks = two_ranks(folder, "1-3")
    while not list(folder.glob("*-seed2/checkpoint.pt")):
        assert ranks.poll() is None, ranks.stderr.read()
        time.sleep(0.05)
    children = Path(f"/proc/{ranks.pid}/task/{ranks.pid}/children").read_text().split()
    second = next(pid for pid in children if b"\0LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(second), signal.SIGSTOP)
    capsys.readouterr()
    assert study.main([*STUDY, "1-3", "--out-dir", str(folder)]) == 1
    assert capsys.readouterr().err.startswith("study.py: error: another study is at work in")
    os.kill(int(second), signal.SIGKILL)
    assert ranks.wait() != 0
    assert not (folder / "study.csv").exists()

    again = two_ranks(folder, "1-3")
    printed, errors = again.communicate()
    assert again.returncode == 0, errors
    assert table_of(folder) == table_of(tmp_path / "alone")
    assert printed.count("n 3; mean") == 1  # one table, the first rank's
    assert len(list(folder.glob("*-seed2"))) == 1  # resumed, not begun anew


@pytest.mark.slow
def test_without_a_common_disk_a_begun_seed_goes_to_the_rank_that_has_it(tmp_path, monkeypatch, few):
    begin(tmp_path / "disk1", 1, monkeypatch)  # rank 1's, though seed 1 would be rank 0's turn
    ranks = two_ranks(tmp_path / "diskRANK", "1,2")
    _, errors = ranks.communicate()
    assert ranks.returncode == 0, errors
    ((first,), (second,)) = ((tmp_path / disk).glob("*-seed*") for disk in ("disk0", "disk1"))
    assert (first.name.split("-")[-1], second.name.split("-")[-1]) == ("seed2", "seed1")
    assert "resumed after epoch 1\n" in (second / "train.log").read_text(encoding="utf-8")
    assert [row["seed"] for row in table_of(tmp_path / "disk0")] == ["1", "2"]
