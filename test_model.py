"""The companion suite of script.py. It opens with the claim and with what the network is made of.

pytest -m "not slow"    the fast part
pytest                  all of it: the whole 20-epoch run, last, and faults injected into processes of their own
"""

import csv
import hashlib
import http.server
import importlib
import json
import math
import os
import re
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
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

import script
from conftest import CPU, FAULTS_TOLD, HERE, command, fault, only_run

README = (HERE / "README.md").read_text(encoding="utf-8")
SOURCE_TABLE = README.split("## Architecture")[1].split("```\n")[1].strip()  # as the source document has it


# ---------------------------------------------------------------- the claim, and what the network is made of


@pytest.mark.slow
def test_twenty_epochs_pass_99_40_percent_at_the_last(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole_run")
    done = command("--out-dir", out)
    assert done.returncode == 0, done.stderr
    run = only_run(out)
    rows = list(csv.DictReader((run / "history.csv").open()))
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 21)]
    accuracy = float(rows[-1]["test_accuracy"])
    print(f"last epoch: {accuracy:.2f}%")
    assert accuracy > 99.40
    assert done.stdout.encode() == (run / "train.log").read_bytes()
    assert f"Final accuracy: {accuracy:.2f}% after 20 epochs in " in done.stdout.splitlines()[-1]
    evaluated = command("--evaluate", run / "model.pt")
    assert evaluated.stdout.splitlines()[0] == re.findall(r"Test set: .*", done.stdout)[-1]


def test_the_committed_weights_score_above_99_40_percent(tmp_path):
    done = command("--evaluate", cwd=tmp_path)  # from elsewhere: data/ and assets/ are beside script.py
    assert (done.returncode, done.stderr) == (0, "")
    right = int(re.search(r"^Test set: Average loss: \d\.\d{4}, Accuracy: (\d+)/10000", done.stdout)[1])
    assert right > 9940
    rows = [line.split() for line in done.stdout.splitlines()[3:]]
    counts = np.array([[int(count) for count in row[2:]] for row in rows])
    assert counts.shape == (10, 10)
    assert counts.sum() == 10_000
    assert np.trace(counts) == right
    assert [row[1] for row in rows] == [f"{100 * counts[d, d] / counts[d].sum():.2f}%" for d in range(10)]
    history = list(csv.DictReader((HERE / "assets" / "history.csv").open()))
    assert len(history) == 20
    assert float(history[-1]["test_accuracy"]) == right / 100
    assert not list(tmp_path.iterdir())


def test_summary_is_the_source_documents_table():
    assert script.summary() == SOURCE_TABLE


def test_parameters():
    count = sum(parameter.numel() for parameter in script.Net().parameters() if parameter.requires_grad)
    assert count == 15_440 < 20_000


def test_output_is_log_probabilities():
    output = script.Net()(torch.rand(5, 1, 28, 28))
    assert output.shape == (5, 10)
    torch.testing.assert_close(output.exp().sum(dim=1), torch.ones(5))


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
    start = [norm.running_mean.clone() for norm in norms]
    net.eval()(images)
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, start, strict=True))
    net.train()(images)
    assert not any(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, start, strict=True))


def test_global_average_pooling_forgets_where_a_feature_stands():
    net, images = script.Net().eval(), torch.rand(8, 1, 28, 28)
    straight = net(images)
    with net.norm6.register_forward_hook(lambda module, args, out: out.roll((2, 3), dims=(2, 3))):
        torch.testing.assert_close(net(images), straight)
    with net.norm5.register_forward_hook(lambda module, args, out: out.roll((2, 3), dims=(2, 3))):
        assert not torch.allclose(net(images), straight)  # before a padded convolution the place does matter


# ---------------------------------------------------------------- optimiser and schedule


def test_adam_decays_weights_that_have_no_gradient():
    for decay, moved in ((0.1, True), (0.0, False)):
        net = script.Net()
        optimizer, _ = script.make_optimizer(net, script.Recipe(weight_decay=decay), total_steps=100)
        assert type(optimizer) is torch.optim.Adam
        before = net.conv6.weight.detach().clone()
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert torch.equal(net.conv6.weight, before) is not moved
        assert (net.conv6.weight.abs().mean() < before.abs().mean()).item() is moved


def test_one_cycle_follows_the_recipe_for_37500_steps():
    recipe = script.Recipe()
    steps = recipe.epochs * len(script.Loader(torch.empty(60_000, 0), None, recipe.batch_size))
    assert steps == 37_500
    optimizer, scheduler = script.make_optimizer(script.Net(), recipe, steps)
    optimizer.step()  # or the scheduler warns that it was stepped first
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.step()
    first, last = recipe.max_lr / recipe.div_factor, recipe.max_lr / recipe.div_factor / recipe.final_div_factor
    peak = round(recipe.pct_start * steps) - 1
    assert rates.index(max(rates)) == peak
    assert (rates[0], rates[peak], rates[-1]) == pytest.approx((first, recipe.max_lr, last), rel=1e-3)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    for low, start, end in ((first, 0, peak), (last, steps - 1, peak)):  # two half cosines
        cosine = [low + (recipe.max_lr - low) * (1 - math.cos(math.pi * part / 8)) / 2 for part in range(9)]
        measured = [rates[round(start + (end - start) * part / 8)] for part in range(9)]
        assert measured == pytest.approx(cosine, rel=1e-3)


def test_the_sources_cycle_moves_beta1_as_one_cycle_does_by_default():
    optimizer, scheduler = script.make_optimizer(script.Net(), script.RECIPES["source"], 1000)
    optimizer.step()
    betas = []
    for _ in range(1000):
        betas.append(optimizer.param_groups[0]["betas"][0])
        scheduler.step()
    assert (betas[0], min(betas), betas[199], betas[-1]) == pytest.approx((0.95, 0.85, 0.85, 0.95))


