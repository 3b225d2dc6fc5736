"""The companion suite of bench.py, on few images: what it counts, not how long it takes."""

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import script


def test_a_steps_arithmetic_is_what_torch_counts():
    with FlopCounterMode(display=False) as counter:
        script.Net()(torch.rand(1, 1, 28, 28))
    assert 3 * counter.get_total_flops() == bench.FLOP_PER_IMAGE


def test_the_stock_loops_data_is_mnist_and_leaves_nothing_behind(tmp_path, monkeypatch, test_set):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    train_part, test_part = bench.stock_data(600)
    images, labels = zip(*test_part, strict=True)
    torch.testing.assert_close(torch.stack(images), (test_set[0][:100] / 255 - script.MEAN) / script.STD)
    assert (len(train_part), list(labels)) == (600, test_set[1][:100].tolist())
    assert not torch.equal(train_part[0][0], train_part[0][0])  # augmented, each time anew
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_tables_have_all_rows_and_the_ratios_of_their_times(monkeypatch, capsys):
    for name, value in {"IMAGES": 96, "SCALING_IMAGES": 64, "peak_memory": lambda: "not now"}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(script, "save", lambda path, content: print(path.name, content[:4]))
    assert [bench.main([]), bench.main(["--scaling"])] == [0, 0]
    printed, cores = capsys.readouterr().out, torch.get_num_threads()
    rows = re.findall(r"^(\w.*?) +(\d+) +([\d,]+) +(\S+) +(\S+?)-(\S+) +(\S+) +(\S+)%$", printed, re.M)
    times = {(name, int(threads)): float(time) for name, threads, _, time, *_ in rows}
    stock = min(times[f"stock loop, workers: {workers}", cores] for workers in (0, 1, 2))
    assert len(rows) == 4 + 3 * len({1, cores})
    for _, threads, *numbers in rows:
        rate, time, least, most, ratio, share = (float(number.replace(",", "")) for number in numbers)
        expected = [32_000 / time, stock / time, 100 * times["matrix-rate limit", int(threads)] / time]
        assert [rate, ratio, share] == pytest.approx(expected, rel=0.01, abs=0.06)
        assert least <= time <= most
    other = 100 * (1 - times["bare step", cores] / times["script.py, as run", cores])
    assert float(re.search(r"of an epoch, all but its bare steps: (.*)%", printed)[1]) == pytest.approx(other, abs=1)
    assert re.findall(r"^threads: (\d+)", printed, re.M) == [str(n) for n in range(1, cores + 1)]
    assert "scaling.png b'\\x89PNG'" in printed


@pytest.mark.parametrize("arguments", [[], ["--scaling"]])
def test_a_missing_archive_is_one_line(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.setattr(script, "HERE", tmp_path)
    monkeypatch.setattr(script, "MIRRORS", ())
    assert bench.main(arguments) == 1
    assert re.fullmatch(r"bench\.py: error: .* is missing or damaged .*\n", capsys.readouterr().err)
