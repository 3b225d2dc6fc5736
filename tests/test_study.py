"""The companion suite of study.py; the slow test runs it over two ranks, in processes of their own."""

import csv
import os
import re
import statistics
import subprocess
import sys
from dataclasses import asdict
from datetime import timedelta
from unittest.mock import DEFAULT, Mock

import pytest
import torch
from PIL import Image

import script
import study

STUDY = "--epochs", "2", "--holdout", "320", "--no-compile", "--device", "cpu", "--seeds"


@pytest.fixture
def few(monkeypatch, few_images):
    """Few images, no pictures, which take longer than the training, and one thread, on which eager bits depend."""
    monkeypatch.setattr("pictures.draw", lambda *run: {})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_study(folder, seeds):
    """The exit status of a study of two epochs in the folder."""
    return study.main([*STUDY, seeds, "--out-dir", str(folder)])


def finished_run(folder, seed, errors, **recipe):
    """What study.py reads of a finished run that misread so many of the 320 held-out images after the last epoch."""
    run = folder / f"2026-01-01_00-00-00-seed{seed}"
    history = [{"test_accuracy": 100 - 100 * wrong / 320, "test_loss": 0.1, "seconds": 12.25} for wrong in (0, errors)]
    recipe = asdict(script.Recipe(epochs=2, holdout=320, compile=False, seed=seed, **recipe))
    script.save(run / "checkpoint.pt", {"recipe": recipe, "history": history})
    (run / "model.pt").touch()
    return run


def rows_of(table):
    """A CSV file's rows."""
    return list(csv.DictReader(table.read_text().splitlines()))


def results_of(table):
    """A study.csv's rows without the seconds, which no two runs share; none where there is no file."""
    return [list(row.values())[:-1] for row in rows_of(table)] if table.exists() else []


def test_a_study_trains_each_seed_once_and_keeps_its_table_after_each(tmp_path, monkeypatch, capsys, few):
    table, kept, expected, seconds = tmp_path / "study.csv", [], [], []

    def note(_):
        kept.append(results_of(table))
        return DEFAULT

    monkeypatch.setattr(script, "main", Mock(wraps=script.main, side_effect=note))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert run_study(tmp_path, "3, 1") == 0
    for seed in "1", "3":
        (history,) = tmp_path.glob(f"*-seed{seed}/history.csv")
        accuracy, loss = (float(rows_of(history)[-1][name]) for name in ("test_accuracy", "test_loss"))
        expected.append([seed, f"{accuracy:.2f}", f"{320 - 3.2 * accuracy:.0f}", f"{loss:.4f}"])
        seconds.append(sum(float(row["seconds"]) for row in rows_of(history)))
    assert results_of(table) == expected
    assert kept == [[], expected[:1]]  # before each seed
    printed, left = capsys.readouterr().out, str(timedelta(seconds=round(seconds[0])))
    progress = re.findall(r"(\d) of 2 done, (\d) running, (.*) left", printed)
    assert progress == [("1", "1", left), ("2", "0", "0:00:00")]
    assert re.findall("^n (.); mean", printed, re.M) == ["1", "2"]  # on a terminal at each seed's end
    assert Image.open(tmp_path / "study.png").width > 500

    (tmp_path / "2026-01-01_00-00-00-seed2").mkdir()  # of a run that was killed in its first epoch
    assert run_study(tmp_path, "1-3, 2") == 0
    assert [row["seed"] for row in rows_of(table)] == ["1", "2", "3"]
    assert kept[2:] == [expected]  # one seed was trained


@pytest.mark.slow
def test_a_study_goes_on_with_a_seed_that_was_interrupted(tmp_path, monkeypatch, capsys, few):
    assert run_study(tmp_path / "unbroken", "5") == 0
    monkeypatch.setattr(script, "train", Mock(wraps=script.train, side_effect=[DEFAULT, KeyboardInterrupt, DEFAULT]))
    assert [run_study(tmp_path / "broken", "5,6"), run_study(tmp_path / "broken", "5")] == [130, 0]
    assert capsys.readouterr().err.splitlines()[-1] == "study.py: interrupted"
    one, other = (path.read_bytes() for path in tmp_path.glob("*/*-seed5/model.pt"))
    assert one == other