@pytest.mark.parametrize("steps", range(1, 12))
def test_one_cycle_serves_a_run_of_any_length(steps):
    optimizer, scheduler = script.make_optimizer(script.Net(), script.Recipe(), steps)
    optimizer.step()
    for _ in range(steps):
        assert 0 < scheduler.get_last_lr()[0] <= script.Recipe.max_lr
        scheduler.step()


# ---------------------------------------------------------------- data and augmentation


def test_the_archives_are_mnist():
    told = re.findall(r"^\| (\S+\.gz) \|.*\| (\w{32}) \|$", (HERE / "data" / "README.md").read_text(), re.M)
    raw = HERE / "data" / "MNIST" / "raw"
    assert told == [(name, hashlib.md5((raw / name).read_bytes()).hexdigest()) for name, _ in told]
    assert sorted(told) == sorted(script.MNIST.resources)


def test_the_tensors_are_mnist(train_set, test_set):
    images, labels = train_set
    assert (images.dtype, images.shape) == (torch.uint8, (60_000, 1, 28, 28))
    assert labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    pixels = images.float() / 255
    assert (pixels.mean().item(), pixels.std().item()) == pytest.approx((script.MEAN, script.STD), abs=5e-5)
    images, labels = test_set
    assert (images.dtype, images.shape) == (torch.uint8, (10_000, 1, 28, 28))
    assert labels.bincount().tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_the_test_loader_normalises_in_order(test_set):
    images, labels = test_set
    loader = script.Loader(images, labels, 1000)
    batches = list(loader)
    assert len(batches) == len(loader) == 10
    assert torch.equal(torch.cat([batch[1] for batch in batches]), labels)
    expected = vision.normalize(images.float() / 255, [0.1307], [0.3081])
    torch.testing.assert_close(torch.cat([batch[0] for batch in batches]), expected)


def test_the_training_loader_shows_each_image_once_in_a_new_order():
    images = torch.arange(1000, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 28, 28)
    labels = torch.arange(1000)
    still = replace(script.Recipe(), rotation=0.0, affine_rotation=0.0, shear=0.0, translate=0.0, scale=0.0)
    loader = script.Loader(images, labels, 32, still)
    orders = []
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == 32
        assert [len(batch[1]) for batch in batches] == [32] * 31 + [8]
        order = torch.cat([batch[1] for batch in batches])
        shown = torch.cat([batch[0] for batch in batches])[:, 0, 14, 14] * script.STD + script.MEAN
        torch.testing.assert_close(shown * 255, (order % 256).float(), atol=1e-2, rtol=0)  # with its own label
        orders.append(order)
        assert torch.equal(order.sort().values, labels)
    assert not torch.equal(*orders)


def warp(images, rotation=0.0, angle=0.0, shear=0.0, scale=1.0, shift=(0.0, 0.0), interpolation="bilinear"):
    """script.py's transformation of images (B, 1, H, W) with given numbers instead of drawn ones."""
    same, shift = torch.ones(len(images)), torch.tensor(shift).expand(len(images), 2)
    matrices = script.affine_matrices(rotation * same, angle * same, shear * same, scale * same, shift)
    return script.warp(images, matrices, interpolation)


@pytest.mark.parametrize(
    ("angle", "shear", "scale", "pixels"),
    [(5, 0, 1, (0, 0)), (0, 10, 1, (0, 0)), (0, 0, 0.9, (0, 0)), (0, 0, 1, (2, -1)), (-4, 7, 1.1, (-1, 2))],
)
def test_augmentation_agrees_with_torchvisions_affine(test_set, angle, shear, scale, pixels):
    images = test_set[0][:50].float() / 255
    theirs = vision.affine(images, angle, list(pixels), scale, [shear, 0], InterpolationMode.BILINEAR)
    ours = warp(images, 0.0, angle, shear, scale, [pixel / 28 for pixel in pixels])
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    assert (ours - images).abs().max() > 0.1


def test_the_sources_interpolation_is_torchvisions_default(test_set):
    images = test_set[0][:50].float() / 255
    theirs = vision.affine(images, 4, [1, -2], 0.9, [5, 0])
    ours = warp(images, 0.0, 4, 5, 0.9, [1 / 28, -2 / 28], script.RECIPES["source"].interpolation)
    assert (ours != theirs).float().mean() < 1e-3  # points that lie between two pixels may fall to either
    assert (ours != images).float().mean() > 0.1


def test_augmentation_turns_first_and_then_transforms(test_set):
    # Large and smooth, so that torchvision's two interpolations differ little from our one.
    images = vision.resize(test_set[0][:50].float() / 255, [224, 224], InterpolationMode.BICUBIC).clamp(0, 1)
    turned = vision.rotate(images, -5, InterpolationMode.BILINEAR)
    theirs = vision.affine(turned, 3, [16, -8], 1.1, [10, 0], InterpolationMode.BILINEAR)
    ours = warp(images, 5.0, 3, 10, 1.1, [16 / 224, -8 / 224])
    assert (ours - theirs).abs().mean() < 1e-3
    assert (warp(images, 0.0, 8, 10, 1.1, [16 / 224, -8 / 224]) - theirs).abs().mean() > 2e-3  # order matters


def test_augmentation_draws_for_each_image_and_repeats_with_the_seed(test_set):
    images = test_set[0][:1].float().expand(64, -1, -1, -1) / 255
    script.seed_everything(1, 1)
    first = script.augment(images, script.Recipe())
    assert len(first.flatten(1).unique(dim=0)) == 64
    assert not torch.equal(first, script.augment(images, script.Recipe()))
    script.seed_everything(1, 1)
    assert torch.equal(first, script.augment(images, script.Recipe()))
    for other in ((1, 2), (2, 1)):
        script.seed_everything(*other)
        assert not torch.equal(first, script.augment(images, script.Recipe()))


