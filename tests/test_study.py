"""The companion suite of study.py; the slow test runs it over two ranks, in processes of their own."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from unittest.mock import DEFAULT, Mock

import pytest
from PIL import Image

import script
import study
from conftest import fault

STUDY = "--epochs", "2", "--holdout", "320", "--device", "cpu", "--seeds"
# Of a finished run of seed 1 that misread 40 of the 320 held-out images at last, and none after its first epoch:
RECIPE = json.dumps(asdict(script.Recipe(epochs=2, holdout=320, seed=1)))
HISTORY = ",".join(script.HISTORY) + "\n1,0.1,97.5,0.05,100.0,0.02,12.25\n2,0.1,97.5,0.05,87.5,0.01,12.25\n"
# Missing, empty, zeros, cut within a number, a column short, a row short, not finite, no percentage:
CUT_HISTORIES = None, "", "\0" * 100, HISTORY[:-2], HISTORY[:-12], HISTORY[:-32]
BAD_HISTORIES = *CUT_HISTORIES, HISTORY.replace("12.25", "nan"), HISTORY.replace("87.5", "1e9")


@pytest.fixture
def few(monkeypatch, few_images):
    """Few images, and no pictures, which take longer than the training."""
    monkeypatch.setattr("pictures.draw", lambda *run: {})


def run_study(folder, seeds):
    """The exit status of a study of two epochs in the folder."""
    return study.main([*STUDY, seeds, "--out-dir", str(folder)])


def finished_run(folder, seed, errors):
    """What study.py reads of a finished run that misread so many held-out images after the last epoch."""
    run = folder / f"2026-01-01_00-00-00-seed{seed}"
    run.mkdir()
    (run / "model.pt").touch()
    (run / "recipe.json").write_text(RECIPE.replace('"seed": 1', f'"seed": {seed}'))
    (run / "history.csv").write_text(HISTORY.replace("87.5", str(100 - 100 * errors / 320)))
    return run


def rows_of(table):
    """A CSV file's rows without the seconds, which no two runs share."""
    rows = csv.DictReader(table.read_text().splitlines())
    return [{name: row[name] for name in row if name != "seconds"} for row in rows]


def test_a_study_trains_each_seed_once_and_sums_them_up(tmp_path, capsys, few):
    folder = tmp_path / "a study"
    assert run_study(folder, "3, 1") == 0
    printed = capsys.readouterr().out
    for seed, row in zip(["1", "3"], rows_of(folder / "study.csv"), strict=True):
        (history,) = folder.glob(f"*-seed{seed}/history.csv")
        accuracy = float(rows_of(history)[-1]["test_accuracy"])
        assert (row["seed"], row["accuracy"]) == (seed, f"{accuracy:.2f}")
        assert int(row["errors"]) == pytest.approx(320 * (1 - accuracy / 100), abs=1e-3)
        assert f"seed {seed}: {row['accuracy']}%, {row['errors']} errors" in printed
    assert Image.open(folder / "study.png").width > 500

    before = {path: path.read_bytes() for path in folder.glob("*-seed*/*")}
    assert len({before[path] for path in before if path.name == "model.pt"}) == 2
    (folder / "2026-01-01_00-00-00-seed2").mkdir()  # of a run that was killed in its first epoch
    assert run_study(folder, "1-3, 2") == 0
    assert f"{folder}: 2 of 3 seeds are finished already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert [row["seed"] for row in rows_of(folder / "study.csv")] == ["1", "2", "3"]
    assert len(list(folder.glob("*-seed*/model.pt"))) == 3


