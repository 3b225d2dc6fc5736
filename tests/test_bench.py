"""The companion suite of bench.py, on few images: what it counts, not how long it takes."""

import re

import pytest
import torch
from torchvision.datasets import MNIST

import bench
import script


def test_the_stock_loops_data_is_mnist_and_leaves_nothing_behind(tmp_path, monkeypatch, test_set):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    train_part, test_part = bench.stock_data(600)
    images, labels = zip(*test_part, strict=True)
    torch.testing.assert_close(torch.stack(images), (test_set[0][:100] / 255 - script.MEAN) / script.STD)
    assert (len(train_part), list(labels)) == (600, test_set[1][:100].tolist())
    assert not torch.equal(train_part[0][0], train_part[0][0])  # augmented, each time anew
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_table_has_all_rows_and_the_ratios_of_their_times(monkeypatch, capsys):
    monkeypatch.setattr(bench, "IMAGES", 96)
    assert bench.main([]) == 0
    printed, cores = capsys.readouterr().out, torch.get_num_threads()
    rows = re.findall(r"^(\w.*?) +(\d+) +([\d,]+) +(\S+) +(\S+?)-(\S+) +(\S+) +(\S+)%$", printed, re.M)
    times = {(name, int(threads)): float(time) for name, threads, _, time, *_ in rows}
    stock = min(times[f"stock loop, workers: {workers}", cores] for workers in (0, 1, 2))
    assert len(rows) == 4 + 3 * len({1, cores})
    for _, threads, *numbers in rows:
        rate, time, least, most, ratio, share = (float(number.replace(",", "")) for number in numbers)
        assert rate == pytest.approx(32_000 / time, rel=0.01, abs=0.5)
        expected = [stock / time, 100 * times["matrix-rate limit", int(threads)] / time]
        assert [ratio, share] == pytest.approx(expected, rel=0.01, abs=0.06)
        assert least <= time <= most


def test_a_missing_archive_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(MNIST, "mirrors", [])
    assert bench.main([]) == 1
    assert re.fullmatch(r"bench\.py: error: .*train-images-idx3-ubyte.*\n", capsys.readouterr().err)