@pytest.mark.parametrize("name", ["rotation", "affine_rotation", "shear", "translate", "scale"])
def test_augmentation_keeps_to_each_range_of_the_recipe(monkeypatch, name):
    none = dict.fromkeys(("rotation", "affine_rotation", "shear", "translate", "scale"), 0.0)
    seen = []
    monkeypatch.setattr(script, "affine_matrices", lambda *drawn: seen.append(drawn) or torch.zeros(4096, 2, 3))
    script.augment(torch.zeros(4096, 1, 28, 28), script.Recipe(**{**none, name: 0.5}))
    ranges = {key: value.flatten() for key, value in zip(none, (*seen[0][:3], seen[0][4], seen[0][3]), strict=True)}
    for key, values in ranges.items():
        centre, spread = float(key == "scale"), 0.5 * (key == name)
        assert values.min().item() == pytest.approx(centre - spread, abs=0.01)
        assert values.max().item() == pytest.approx(centre + spread, abs=0.01)


def test_bicubic_keeps_the_strokes_that_bilinear_blurs(test_set):
    images = test_set[0][:500].float() / 255
    half_a_pixel = torch.tensor([[1.0, 0.0, 1 / 28], [0.0, 1.0, 1 / 28]]).expand(500, 2, 3)
    spread = {mode: script.warp(images, half_a_pixel, mode).std().item() for mode in ("bilinear", "bicubic")}
    assert spread["bilinear"] < 0.94 * images.std().item()
    assert spread["bicubic"] > 0.955 * images.std().item()
    shown = script.augment(images, script.Recipe())
    assert shown.min() >= 0
    assert shown.max() <= 1


def test_background_stays_background(test_set):
    images, labels = test_set
    shown, _ = next(iter(script.Loader(images[:32], labels[:32], 32, script.Recipe(translate=0.3))))
    assert shown.min().item() == pytest.approx((0 - 0.1307) / 0.3081)


# ---------------------------------------------------------------- step, training, score


def test_it_overfits_one_batch(test_set):
    torch.manual_seed(1)
    net, recipe = script.Net(), script.Recipe(compile=False)
    optimizer, scheduler = script.make_optimizer(net, recipe, 60)
    forward_backward, _ = script.make_step(net, recipe)
    images, labels = next(iter(script.Loader(test_set[0][:32], test_set[1][:32], 32)))
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(forward_backward(images, labels)[0].item())
        optimizer.step()
        scheduler.step()
    assert losses[0] > 2
    assert losses[-1] < 0.1


@pytest.mark.parametrize("compiled", [True, False])
def test_one_epoch_of_five_thousand_images_passes_90_percent(train_set, test_set, compiled):
    script.seed_everything(1, 1)
    net, recipe = script.Net().to(memory_format=torch.channels_last), script.Recipe(epochs=1, compile=compiled)
    loader = script.Loader(train_set[0][:5000], train_set[1][:5000], recipe.batch_size, recipe)
    optimizer, scheduler = script.make_optimizer(net, recipe, len(loader))
    forward_backward, forward = script.make_step(net, recipe)
    loss, accuracy, rate, bar = script.train(net, loader, forward_backward, optimizer, scheduler, 1)
    assert 0 < loss < 1.5
    assert accuracy > 50
    assert rate == pytest.approx(recipe.max_lr / 1000)
    assert f"loss={loss:.4f} batch_id=156: 100%|" in bar
    assert script.test(forward, script.Loader(test_set[0][:2000], test_set[1][:2000], 1000)).accuracy > 90


def test_the_score_is_torchs_loss_and_a_plain_count(test_set):
    net = script.Net().eval()
    images, labels = test_set[0][:100], test_set[1][:100]
    score = script.test(net, script.Loader(images, labels, 32))
    output = net((images.float() / 255 - 0.1307) / 0.3081)
    assert score.loss == pytest.approx(nn.functional.nll_loss(output, labels).item(), rel=1e-5)
    assert torch.equal(score.predicted, output.argmax(dim=1))
    assert score.accuracy == pytest.approx((score.predicted == labels).float().mean().item() * 100)
    table = np.zeros((10, 10), dtype=np.int64)
    np.add.at(table, (labels.numpy(), score.predicted.numpy()), 1)
    assert score.table.tolist() == table.tolist()


# ---------------------------------------------------------------- a run and what it leaves


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A run of two epochs on 960 images, by the command line's main(); shared, so leave it as it is."""
    folder = tmp_path_factory.mktemp("small") / "runs here, später"
    load = script.load_mnist
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "load_mnist", lambda *args: tuple(part[:960] for part in load(*args)))
        assert script.main(["--epochs", "2", "--seed", "7", "--device", "cpu", "--out-dir", str(folder)]) == 0
    return only_run(folder)


def test_a_run_leaves_its_files(small_run):
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-seed7", small_run.name)
    expected = {"checkpoint.pt", "model.pt", "history.csv", "train.log", "recipe.json", *script.PICTURES}
    assert {path.name for path in small_run.iterdir()} == expected


def test_history_csv(small_run):
    rows = list(csv.DictReader((small_run / "history.csv").open()))
    columns = ["epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate", "seconds"]
    assert [list(row) for row in rows] == [columns, columns]
    assert [row["epoch"] for row in rows] == ["1", "2"]
    numbers = [[float(value) for value in row.values()] for row in rows]
    assert all(math.isfinite(number) for row in numbers for number in row)
    assert float(rows[-1]["learning_rate"]) == pytest.approx(0.02 / 1000)
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])


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


