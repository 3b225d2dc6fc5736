"""The companion suite of script.py. It opens with the claim: five tests of what the source document promises.

pytest -m "not slow"    the fast part
pytest                  all of it: the whole 20-epoch run, last, and runs that are killed in processes of their own
"""

import csv
import errno
import gzip
import http.server
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
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, Mock

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
from script import HERE
from tests.helpers import CPU, command, only_run

README = (HERE / "README.md").read_text(encoding="utf-8")
PICTURES = "curves.png", "confusion.png", "misclassified.png", "augmentation.png"
TABLES = "recipe.json", "history.csv", "train.log"


def history_of(run):
    """The rows of a run's history.csv."""
    return list(csv.DictReader((run / "history.csv").open()))


# ---------------------------------------------------------------- the claim


def test_fewer_than_20_000_parameters():
    assert sum(parameter.numel() for parameter in script.Net().parameters()) == 15_440 < 20_000


def test_batch_normalisation_moves_its_statistics_in_training_only():
    net, images = script.Net(), torch.rand(8, 1, 28, 28)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 5
    for mode, moves in ((net.eval, False), (net.train, True)):
        before = [norm.running_mean.clone() for norm in norms]
        mode()(images)
        assert all(torch.equal(norm.running_mean, b) is not moves for norm, b in zip(norms, before, strict=True))


def test_dropout_of_a_tenth_in_training_only():
    net, images = script.Net().eval(), torch.rand(8, 1, 28, 28)
    assert torch.equal(net(images), net(images))
    for layer in (net.drop1, net.drop2):
        layer.train()
        assert not torch.equal(net(images), net(images))
        values = layer(torch.ones(100, 20, 14, 14))
        assert values.unique().tolist() == pytest.approx([0, 1 / 0.9])
        assert (values == 0).float().mean().item() == pytest.approx(0.1, abs=0.005)  # 10 standard deviations
        layer.eval()


def test_global_average_pooling_before_the_last_convolution():
    net, seen = script.Net().eval(), {}
    net.norm6.register_forward_hook(lambda module, args, maps: seen.update(maps=maps))
    net.conv7.register_forward_pre_hook(lambda module, args: seen.update(pooled=args[0]))
    net(torch.rand(8, 1, 28, 28))
    assert seen["maps"].shape == (8, 40, 7, 7)
    torch.testing.assert_close(seen["pooled"], net.activation(seen["maps"]).mean(dim=(2, 3), keepdim=True))


@pytest.mark.slow
def test_accuracy_above_99_40_percent_after_20_epochs(tmp_path_factory):
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
    evaluated = command("--evaluate", run)
    assert evaluated.stdout.splitlines()[0] == re.findall(r"Test set: .*", done.stdout)[-1]


# ---------------------------------------------------------------- the network

SOURCE_TABLE = """
            Conv2d-1           [-1, 10, 28, 28]             100
       BatchNorm2d-2           [-1, 10, 28, 28]              20
            Conv2d-3           [-1, 20, 28, 28]           1,820
       BatchNorm2d-4           [-1, 20, 28, 28]              40
         MaxPool2d-5           [-1, 20, 14, 14]               0
           Dropout-6           [-1, 20, 14, 14]               0
            Conv2d-7           [-1, 10, 14, 14]             210
            Conv2d-8           [-1, 20, 14, 14]           1,820
       BatchNorm2d-9           [-1, 20, 14, 14]              40
           Conv2d-10           [-1, 20, 14, 14]           3,620
      BatchNorm2d-11           [-1, 20, 14, 14]              40
        MaxPool2d-12             [-1, 20, 7, 7]               0
          Dropout-13             [-1, 20, 7, 7]               0
           Conv2d-14             [-1, 40, 7, 7]           7,240
      BatchNorm2d-15             [-1, 40, 7, 7]              80
AdaptiveAvgPool2d-16             [-1, 40, 1, 1]               0
           Conv2d-17             [-1, 10, 1, 1]             410
"""


