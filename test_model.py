"""The companion suite of script.py. It opens with the claim and with what the network is made of.

pytest -m "not slow"    the fast part
pytest                  all of it: the whole 20-epoch run, last, and faults injected into processes of their own
"""

import csv
import http.server
import importlib
import inspect
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.datasets import MNIST
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

import pictures
import script
from conftest import CPU, FAULTS_TOLD, HERE, command, fault, only_run

README = (HERE / "README.md").read_text(encoding="utf-8")
PICTURES = "curves.png", "confusion.png", "misclassified.png", "augmentation.png"
TABLES = "recipe.json", "history.csv", "train.log"
SOURCE_TABLE = README.split("## Architecture")[1].split("```\n")[1].strip()  # as the source document has it


def history_of(run):
    """The rows of a run's history.csv."""
    return list(csv.DictReader((run / "history.csv").open()))


# ---------------------------------------------------------------- the claim, and what the network is made of


@pytest.mark.slow
def test_twenty_epochs_pass_99_40_percent_at_the_last(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole_run")
    done = command("--out-dir", out)
    assert done.returncode == 0, done.stderr
    run = only_run(out)
    rows = history_of(run)
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 21)]
    accuracy = float(rows[-1]["test_accuracy"])
    print(f"last epoch: {accuracy:.2f}%")
    assert accuracy > 99.40
    assert done.stdout.encode() == (run / "train.log").read_bytes()
    assert f"Final accuracy: {accuracy:.2f}% after 20 epochs in " in done.stdout.splitlines()[-1]
    evaluated = command("--evaluate", run / "model.pt")
    assert evaluated.stdout.splitlines()[0] == re.findall(r"Test set: .*", done.stdout)[-1]


def test_the_committed_weights_score_above_99_40_percent(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # from elsewhere: data/ and assets/ are beside script.py
    assert script.main(["--evaluate", "--device", "cpu"]) == 0
    told, _, _, *rows = capsys.readouterr().out.splitlines()
    right = int(re.match(r"Test set: Average loss: \d\.\d{4}, Accuracy: (\d+)/10000", told)[1])
    assert right > 9940
    counts = np.array([row.split()[2:] for row in rows], dtype=int)
    assert counts.shape == (10, 10)
    assert (counts.sum(), np.trace(counts)) == (10_000, right)
    assert [row.split()[1] for row in rows] == [f"{100 * counts[d, d] / counts[d].sum():.2f}%" for d in range(10)]
    assert float(history_of(HERE / "assets")[19]["test_accuracy"]) == right / 100
    assert not list(tmp_path.iterdir())


def test_the_network_is_the_source_documents_and_gives_log_probabilities():
    assert script.summary() == SOURCE_TABLE
    assert sum(parameter.numel() for parameter in script.Net().parameters()) == 15_440
    output = script.Net()(torch.rand(5, 1, 28, 28))
    assert output.shape == (5, 10)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(5))


@pytest.mark.parametrize(("name", "activation"), [("relu", nn.ReLU()), ("hardswish", nn.Hardswish())])
def test_the_activation_is_torchs_and_goes_with_the_weights(name, activation):
    net, images = script.Net(name).eval(), torch.randn(8, 1, 28, 28)
    first = net.conv1, net.norm1, activation, net.conv2, net.norm2, net.pool1, activation, net.drop1
    second = net.conv3, net.conv4, net.norm4, activation, net.conv5, net.norm5, net.pool2, activation, net.drop2
    third = net.conv6, net.norm6, activation, net.gap, net.conv7, nn.Flatten(), nn.LogSoftmax(dim=1)
    torch.testing.assert_close(net(images), nn.Sequential(*first, *second, *third)(images))
    other = script.Net("hardswish" if name == "relu" else "relu").eval()
    assert not torch.allclose(other(images), net(images))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(images), net(images))


def test_dropout_acts_in_training_only():
    net, images = script.Net().eval(), torch.rand(8, 1, 28, 28)
    assert torch.equal(net(images), net(images))
    for layer in (net.drop1, net.drop2):
        layer.train()
        assert not torch.equal(net(images), net(images))
        values = layer(torch.ones(100, 20, 14, 14))
        assert values.unique().tolist() == pytest.approx([0, 1 / 0.9])
        assert (values == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)  # 10 standard deviations
        layer.eval()


def test_batch_norm_statistics_move_in_training_only():
    net, images = script.Net(), torch.rand(8, 1, 28, 28)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 5
    for mode, moves in ((net.eval, False), (net.train, True)):
        before = [norm.running_mean.clone() for norm in norms]
        mode()(images)
        assert all(torch.equal(norm.running_mean, b) is not moves for norm, b in zip(norms, before, strict=True))


def test_global_average_pooling_forgets_where_a_feature_stands():
    net, images = script.Net().eval(), torch.rand(8, 1, 28, 28)
    straight = net(images)
    with net.norm6.register_forward_hook(lambda module, args, out: out.roll((2, 3), dims=(2, 3))):
        torch.testing.assert_close(net(images), straight)
    with net.norm5.register_forward_hook(lambda module, args, out: out.roll((2, 3), dims=(2, 3))):
        assert not torch.allclose(net(images), straight)  # before a padded convolution the place does matter


# ---------------------------------------------------------------- optimiser and schedule


@pytest.mark.parametrize("decay", [0.1, 0.0])
def test_adam_decays_weights_that_have_no_gradient(decay):
    net = script.Net()
    optimizer, _ = script.make_optimizer(net, script.Recipe(weight_decay=decay), total_steps=100)
    assert type(optimizer) is torch.optim.Adam
    before = net.conv6.weight.detach().clone()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.equal(net.conv6.weight, before) is (decay == 0)
    assert (net.conv6.weight.abs().mean() < before.abs().mean()).item() is (decay > 0)