def test_recipe_json(small_run):
    content = json.loads((small_run / "recipe.json").read_text())
    assert {**content, **asdict(script.Recipe(epochs=2, seed=7))} == content
    assert content["torch"] == torch.__version__
    assert (content["device"], content["threads"]) == ("cpu", torch.get_num_threads())
    assert {"python", "torchvision", "system", "commit"} <= content.keys()


@pytest.mark.parametrize("name", script.PICTURES)
def test_pictures_open_and_are_not_blank(small_run, name):
    with Image.open(small_run / name) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
        assert np.asarray(picture.convert("L")).std() > 5


def test_a_run_is_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.setattr(script.time, "strftime", lambda form: "2026-01-01_00-00-00")
    names = [script.new_run(tmp_path, 1).name for _ in range(3)]
    assert names == ["2026-01-01_00-00-00-seed1", "2026-01-01_00-00-00-seed1-2", "2026-01-01_00-00-00-seed1-3"]


def test_model_pt_scores_the_same_when_loaded_afresh(small_run, test_set):
    loader = script.Loader(test_set[0][:960], test_set[1][:960], 1000)
    state = torch.load(small_run / "model.pt", weights_only=True)
    assert all(value.is_contiguous() for value in state.values())
    net = script.Net().eval()
    net.load_state_dict(state)
    score = script.test(net, loader)
    last = list(csv.DictReader((small_run / "history.csv").open()))[-1]
    assert score.accuracy == float(last["test_accuracy"])
    assert score.loss == pytest.approx(float(last["test_loss"]), rel=1e-5)


def run_of(folder, *arguments):
    """The run that main() makes in the folder with these arguments."""
    assert script.main([*arguments, "--device", "cpu", "--out-dir", str(folder)]) == 0
    return only_run(folder)


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the drawing, which takes as long as two epochs of few images."""
    monkeypatch.setattr(script, "png", lambda figure: b"")


def test_two_runs_of_one_seed_are_equal_and_of_another_are_not(small_run, tmp_path, few_images, no_pictures):
    first = torch.load(small_run / "model.pt", weights_only=True)
    for seed, same in ((7, True), (8, False)):
        run = run_of(tmp_path / str(seed), "--epochs", "2", "--seed", str(seed))
        weights = torch.load(run / "model.pt", weights_only=True)
        assert all(torch.equal(first[name], weights[name]) for name in first) is same


def test_the_sources_recipe_and_a_flag_that_goes_before_it(tmp_path, few_images, no_pictures):
    run = run_of(tmp_path, "--recipe", "source", "--weight-decay", "0.001", "--epochs", "1")
    recipe = json.loads((run / "recipe.json").read_text())
    told = {"batch_size": 32, "max_lr": 0.01, "pct_start": 0.2, "div_factor": 10, "final_div_factor": 100}
    told |= {"rotation": 5, "affine_rotation": 5, "shear": 5, "translate": 0, "scale": 0, "weight_decay": 0.001}
    assert {name: recipe[name] for name in told} == told
    assert script.RECIPES["source"].weight_decay == 1e-4
    assert script.RECIPES["source"].epochs == 20
    assert script.RECIPES["ours"] == script.Recipe()


def test_training_images_that_lack_a_digit_are_drawn_without_it(tmp_path, few_images):
    run = run_of(tmp_path, "--holdout", "957", "--batch-size", "3", "--epochs", "1")  # 5, 0 and 4
    with Image.open(run / "augmentation.png") as picture:
        assert picture.height < picture.width / 2


@pytest.mark.parametrize("accuracies", [(10.0, 60.0, 80.0), (60.0, 97.5, 99.5)])
def test_the_curves_show_the_last_accuracies(accuracies):
    history = [{**dict.fromkeys(script.HISTORY, 0.5), "test_accuracy": accuracy} for accuracy in accuracies]
    panel = script.curves(history).axes[1]
    assert panel.get_ylim()[0] < accuracies[-1] < panel.get_ylim()[1]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every name is Unicode")
def test_a_folder_whose_name_is_no_utf8(tmp_path, few_images, no_pictures):
    run = run_of(tmp_path / os.fsdecode(b"caf\xe9"), "--epochs", "1")
    assert "see " in (run / "train.log").read_text(encoding="utf-8").splitlines()[-1]
    assert (run / "model.pt").exists()


def test_a_closed_standard_error_does_not_stop_a_run(tmp_path, monkeypatch, few_images, no_pictures):
    monkeypatch.setattr(sys, "stderr", None)  # as Python has it behind 2>&-
    run_of(tmp_path, "--epochs", "1")


def test_holdout_never_looks_at_the_test_images(tmp_path, monkeypatch, train_set, no_pictures):
    asked, loaders, load_sets = [], [], script.load_sets

    def load(data_dir, train, *args):
        asked.append(train)
        return tuple(part[:960] for part in train_set)

    monkeypatch.setattr(script, "load_mnist", load)
    monkeypatch.setattr(script, "load_sets", lambda *args: loaders.extend(load_sets(*args)) or loaders)
    run = run_of(tmp_path, "--holdout", "160", "--epochs", "1")
    assert asked == [True]
    for loader, part in zip(loaders, (slice(0, 800), slice(800, 960)), strict=True):
        assert torch.equal(loader.images, train_set[0][part])
        assert torch.equal(loader.labels, train_set[1][part])
    log = (run / "train.log").read_text(encoding="utf-8")
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
    [("study", 9, "**ours**"), ("study-source", 10, "the source's,")],
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
    shutil.copytree(HERE / "data", tmp_path / "data")
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
    assert "assets/curves.png" in links
    assert "assets/misclassified.png" in links
    for link in links:
        assert (HERE / link).exists() or link.startswith("../../actions/workflows/model_tests.yml"), link


def test_the_inline_dependencies_are_among_the_requirements():
    metadata = re.search(r"^# dependencies = \[(.*?)\]\n# ///", (HERE / "script.py").read_text("utf-8"), re.M | re.S)[1]
    inline = re.findall(r'"([^"]+)"', metadata)
    required = (HERE / "requirements.txt").read_text().splitlines()
    others = {"scipy>=1.13,<2", "filelock>=3.13,<4", "pytest>=8,<10"}  # predict.py's and study.py's; the suites'
    assert set(required) - set(inline) == others
    assert set(inline) <= set(required)
    assert all(re.fullmatch(r"\w+>=[\d.]+,<\d+", line) for line in required)


# ---------------------------------------------------------------- command line


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    flags = "--epochs --batch-size --max-lr --weight-decay --seed --device --data-dir --out-dir --resume --evaluate"
    for flag in f"{flags} --no-compile --recipe --holdout".split():
        assert flag in text
    for default in (20, 32, 0.02, 2e-06, 1):
        assert f"(default: {default})" in text


def bad_usage(capsys, *arguments):
    """The one line on standard error with which main() refuses with status 2."""
    with pytest.raises(SystemExit, match="2"):
        script.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("script.py: error: ")
    return line.removeprefix("script.py: error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "--epochs is 0; it must be a whole number from 1 to 1000000"),
        ("--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
        ("--batch-size 60001", "--batch-size is 60001; it must be a whole number from 1 to 60000"),
        ("--batch-size 20 --holdout 59990", "--batch-size is 20; it must be a whole number from 1 to 10"),
        ("--holdout 60000", "--holdout is 60000; it must be a whole number from 0 to 59999"),
        ("--max-lr -0.1", "--max-lr is -0.1; it must be a number from 0 to 1e+30"),
        ("--weight-decay nan", "--weight-decay is nan; it must be a number from 0 to 1e+30"),
        (f"--seed {2**63}", f"--seed is {2**63}; it must be a whole number from 0 to {2**63 - 1}"),
        ("--device abacus", "argument --device: invalid choice: 'abacus'"),
        ("--recipe theirs", "argument --recipe: invalid choice: 'theirs'"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("--evaluate --resume run", "argument --resume: not allowed with argument --evaluate"),
        ("--evaluate --seed 3", "--seed is for a new run; --evaluate does not take it"),
        ("--evaluate --recipe source", "--recipe is for a new run; --evaluate does not take it"),
        ("--resume run --out-dir x", "--out-dir is for a new run; --resume does not take it"),
    ],
)
def test_bad_usage(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert bad_usage(capsys, *arguments.split()).startswith(message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 2.0}, {"epochs": True}, {"seed": "1"}, {"shear": 90}, {"div_factor": 0}, {"interpolation": "cubic"}],
)
def test_a_recipe_refuses_what_is_out_of_range(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^{name} is {value!r}; it must be "):
        script.Recipe(**wrong)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(device, capsys):
    if {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
        pytest.skip(f"this machine has {device}")
    assert bad_usage(capsys, "--device", device) == f"--device {device}: there is none here that this torch can use"


def refused(capsys, *arguments):
    """The one line on standard error with which main() refuses with status 1."""
    assert script.main([str(argument) for argument in arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("script.py: error: ")
    return line.removeprefix("script.py: error: ")


class Hostile:
    """Unpickled with code allowed, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("hostile",)