@pytest.mark.parametrize("arguments", ["", "--seeds x", "--seeds 3-1", "--seeds 1-1001", "--seeds 1 --resume runs"])
def test_bad_usage_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        study.main(arguments.split())
    assert re.fullmatch(r"study\.py: error: .*\n", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_the_summary_is_not_of_rounded_accuracies(tmp_path, capsys):
    errors = [4, 5, 9, 13, 21]
    for seed, count in enumerate(errors, start=1):
        (finished_run(tmp_path, seed, count) / "history.csv").write_text("altered\n")  # the checkpoint counts
    assert run_study(tmp_path, "1-5") == 0
    accuracies = [100 - 100 * count / 320 for count in errors]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    half = 2.776 * deviation / 5**0.5  # Student's t for 4 degrees of freedom, from a printed table
    expected = 5, mean, deviation, mean - half, mean + half, accuracies[-1], accuracies[0]
    numbers = re.findall(r"\d+(?:\.\d+)?", capsys.readouterr().out.splitlines()[-1].replace("95%", ""))
    assert [float(number) for number in numbers] == pytest.approx(expected, abs=0.006)
    assert [int(row["errors"]) for row in rows_of(tmp_path / "study.csv")] == errors


@pytest.mark.parametrize("content", [b"", b"\0" * 100, [], {"recipe": {}, "history": []}, None])
def test_a_run_that_is_damaged_or_of_another_recipe_is_one_line(tmp_path, capsys, content):
    finished_run(tmp_path, seed=1, errors=40)
    run = finished_run(tmp_path, seed=2, errors=40, max_lr=0.03)
    if content is not None:
        script.save(run / "checkpoint.pt", content)
    assert run_study(tmp_path, "1,2") == 1
    message = "is damaged or not" if content is not None else "another recipe: max_lr is 0.03 there, 0.02 here"
    assert re.fullmatch(rf"study\.py: error: {re.escape(str(run))}.*{message}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "study.csv").exists()


def test_a_second_study_is_refused_and_seeds_that_failed_are_named(tmp_path, monkeypatch, capsys):
    finished_run(tmp_path, seed=1, errors=40)
    monkeypatch.setattr(script, "main", lambda flags: run_study(tmp_path, "1"))  # a study within the study, that fails
    assert run_study(tmp_path, "1-3") == 1
    refused = f"study.py: error: another study is at work in {tmp_path}; choose another --out-dir"
    assert capsys.readouterr().err.splitlines() == [refused, refused, "study.py: error: not finished: seeds 2, 3"]
    assert results_of(tmp_path / "study.csv") == [["1", "87.50", "40", "0.1000"]]


def test_begun_seeds_go_where_their_run_is_and_the_rest_in_turn():
    assert study.shares([1, 2, 3, 4, 5], [{}, {}]) == [[1, 3, 5], [2, 4]]
    assert study.shares([1, 2, 3, 4], [{}, {1: "run"}]) == [[2, 3], [1, 4]]
    assert study.shares([1, 2, 3], [{1: "run", 2: "run"}, {1: "run", 2: "run"}]) == [[1, 3], [2]]  # one disk


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
    again = two_ranks(tmp_path / folder, f"{begun},3")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("n 2; mean") == 1  # one table, the first rank's
    assert run_study(tmp_path / "alone", f"{begun},3") == 0
    (table,) = tmp_path.glob("disk*/study.csv")
    assert results_of(table) == results_of(tmp_path / "alone" / "study.csv")
    (run,) = tmp_path.glob(f"disk*/*-seed{begun}")  # resumed, not begun anew
    assert "resumed after epoch 1\n" in (run / "train.log").read_text(encoding="utf-8")