@pytest.mark.parametrize(("name", "activation"), [("relu", nn.ReLU()), ("hardswish", nn.Hardswish())])
def test_the_layers_are_torchs_and_the_activation_goes_with_the_weights(name, activation):
    net, images = script.Net(name).eval(), torch.randn(8, 1, 28, 28)
    first = net.conv1, net.norm1, activation, net.conv2, net.norm2, net.pool1, activation, net.drop1
    second = net.conv3, net.conv4, net.norm4, activation, net.conv5, net.norm5, net.pool2, activation, net.drop2
    third = net.conv6, net.norm6, activation, net.gap, net.conv7, nn.Flatten(), nn.LogSoftmax(dim=1)
    torch.testing.assert_close(net(images), nn.Sequential(*first, *second, *third)(images))
    other = script.Net("hardswish" if name == "relu" else "relu").eval()
    assert not torch.allclose(other(images), net(images))
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(images), net(images))


# ---------------------------------------------------------------- optimizer and schedule


def test_adam_decays_weights_that_have_no_gradient():
    net = script.Net()
    optimizer, _ = script.make_optimizer(net, script.Recipe(weight_decay=0.1), total_steps=100)
    assert type(optimizer) is torch.optim.Adam
    before = net.conv6.weight.detach().clone()
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert net.conv6.weight.abs().mean() < before.abs().mean()


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
    rates, _ = cycle(recipe, 5)  # of which a fifth is one step
    assert 0 < min(rates) < max(rates) <= recipe.max_lr
    _, betas = cycle(script.RECIPES["source"], 1000)
    first, *others = [beta1 for beta1, _ in betas]
    assert (first, min(others), others[198], others[-1]) == pytest.approx((0.95, 0.85, 0.85, 0.95))


# ---------------------------------------------------------------- data and augmentation


def test_the_data_is_mnist(train_set, test_set):
    train_digits = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test_digits = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    for (images, labels), counts in ((train_set, train_digits), (test_set, test_digits)):
        assert (images.dtype, images.shape) == (torch.uint8, (sum(counts), 1, 28, 28))
        assert labels.bincount().tolist() == counts
    pixels = train_set[0].float() / 255
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((script.MEAN, script.STD), abs=5e-5)


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


AFFINES = (-4, 7, 1.1, (-1, 2), "bilinear"), (4, 5, 0.9, (1, -2), "nearest")


@pytest.mark.parametrize(("angle", "shear", "scale", "pixels", "mode"), AFFINES)
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
        script.seed_torch(seed, epoch)
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


def test_background_stays_background_and_no_pixel_overshoots(test_set):
    images, labels = test_set
    shown, _ = next(iter(script.Loader(images[:500], labels[:500], 500, script.Recipe(translate=0.3))))
    assert shown.min().item() == pytest.approx((0 - 0.1307) / 0.3081)
    assert shown.max().item() == pytest.approx((1 - 0.1307) / 0.3081)


# ---------------------------------------------------------------- training and test


def test_one_epoch_of_five_thousand_images_passes_90_percent(train_set, test_set):
    script.seed_torch(1, 1)
    net, recipe = script.Net(), script.Recipe(epochs=1)
    loader = script.Loader(train_set[0][:5000], train_set[1][:5000], recipe.batch_size, recipe)
    backend, _ = script.make_backend(script.EagerBackend(net), recipe)
    optimizer, scheduler = script.make_optimizer(net, recipe, len(loader))
    loss, accuracy, learning_rate, bar = script.train(backend, loader, optimizer, scheduler, 1)
    assert 0 < loss < 1.5
    assert accuracy > 50
    assert learning_rate == pytest.approx(recipe.max_lr / 1000)
    assert f"loss={loss:.4f} batch_id=156: 100%|" in bar
    assert script.test(backend, script.Loader(test_set[0][:2000], test_set[1][:2000], 1000)).accuracy > 90