def test_weights_that_are_none(tmp_path, monkeypatch, capsys, small_run):
    monkeypatch.chdir(tmp_path)
    Path("text.pt").write_text("no weights")
    Path("cut.pt").write_bytes((small_run / "model.pt").read_bytes()[:5000])
    Path("folder.pt").mkdir()
    torch.save(nn.Linear(3, 3).state_dict(), "other.pt")
    torch.save({1: 2}, "numbers.pt")
    torch.save([1, 2], "list.pt")
    torch.save(Hostile(), "hostile.pt")
    weights = script.Net().state_dict()
    weights["conv4.bias"][3] = math.nan
    torch.save(weights, "nan.pt")
    before = sorted(tmp_path.iterdir())
    for name, message in {
        "missing.pt": "cannot read missing.pt: No such file or directory",
        "folder.pt": "cannot read folder.pt: Is a directory",
        "text.pt": "text.pt is not a checkpoint, or is damaged",
        "cut.pt": "cut.pt is not a checkpoint, or is damaged",
        "hostile.pt": "hostile.pt is not a checkpoint, or is damaged",
        "list.pt": "list.pt is not a checkpoint of this network",
        "other.pt": "other.pt does not hold the weights of this network",
        "numbers.pt": "numbers.pt does not hold the weights of this network",
        "nan.pt": "nan.pt holds weights that are not finite numbers",
    }.items():
        assert refused(capsys, "--evaluate", name) == message
    assert sorted(tmp_path.iterdir()) == before


def test_an_out_dir_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert refused(capsys, "--out-dir", tmp_path / "file") == f"{tmp_path / 'file'}: File exists"


# ---------------------------------------------------------------- data faults

ARCHIVE = "t10k-labels-idx1-ubyte.gz"


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


@pytest.fixture
def data_dir(tmp_path):
    """A copy of data/ with the test archives alone, which are all that evaluating needs."""
    return Path(shutil.copytree(HERE / "data", tmp_path / "data", ignore=shutil.ignore_patterns("train-*")))


class Mirrors(http.server.BaseHTTPRequestHandler):
    """Mirrors as they fail, by the path's first part; /good/ serves the committed archives."""

    def do_GET(self):
        kind, name = self.path.strip("/").split("/")
        content = (HERE / "data" / "MNIST" / "raw" / name).read_bytes()
        if kind == "garbled":
            self.wfile.write(b"SSH-2.0-mirror\r\n")
        elif kind == "forbidden":
            self.send_error(403)
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write({"good": content, "cut": content[:1000], "altered": bytes(len(content))}[kind])

    def log_message(self, *args):
        pass