def cycle(recipe, steps):
    """The learning rate and Adam's betas at each of so many steps."""
    optimizer, scheduler = script.make_optimizer(script.Net(), recipe, steps)
    optimizer.step()  # or the scheduler warns that it was stepped first
    found = []
    for _ in range(steps):
        found.append((scheduler.get_last_lr()[0], optimizer.param_groups[0]["betas"]))
        scheduler.step()
    return zip(*found, strict=True)


def test_one_cycle_follows_the_recipe_for_37500_steps():
    recipe = script.Recipe()
    steps = recipe.epochs * len(script.Loader(torch.empty(60_000, 0), None, recipe.batch_size))
    assert steps == 37_500
    rates, betas = cycle(recipe, steps)
    first, last = recipe.max_lr / recipe.div_factor, recipe.max_lr / recipe.div_factor / recipe.final_div_factor
    peak = round(recipe.pct_start * steps) - 1
    assert rates.index(max(rates)) == peak
    assert set(betas) == {(0.9, 0.999)}
    for low, start, end in ((first, 0, peak), (last, steps - 1, peak)):  # two half cosines
        cosine = [low + (recipe.max_lr - low) * (1 - math.cos(math.pi * part / 8)) / 2 for part in range(9)]
        measured = [rates[round(start + (end - start) * part / 8)] for part in range(9)]
        assert measured == pytest.approx(cosine, rel=1e-3)


def test_one_cycle_serves_a_run_of_any_length_and_moves_the_sources_beta1():
    for steps in (1, 2, 3, 5, 10):  # 5: a warm-up of one step
        rates, _ = cycle(script.Recipe(), steps)
        assert all(0 < rate <= script.Recipe.max_lr for rate in rates)
    _, betas = cycle(script.RECIPES["source"], 1000)
    first, *others = [beta1 for beta1, _ in betas]
    assert (first, min(others), others[198], others[-1]) == pytest.approx((0.95, 0.85, 0.85, 0.95))


# ---------------------------------------------------------------- data and augmentation


def test_the_data_is_mnist(train_set, test_set):
    told = re.findall(r"^\| (\S+\.gz) \|.*\| (\w{32}) \|$", (HERE / "data" / "README.md").read_text(), re.M)
    assert sorted(told) == sorted(script.ARCHIVES.items()) == sorted(MNIST.resources)
    assert list(script.MIRRORS) == MNIST.mirrors
    train_digits = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test_digits = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    for (images, labels), counts in ((train_set, train_digits), (test_set, test_digits)):
        assert (images.dtype, images.shape) == (torch.uint8, (sum(counts), 1, 28, 28))
        assert labels.bincount().tolist() == counts
    pixels = train_set[0].float() / 255
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((script.MEAN, script.STD), abs=5e-5)


def test_the_test_loader_normalises_in_order(test_set):
    images, labels = test_set
    batches = list(script.Loader(images, labels, 1000))
    assert len(batches) == 10
    assert torch.equal(torch.cat([batch[1] for batch in batches]), labels)
    expected = vision.normalize(images.float() / 255, [0.1307], [0.3081])
    torch.testing.assert_close(torch.cat([batch[0] for batch in batches]), expected)


def test_the_training_loader_shows_each_image_once_in_a_new_order():
    images = torch.arange(1000, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 28, 28)
    labels = torch.arange(1000)
    still = replace(script.Recipe(), rotation=0.0, affine_rotation=0.0, shear=0.0, translate=0.0, scale=0.0)
    loader, orders = script.Loader(images, labels, 32, still), []
    for _ in range(2):
        batches = list(loader)
        assert [len(batch[1]) for batch in batches] == [32] * 31 + [8]
        orders.append(torch.cat([batch[1] for batch in batches]))
        shown = torch.cat([batch[0] for batch in batches])[:, 0, 14, 14] * script.STD + script.MEAN
        torch.testing.assert_close(shown * 255, (orders[-1] % 256).float(), atol=1e-2, rtol=0)  # with its own label
        assert torch.equal(orders[-1].sort().values, labels)
    assert not torch.equal(*orders)


def warp(images, rotation=0.0, affine_rotation=0.0, shear=0.0, scale=1.0, shift=(0.0, 0.0), interpolation="bilinear"):
    """script.py's transformation of images (B, 1, H, W) with given numbers instead of drawn ones."""
    same, shift = torch.ones(len(images)), torch.tensor(shift).expand(len(images), 2)
    matrices = script.affine_matrices(rotation * same, affine_rotation * same, shear * same, scale * same, shift)
    return script.warp(images, matrices, interpolation)


@pytest.mark.parametrize(
    ("angle", "shear", "scale", "pixels", "mode"),
    [
        (5, 0, 1, (0, 0), "bilinear"),
        (0, 10, 1, (0, 0), "bilinear"),
        (0, 0, 0.9, (0, 0), "bilinear"),
        (0, 0, 1, (2, -1), "bilinear"),
        (-4, 7, 1.1, (-1, 2), "bilinear"),
        (4, 5, 0.9, (1, -2), "nearest"),
    ],
)
def test_augmentation_agrees_with_torchvisions_affine(test_set, angle, shear, scale, pixels, mode):
    images = test_set[0][:50].float() / 255
    theirs = vision.affine(images, angle, list(pixels), scale, [shear, 0], InterpolationMode(mode))
    ours = warp(images, 0.0, angle, shear, scale, [pixel / 28 for pixel in pixels], mode)
    differ = ((ours - theirs).abs() > 2e-4).float().mean()
    assert differ < (1e-3 if mode == "nearest" else 1e-9)  # a point between two pixels may fall to either
    assert (ours - images).abs().max() > 0.1


def test_augmentation_turns_first_and_then_transforms(test_set):
    # Large and smooth, so that torchvision's two interpolations differ little from our one.
    images = vision.resize(test_set[0][:50].float() / 255, [224, 224], InterpolationMode.BICUBIC).clamp(0, 1)
    turned = vision.rotate(images, -5, InterpolationMode.BILINEAR)
    theirs = vision.affine(turned, 3, [16, -8], 1.1, [10, 0], InterpolationMode.BILINEAR)
    ours = warp(images, 5.0, 3, 10, 1.1, [16 / 224, -8 / 224])
    assert (ours - theirs).abs().mean() < 1e-3
    assert (warp(images, 0.0, 8, 10, 1.1, [16 / 224, -8 / 224]) - theirs).abs().mean() > 2e-3  # order matters