@pytest.mark.slow
def test_a_study_goes_on_with_a_seed_that_was_interrupted(tmp_path, monkeypatch, capsys, few):
    assert run_study(tmp_path / "unbroken", "5") == 0
    epochs = [DEFAULT, KeyboardInterrupt(143), KeyboardInterrupt(), DEFAULT]  # the second only at the third attempt
    monkeypatch.setattr(script, "train", Mock(wraps=script.train, side_effect=epochs))
    assert [run_study(tmp_path / "broken", "5") for _ in range(3)] == [143, 130, 0]
    assert capsys.readouterr().err.count("study.py: interrupted; the same command goes on with it\n") == 2
    one, other = (path.read_bytes() for path in tmp_path.glob("*/*-seed5/model.pt"))
    assert one == other


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: --seeds"),
        *[(f"--seeds {text}", f"argument --seeds: '{text}' is no list") for text in ("x", "3-1", "1-1001", str(2**63))],
        ("--seeds 1 --max-lr nan", "--max-lr is nan"),
        *[(f"--seeds 1 --{flag} 1", "of script.py's flags, only those") for flag in ("seed", "resume", "evaluate")],
    ],
)
def test_bad_usage_of_the_study(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        study.main(arguments.split())
    assert re.fullmatch(rf"(study|script)\.py: error: {message}.*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_summary_is_not_of_rounded_accuracies(tmp_path, capsys):
    for seed, errors in enumerate([4, 5, 9, 13, 21], start=1):
        finished_run(tmp_path, seed, errors)
    assert run_study(tmp_path, "1-5") == 0
    spread = "standard deviation 2.161; 95% interval of the mean 94.067 to 99.433"  # by Student's t, 2.776
    assert capsys.readouterr().out.endswith(f"\nn 5; mean 96.750%; {spread}; minimum 93.44%; maximum 98.75%\n")


@fault(
    "a run in a study's folder is of another recipe, or its recipe.json or history.csv is missing, cut or altered",
    "the study names it and does not count it; status 1",
)
@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        *[("history.csv", text, "is missing, cut or damaged") for text in BAD_HISTORIES],
        *[("recipe.json", text, "its recipe.json is missing or damaged") for text in (None, "[]", RECIPE[:100])],
        pytest.param("recipe.json", "[" * 10**5, "its recipe.json is missing or damaged", id="too deeply nested"),
        ("recipe.json", RECIPE.replace("0.02", "0.03"), "max_lr is 0.03 there, 0.02 here"),
    ],
)
def test_a_run_that_is_damaged_or_of_another_recipe_is_one_line(tmp_path, capsys, file, text, message):
    run = finished_run(tmp_path, seed=1, errors=40)
    (run / file).unlink()
    if text is not None:
        (run / file).write_text(text)
    assert run_study(tmp_path, "1") == 1
    assert re.fullmatch(f"study.py: error: {re.escape(str(run))}.* {message}; .*\n", capsys.readouterr().err)
    assert not (tmp_path / "study.csv").exists()


@fault("a second study in the folder of one that lives", "refused; status 1; one that was killed does not hinder it")
def test_a_second_study_is_refused_and_seeds_that_failed_are_named(tmp_path, monkeypatch, capsys):
    finished_run(tmp_path, seed=1, errors=40)
    assert run_study(tmp_path, "1") == 0
    assert capsys.readouterr().out.endswith("\nn 1; mean 87.500%; minimum 87.50%; maximum 87.50%\n")
    monkeypatch.setattr(script, "main", lambda flags: run_study(tmp_path, "1"))  # a study within the study, that fails
    assert run_study(tmp_path, "1-3") == 1
    refused = f"study.py: error: another study is at work in {tmp_path}; choose another --out-dir"
    assert capsys.readouterr().err.splitlines() == [refused, refused, "study.py: error: not finished: seeds 2, 3"]


def test_begun_seeds_go_where_their_run_is_and_the_rest_in_turn():
    assert study.shares([1, 2, 3, 4, 5], [{}, {}]) == [[1, 3, 5], [2, 4]]
    assert study.shares([1, 2, 3, 4], [{}, {1: "run"}]) == [[2, 3], [1, 4]]
    assert study.shares([1, 2, 3], [{1: "run", 2: "run"}, {1: "run", 2: "run"}]) == [[1, 3], [2]]  # one disk
    assert study.shares([1, 2, 3], [{}, {1: "run", 2: "run", 3: "run"}]) == [[], [1, 2, 3]]


RANK = """\
import os, runpy, sys, pictures, script
load, train = script.load_mnist, script.train
script.load_mnist = lambda *args: tuple(part[:960] for part in load(*args))
pictures.draw = lambda *run: {}
if os.environ["RANK"] == os.environ["KILLED"]:  # in its second epoch
    script.train = lambda *args: os.kill(os.getpid(), 9) if args[-1] == 2 else train(*args)
sys.argv[1:] = map(os.path.expandvars, sys.argv[1:])
runpy.run_module("study", run_name="__main__")
"""


def two_ranks(folder, seeds, killed=""):
    """A study on few images in two processes, of which one may be killed in its second epoch."""
    (folder.parent / "rank.py").write_text(RANK)
    launch = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", folder.parent / "rank.py"
    line = [sys.executable, *launch, *STUDY, seeds, "--out-dir", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(script.HERE), "KILLED": str(killed)}
    return subprocess.run(line, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "killed"), [("disk", 0), ("disk$RANK", 1)])  # with a common disk, and without
def test_a_rank_is_killed_and_the_next_study_goes_on_where_its_run_is(tmp_path, few, folder, killed):
    begun = killed + 1  # the seed; without a common disk it would be the other rank's turn
    assert two_ranks(tmp_path / folder, "1,2", killed).returncode != 0
    assert not list(tmp_path.glob("disk*/study.csv"))
    again = two_ranks(tmp_path / folder, f"{begun},3")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("n 2; mean") == 1  # one table, the first rank's
    assert run_study(tmp_path / "alone", f"{begun},3") == 0
    (table,) = tmp_path.glob("disk*/study.csv")
    assert rows_of(table) == rows_of(tmp_path / "alone" / "study.csv")
    (run,) = tmp_path.glob(f"disk*/*-seed{begun}")  # resumed, not begun anew
    assert "resumed after epoch 1\n" in (run / "train.log").read_text(encoding="utf-8")