@pytest.fixture
def mirrors(monkeypatch):
    """Let torchvision name these mirrors; until a test does, one that refuses the connection at once."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirrors)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"

    def use(*kinds):
        monkeypatch.setattr(script.MNIST, "mirrors", ["http://127.0.0.1:9/", *(f"{address}/{kind}/" for kind in kinds)])

    use()
    yield use
    server.shutdown()
    server.server_close()


@fault(
    "a data archive is missing, truncated, altered or unreadable",
    "downloaded and verified; without a network one line says what to put where; status 1",
)
@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: os.truncate(path, path.stat().st_size - 1),
        flip_a_bit,
        lambda path: (path.unlink(), path.mkdir()),
    ],
    ids=["missing", "empty", "cut", "one bit flipped", "a folder"],
)
def test_a_damaged_archive_is_refused_without_a_network(data_dir, mirrors, capsys, damage):
    archive = data_dir / "MNIST" / "raw" / ARCHIVE
    damage(archive)
    assert refused(capsys, "--evaluate", "--data-dir", data_dir) == (
        f"{archive} is missing or damaged and cannot be downloaded; put a good copy there "
        "(md5 ec29112dd5afa0611ce80d1b7f02629c)"
    )


def test_an_empty_data_folder_is_filled_from_the_first_good_mirror(tmp_path, mirrors, test_set):
    mirrors("garbled", "forbidden", "cut", "altered", "good")
    said = []
    for expected_lines in (2, 2):  # the second time both archives are there
        images, labels = script.load_mnist(tmp_path / "new", False, CPU, said.append)
        assert torch.equal(images, test_set[0])
        assert torch.equal(labels, test_set[1])
        assert len(said) == expected_lines
    assert said[1] == f"data: {tmp_path / 'new' / 'MNIST' / 'raw' / ARCHIVE} is missing or damaged; downloading it"


def test_a_downloaded_archive_that_cannot_be_kept_is_named(tmp_path, mirrors, capsys):
    mirrors("good")
    (tmp_path / "MNIST").touch()
    line = refused(capsys, "--evaluate", "--data-dir", tmp_path)
    assert line.startswith(f"cannot write {tmp_path / 'MNIST' / 'raw' / 't10k-images-idx3-ubyte.gz'}: ")


def test_nothing_but_the_archives_is_believed_or_written(data_dir, mirrors, test_set):
    processed = data_dir / "MNIST" / "processed"
    processed.mkdir()
    torch.save((torch.zeros(10_000, 28, 28, dtype=torch.uint8), torch.zeros(10_000).long()), processed / "test.pt")
    (data_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(bytes(10_008))
    before = sorted(data_dir.rglob("*"))
    images, labels = script.load_mnist(data_dir, False, CPU)
    assert torch.equal(images, test_set[0])
    assert torch.equal(labels, test_set[1])
    assert sorted(data_dir.rglob("*")) == before


# ---------------------------------------------------------------- interruption


def child(moment, *arguments):
    """What a child process runs: main() on 320 images, killed without warning at a moment.

    "step 15" is inside the 15th step, "before model.pt 1" where its temporary is whole and not renamed, "after" behind.
    """
    load = script.load_mnist
    script.load_mnist = lambda *args: tuple(part[:320] for part in load(*args))
    step, rename, calls = torch.optim.Adam.step, os.replace, []

    def die_at(place):
        calls.append(place)
        if f"{place} {calls.count(place)}" == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def deadly_step(*args, **options):
        die_at("step")
        return step(*args, **options)

    def deadly_rename(source, target):
        die_at(f"before {target.name}")
        rename(source, target)
        die_at(f"after {target.name}")

    torch.optim.Adam.step, os.replace = deadly_step, deadly_rename
    sys.exit(script.main(list(arguments)))


def in_child(moment, *arguments):
    """Run child() in a process of its own."""
    code = f"import test_model; test_model.child{(moment, *map(str, arguments))!r}"
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    line = [sys.executable, "-c", code]
    return subprocess.run(line, capture_output=True, text=True, encoding="utf-8", env=environment, check=False)


TWO_EPOCHS = "--epochs", "2", "--device", "cpu", "--no-compile", "--out-dir"  # of ten steps each


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run of two epochs that nothing interrupts."""
    out = tmp_path_factory.mktemp("unbroken")
    assert in_child("never", *TWO_EPOCHS, out).returncode == 0
    return only_run(out)


def without_seconds(run):
    """history.csv but for its times, which no two runs share."""
    return [{**row, "seconds": None} for row in csv.DictReader((run / "history.csv").open())]


def assert_same_end(run, unbroken):
    """Both runs ended with the same weights, the same history and the same files."""
    first, second = (torch.load(folder / "model.pt", weights_only=True) for folder in (run, unbroken))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert without_seconds(run) == without_seconds(unbroken)
    assert {path.name for path in run.iterdir()} == {path.name for path in unbroken.iterdir()}
    logs = [(folder / "train.log").read_text(encoding="utf-8") for folder in (run, unbroken)]
    assert re.findall("Accuracy: .*", logs[0]) == re.findall("Accuracy: .*", logs[1])


@fault(
    "killed (SIGKILL) before the first epoch ends",
    "nothing to resume, and `--resume` says so",
)
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["before recipe.json 1", "step 5", "before checkpoint.pt 1"])
def test_killed_before_the_first_checkpoint_there_is_nothing_to_resume(tmp_path, moment):
    assert in_child(moment, *TWO_EPOCHS, tmp_path).returncode == -signal.SIGKILL
    run = only_run(tmp_path)
    done = in_child("never", "--resume", run)
    checkpoint = run / "checkpoint.pt"
    assert done.stderr == f"script.py: error: cannot read {checkpoint}: No such file or directory\n"
    assert done.returncode == 1