def test_the_score_is_torchs_loss_and_a_plain_count(test_set):
    net = script.Net().eval()
    images, labels = test_set[0][:100], test_set[1][:100]
    score = script.test(script.EagerBackend(net), script.Loader(images, labels, 32))
    output = net((images.float() / 255 - 0.1307) / 0.3081)
    assert score.loss == pytest.approx(nn.functional.nll_loss(output, labels).item(), rel=1e-5)
    assert torch.equal(score.predicted, output.argmax(dim=1))
    assert score.accuracy == pytest.approx((score.predicted == labels).sum().item())
    pairs = list(zip(labels.tolist(), score.predicted.tolist(), strict=True))
    assert score.confusion.tolist() == [[pairs.count((true, read)) for read in range(10)] for true in range(10)]


def test_a_loader_that_shuffles_is_scored_with_its_own_labels(train_set):
    backend = script.EagerBackend(script.load_net(script.REFERENCE))
    loader = script.Loader(train_set[0][:2000], train_set[1][:2000], 32, script.Recipe())
    assert script.test(backend, loader).accuracy > 97


# ---------------------------------------------------------------- a run and its files


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the drawing, which takes as long as two epochs of few images."""
    monkeypatch.setattr(pictures, "draw", lambda *args: {})


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
    assert {path.name for path in small_run.iterdir()} == {"checkpoint.pt", "model.pt", "draw.html", *TABLES, *PICTURES}
    rows = history_of(small_run)
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in rows for value in row.values())
    assert float(rows[-1]["learning_rate"]) == pytest.approx(0.02 / 1000)
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    recipe = json.loads((small_run / "recipe.json").read_text())
    assert {**recipe, **asdict(script.Recipe(epochs=2, seed=7))} == recipe
    assert (recipe["torch"], recipe["device"]) == (torch.__version__, "cpu")
    for name in PICTURES:
        with Image.open(small_run / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 5
    backend = script.EagerBackend(script.load_net(small_run / "model.pt"))
    score = script.test(backend, script.Loader(test_set[0][:960], test_set[1][:960], 1000))
    assert score.accuracy == float(rows[-1]["test_accuracy"])
    assert score.loss == pytest.approx(float(rows[-1]["test_loss"]), rel=1e-5)


def test_train_log_reads_like_the_source_documents(small_run):
    log = (small_run / "train.log").read_text(encoding="utf-8")
    assert SOURCE_TABLE in log
    assert "\nTotal params: 15,440\n" in log
    assert re.search(r"^backend: (compiled|eager), float32, threads: \d+ \(.+\)$", log, re.MULTILINE)
    epochs = re.findall(
        r"loss=\d\.\d{4} batch_id=29: 100%\|█+\| 30/30 \[[^\n]+\]\n\n"
        r"Test set: Average loss: \d\.\d{4}, Accuracy: (\d+)/960 \((\d+\.\d\d)%\)\n",
        log,
    )
    assert len(epochs) == 2
    assert all(percent == f"{100 * int(right) / 960:.2f}" for right, percent in epochs)
    last = rf"Final accuracy: {epochs[-1][1]}% after 2 epochs in \d+ min \d+ s; see {re.escape(str(small_run))}"
    assert re.fullmatch(last, log.splitlines()[-1])


def test_the_sources_recipe_and_a_flag_that_overrides_it(tmp_path, few_images, no_pictures):
    run = run_of(tmp_path, "--recipe", "source", "--weight-decay", "0.001", "--epochs", "1")
    recipe = json.loads((run / "recipe.json").read_text())
    told = {"batch_size": 32, "max_lr": 0.01, "rotation": 5, "affine_rotation": 5, "shear": 5, "translate": 0}
    told |= {"scale": 0, "weight_decay": 0.001, "interpolation": "nearest", "activation": "relu"}
    assert recipe | told == recipe
    assert script.load_net(run / "model.pt").activation is nn.functional.relu


def test_every_field_of_the_recipe_is_a_flag():
    for field in fields(script.Recipe):
        flag = "--" + field.name.replace("_", "-")
        kind = type(field.default)
        if kind is bool:
            value, words = not field.default, ["--no-" + flag[2:] if field.default else flag]
        else:
            value = "relu" if field.name == "activation" else "nearest" if kind is str else kind(2)
            value = 0.5 if field.metadata.get("most") == 0.99 else value
            words = [flag, str(value)]
        _, recipe = script.parse_arguments(words)
        assert asdict(recipe) == asdict(script.Recipe()) | {field.name: value}


def test_holdout_never_looks_at_the_test_images(tmp_path, monkeypatch, train_set, no_pictures):
    asked = []
    monkeypatch.setattr(script, "load_mnist", lambda *args: asked.append(args[1]) or [part[:960] for part in train_set])
    train_loader, test_loader = script.make_loaders(script.Recipe(holdout=160), None, CPU)
    assert torch.equal(train_loader.images, train_set[0][:800])
    assert torch.equal(test_loader.images, train_set[0][800:960])
    assert torch.equal(test_loader.labels, train_set[1][800:960])
    log = (run_of(tmp_path, "--holdout", "160", "--epochs", "1") / "train.log").read_text(encoding="utf-8")
    assert asked == [True, True]
    assert "\nHeld-out set: Average loss" in log
    assert "Test set" not in log


def test_two_runs_of_a_seed_in_one_second_have_folders_of_their_own(tmp_path, monkeypatch, few_images, no_pictures):
    monkeypatch.setattr(script.time, "strftime", lambda _: "now")
    for _ in range(2):
        assert script.main(["--epochs", "1", "--no-cpp", "--device", "cpu", "--out-dir", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"now-seed1", "now-seed1-2"}


def test_a_run_with_another_optimizer_is_resumed(tmp_path, monkeypatch, few_images, no_pictures):
    def sgd(net, recipe, total_steps):
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
        return optimizer, script.OneCycleLR(optimizer, 0.1, total_steps)

    train = script.train
    monkeypatch.setattr(script, "make_optimizer", sgd)
    monkeypatch.setattr(script, "train", Mock(wraps=train, side_effect=[DEFAULT, KeyboardInterrupt]))
    assert script.main(["--epochs", "2", "--no-cpp", "--device", "cpu", "--out-dir", str(tmp_path)]) == 130
    monkeypatch.setattr(script, "train", train)
    assert script.main(["--resume", str(only_run(tmp_path)), "--device", "cpu"]) == 0
    assert len(history_of(only_run(tmp_path))) == 2


def test_a_changed_network_trains_eagerly_and_gets_no_page(tmp_path, monkeypatch, few_images, no_pictures):
    class Mirrored(script.Net):
        def forward(self, x):
            return super().forward(x.flip(3))

    monkeypatch.setattr(script, "Net", Mirrored)
    run = run_of(tmp_path, "--epochs", "1")
    assert {"model.pt", *TABLES} <= {path.name for path in run.iterdir()}
    log = (run / "train.log").read_text(encoding="utf-8")
    assert "(EagerBackend or Net was changed)\n" in log
    assert "\nno page: this Net is another one than page/forward.js computes\n" in log


# ---------------------------------------------------------------- the README


def test_the_committed_weights_are_the_reference_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # from elsewhere: data/ and assets/ are beside script.py
    assert script.main(["--evaluate", "--device", "cpu"]) == 0
    told, _, _, *rows = capsys.readouterr().out.splitlines()
    right = int(re.match(r"Test set: Average loss: \d\.\d{4}, Accuracy: (\d+)/10000", told)[1])
    counts = np.array([row.split()[2:] for row in rows], dtype=int)
    assert (counts.shape, counts.sum(), np.trace(counts)) == ((10, 10), 10_000, right)
    assert [row.split()[1] for row in rows] == [f"{100 * counts[d, d] / counts[d].sum():.2f}%" for d in range(10)]
    assert float(history_of(script.REFERENCE.parent)[19]["test_accuracy"]) == right / 100 > 99.40
    log = (script.REFERENCE.parent / "train.log").read_text(encoding="utf-8").strip()
    assert log in README
    assert f"\nFinal accuracy: {right / 100:.2f}% after 20 epochs in " in log


@pytest.mark.parametrize(
    ("file", "start"), [("study", "**ours**"), ("study-relu", "ours with ReLU"), ("study-source", "the source")]
)
def test_the_readme_tells_what_the_studies_found(file, start):
    with open(HERE / "results" / "studies" / f"{file}.csv", newline="") as table:
        values = np.array([float(row["accuracy"]) for row in csv.DictReader(table)])
    assert values.min() > 99.40
    (row,) = re.findall(rf"^\| {re.escape(start)}.*$", README, re.M)
    told = [str(len(values)), *(f"{value:.3f}" for value in (values.mean(), values.std(ddof=1)))]
    assert re.findall(r"\d+\.\d+|\b\d+\b", row)[-5:] == [*told, f"{values.min():.2f}", f"{values.max():.2f}"]


def test_the_python_in_the_documents_runs(tmp_path, monkeypatch, capsys, few_images):
    for name in ("first", "second"):
        (tmp_path / "runs" / "study" / name).mkdir(parents=True)
        shutil.copy(script.REFERENCE, tmp_path / "runs" / "study" / name)
    for file, folder in (("README.md", HERE), ("docs/recipe.md", tmp_path)):
        monkeypatch.chdir(folder)
        blocks = re.findall(r"^```python\n(.*?)^```", (HERE / file).read_text(encoding="utf-8"), re.M | re.S)
        assert blocks
        for block in blocks:
            exec(block, {})
    errors, wrong = map(json.loads, capsys.readouterr().out.splitlines()[-2:])
    assert errors[0] == errors[1] == wrong[0] == wrong[1] < 20


def test_the_documents_links_exist():
    for document in (HERE / "README.md", *(HERE / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            assert "://" in link or "/actions/" in link or (document.parent / link).exists(), link


# ---------------------------------------------------------------- command line


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
    "arguments",
    [
        *("--epochs 0", "--epochs 1.5", "--batch-size 60001", "--holdout 60000", "--max-lr -0.1", "--shear 90"),
        *("--weight-decay nan", f"--seed {2**63}", "--activation mish", "--recipe theirs", "--nonsense"),
        *("--device abacus", "--device cuda", "--evaluate --resume run", "--evaluate --seed 3"),
        *("--resume run --holdout 0", "--resume run --no-cpp", "--resume run --recipe ours"),
    ],
)
def test_bad_usage_is_one_line_that_names_the_flag(tmp_path, monkeypatch, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert arguments.split()[0] in refused(capsys, *arguments.split(), status=2)
    assert not list(tmp_path.iterdir())


class Hostile:
    """Unpickled with code allowed, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("hostile",)