def test_augmentation_draws_for_each_image_and_repeats_with_the_seed(test_set):
    def shown(seed, epoch):
        script.seed_everything(seed, epoch)
        return script.augment(test_set[0][:1].float().expand(64, -1, -1, -1) / 255, script.Recipe())

    first = shown(1, 1)
    assert len(first.flatten(1).unique(dim=0)) == 64
    assert torch.equal(first, shown(1, 1))
    assert not any(torch.equal(first, other) for other in (shown(1, 2), shown(2, 1)))


def test_augmentation_keeps_to_each_range_of_the_recipe(monkeypatch):
    names, seen = ("rotation", "affine_rotation", "shear", "scale", "translate"), []
    monkeypatch.setattr(script, "affine_matrices", lambda *drawn: seen.append(drawn) or torch.zeros(4096, 2, 3))
    for name in names:
        script.augment(torch.zeros(4096, 1, 28, 28), script.Recipe(**{**dict.fromkeys(names, 0.0), name: 0.5}))
        for other, values in zip(names, seen[-1], strict=True):
            centre, spread = float(other == "scale"), 0.5 * (other == name)
            assert values.min().item() == pytest.approx(centre - spread, abs=0.01)
            assert values.max().item() == pytest.approx(centre + spread, abs=0.01)


def test_bicubic_keeps_the_strokes_that_bilinear_blurs(test_set):
    images = test_set[0][:500].float() / 255
    half_a_pixel = torch.tensor([[1.0, 0.0, 1 / 28], [0.0, 1.0, 1 / 28]]).expand(500, 2, 3)
    spread = {mode: script.warp(images, half_a_pixel, mode).std().item() for mode in ("bilinear", "bicubic")}
    assert spread["bilinear"] < 0.94 * images.std().item()
    assert spread["bicubic"] > 0.955 * images.std().item()


def test_background_stays_background_and_no_pixel_overshoots(test_set):
    images, labels = test_set
    shown, _ = next(iter(script.Loader(images[:500], labels[:500], 500, script.Recipe(translate=0.3))))
    assert shown.min().item() == pytest.approx((0 - 0.1307) / 0.3081)
    assert shown.max().item() == pytest.approx((1 - 0.1307) / 0.3081)


# ---------------------------------------------------------------- step, training, score


def test_one_epoch_of_five_thousand_images_passes_90_percent(train_set, test_set):
    script.seed_everything(1, 1)
    net, recipe = script.Net(), script.Recipe(epochs=1)
    loader = script.Loader(train_set[0][:5000], train_set[1][:5000], recipe.batch_size, recipe)
    step, _ = script.make_step(net, recipe)
    loss, accuracy, learning_rate, bar = script.train(step, loader, *script.make_optimizer(net, recipe, len(loader)), 1)
    assert 0 < loss < 1.5
    assert accuracy > 50
    assert learning_rate == pytest.approx(recipe.max_lr / 1000)
    assert f"loss={loss:.4f} batch_id=156: 100%|" in bar
    assert script.test(step, script.Loader(test_set[0][:2000], test_set[1][:2000], 1000)).accuracy > 90


def test_the_score_is_torchs_loss_and_a_plain_count(test_set):
    net = script.Net().eval()
    images, labels = test_set[0][:100], test_set[1][:100]
    score = script.test(script.Step(net), script.Loader(images, labels, 32))
    output = net((images.float() / 255 - 0.1307) / 0.3081)
    assert score.loss == pytest.approx(nn.functional.nll_loss(output, labels).item(), rel=1e-5)
    assert torch.equal(score.predicted, output.argmax(dim=1))
    assert score.accuracy == pytest.approx((score.predicted == labels).sum().item())
    pairs = list(zip(labels.tolist(), score.predicted.tolist(), strict=True))
    assert score.confusion.tolist() == [[pairs.count((true, read)) for read in range(10)] for true in range(10)]


# ---------------------------------------------------------------- a run and what it leaves


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the drawing, which takes as long as two epochs of few images."""
    monkeypatch.setattr(pictures, "draw", lambda *args: dict.fromkeys(PICTURES, b""))


def run_of(folder, *arguments):
    """The run that main() makes in the folder with these arguments."""
    assert script.main([*arguments, "--device", "cpu", "--out-dir", str(folder)]) == 0
    return only_run(folder)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, first_images):
    """A run of two epochs on 960 images, by the command line's main(); shared, so leave it as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_mnist", first_images)
        return run_of(tmp_path_factory.mktemp("small") / "runs here, später", "--epochs", "2", "--seed", "7")