@fault(
    "killed at any later moment: in an epoch, while a file is written, between files, during the pictures",
    "`--resume` ends in the same weights, bit for bit, the same history and the same files as an unbroken run",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        "after checkpoint.pt 1",
        "step 15",
        "before checkpoint.pt 2",
        "after checkpoint.pt 2",
        "before train.log 3",
        "before model.pt 1",
        "before misclassified.png 1",
    ],
)
def test_killed_and_resumed_it_ends_in_the_same_bits(tmp_path, unbroken, moment):
    assert in_child(moment, *TWO_EPOCHS, tmp_path).returncode == -signal.SIGKILL
    run = only_run(tmp_path)
    done = in_child("never", "--resume", run)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_end(run, unbroken)


@pytest.mark.slow
def test_killed_and_resumed_with_the_compiled_step_it_ends_in_the_same_bits(tmp_path):
    arguments = [argument for argument in TWO_EPOCHS if argument != "--no-compile"]
    in_child("never", *arguments, tmp_path / "unbroken")
    assert in_child("step 15", *arguments, tmp_path / "killed").returncode == -signal.SIGKILL
    run = only_run(tmp_path / "killed")
    assert in_child("never", "--resume", run).returncode == 0
    assert_same_end(run, only_run(tmp_path / "unbroken"))


@fault(
    "Ctrl-C, SIGTERM",
    "the finished epochs are kept; one line says how to go on; status 130, 143",
)
@pytest.mark.parametrize(
    ("number", "status", "place", "call", "kept"),
    [
        (signal.SIGINT, 130, (torch.optim.Adam, "step"), 45, 1),  # in the second epoch
        (signal.SIGTERM, 143, (script, "save"), 5, 2),  # in the second checkpoint: recipe.json, then three an epoch
    ],
)
def test_a_signal_pressed_twice_keeps_the_finished_epochs(
    tmp_path, monkeypatch, capsys, small_run, few_images, no_pictures, number, status, place, call, kept
):
    original, calls = getattr(*place), []

    def pressed(*args, **options):
        calls.append(args)
        if len(calls) == call:
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)  # as an impatient user does, and is not heard
        return original(*args, **options)

    monkeypatch.setattr(*place, pressed)
    monkeypatch.setattr(script.interrupt, "deaf_until", 0.0)
    before = signal.signal(number, script.interrupt)
    try:
        arguments = ["--epochs", "2", "--seed", "7", "--device", "cpu", "--out-dir", str(tmp_path / "my runs")]
        assert script.main(arguments) == status
    finally:
        signal.signal(number, before)
    run = only_run(tmp_path / "my runs")
    line = f"script.py: interrupted; what was finished is kept: python script.py --resume '{run}'\n"
    assert capsys.readouterr().err == line
    assert len(script.load(run / "checkpoint.pt")["history"]) == kept
    assert script.main(["--resume", str(run), "--device", "cpu"]) == 0
    assert_same_end(run, small_run)


def send_signals(process, number):
    """Send the signal twice, as an impatient user does; the exit status and standard error."""
    process.send_signal(number)
    process.send_signal(number)
    _, errors = process.communicate()
    return process.returncode, errors


# A suite that a shell put into the background ignores Ctrl-C, and so would what it starts.
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "encoding": "utf-8"}
HEARS = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_ends_in_order_on_a_signal(tmp_path, number, status):
    line = [sys.executable, HERE / "script.py", "--epochs", "2", "--batch-size", "240", "--out-dir", tmp_path]
    process = subprocess.Popen(list(map(str, line)), **PIPES, **HEARS)
    assert any(line.startswith("Test set:") for line in process.stdout)
    returned, errors = send_signals(process, number)
    run = only_run(tmp_path)
    line = f"script.py: interrupted; what was finished is kept: python script.py --resume {run}\n"
    assert (returned, errors) == (status, line)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals to send")