def damaged(file):
    """Contents that are not the file's: cut, a text, with one bit of a number changed, a hostile pickle."""
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2 // 4 * 4 + 3] ^= 0x80
    torch.save(Hostile(), "hostile.pt")
    return content[:5000], b"no weights", bytes(flipped), Path("hostile.pt").read_bytes()


def test_weights_that_are_damaged_or_foreign(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = script.load(script.REFERENCE)
    foreign = {1: 2}, [1, 2], nn.Linear(3, 3).state_dict(), good | {"_extra_state": ["relu"]}
    for content in (*damaged(script.REFERENCE), *foreign):
        script.save(Path("weights.pt"), content)
        assert refused(capsys, "--evaluate", "weights.pt").startswith("weights.pt ")
    assert refused(capsys, "--evaluate", "missing.pt") == "cannot read missing.pt: No such file or directory"
    assert not Path("hostile").exists()


def test_checkpoints_that_are_damaged_or_foreign(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ours = script.load(small_run / "checkpoint.pt")
    foreign = (
        script.load(small_run / "model.pt"),
        [1, 2],
        {**ours, "recipe": {**ours["recipe"], "interpolation": "sharp"}},
        {**ours, "recipe": {**ours["recipe"], "compile": True}},  # from an older version
        {**ours, "recipe": {name: ours["recipe"][name] for name in ("epochs", "seed")}},
        {**ours, "net": {**ours["net"], "conv1.weight": torch.zeros(3, 3)}},
        {**ours, "optimizer": {}},
    )
    assert refused(capsys, "--resume", "missing").startswith("cannot read missing/checkpoint.pt: No such file")
    Path("killed").mkdir()  # in its first epoch
    shutil.copy(small_run / "recipe.json", "killed")
    assert "nothing to resume" in refused(capsys, "--resume", "killed")
    for content in (*damaged(small_run / "checkpoint.pt"), *foreign):
        script.save(Path("checkpoint.pt"), content)
        assert refused(capsys, "--resume", ".").startswith("checkpoint.pt ")
    assert not Path("hostile").exists()


def test_resuming_a_finished_run_does_nothing(small_run, capsys):
    before = {path: path.read_bytes() for path in small_run.iterdir()}
    for path in (small_run, small_run / "model.pt"):
        assert script.main(["--resume", str(path)]) == 0
        assert capsys.readouterr().out == f"{small_run} is finished; nothing to do\n"
    assert {path: path.read_bytes() for path in small_run.iterdir()} == before


# ---------------------------------------------------------------- data that is missing or damaged


@pytest.fixture
def data_dir(tmp_path):
    """A copy of data/ with the test archives alone, which are all that evaluating needs."""
    return Path(shutil.copytree(HERE / "data", tmp_path / "data", ignore=shutil.ignore_patterns("train-*")))


@pytest.fixture
def web(tmp_path):
    """The address of a web server with the archives under /good/, and zeros in their place under /altered/."""
    shutil.copytree(HERE / "data" / "MNIST" / "raw", tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "altered", copy_function=lambda _, to: Path(to).write_bytes(b"0"))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("damage", ["missing", "cut", "one byte altered", "a folder"])
def test_a_damaged_archive_is_refused_or_downloaded_and_kept_as_bad(data_dir, web, monkeypatch, capsys, damage):
    archive = data_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    content = archive.read_bytes()
    archive.unlink()
    if damage == "a folder":
        archive.mkdir()
    elif damage != "missing":
        archive.write_bytes({"cut": content[:-1], "one byte altered": content[:-1] + b"\xff"}[damage])
    before = sorted(archive.parent.iterdir())
    monkeypatch.setattr(MNIST, "mirrors", [f"{web}/no-such-folder/", f"{web}/altered/"])
    assert script.main(["--evaluate", "--data-dir", str(data_dir)]) == 1
    line = capsys.readouterr().err.splitlines()[-1]  # torchvision's progress bar comes before it
    assert line.startswith(f"script.py: error: {archive} is missing or damaged")
    assert sorted(archive.parent.iterdir()) == before
    monkeypatch.setattr(MNIST, "mirrors", [f"{web}/altered/", f"{web}/good/"])
    assert script.main(["--evaluate", "--data-dir", str(data_dir)]) == 0
    assert archive.read_bytes() == content
    assert len(list(archive.parent.glob("*.bad"))) == (damage != "missing")


def test_other_data_under_mnists_names_is_refused_and_stays(data_dir, capsys):
    archive = data_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte.gz"
    archive.write_bytes(gzip.compress(bytes(10_008)))  # as Fashion-MNIST's
    before = {path: path.read_bytes() for path in archive.parent.iterdir()}
    assert refused(capsys, "--evaluate", "--data-dir", data_dir).startswith(f"{archive} is not MNIST's")
    assert {path: path.read_bytes() for path in archive.parent.iterdir()} == before


def test_nothing_but_the_archives_is_believed_or_written(data_dir, test_set):
    (data_dir / "MNIST" / "processed").mkdir()
    torch.save((torch.zeros(10_000, 28, 28), torch.zeros(10_000)), data_dir / "MNIST" / "processed" / "test.pt")
    (data_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(bytes(10_008))
    before = sorted(data_dir.rglob("*"))
    assert torch.equal(script.load_mnist(data_dir, False, CPU)[1], test_set[1])
    assert sorted(data_dir.rglob("*")) == before


# ---------------------------------------------------------------- interruption


def child(number, moment, *arguments):
    """What a child process runs: main() on 320 images, with a signal at a moment.

    "step 15" is in the 15th step, "model.pt 1" where a file's temporary is whole and, for the first time, not renamed.
    """
    load, step, rename, calls = script.load_mnist, torch.optim.Adam.step, os.replace, []

    def strike(place):
        calls.append(place)
        if f"{place} {calls.count(place)}" == moment:
            signal.raise_signal(number)

    def struck_step(*args, **options):
        strike("step")
        return step(*args, **options)

    def struck_rename(source, target):
        strike(target.name)
        rename(source, target)

    script.load_mnist = lambda *args: tuple(part[:320] for part in load(*args))
    os.replace, torch.optim.Adam.step = struck_rename, struck_step
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite that a shell runs in the background ignores it
    sys.exit(script.main(list(arguments)))


def in_child(moment, *arguments, number=9):
    """Run child() in a process of its own; 9 kills it."""
    code = f"import test_model; test_model.child{(int(number), moment, *map(str, arguments))!r}"
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    line = [sys.executable, "-c", code]
    return subprocess.run(line, capture_output=True, text=True, encoding="utf-8", env=environment, check=False)


TWO_EPOCHS = "--epochs", "2", "--device", "cpu", "--out-dir"  # of ten steps each


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The runs of two epochs that nothing interrupts, by backend."""
    runs = {}
    for flag in ("--cpp", "--no-cpp"):
        out = tmp_path_factory.mktemp("unbroken")
        assert in_child("never", flag, *TWO_EPOCHS, out).returncode == 0
        runs[flag] = only_run(out)
    return runs


def assert_same_end(run, unbroken):
    """Both runs ended with the same weights, the same history but for its times, and the same files."""
    first, second = (torch.load(folder / "model.pt", weights_only=True) for folder in (run, unbroken))
    assert first.pop("_extra_state") == second.pop("_extra_state")  # the activation; all others are tensors
    assert all(torch.equal(first[name], second[name]) for name in second)
    rows, wanted = history_of(run), history_of(unbroken)
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in wanted]
    assert {path.name for path in unbroken.iterdir()} <= {path.name for path in run.iterdir()}
    logs = [(folder / "train.log").read_text(encoding="utf-8") for folder in (run, unbroken)]
    assert re.findall("Test set: .*", logs[0]) == re.findall("Test set: .*", logs[1])


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--cpp", "--no-cpp"])
@pytest.mark.parametrize("moment", ["step 15", "history.csv 2", "confusion.png 1"])
def test_killed_and_resumed_it_ends_in_the_same_bits(tmp_path, unbroken, moment, flag):
    assert in_child(moment, flag, *TWO_EPOCHS, tmp_path).returncode == -signal.SIGKILL
    done = in_child("never", "--resume", only_run(tmp_path))
    assert (done.returncode, done.stderr) == (0, "compiling backend.cpp ...\n" if flag == "--cpp" else "")
    assert_same_end(only_run(tmp_path), unbroken[flag])
    assert done.stdout.splitlines()[-1].startswith("Final accuracy: ")
    assert (only_run(tmp_path) / "train.log").read_text(encoding="utf-8").count("Final accuracy: ") == 1


@pytest.mark.slow
def test_ctrl_c_keeps_the_finished_epochs_and_says_how_to_go_on(tmp_path, unbroken):
    arguments = "--no-cpp", *TWO_EPOCHS, tmp_path / "my runs"
    early = in_child("step 5", *arguments, number=signal.SIGINT)
    assert (early.returncode, early.stderr) == (130, "script.py: interrupted\n")
    only_run(tmp_path / "my runs").rename(tmp_path / "early")
    done = in_child("step 15", *arguments, number=signal.SIGINT)
    run = only_run(tmp_path / "my runs")
    told, again = done.stderr.split("; go on with: ")
    assert (done.returncode, told, len(again.splitlines())) == (130, "script.py: interrupted", 1)
    _, program, *arguments = shlex.split(again)
    assert program == str(HERE / "script.py")
    assert in_child("never", *arguments).returncode == 0
    assert_same_end(run, unbroken["--no-cpp"])


# ---------------------------------------------------------------- faults of the machine


def test_numbers_that_processors_are_slow_at_count_as_zero():
    code = "import script, sys, torch; sys.exit(script.run_command('', lambda: int(torch.tensor(1e-39) * 1 > 0)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=HERE, check=False).returncode == 0


def test_two_writers_of_one_file_leave_it_whole(tmp_path):
    path, contents = tmp_path / "file", [letter * 2**20 for letter in (b"a", b"b")]
    script.save(path, contents[0])

    def write(content):
        for _ in range(20):
            script.save(path, content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_bytes() in contents
    assert list(tmp_path.iterdir()) == [path]  # no temporary is left


@pytest.mark.parametrize("time", [1, 5, 8, 11])  # recipe.json; checkpoint.pt after epoch 2; a picture; model.pt
def test_a_full_disk_is_named_and_spoils_no_earlier_file(tmp_path, monkeypatch, capsys, few_images, time):
    fsync, calls = os.fsync, []

    def full(file):
        calls.append(file)
        if len(calls) == time:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr(pictures, "draw", lambda *args: {"curves.png": b"drawn"})
    monkeypatch.setitem(sys.modules, "page", None)
    monkeypatch.setattr(os, "fsync", full)
    line = refused(capsys, "--epochs", "2", "--no-cpp", "--device", "cpu", "--out-dir", tmp_path)
    run = only_run(tmp_path)
    assert re.fullmatch(rf"cannot write {re.escape(str(run))}/\S+: No space left on device", line)
    assert not list(run.glob(".*"))  # no temporary
    if time > 1:
        assert script.main(["--resume", str(run), "--device", "cpu"]) == 0
        assert len(history_of(run)) == 2
        assert (run / "curves.png").read_bytes() == b"drawn"


def test_a_table_that_is_open_elsewhere_does_not_end_a_run(tmp_path, monkeypatch, capsys, few_images, no_pictures):
    rename, names = os.replace, []

    def locked(source, target):  # as on Windows, while Excel has it open, in the first two epochs
        names.append(target.name)
        if target.name == "history.csv" and names.count("history.csv") <= 2:
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "replace", locked)
    run = run_of(tmp_path, "--epochs", "3", "--no-cpp")
    assert len(history_of(run)) == 3
    assert (run / "train.log").read_text(encoding="utf-8").count("history.csv: Permission denied") == 1


@pytest.mark.parametrize("arguments", ["", "--no-cpp", "--holdout 900 --batch-size 60"])
def test_a_run_that_diverges_is_stopped(tmp_path, capsys, few_images, arguments):
    # The last has one step, which spoils the weights.
    line = refused(capsys, *f"--max-lr 1e30 --epochs 1 --device cpu {arguments}".split(), "--out-dir", tmp_path)
    assert re.search(r"is not finite.* epoch 1.*; begin anew with a lower --max-lr$", line)
    assert {path.name for path in only_run(tmp_path).iterdir()} == {"recipe.json"}


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys, few_images):
    forward_backward, calls = script.EagerBackend.forward_backward, []

    def once_nan(*args):
        loss, right = forward_backward(*args)
        calls.append(loss)
        return (loss * math.nan if len(calls) == 40 else loss), right

    monkeypatch.setattr(script.EagerBackend, "forward_backward", once_nan)
    line = refused(capsys, "--epochs", "2", "--no-cpp", "--device", "cpu", "--out-dir", tmp_path)
    assert line.startswith("the loss is not finite: epoch 2, step 10 of 30, ")
    assert len(script.load(only_run(tmp_path) / "checkpoint.pt")["history"]) == 1
