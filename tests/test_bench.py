"""The companion suite of bench.py, on few images: what it counts, not how long it takes."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import script

CPU = torch.device("cpu")


def test_a_steps_arithmetic_is_what_torch_counts():
    with FlopCounterMode(display=False) as counter:
        script.Net()(torch.rand(1, 1, 28, 28))
    assert 3 * counter.get_total_flops() == bench.FLOP_PER_IMAGE


def test_the_stock_loops_data_is_mnist_and_leaves_nothing_behind(tmp_path, monkeypatch, test_set):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    train_part, test_part = bench.stock_data(600)
    assert (len(train_part), len(test_part)) == (600, 100)
    images, labels = zip(*test_part, strict=True)
    torch.testing.assert_close(torch.stack(images), (test_set[0][:100] / 255 - script.MEAN) / script.STD)
    assert list(labels) == test_set[1][:100].tolist()
    assert not torch.equal(train_part[0][0], train_part[0][0])  # augmented, each time anew
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_tables_ratios_are_those_of_its_times(monkeypatch, capsys):
    monkeypatch.setattr(bench, "IMAGES", 96)
    monkeypatch.setattr(bench, "REPEATS", 2)
    monkeypatch.setattr(bench, "peak_memory", lambda: "not now")
    assert bench.main([]) == 0
    printed, cores = capsys.readouterr().out, torch.get_num_threads()
    table = re.findall(r"^(\w.*?) +(\d+) +([\d,]+) +(\S+) +(\S+?)-(\S+) +(\S+) +(\S+)%$", printed, re.M)
    rows = {(name, int(threads)): numbers for name, threads, *numbers in table}
    stock = [(f"stock loop, workers: {workers}", cores) for workers in (0, 1, 2)]
    ours = [(name, n) for n in {1, cores} for name in ("script.py, as run", "bare step", "matrix-rate limit")]
    assert rows.keys() == {*stock, ("script.py, eager", cores), *ours}
    times = {row: float(numbers[1]) for row, numbers in rows.items()}
    for (name, threads), (images, time, least, most, ratio, share) in rows.items():
        limit, time = times["matrix-rate limit", threads], float(time)
        assert float(least) <= time <= float(most)
        assert int(images.replace(",", "")) == pytest.approx(32_000 / time, rel=0.01)
        assert float(ratio) == pytest.approx(min(times[row] for row in stock) / time, rel=0.01, abs=0.006), name
        assert float(share) == pytest.approx(100 * limit / time, rel=0.01, abs=0.06), name
    (other,) = re.findall(r"^of an epoch, all but its bare steps: (\S+)%$", printed, re.M)
    bare, whole = times["bare step", cores], times["script.py, as run", cores]
    assert float(other) == pytest.approx(100 * (1 - bare / whole), abs=1)


@pytest.mark.slow
def test_scaling_has_a_line_for_each_number_of_threads(monkeypatch, capsys):
    saved = {}
    monkeypatch.setattr(script, "save", lambda path, content: saved.update({path.name: content}))
    monkeypatch.setattr(bench, "SCALING_IMAGES", 64)
    monkeypatch.setattr(bench, "REPEATS", 1)
    assert bench.main(["--scaling"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    threads = [f"threads: {n}" for n in range(1, torch.get_num_threads() + 1)]
    assert [line[:12].rstrip() for line in lines] == ["batch size", *threads]
    assert saved["scaling.png"].startswith(b"\x89PNG")


def test_a_missing_archive_is_one_line(monkeypatch, capsys):
    def nothing(*args):
        raise script.Failure("no data")

    monkeypatch.setattr(script, "load_mnist", nothing)
    assert bench.main([]) == 1
    assert capsys.readouterr().err == "bench.py: error: no data\n"
