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

STUDY = "--epochs", "2", "--holdout", "320", "--no-cpp", "--device", "cpu", "--seeds"


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
    recipe = asdict(script.Recipe(epochs=2, holdout=320, cpp=False, seed=seed, **recipe))
    run.mkdir(parents=True)
    script.save(run / "checkpoint.pt", {"recipe": recipe, "history": history})
    (run / "model.pt").touch()
    return run


def rows_of(table):
    """A CSV file's rows."""
    return list(csv.DictReader(table.read_text().splitlines()))


def results_of(table):
    """A study.csv's rows without the seconds, which no two runs share; none where there is no file."""
    return [list(row.values())[:-1] for row in rows_of(table)] if table.exists() else []


def test_a_study_trains_each_seed_once_and_its_table_keeps_all_seeds_of_its_folder(tmp_path, monkeypatch, capsys, few):
    table, kept, expected, seconds = tmp_path / "study.csv", [], [], []

    def note(*_):
        kept.append(results_of(table))
        return DEFAULT

    monkeypatch.setattr(script, "run_script", Mock(wraps=script.run_script, side_effect=note))
    assert run_study(tmp_path, "3, 1") == 0
    for seed in "1", "3":
        (history,) = tmp_path.glob(f"*-seed{seed}/history.csv")
        accuracy, loss = (float(rows_of(history)[-1][name]) for name in ("test_accuracy", "test_loss"))
        expected.append([seed, f"{accuracy:.2f}", f"{320 - 3.2 * accuracy:.0f}", f"{loss:.4f}"])
        seconds.append(sum(float(row["seconds"]) for row in rows_of(history)))
    assert results_of(table) == expected
    assert kept == [[], expected[:1]]  # before each seed
    printed, left = capsys.readouterr().out, str(timedelta(seconds=round(seconds[0])))
    assert re.findall(r"(\d) of 2 done, (.*) left", printed) == [("1", left), ("2", "0:00:00")]
    assert re.findall("^n (.); mean", printed, re.M) == ["2"]
    assert Image.open(tmp_path / "study.png").width > 500

    (tmp_path / "2026-01-01_00-00-00-seed2").mkdir()  # of a run that was killed in its first epoch
    assert run_study(tmp_path, "2, 3") == 0
    assert [row["seed"] for row in rows_of(table)] == ["1", "2", "3"]
    assert kept[2:] == [expected]  # one seed was trained


@pytest.mark.slow
def test_a_study_goes_on_with_a_seed_that_was_interrupted(tmp_path, monkeypatch, capsys, few):
    assert run_study(tmp_path / "unbroken", "5") == 0
    monkeypatch.setattr(script, "train", Mock(wraps=script.train, side_effect=[DEFAULT, KeyboardInterrupt, DEFAULT]))
    assert [run_study(tmp_path / "broken", "5,6"), run_study(tmp_path / "broken", "5")] == [130, 0]
    assert capsys.readouterr().err.splitlines() == ["study.py: interrupted; the same command goes on"]
    one, other = (path.read_bytes() for path in tmp_path.glob("*/*-seed5/model.pt"))
    assert one == other


BAD_USAGE = "", *(f"--seeds {rest}" for rest in ("x", "3-1", "1-1001", "1 --resume runs", "1 --epochs 0"))


@pytest.mark.parametrize("arguments", BAD_USAGE)
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
    message = "is damaged or" if content is not None else "another recipe: max_lr is 0.03 there, 0.02 here"
    assert re.fullmatch(rf"study\.py: error: {re.escape(str(run))}.*{message}.*\n", capsys.readouterr().err)
    assert not (tmp_path / "study.csv").exists()


def test_a_second_study_is_refused_and_seeds_that_failed_are_named(tmp_path, monkeypatch, capsys):
    finished_run(tmp_path, seed=1, errors=40)

    def fail(*_):
        assert run_study(tmp_path, "1") == 1  # a study within the study
        raise script.Failure("the disk is full")

    monkeypatch.setattr(script, "run_script", fail)
    assert run_study(tmp_path, "1-3") == 1
    refused = f"study.py: error: another study is at work in {tmp_path}; choose another --out-dir"
    failed = [f"study.py: error: seed {seed}: the disk is full" for seed in (2, 3)]
    told = [refused, failed[0], refused, failed[1], "study.py: error: not finished: seeds 2, 3"]
    assert capsys.readouterr().err.splitlines() == told
    assert results_of(tmp_path / "study.csv") == [["1", "87.50", "40", "0.1000"]]


def test_a_table_of_ones_own_is_not_overwritten_and_one_that_is_open_elsewhere_ends_nothing(tmp_path, monkeypatch):
    finished_run(tmp_path, seed=1, errors=40)
    (tmp_path / "study.csv").write_bytes(b"my studies\xe4")
    assert run_study(tmp_path, "1") == 1
    assert (tmp_path / "study.csv").read_bytes() == b"my studies\xe4"
    (tmp_path / "study.csv").unlink()
    monkeypatch.setattr(os, "replace", Mock(side_effect=PermissionError(13, "Permission denied")))
    assert run_study(tmp_path, "1") == 0


RANK = """\
import os, runpy, pictures, script
load, train = script.load_mnist, script.train
script.load_mnist = lambda *args: tuple(part[:960] for part in load(*args))
pictures.draw = lambda *run: {}
if os.environ["RANK"] == os.environ["KILLED"]:  # in its second epoch
    script.train = lambda *args: os.kill(os.getpid(), 9) if args[-1] == 2 else train(*args)
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
def test_a_rank_is_killed_and_the_next_study_goes_on_with_its_run(tmp_path, few):
    assert two_ranks(tmp_path / "two", "1,2", killed=1).returncode != 0
    again = two_ranks(tmp_path / "two", "1,2")
    assert again.returncode == 0, again.stderr
    assert "n 2; mean" in again.stdout  # from the rank that finished last
    assert run_study(tmp_path / "alone", "1,2") == 0
    assert results_of(tmp_path / "two" / "study.csv") == results_of(tmp_path / "alone" / "study.csv")
    (run,) = tmp_path.glob("two/*-seed2")  # resumed, not begun anew
    assert "resumed after epoch 1\n" in (run / "train.log").read_text(encoding="utf-8")