def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    (tmp_path / "torch.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, str(HERE / "script.py")], env=environment, **PIPES, **HEARS)
    assert process.stdout.readline() == "importing\n"
    assert send_signals(process, signal.SIGINT) == (-signal.SIGINT, "")  # of which a shell makes 130


# ---------------------------------------------------------------- resuming


def test_resuming_a_finished_run_does_nothing(small_run, capsys):
    before = {path: path.read_bytes() for path in small_run.iterdir()}
    assert script.main(["--resume", str(small_run)]) == 0
    assert capsys.readouterr().out == f"{small_run} is finished: 2 epochs; nothing to do\n"
    assert {path: path.read_bytes() for path in small_run.iterdir()} == before


@fault(
    "`--resume` with a flag that makes a recipe, whatever its value",
    "refused, with the flag; status 2",
)
@pytest.mark.parametrize("arguments", ["--epochs 2", "--seed 8", "--no-compile", "--recipe ours", "--holdout 0"])
def test_resuming_takes_no_training_flag(small_run, capsys, arguments):
    line = bad_usage(capsys, "--resume", small_run, *arguments.split())
    assert line == f"{arguments.split()[0]} is for a new run; --resume does not take it"


def test_only_an_accepted_checkpoint_has_leftovers_removed(small_run, tmp_path, capsys):
    left = [".checkpoint.pt.123.tmp", ".checkpoint.pt.old.tmp", ".notes.tmp"]
    for name in left:
        (tmp_path / name).touch()
    refused(capsys, "--resume", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == left
    shutil.copytree(small_run, tmp_path, dirs_exist_ok=True)
    bad_usage(capsys, "--resume", tmp_path, "--epochs", "2")
    assert all((tmp_path / name).exists() for name in left)
    assert script.main(["--resume", str(tmp_path)]) == 0
    assert [name for name in left if (tmp_path / name).exists()] == left[1:]


def test_a_recipe_with_few_training_images_can_be_resumed(small_run, tmp_path):
    checkpoint = script.load(small_run / "checkpoint.pt")
    checkpoint["recipe"] |= {"holdout": 59_980, "batch_size": 18}
    (tmp_path / "checkpoint.pt").write_bytes(script.packed(checkpoint))
    recipe, _ = script.read_checkpoint(tmp_path)
    assert recipe == replace(script.Recipe(), epochs=2, seed=7, holdout=59_980, batch_size=18)


@fault(
    "a checkpoint that is truncated, foreign or a hostile pickle",
    "refused, and no code in it runs; status 1",
)
def test_checkpoints_that_are_none(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = (small_run / "checkpoint.pt").read_bytes()
    ours = script.load(small_run / "checkpoint.pt")
    other_shape = {**ours["model"], "conv1.weight": torch.zeros(3, 3)}
    foreign = "checkpoint.pt was not made by this script.py"
    for number, (damaged, message) in enumerate(
        (
            (content[: len(content) // 2], "checkpoint.pt is not a checkpoint, or is damaged"),
            (script.packed(Hostile()), "checkpoint.pt is not a checkpoint, or is damaged"),
            ((small_run / "model.pt").read_bytes(), foreign),
            (script.packed({"recipe": {}}), foreign),
            (script.packed({**ours, "recipe": {**ours["recipe"], "interpolation": "sharp"}}), foreign),
            (script.packed({**ours, "model": other_shape}), foreign),
            (script.packed({**ours, "optimizer": {}}), foreign),
            (script.packed({**ours, "history": [1, 2]}), foreign),
        )
    ):
        Path(str(number)).mkdir()
        Path(str(number), "checkpoint.pt").write_bytes(damaged)
        assert refused(capsys, "--resume", number) == f"{Path(str(number), message)}"  # and no advice to resume
    assert refused(capsys, "--resume", "nowhere").startswith("cannot read nowhere")
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
        if path.name != name or calls.count(name) != time:
            return save(path, content)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, limits[1]))
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
        assert line.endswith(f"python script.py --resume {run}")
        assert len(script.load(run / "checkpoint.pt")["history"]) == calls[:-1].count("checkpoint.pt")
        monkeypatch.setattr(script, "save", save)
        assert script.main(["--resume", str(run), "--device", "cpu"]) == 0
        assert len((run / "history.csv").read_text().splitlines()) == 3


@fault(
    "a loss that is not finite",
    "the run stops with epoch, step and learning rate; the last good checkpoint is kept; status 1",
)
@pytest.mark.parametrize("step", [[], ["--no-compile"]])
def test_a_run_that_diverges_is_stopped(tmp_path, capsys, few_images, step):
    line = refused(capsys, "--max-lr", "1e30", "--epochs", "1", "--device", "cpu", *step, "--out-dir", tmp_path)
    assert line.startswith("the loss is not finite: epoch 1, step ")
    assert {path.name for path in only_run(tmp_path).iterdir()} == {"recipe.json"}


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys, few_images):
    make_step, calls = script.make_step, []

    def poisoned(*args):
        forward_backward, forward = make_step(*args)

        def once_nan(images, labels):
            loss, right = forward_backward(images, labels)
            calls.append(loss)
            return (loss * math.nan if len(calls) == 40 else loss), right

        return once_nan, forward

    monkeypatch.setattr(script, "make_step", poisoned)
    line = refused(capsys, "--epochs", "2", "--device", "cpu", "--out-dir", tmp_path)
    assert line.startswith("the loss is not finite: epoch 2, step 10 of 30, learning rate 0.0")
    assert len(script.load(only_run(tmp_path) / "checkpoint.pt")["history"]) == 1


def test_weights_that_the_last_step_spoils_are_no_result(tmp_path, capsys, few_images):
    one_step = ["--epochs", "1", "--holdout", "900", "--batch-size", "60", "--max-lr", "1e30", "--device", "cpu"]
    line = refused(capsys, *one_step, "--out-dir", tmp_path)
    assert line == "the loss is not finite after epoch 1; begin anew with a lower --max-lr"
    assert {path.name for path in only_run(tmp_path).iterdir()} == {"recipe.json"}


@fault(
    "memory that runs out, an operation that the device lacks",
    "one line with the device, and with what to try instead; status 1",
)
@pytest.mark.parametrize(
    ("device", "trouble", "message"),
    [
        ("cpu", lambda *_: torch.empty(2**60), "cpu is out of memory; try a smaller --batch-size"),  # the real error
        (
            "mps",
            RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
            "mps is out of memory; try a smaller --batch-size, or --device cpu",
        ),
        (
            "mps",
            RuntimeError("grid_sampler_2d_mps: Unsupported Bicubic interpolation"),
            "mps cannot do this (grid_sampler_2d_mps: Unsupported Bicubic interpolation); try --device cpu",
        ),
        (
            "mps",
            NotImplementedError("The operator 'aten::x' is not currently implemented for the MPS device.\nMore."),
            "mps cannot do this (The operator 'aten::x' is not currently implemented for the MPS device.); "
            "try --device cpu",
        ),
    ],
)
def test_what_a_device_lacks_is_one_line(tmp_path, monkeypatch, capsys, device, trouble, message):
    def fail(*args):
        if callable(trouble):
            trouble()
        raise trouble

    monkeypatch.setattr(script, "load_mnist", fail)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert refused(capsys, "--device", device, "--out-dir", tmp_path) == message


def test_a_defect_on_the_processor_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "load_mnist", lambda *args: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        script.main(["--device", "cpu", "--out-dir", str(tmp_path)])