def test_a_run_leaves_its_files(small_run, test_set):
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-seed7", small_run.name)
    assert {path.name for path in small_run.iterdir()} == {"checkpoint.pt", "model.pt", *TABLES, *PICTURES}
    rows = history_of(small_run)
    told = README.split("| history.csv | ")[1].split(" |")[0]  # the columns
    assert list(rows[0]) == told.replace(", ", ",").replace(" ", "_").split(",")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert float(rows[-1]["learning_rate"]) == pytest.approx(0.02 / 1000)
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    recipe = json.loads((small_run / "recipe.json").read_text())
    assert {**recipe, **asdict(script.Recipe(epochs=2, seed=7))} == recipe
    assert (recipe["torch"], recipe["threads"]) == (torch.__version__, torch.get_num_threads())
    assert {"python", "device", "system", "commit"} <= recipe.keys()
    for name in PICTURES:
        with Image.open(small_run / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 5
    step = script.Step(script.load_net(small_run / "model.pt"))
    score = script.test(step, script.Loader(test_set[0][:960], test_set[1][:960], 1000))
    assert score.accuracy == float(rows[-1]["test_accuracy"])
    assert score.loss == pytest.approx(float(rows[-1]["test_loss"]), rel=1e-5)


def test_train_log_reads_like_the_source_documents(small_run):
    log = (small_run / "train.log").read_text(encoding="utf-8")
    assert log.startswith(SOURCE_TABLE + "\ndevice: cpu")
    assert "\nseed: 7\n" in log
    assert re.search("^step: (compiled|eager), float32, threads: ", log, re.MULTILINE)
    epochs = re.findall(
        r"loss=\d\.\d{4} batch_id=29: 100%\|█+\| 30/30 \[[^\n]+\]\n\n"
        r"Test set: Average loss: \d\.\d{4}, Accuracy: (\d+)/960 \((\d+\.\d\d)%\)\n",
        log,
    )
    assert len(epochs) == 2
    assert all(float(percent) == pytest.approx(100 * int(right) / 960, abs=0.005) for right, percent in epochs)
    last = log.splitlines()[-1]
    assert re.fullmatch(rf"Final accuracy: {epochs[-1][1]}% after 2 epochs in \d+ min \d+ s; see .+", last)
    assert last.endswith(str(small_run))
    assert max(map(len, log.splitlines()[:-1])) < 121  # one line a bar


def test_a_run_is_never_overwritten(tmp_path, monkeypatch):
    times = iter("aaab")  # the second run begins in the first's second
    monkeypatch.setattr(script.time, "strftime", lambda form: next(times))
    assert [script.new_run(tmp_path, 1).name for _ in range(2)] == ["a-seed1", "b-seed1"]


def test_the_sources_recipe_and_a_flag_that_goes_before_it(tmp_path, few_images, no_pictures):
    run = run_of(tmp_path, "--recipe", "source", "--weight-decay", "0.001", "--epochs", "1")
    recipe = json.loads((run / "recipe.json").read_text())
    told = {"batch_size": 32, "max_lr": 0.01, "rotation": 5, "affine_rotation": 5, "shear": 5, "translate": 0}
    default = inspect.signature(vision.affine).parameters["interpolation"].default.value
    told |= {"scale": 0, "weight_decay": 0.001, "interpolation": default, "activation": "relu"}
    assert recipe | told == recipe
    assert script.load_net(run / "model.pt").activation is nn.functional.relu
    assert (script.RECIPES["source"].weight_decay, script.RECIPES["source"].epochs) == (1e-4, 20)


def test_training_images_that_lack_a_digit_are_drawn_without_it(train_set):
    loader = script.Loader(train_set[0][:3], train_set[1][:3], 3, script.Recipe())  # 5, 0 and 4
    assert len(pictures.augmentation(loader, script.augment).axes[0].images) == 30


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every name is Unicode")
def test_a_folder_whose_name_is_no_utf8_an_ascii_console_and_a_closed_standard_error(tmp_path):
    folder, environment = tmp_path / os.fsdecode(b"caf\xe9"), {**os.environ, "PYTHONIOENCODING": "ascii"}
    arguments = "--epochs", "1", "--holdout", "59000", "--out-dir", folder
    done = command(*arguments, preexec_fn=lambda: os.close(2), env=environment)
    assert "100%|?" in done.stdout  # for the bar's blocks
    assert done.returncode == 0
    run = only_run(folder)
    assert "see " in (run / "train.log").read_text(encoding="utf-8").splitlines()[-1]
    assert (run / "model.pt").exists()


def test_holdout_never_looks_at_the_test_images(tmp_path, monkeypatch, train_set, no_pictures):
    asked = []
    monkeypatch.setattr(script, "load_mnist", lambda *args: asked.append(args[1]) or [part[:960] for part in train_set])
    train_loader, test_loader = script.load_sets(script.Recipe(holdout=160), None, CPU)
    assert torch.equal(train_loader.images, train_set[0][:800])
    assert torch.equal(test_loader.images, train_set[0][800:960])
    assert torch.equal(test_loader.labels, train_set[1][800:960])
    log = (run_of(tmp_path, "--holdout", "160", "--epochs", "1") / "train.log").read_text(encoding="utf-8")
    assert asked == [True, True]
    assert "\nHeld-out set: Average loss" in log
    assert "Test set" not in log


# ---------------------------------------------------------------- the README


def test_the_readme_tells_what_the_reference_run_printed():
    log = (HERE / "assets" / "train.log").read_text(encoding="utf-8").strip()
    assert log in README
    assert SOURCE_TABLE in log
    (final,) = re.findall(r"^Final accuracy: (\d\d\.\d\d)% after 20 epochs in (\d+ min \d+ s)", log, re.M)
    (told,) = re.findall(r"^`python script.py` is seed 1: (\d\d\.\d\d)% in (\d+ min \d+ s)", README, re.M)
    assert told == final


@pytest.mark.parametrize(
    ("file", "seeds", "start"),
    [("study", 20, "**ours**"), ("study-relu", 20, "the former default,"), ("study-source", 10, "the source's,")],
)
def test_the_readme_tells_what_the_studies_found(file, seeds, start):
    with open(HERE / "assets" / f"{file}.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["seed"] for row in rows] == [str(seed) for seed in range(1, seeds + 1)]
    assert "".join("".join(f"{value:>10}" for value in row.values()) + "\n" for row in rows) in README
    values = np.array([float(row["accuracy"]) for row in rows])
    mean, deviation = f"{values.mean():.3f}", f"{values.std(ddof=1):.3f}"
    assert f"\nn {seeds}; mean {mean}%; standard deviation {deviation}; " in README
    (row,) = re.findall(rf"^\| {re.escape(start)} .*$", README, re.M)
    least, most = f"{values.min():.2f}", f"{values.max():.2f}"
    assert re.findall(r"\b\d+\.\d+\b", row.split(f"| {seeds} |")[1]) == [mean, deviation, least, most]
    assert values.min() > 99.40


def test_the_readmes_table_of_faults_is_what_the_tests_try(monkeypatch):
    monkeypatch.syspath_prepend(str(HERE / "tests"))
    for suite in (HERE / "tests").glob("test_*.py"):
        importlib.import_module(suite.stem)
    rows = {f"| {what} | {happens} |" for what, happens in FAULTS_TOLD.items()}
    table = README.split("| fault | what happens |\n|---|---|\n")[1].split("\n\n")[0]
    assert set(table.splitlines()) == rows


def test_the_python_in_the_readme_and_the_notes_runs(tmp_path, monkeypatch, capsys, few_images):
    for name in ("first", "second"):
        (tmp_path / "runs" / "study" / name).mkdir(parents=True)
        shutil.copy(HERE / "assets" / "model.pt", tmp_path / "runs" / "study" / name)
    for file, folder in (("README.md", HERE), ("docs/recipe.md", tmp_path)):
        monkeypatch.chdir(folder)
        blocks = re.findall(r"^```python\n(.*?)^```", (HERE / file).read_text(encoding="utf-8"), re.M | re.S)
        assert blocks
        for block in blocks:
            exec(block, {})
    errors, misread = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    assert errors[0] == errors[1] == misread[0] == misread[1] < 20


def test_the_readmes_links_and_pictures_exist():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert {"assets/curves.png", "assets/misclassified.png"} <= set(links)
    for link in links:
        assert (HERE / link).exists() or link.startswith("../../actions/workflows/model_tests.yml"), link


def test_the_inline_dependencies_are_among_the_requirements():
    metadata = re.search(r"^# dependencies = \[(.*?)\]\n# ///", (HERE / "script.py").read_text("utf-8"), re.M | re.S)[1]
    inline = re.findall(r'"([^"]+)"', metadata)
    required = (HERE / "requirements.txt").read_text().splitlines()
    others = {"torchvision>=0.26,<1", "scipy>=1.13,<2", "filelock>=3.13,<4", "pytest>=8,<10"}
    assert set(required) - set(inline) == others  # of bench.py, predict.py, study.py and the suites
    assert set(inline) <= set(required)
    assert all(re.fullmatch(r"\w+>=[\d.]+,<\d+", line) for line in required)


# ---------------------------------------------------------------- command line


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert [default for default in (20, 32, 0.02, 2e-06, 1) if f"(default: {default})" not in text] == []


def refused(capsys, *arguments, status=1):
    """The one line with which main() refuses, without its beginning."""
    try:
        returned = script.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        returned = stop.code
    (line,) = capsys.readouterr().err.splitlines()
    assert returned == status
    assert line.startswith("script.py: error: ")
    return line.removeprefix("script.py: error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "--epochs is 0; it must be a whole number from 1 to 1000000"),
        ("--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
        ("--batch-size 60001", "--batch-size is 60001; it must be a whole number from 1 to 60000"),
        ("--holdout 60000", "--holdout is 60000; it must be a whole number from 0 to 59999"),
        ("--max-lr -0.1", "--max-lr is -0.1; it must be a number from 0 to 1e+30"),
        ("--weight-decay nan", "--weight-decay is nan; it must be a number from 0 to 1e+30"),
        (f"--seed {2**63}", f"--seed is {2**63}; it must be a whole number from 0 to {2**63 - 1}"),
        ("--resume run --holdout 0", "--holdout is for a new run; --resume does not take it"),
        ("--device abacus", "argument --device: invalid choice: 'abacus'"),
        ("--recipe theirs", "argument --recipe: invalid choice: 'theirs'"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--evaluate --resume run", "argument --resume: not allowed with argument --evaluate"),
        ("--evaluate --seed 3", "--seed is for a new run; --evaluate does not take it"),
        ("--device cuda", "argument --device: invalid choice: 'cuda' (choose from "),
        ("--device mps", "argument --device: invalid choice: 'mps' (choose from "),
    ],
)
def test_bad_usage(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    for kind in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(kind, "is_available", lambda: False)
    assert refused(capsys, *arguments.split(), status=2).startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [
        *({"epochs": 2.0}, {"epochs": True}, {"seed": "1"}, {"shear": 90}, {"div_factor": 0}),
        *({"interpolation": "cubic"}, {"activation": "mish"}, {"compile": "no"}),
    ],
)
def test_a_recipe_refuses_what_is_out_of_range(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}; it must be "):
        script.Recipe(**wrong)


class Hostile:
    """Unpickled with code allowed, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("hostile",)


def with_a_bit_changed(file: Path) -> bytes:
    """The file's bytes with the sign turned of a number in its middle, where tensors lie."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2 // 4 * 4 + 3] ^= 0x80
    return bytes(content)


def test_weights_that_are_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = HERE / "assets" / "model.pt"
    Path("cut.pt").write_bytes(good.read_bytes()[:5000])
    Path("text.pt").write_text("no weights")
    torch.save(Hostile(), "hostile.pt")
    Path("bit.pt").write_bytes(with_a_bit_changed(good))
    foreign = {"numbers.pt": {1: 2}, "list.pt": [1, 2], "other.pt": nn.Linear(3, 3).state_dict()}
    foreign["unknown activation.pt"] = script.load(good) | {"_extra_state": ["relu"]}
    nan = {"nan.pt": script.load(good) | {"conv1.bias": torch.full((10,), math.nan)}}
    nan["negative variance.pt"] = script.load(good) | {"norm1.running_var": torch.full((10,), -1.0)}
    for name, content in (foreign | nan).items():
        torch.save(content, name)
    messages = {"missing.pt": ": No such file or directory"}
    messages |= dict.fromkeys(nan, " holds weights with which the network's output is not finite")
    messages |= dict.fromkeys(("text.pt", "cut.pt", "bit.pt", "hostile.pt"), " is not a checkpoint, or is damaged")
    messages |= dict.fromkeys(foreign, " does not hold the weights of this network")
    before = sorted(tmp_path.iterdir())
    for name, message in messages.items():
        assert refused(capsys, "--evaluate", name).removeprefix("cannot read ") == name + message
    assert sorted(tmp_path.iterdir()) == before


def test_an_out_dir_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert refused(capsys, "--out-dir", tmp_path / "file") == f"{tmp_path / 'file'}: File exists"


# ---------------------------------------------------------------- data faults


@pytest.fixture
def data_dir(tmp_path):
    """A copy of data/ with the test archives alone, which are all that evaluating needs."""
    return Path(shutil.copytree(HERE / "data", tmp_path / "data", ignore=shutil.ignore_patterns("train-*")))


class Mirrors(http.server.BaseHTTPRequestHandler):
    """Mirrors as they fail, by the path's first part; /good/ serves the committed archives."""

    def do_GET(self):
        kind, name = self.path.strip("/").split("/")
        content = (HERE / "data" / "MNIST" / "raw" / name).read_bytes()
        heads = {"garbled": b"SSH-2.0-mirror\r\n", "forbidden": b"HTTP/1.0 403 Forbidden\r\n\r\n"}
        self.wfile.write(heads.get(kind, b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n" % len(content)))
        self.wfile.write({"good": content, "cut": content[:1000], "altered": bytes(len(content))}.get(kind, b""))

    def log_message(self, *args):
        pass


@pytest.fixture
def mirrors(monkeypatch):
    """Let these be the mirrors; until a test does, one that refuses the connection at once."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirrors)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"

    def use(*kinds):
        monkeypatch.setattr(script, "MIRRORS", ["http://127.0.0.1:9/", *(f"{address}/{kind}/" for kind in kinds)])

    use()
    yield use
    server.shutdown()
    server.server_close()


@fault(
    "a data archive is missing, truncated, altered or unreadable",
    "downloaded and verified; without a network one line says what to put where; status 1",
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "one byte altered", "a folder"])
def test_a_damaged_archive_is_refused_without_a_network(data_dir, mirrors, capsys, damage):
    archive = data_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    content = archive.read_bytes()
    archive.unlink()
    if damage == "a folder":
        archive.mkdir()
    elif damage != "missing":
        archive.write_bytes({"empty": b"", "cut": content[:-1], "one byte altered": content[:-1] + b"\xff"}[damage])
    line = f"{archive} is missing or damaged and cannot be downloaded; put a good copy there "
    assert refused(capsys, "--evaluate", "--data-dir", data_dir) == line + "(md5 ec29112dd5afa0611ce80d1b7f02629c)"


def test_an_empty_data_folder_is_filled_from_the_first_good_mirror(tmp_path, mirrors, test_set, capsys):
    mirrors("garbled", "forbidden", "cut", "altered", "good")
    (tmp_path / "MNIST").touch()  # what is downloaded cannot be kept here, and serves all the same
    for folder, lines in ((tmp_path / "new", 12), (tmp_path / "new", 0), (tmp_path, 12)):
        images, labels = script.load_mnist(folder, False, CPU)
        assert torch.equal(images, test_set[0])
        assert torch.equal(labels, test_set[1])
        told = capsys.readouterr().out.splitlines()
        assert len(told) == lines  # of each of two archives the file and five mirrors
        assert all(line.startswith("data: no good copy at ") for line in told)


def test_nothing_but_the_archives_is_believed_or_written(data_dir, mirrors, test_set):
    if sys.platform == "linux":  # elsewhere every name is Unicode
        data_dir = data_dir.rename(data_dir.parent / os.fsdecode(b"caf\xe9"))
    (data_dir / "MNIST" / "processed").mkdir()
    torch.save((torch.zeros(10_000, 28, 28), torch.zeros(10_000)), data_dir / "MNIST" / "processed" / "test.pt")
    (data_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(bytes(10_008))
    before = sorted(data_dir.rglob("*"))
    assert torch.equal(script.load_mnist(data_dir, False, CPU)[1], test_set[1])
    assert sorted(data_dir.rglob("*")) == before


# ---------------------------------------------------------------- interruption


def child(number, moment, *arguments):
    """What a child process runs: main() on 320 images, with a signal, twice, at a moment.

    "step 15" is inside the 15th step, "before model.pt 1" where its temporary is whole and not renamed, "after" behind.
    "end 1" is when main() has returned.
    """
    load = script.load_mnist
    script.load_mnist = lambda *args: tuple(part[:320] for part in load(*args))
    step, rename, calls = torch.optim.Adam.step, os.replace, []

    def strike(place):
        calls.append(place)
        if f"{place} {calls.count(place)}" == moment:
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)  # as an impatient user does, and is not heard

    def struck_step(*args, **options):
        strike("step")
        return step(*args, **options)

    def struck_rename(source, target):
        strike(f"before {target.name}")
        rename(source, target)
        strike(f"after {target.name}")

    os.replace = struck_rename
    torch.optim.Adam.step = struck_step
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a suite that a shell runs in the background ignores it
    status = script.run_program(lambda: script.main(list(arguments)))
    strike("end")
    sys.exit(status)


def in_child(moment, *arguments, number=signal.SIGKILL):
    """Run child() in a process of its own."""
    code = f"import test_model; test_model.child{(int(number), moment, *map(str, arguments))!r}"
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    line = [sys.executable, "-c", code]
    return subprocess.run(line, capture_output=True, text=True, encoding="utf-8", env=environment, check=False)


TWO_EPOCHS = "--epochs", "2", "--device", "cpu", "--no-compile", "--out-dir"  # of ten steps each
EARLY_MOMENTS = "before recipe.json 1", "step 5", "before checkpoint.pt 1"
LATER_MOMENTS = (
    *("after checkpoint.pt 1", "step 15", "step 15 compiled", "before checkpoint.pt 2", "after checkpoint.pt 2"),
    *("before train.log 3", "before misclassified.png 1", "before model.pt 1"),
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run of two epochs that nothing interrupts."""
    out = tmp_path_factory.mktemp("unbroken")
    assert in_child("never", *TWO_EPOCHS, out).returncode == 0
    return only_run(out)


def assert_same_end(run, unbroken):
    """Both runs ended with the same weights, the same history but for its times, and the same files."""
    first, second = (torch.load(folder / "model.pt", weights_only=True) for folder in (run, unbroken))
    assert first.pop("_extra_state") == second.pop("_extra_state")  # the activation; all others are tensors
    assert all(torch.equal(first[name], second[name]) for name in second)
    rows, wanted = history_of(run), history_of(unbroken)
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in wanted]
    assert {path.name for path in run.iterdir()} == {path.name for path in unbroken.iterdir()}
    logs = [(folder / "train.log").read_text(encoding="utf-8") for folder in (run, unbroken)]
    assert re.findall("Accuracy: .*", logs[0]) == re.findall("Accuracy: .*", logs[1])


@fault("killed (SIGKILL) before the first epoch ends", "nothing to resume, and `--resume` says so")
@pytest.mark.slow
@pytest.mark.parametrize("moment", EARLY_MOMENTS)
def test_killed_before_the_first_checkpoint_there_is_nothing_to_resume(tmp_path, moment):
    assert in_child(moment, *TWO_EPOCHS, tmp_path).returncode == -signal.SIGKILL
    run = only_run(tmp_path)
    done = in_child("never", "--resume", run)
    assert done.stderr == f"script.py: error: cannot read {run / 'checkpoint.pt'}: No such file or directory\n"
    assert done.returncode == 1


@fault(
    "killed at any later moment: in an epoch, while a file is written, between files, during the pictures",
    "`--resume` ends in the same weights, bit for bit, the same history and the same files as an unbroken run",
)
@pytest.mark.slow
@pytest.mark.parametrize("moment", LATER_MOMENTS)
def test_killed_and_resumed_it_ends_in_the_same_bits(tmp_path, unbroken, moment):
    arguments = TWO_EPOCHS
    if moment.endswith(" compiled"):
        arguments = [argument for argument in TWO_EPOCHS if argument != "--no-compile"]
        assert in_child("never", *arguments, tmp_path / "unbroken").returncode == 0
        unbroken = only_run(tmp_path / "unbroken")
    assert in_child(moment.removesuffix(" compiled"), *arguments, tmp_path / "killed").returncode == -signal.SIGKILL
    run = only_run(tmp_path / "killed")
    done = in_child("never", "--resume", run)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_end(run, unbroken)


@fault("Ctrl-C, SIGTERM", "the finished epochs are kept; one line says how to go on; status 130, 143")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment", "kept"), [(signal.SIGINT, "step 15", 1), (signal.SIGTERM, "before checkpoint.pt 2", 2)]
)
def test_a_signal_pressed_twice_keeps_the_finished_epochs(tmp_path, unbroken, number, moment, kept):
    data_dir = HERE / "tests" / ".." / "data"  # not the default, as it is spelled
    done = in_child(moment, *TWO_EPOCHS, tmp_path / "my runs", "--data-dir", data_dir, number=number)
    run = only_run(tmp_path / "my runs")
    again = shlex.join(["python", f"{HERE / 'script.py'}", f"--resume={run}", "--device=cpu", f"--data-dir={data_dir}"])
    line = f"script.py: interrupted; what was finished is kept: {again}\n"
    assert (done.returncode, done.stderr) == (128 + number, line)
    assert len(script.load(run / "checkpoint.pt")["history"]) == kept
    assert in_child("never", *shlex.split(again)[2:]).returncode == 0
    assert_same_end(run, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_all_is_done_is_not_heard(number):
    done = in_child("end 1", "--evaluate", number=number)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to send")
@pytest.mark.parametrize("moment", ["importing", pytest.param("step: ", marks=pytest.mark.slow)])
def test_a_process_hears_a_signal(tmp_path, moment):
    def hear():  # what a shell runs in the background ignores Ctrl-C, and so would what that starts
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    if moment == "importing":
        (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    line = [sys.executable, str(HERE / "script.py"), "--no-compile", "--out-dir", str(tmp_path)]
    options = {"env": {**os.environ, "PYTHONPATH": str(tmp_path)}, "text": True, "preexec_fn": hear}
    numbers = signal.SIGINT, signal.SIGTERM
    processes = [subprocess.Popen(line, stdout=-1, stderr=-1, **options) for _ in numbers]
    for number, process in zip(numbers, processes, strict=True):
        assert any(line.startswith(moment) for line in process.stdout)
        process.send_signal(number)
        errors = process.communicate()[1]
        told = (-number, "") if moment == "importing" else (128 + number, "script.py: interrupted\n")
        assert (process.returncode, errors) == told  # of -2 a shell makes 130


# ---------------------------------------------------------------- resuming


def test_resuming_a_finished_run_does_nothing(small_run, capsys):
    before = {path: path.read_bytes() for path in small_run.iterdir()}
    assert script.main(["--resume", str(small_run)]) == 0
    assert capsys.readouterr().out == f"{small_run} is finished: 2 epochs; nothing to do\n"
    assert {path: path.read_bytes() for path in small_run.iterdir()} == before


@fault("`--resume` with a flag that makes a recipe, whatever its value", "refused, with the flag; status 2")
@pytest.mark.parametrize("flag", ["--epochs 2", "--seed 8", "--no-compile", "--recipe ours", "--out-dir x"])
def test_resuming_takes_no_training_flag(small_run, capsys, flag):
    line = refused(capsys, "--resume", small_run, *flag.split(), status=2)
    assert line == f"{flag.split()[0]} is for a new run; --resume does not take it"


@fault("a checkpoint that is cut, altered, foreign or a hostile pickle", "refused, and no code in it runs; status 1")
def test_checkpoints_that_are_none(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = small_run / "checkpoint.pt"
    ours = script.load(checkpoint)
    torch.save(Hostile(), "hostile.pt")
    damaged = Path("hostile.pt").read_bytes(), checkpoint.read_bytes()[:9000], with_a_bit_changed(checkpoint)
    foreign = (
        script.load(small_run / "model.pt"),
        [1, 2],
        {"recipe": {}},
        {**ours, "recipe": {**ours["recipe"], "interpolation": "sharp"}},
        {**ours, "recipe": {**ours["recipe"], "holdout": "x"}},
        {**ours, "recipe": {**ours["recipe"], "activation": "relu"}},
        {**ours, "model": {**ours["model"], "conv1.weight": torch.zeros(3, 3)}},
        {**ours, "recipe": {**ours["recipe"], "epochs": ours["recipe"]["epochs"] + 1}},
        {**ours, "optimizer": {}},
        {**ours, "optimizer": {**ours["optimizer"], "state": {0: {"exp_avg": torch.zeros(3)}}}},
        {**ours, "scheduler": {}},
        {**ours, "history": [1, 2]},
    )
    assert refused(capsys, "--resume", ".") == "cannot read checkpoint.pt: No such file or directory"
    for content in (*damaged, *foreign):
        script.save(Path("checkpoint.pt"), content)
        kind = "is not a checkpoint, or is damaged" if isinstance(content, bytes) else "was not made by this script.py"
        assert refused(capsys, "--resume", ".") == f"checkpoint.pt {kind}"  # and no advice to resume
    assert not Path("hostile").exists()


# ---------------------------------------------------------------- faults of the machine


@fault(
    "the disk fills while any file is written",
    "the file and the cause are named, earlier files stay whole, `--resume` goes on; status 1",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "time"), [("recipe.json", 1), ("checkpoint.pt", 2), ("train.log", 3), ("model.pt", 1), ("curves.png", 1)]
)
def test_a_full_disk_is_named_and_spoils_no_earlier_file(tmp_path, monkeypatch, capsys, few_images, name, time):
    resource = pytest.importorskip("resource")
    save, calls = script.save, []

    def with_little_room(path, content):
        calls.append(path.name)
        full = path.name == name and calls.count(name) == time
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100 if full else limits[0], limits[1]))
        try:
            return save(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(script, "save", with_little_room)
    line = refused(capsys, "--epochs", "2", "--device", "cpu", "--out-dir", tmp_path)
    run = only_run(tmp_path)
    assert line.startswith(f"cannot write {run / name}: File too large")
    assert {path.name for path in run.iterdir()} == set(calls[:-1])  # no temporary, no part of a file
    if "checkpoint.pt" in calls[:-1]:
        assert line.endswith(shlex.join(["python", f"{HERE / 'script.py'}", f"--resume={run}", "--device=cpu"]))
        assert len(script.load(run / "checkpoint.pt")["history"]) == min(2, calls[:-1].count("checkpoint.pt"))
        assert script.main(["--resume", str(run), "--device", "cpu"]) == 0
        assert len(history_of(run)) == 2


@fault(
    "a loss or a weight that is not finite",
    "the run stops, says where, and the last good checkpoint is kept; status 1",
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the loss is not finite: epoch 1, step "),
        ("--no-compile", "the loss is not finite: epoch 1, step "),
        ("--holdout 900 --batch-size 60", "the network is not finite after epoch 1; begin anew with a lower --max-lr"),
    ],  # the last has one step, which spoils the weights
)
def test_a_run_that_diverges_is_stopped(tmp_path, capsys, few_images, arguments, message):
    flags = f"--max-lr 1e30 --epochs 1 --device cpu {arguments}".split()
    line = refused(capsys, *flags, "--out-dir", tmp_path)
    assert line.startswith(message)
    assert {path.name for path in only_run(tmp_path).iterdir()} == {"recipe.json"}


def test_an_overflow_behind_a_finite_loss_is_a_divergence(tmp_path, monkeypatch, capsys, few_images):
    train = script.train

    def overflow(step, *args):
        step.net.norm6.running_var.fill_(math.inf)  # what is divided by it is 0
        return train(step, *args)

    monkeypatch.setattr(script, "train", overflow)
    line = refused(capsys, "--epochs", "1", "--no-compile", "--device", "cpu", "--out-dir", tmp_path)
    assert line == "the network is not finite after epoch 1; begin anew with a lower --max-lr"


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys, few_images):
    step, calls = script.Step.forward_backward, []

    def once_nan(*args):
        loss, right = step(*args)
        calls.append(loss)
        return (loss * math.nan if len(calls) == 40 else loss), right

    monkeypatch.setattr(script.Step, "forward_backward", once_nan)
    line = refused(capsys, "--epochs", "2", "--no-compile", "--device", "cpu", "--out-dir", tmp_path)
    assert re.match(r"the loss is not finite: epoch 2, step 10 of 30, learning rate 0\.0", line)
    assert "--resume" not in line
    assert len(script.load(only_run(tmp_path) / "checkpoint.pt")["history"]) == 1


@fault(
    "memory that runs out, an operation that the device lacks",
    "one line with the device, and with what to try instead; status 1",
)
@pytest.mark.parametrize(
    ("device", "text", "message"),
    [
        ("cpu", "", "cpu is out of memory; a run with a smaller --batch-size needs less"),
        (
            *("mps", "MPS backend out of memory"),
            "mps is out of memory; a run with a smaller --batch-size needs less; or try --device cpu",
        ),
        ("mps", "grid_sampler_2d_mps: no\nMore.", "mps cannot do this (grid_sampler_2d_mps: no); try --device cpu"),
    ],
)
def test_what_a_device_lacks_is_one_line(tmp_path, monkeypatch, capsys, device, text, message):
    def fail(*args):
        if device == "cpu":
            torch.empty(2**60)  # raises the real error
        raise NotImplementedError(text)

    monkeypatch.setattr(script, "load_mnist", fail)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert refused(capsys, "--device", device, "--out-dir", tmp_path) == message


def test_a_defect_on_the_processor_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_mnist", lambda *args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        script.main(["--device", "cpu", "--out-dir", str(tmp_path)])
