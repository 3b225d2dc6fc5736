"""The companion suite of script.py.

pytest -m "not slow"    the fast part
pytest                  all of it: the whole 20-epoch run, and faults injected into processes of their own
"""

import csv
import ctypes
import gzip
import hashlib
import http.server
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
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as vision

import script
import study

HERE = Path(__file__).resolve().parent
CPU = torch.device("cpu")

SOURCE_TABLE = """\
----------------------------------------------------------------
        Layer (type)               Output Shape         Param #
================================================================
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
================================================================
Total params: 15,440
Trainable params: 15,440
Non-trainable params: 0
----------------------------------------------------------------
Input size (MB): 0.00
Forward/backward pass size (MB): 0.60
Params size (MB): 0.06
Estimated Total Size (MB): 0.66
----------------------------------------------------------------"""


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def train_set():
    """The 60,000 training images and labels."""
    return script.load_mnist(HERE / "data", True, CPU)


@pytest.fixture(scope="session")
def test_set():
    """The 10,000 test images and labels."""
    return script.load_mnist(HERE / "data", False, CPU)


@pytest.fixture
def few_images(monkeypatch):
    """Let script.py see the first 960 images of each set only, so that an epoch takes a second."""
    load = script.load_mnist
    monkeypatch.setattr(script, "load_mnist", lambda *args: tuple(part[:960] for part in load(*args)))


def command(*arguments, **options):
    """`python script.py ...` in a process of its own, its output captured as text."""
    line = [sys.executable, str(HERE / "script.py"), *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, encoding="utf-8", check=False, **options)


FAULTS_TOLD = {}  # the README's table of faults: what happens, by fault


def fault(what, happens):
    """Put a row into the README's table of faults, beside the test that tries it."""
    FAULTS_TOLD[what] = happens
    return lambda test: test


def only_run(folder):
    """The one run in the folder."""
    (run,) = folder.iterdir()
    return run


# ---------------------------------------------------------------- network


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


# ---------------------------------------------------------------- data


@pytest.mark.parametrize(
    ("name", "md5"),
    [
        ("train-images-idx3-ubyte.gz", "f68b3c2dcbeaaa9fbdd348bbdeb94873"),
        ("train-labels-idx1-ubyte.gz", "d53e105ee54ea40749a09fcbcd1e9432"),
        ("t10k-images-idx3-ubyte.gz", "9fb629c4189551a2d022fa330f9573f3"),
        ("t10k-labels-idx1-ubyte.gz", "ec29112dd5afa0611ce80d1b7f02629c"),
    ],
)
def test_the_archives_are_mnist(name, md5):
    archive = HERE / "data" / "MNIST" / "raw" / name
    assert hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest() == md5
    assert name in (HERE / "data" / "README.md").read_text()
    assert md5 in (HERE / "data" / "README.md").read_text()


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


# ---------------------------------------------------------------- step


def test_compiler_pool_is_torchs_max_pool():
    x = torch.randint(0, 3, (4, 20, 14, 14)).float()  # full of ties
    gradient = torch.rand(4, 20, 7, 7)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = script.CompilerPool.apply(ours)
    assert torch.equal(out, F.max_pool2d(theirs, 2))
    out.backward(gradient)
    F.max_pool2d(theirs, 2).backward(gradient)
    assert torch.equal(ours.grad, theirs.grad)


def test_compiler_dropout_drops_a_tenth_at_random():
    x = torch.ones(200, 20, 14, 14)
    drop = script.CompilerDropout(0.1)
    drop.key.fill_(1234567)
    first = (drop(x) == 0).float()
    assert drop(x).unique().tolist() == pytest.approx([0, 1 / 0.9])
    assert torch.equal(first, (drop(x) == 0).float())
    drop.key.fill_(1234568)
    second = (drop(x) == 0).float()
    n = x.numel()
    for mask in (first, second):
        assert mask.mean().item() == pytest.approx(0.1, abs=6 * (0.09 / n) ** 0.5)
        for dim in range(4):  # every slice along every axis has its share, and neighbours are independent
            rest = [axis for axis in range(4) if axis != dim]
            assert (mask.mean(dim=rest) - 0.1).abs().max() < 6 * (0.09 * x.shape[dim] / n) ** 0.5
            both = mask.narrow(dim, 1, x.shape[dim] - 1) * mask.narrow(dim, 0, x.shape[dim] - 1)
            assert both.mean().item() == pytest.approx(0.01, abs=6 * (0.0099 / both.numel()) ** 0.5)
    assert (first * second).mean().item() == pytest.approx(0.01, abs=6 * (0.0099 / n) ** 0.5)


def test_compiler_net_shares_every_tensor():
    net = script.Net()
    twin = script.CompilerNet(net)
    theirs = dict(twin.named_parameters()) | dict(twin.named_buffers())
    ours = dict(net.named_parameters()) | dict(net.named_buffers())
    assert theirs.keys() - ours.keys() == {"drop1.key", "drop2.key"}
    assert all(theirs[name] is ours[name] for name in ours)


def step_of(net, recipe, total_steps):
    """A step on net, and the lines it said."""
    said = []
    return script.make_step(net, *script.make_optimizer(net, recipe, total_steps), recipe, said.append), said


def first_batch(test_set):
    """The first 32 test images, normalised, and their labels."""
    return next(iter(script.Loader(test_set[0][:32], test_set[1][:32], 32)))


def test_it_overfits_one_batch(test_set):
    torch.manual_seed(1)
    net = script.Net()
    step, _ = step_of(net, script.Recipe(), 60)
    losses = [step(*first_batch(test_set))[0].item() for _ in range(60)]
    assert losses[0] > 2
    assert losses[-1] < 0.1


def test_one_epoch_of_ten_thousand_images_passes_95_percent(train_set, test_set):
    script.seed_everything(1, 1)
    net, recipe = script.Net().to(memory_format=torch.channels_last), script.Recipe(epochs=1)
    loader = script.Loader(train_set[0][:10_000], train_set[1][:10_000], recipe.batch_size, recipe)
    optimizer, scheduler = script.make_optimizer(net, recipe, len(loader))
    step = script.make_step(net, optimizer, scheduler, recipe)
    loss, accuracy, _, bar = script.train(net, loader, step, scheduler, 1)
    assert 0 < loss < 1
    assert accuracy > 75
    assert f"loss={loss:.4f} batch_id=312: 100%|" in bar
    assert script.test(net, script.Loader(*test_set, 1000)).accuracy > 95


def test_the_score_is_torchs_loss_and_a_plain_count(test_set):
    net = script.Net()
    images, labels = test_set[0][:100], test_set[1][:100]
    score = script.test(net, script.Loader(images, labels, 32))
    output = net((images.float() / 255 - 0.1307) / 0.3081)
    assert score.loss == pytest.approx(nn.functional.nll_loss(output, labels).item(), rel=1e-5)
    assert torch.equal(score.predicted, output.argmax(dim=1))
    assert score.accuracy == pytest.approx((score.predicted == labels).float().mean().item() * 100)
    table = np.zeros((10, 10), dtype=np.int64)
    np.add.at(table, (labels.numpy(), score.predicted.numpy()), 1)
    assert score.table.tolist() == table.tolist()


def test_the_result_line_has_two_decimals():
    table = torch.zeros(10, 10, dtype=torch.int64)
    table[0, 0], table[0, 1] = 9952, 48
    score = script.Score(0.01532, torch.zeros(10_000), table)
    assert str(score) == "Average loss: 0.0153, Accuracy: 9952/10000 (99.52%)"


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


def test_model_pt_is_a_plain_state_dict(small_run):
    state = torch.load(small_run / "model.pt", weights_only=True)
    assert list(state) == list(script.Net().state_dict())
    assert all(value.is_contiguous() for value in state.values())
    script.Net().load_state_dict(state)


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
    assert "\nstep: eager, float32, threads:" in log
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


def test_two_runs_of_one_seed_are_equal_and_of_another_are_not(small_run, tmp_path, few_images):
    weights = {}
    for seed in (7, 8):
        out = tmp_path / str(seed)
        assert script.main(["--epochs", "2", "--seed", str(seed), "--device", "cpu", "--out-dir", str(out)]) == 0
        weights[seed] = torch.load(only_run(out) / "model.pt", weights_only=True)
    first = torch.load(small_run / "model.pt", weights_only=True)
    assert all(torch.equal(first[name], weights[7][name]) for name in first)
    assert not torch.equal(first["conv1.weight"], weights[8]["conv1.weight"])


def test_the_sources_recipe_and_a_flag_that_goes_before_it(tmp_path, few_images):
    arguments = ["--recipe", "source", "--weight-decay", "0.001", "--epochs", "1", "--device", "cpu"]
    assert script.main([*arguments, "--out-dir", str(tmp_path)]) == 0
    recipe = json.loads((only_run(tmp_path) / "recipe.json").read_text())
    told = {"batch_size": 32, "max_lr": 0.01, "pct_start": 0.2, "div_factor": 10, "final_div_factor": 100}
    told |= {"rotation": 5, "affine_rotation": 5, "shear": 5, "translate": 0, "scale": 0, "weight_decay": 0.001}
    assert {name: recipe[name] for name in told} == told
    assert script.RECIPES["source"].weight_decay == 1e-4
    assert script.RECIPES["source"].epochs == 20
    assert script.RECIPES["ours"] == script.Recipe()


def test_holdout_never_looks_at_the_test_images(tmp_path, monkeypatch, train_set):
    asked = []

    def load(data_dir, train, *args):
        asked.append(train)
        return tuple(part[:960] for part in train_set)

    seen = []
    monkeypatch.setattr(script, "load_mnist", load)
    make_loader = script.Loader.__init__
    monkeypatch.setattr(
        script.Loader, "__init__", lambda self, *args: seen.append(args[:2]) or make_loader(self, *args)
    )
    arguments = ["--holdout", "160", "--epochs", "1", "--device", "cpu", "--out-dir", str(tmp_path)]
    assert script.main(arguments) == 0
    assert asked == [True]
    for (images, labels), part in zip(seen, (slice(0, 800), slice(800, 960)), strict=True):
        assert torch.equal(images, train_set[0][part])
        assert torch.equal(labels, train_set[1][part])
    log = (only_run(tmp_path) / "train.log").read_text(encoding="utf-8")
    assert "\nHeld-out set: Average loss" in log
    assert "Test set" not in log


def test_a_step_that_cannot_be_compiled_says_why(monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no compiler here\nsecond line")

    net, recipe = script.Net(), script.Recipe()
    step_of(net, recipe, script.LONG_RUN - 1)
    monkeypatch.setattr(torch, "compile", broken)
    assert "too short" in step_of(net, recipe, script.LONG_RUN - 1)[1][0]
    assert "turned off" in step_of(net, replace(recipe, compile=False), script.LONG_RUN)[1][0]
    (line,) = step_of(net, recipe, script.LONG_RUN)[1]
    assert line.startswith("step: eager")
    assert line.endswith("(compilation failed: no compiler here)")


# ---------------------------------------------------------------- the committed weights and the README


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


def test_the_readme_tells_what_the_reference_run_printed():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    log = (HERE / "assets" / "train.log").read_text(encoding="utf-8").strip()
    assert log in readme
    assert SOURCE_TABLE in log
    (final,) = re.findall(r"^Final accuracy: (\d\d\.\d\d)% after 20 epochs in (\d+ min \d+ s)", log, re.M)
    (told,) = re.findall(r"^`python script.py` is seed 1: (\d\d\.\d\d)% in (\d+ min \d+ s)", readme, re.M)
    assert told == final


@pytest.mark.parametrize(
    ("file", "seeds", "start"),
    [("study", 20, "**ours**"), ("study-xeon", 10, "ours, on another"), ("study-source", 10, "the source's,")],
)
def test_the_readme_tells_what_the_studies_found(file, seeds, start):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    with open(HERE / "assets" / f"{file}.csv", newline="") as table:
        rows = list(csv.DictReader(table))
    assert [row["seed"] for row in rows] == [str(seed) for seed in range(1, seeds + 1)]
    assert "".join("".join(f"{value:>10}" for value in row.values()) + "\n" for row in rows) in readme
    values = np.array([float(row["accuracy"]) for row in rows])
    assert f"\n{study.summary(values.tolist())}\n" in readme
    (row,) = re.findall(rf"^\| {re.escape(start)} .*$", readme, re.M)
    mean, deviation, least, most = re.findall(r"\b\d+\.\d+\b", row.split(f"| {seeds} |")[1])
    assert (mean, deviation) == (f"{values.mean():.3f}", f"{values.std(ddof=1):.3f}")
    assert (least, most) == (f"{values.min():.2f}", f"{values.max():.2f}")
    assert values.min() > 99.40


def test_the_readmes_table_of_faults_is_what_the_tests_assert():
    rows = [f"| {what} | {happens} |" for what, happens in FAULTS_TOLD.items()]
    assert "\n".join(["| fault | what happens |", "|---|---|", *rows]) in (HERE / "README.md").read_text("utf-8")


def test_the_readmes_links_and_pictures_exist():
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", readme) if "://" not in link]
    assert "assets/curves.png" in links
    assert "assets/misclassified.png" in links
    for link in links:
        assert (HERE / link).exists() or link.startswith("../../actions/workflows/model_tests.yml"), link


def test_requirements_and_inline_metadata_are_one_list():
    metadata = re.search(r"^# dependencies = \[\n(.*?)^# \]", (HERE / "script.py").read_text("utf-8"), re.M | re.S)[1]
    inline = re.findall(r'"([^"]+)"', metadata)
    required = (HERE / "requirements.txt").read_text().splitlines()
    assert required == [*inline, next(line for line in required if line.startswith("pytest"))]  # testing's own
    assert all(re.fullmatch(r"\w+>=[\d.]+,<\d+", line) for line in required)


# ---------------------------------------------------------------- command line


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    flags = "--epochs --batch-size --max-lr --weight-decay --seed --device --data-dir --out-dir --resume --evaluate"
    for flag in f"{flags} --predict --weights --no-compile --recipe --holdout".split():
        assert flag in text
    for default in (20, 32, 0.02, 2e-06, 1):
        assert f"(default: {default})" in text
    assert "centre of mass" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "0"], "argument --epochs: '0' is not a whole number of at least 1"),
        (["--epochs", "1.5"], "argument --epochs: '1.5' is not a whole number of at least 1"),
        (["--batch-size", "0"], "argument --batch-size: '0' is not a whole number of at least 1"),
        (["--batch-size", "60001"], "--batch-size 60001 is larger than the 60,000 training images"),
        (["--batch-size", "20", "--holdout", "59990"], "--batch-size 20 is larger than the 10 training images"),
        (["--holdout", "60000"], "--batch-size 32 is larger than the 0 training images"),
        (["--holdout", "-1"], "argument --holdout: '-1' is not a whole number of at least 0"),
        (["--max-lr", "-0.1"], "argument --max-lr: '-0.1' is not a number of at least 0"),
        (["--max-lr", "nan"], "argument --max-lr: 'nan' is not a number of at least 0"),
        (["--max-lr", "inf"], "argument --max-lr: 'inf' is not a number of at least 0"),
        (["--weight-decay", "-1"], "argument --weight-decay: '-1' is not a number of at least 0"),
        (["--seed", "-1"], "argument --seed: '-1' is not a whole number of at least 0"),
        (["--device", "abacus"], "argument --device: invalid choice: 'abacus'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--evaluate", "--predict", "a.png"], "argument --predict: not allowed with argument --evaluate"),
        (["--evaluate", "--seed", "3"], "--seed is for training only"),
        (["--predict", "a.png", "--no-compile"], "--no-compile is for training only"),
        (["--predict", "a.png", "--out-dir", "x"], "--out-dir is for training only"),
        (["--resume", "run", "--out-dir", "x"], "--out-dir is for a new run"),
        (["--weights", "model.pt"], "--weights goes with --predict"),
        (["--recipe", "theirs"], "argument --recipe: invalid choice: 'theirs'"),
        (["--evaluate", "--recipe", "source"], "--recipe source is for training only"),
    ],
)
def test_bad_usage(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"script.py: error: {message}")
    assert printed.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(device, capsys):
    if {"cuda": torch.cuda, "mps": torch.backends.mps}[device].is_available():
        pytest.skip(f"this machine has {device}")
    with pytest.raises(SystemExit, match="2"):
        script.main(["--device", device])
    assert f"--device {device}: there is none here that this torch can use" in capsys.readouterr().err


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
    Path("empty.pt").touch()
    Path("cut.pt").write_bytes((small_run / "model.pt").read_bytes()[:5000])
    Path("folder.pt").mkdir()
    torch.save(nn.Linear(3, 3).state_dict(), "other.pt")
    torch.save({1: 2}, "numbers.pt")
    torch.save([1, 2], "list.pt")
    torch.save(Hostile(), "hostile.pt")
    before = sorted(tmp_path.iterdir())
    for name, message in {
        "missing.pt": "cannot read missing.pt: No such file or directory",
        "folder.pt": "cannot read folder.pt: Is a directory",
        "text.pt": "text.pt is not a checkpoint, or is damaged",
        "empty.pt": "empty.pt is not a checkpoint, or is damaged",
        "cut.pt": "cut.pt is not a checkpoint, or is damaged",
        "hostile.pt": "hostile.pt is not a checkpoint, or is damaged",
        "list.pt": "list.pt is not a checkpoint of this network",
        "other.pt": "other.pt does not hold the weights of this network",
        "numbers.pt": "numbers.pt does not hold the weights of this network",
    }.items():
        assert refused(capsys, "--evaluate", name) == message
        assert refused(capsys, "--predict", "x.png", "--weights", name) == message
    assert sorted(tmp_path.iterdir()) == before


def test_an_out_dir_that_cannot_be(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert refused(capsys, "--out-dir", tmp_path / "file") == f"{tmp_path / 'file'}: File exists"
    line = refused(capsys, "--out-dir", tmp_path / "file" / "below")
    assert line == f"{tmp_path / 'file' / 'below'}: Not a directory"


def test_a_reader_that_goes_away_is_no_traceback(tmp_path):
    line = f'"{sys.executable}" "{HERE / "script.py"}" --out-dir "{tmp_path}" | head -n 1'
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert "Conv" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == "-" * 64 + "\n"


# ---------------------------------------------------------------- pictures to predict


def digit_picture(test_set, digit, side=200):
    """The first test image of this digit as an 8-bit grey Pillow image, scaled, light on dark."""
    image = test_set[0][(test_set[1] == digit).nonzero()[0, 0], 0]
    return Image.fromarray(image.numpy()).resize((side, side), Image.Resampling.BICUBIC)


def disguise(picture, kind):
    """The picture as people save theirs."""
    inverted = picture.point(lambda value: 255 - value)
    wide = Image.new("L", (640, 400), 0)
    wide.paste(picture, (30, 170))
    clear = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    clear.putalpha(picture)
    white = Image.new("RGBA", picture.size, (255, 255, 255, 0))
    white.putalpha(picture)
    return {
        "light on dark": picture,
        "dark on light": inverted,
        "off centre in a wide field": wide,
        "colour": Image.merge("RGB", (inverted, inverted, Image.new("L", inverted.size, 255))),
        "palette": inverted.convert("P", palette=Image.Palette.ADAPTIVE),
        "black ink on transparency": clear,
        "white ink on transparency": white,
        "16 bits": Image.fromarray(np.asarray(picture, dtype=np.uint16) * 256),
        "two colours": inverted.convert("1"),
        "low contrast": picture.point(lambda value: 100 + value // 4),
        "MNIST's own size": picture.resize((28, 28), Image.Resampling.BOX),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "light on dark",
        "dark on light",
        "off centre in a wide field",
        "colour",
        "palette",
        "black ink on transparency",
        "white ink on transparency",
        "16 bits",
        "two colours",
        "low contrast",
        "MNIST's own size",
    ],
)
def test_predict_reads_digits_in_any_picture(tmp_path, capsys, test_set, kind):
    names = [tmp_path / f"a digit {digit}.png" for digit in range(10)]
    for digit, name in enumerate(names):
        disguise(digit_picture(test_set, digit), kind).save(name)
    assert script.main(["--predict", *map(str, names)]) == 0
    lines = capsys.readouterr().out.splitlines()
    read = [re.fullmatch(r"(.+): (\d) \((\d+\.\d)%\), then (\d) \((\d+\.\d)%\)", line).groups() for line in lines]
    assert [row[0] for row in read] == [str(name) for name in names]
    assert [int(row[1]) for row in read] == list(range(10))
    assert all(row[1] != row[3] and float(row[2]) > float(row[4]) for row in read)


def test_predict_makes_mnist_of_mnist(test_set):
    """MNIST's own images are cropped and centred already, so most come back as they were."""
    similar = []
    for image in test_set[0][:200, 0]:
        field = script.as_mnist(Image.fromarray(image.numpy()))[0, 0]
        for axis in (0, 1):
            mean = (field.sum(dim=axis) * torch.arange(28)).sum() / field.sum()
            assert mean.item() == pytest.approx(14, abs=0.75)
            assert (field > 0.25).any(dim=axis).sum() <= 20
        similar.append(torch.corrcoef(torch.stack((field.flatten(), image.float().flatten())))[0, 1].item())
    assert np.median(similar) > 0.999
    assert min(similar) > 0.5  # a stroke at the threshold of ink, and so a pixel's shift


@fault(
    "a picture that is empty, truncated, no picture, blank, huge, a folder or missing, among good ones",
    "named, each with its reason; the good ones are answered; status 1",
)
def test_bad_pictures_are_named_and_the_good_ones_answered(tmp_path, monkeypatch, capsys, test_set):
    monkeypatch.chdir(tmp_path)
    good = digit_picture(test_set, 7)
    good.save("good.png")
    Path("empty.png").touch()
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:2000])
    Path("text.png").write_text("seven")
    Image.new("L", (1, 1), 255).save("dot.png")
    Image.new("RGB", (300, 200), "white").save("white.png")
    Image.new("RGBA", (300, 200), (0, 0, 0, 0)).save("clear.png")
    Image.new("1", (10_000, 10_000)).save("huge.png")
    Path("folder.png").mkdir()
    bad = {
        "empty.png": "it is not a picture",
        "cut.png": "image file is truncated",
        "text.png": "it is not a picture",
        "dot.png": "it is all of one colour",
        "white.png": "it is all of one colour",
        "clear.png": "it is all of one colour",
        "huge.png": "it is too large",
        "folder.png": "Is a directory",
        "missing.png": "No such file or directory",
    }
    names = [name for name in bad for name in (name, "good.png")]
    assert script.main(["--predict", *names]) == 1
    printed = capsys.readouterr()
    assert [line.split(" (")[0] for line in printed.out.splitlines()] == ["good.png: 7"] * len(bad)
    errors = printed.err.splitlines()
    assert len(errors) == len(bad)
    for line, (name, problem) in zip(errors, bad.items(), strict=True):
        assert line.startswith(f"script.py: error: cannot read {name}: {problem}")


# ---------------------------------------------------------------- data faults

ARCHIVES = [name for name, _ in script.MNIST.resources]
FAULTS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "one byte long": lambda path: os.truncate(path, 1),
    "cut in the middle": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one bit flipped": lambda path: flip(path, path.stat().st_size // 2),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


def flip(path, place):
    """Flip one bit of the byte at this place."""
    content = bytearray(path.read_bytes())
    content[place] ^= 8
    path.write_bytes(content)


@pytest.fixture
def data_dir(tmp_path, train_set):
    """A copy of data/, archives and extracted files."""
    return Path(shutil.copytree(HERE / "data", tmp_path / "data"))


@pytest.fixture
def no_network(monkeypatch):
    """Mirrors that refuse the connection at once."""
    monkeypatch.setattr(script.MNIST, "mirrors", ["http://127.0.0.1:9/"])


@pytest.fixture
def mirror(monkeypatch):
    """A mirror on this machine that serves the committed archives; the paths it was asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(HERE / "data" / "MNIST" / "raw"))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *args: None  # torchvision asks twice, and reads the first answer's head only
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}/"
    monkeypatch.setattr(script.MNIST, "mirrors", ["http://127.0.0.1:9/", address])
    yield asked
    server.shutdown()
    server.server_close()


def same_as_committed(data_dir):
    """Whether every extracted file is what its committed archive holds."""
    committed, copy = HERE / "data" / "MNIST" / "raw", data_dir / "MNIST" / "raw"
    return all(
        (copy / name.removesuffix(".gz")).read_bytes() == gzip.decompress((committed / name).read_bytes())
        for name in ARCHIVES
    )


@fault(
    "an extracted data file is missing, truncated, altered or unreadable",
    "extracted again from its verified archive, with a line that says so",
)
@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "a folder"])
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_damaged_extracted_file_is_extracted_again(data_dir, no_network, name, fault):
    extracted = data_dir / "MNIST" / "raw" / name.removesuffix(".gz")
    FAULTS[fault](extracted)
    said = []
    script.load_mnist(data_dir, True, CPU, said.append)
    assert same_as_committed(data_dir)
    wanted = [] if fault == "missing" else [f"data: {extracted} is damaged or unreadable; extracting it again"]
    assert said == wanted
    assert {path.name for path in extracted.parent.iterdir()} == {
        file for archive in ARCHIVES for file in (archive, archive.removesuffix(".gz"))
    }


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_damaged_archive_does_not_matter_while_the_extracted_file_is_good(data_dir, no_network, name, fault):
    FAULTS[fault](data_dir / "MNIST" / "raw" / name)
    said = []
    script.load_mnist(data_dir, True, CPU, said.append)
    assert said == []


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_damaged_archive_is_refused_without_a_network(data_dir, no_network, capsys, name, fault):
    archive = data_dir / "MNIST" / "raw" / name
    FAULTS[fault](archive)
    archive.with_suffix("").unlink()
    line = refused(capsys, "--evaluate", "--data-dir", data_dir)
    assert line.startswith(f"{archive} is missing or damaged and cannot be downloaded; put a good copy there (md5 ")
    assert not archive.with_suffix("").exists()


@fault(
    "a data archive is missing, truncated or altered too",
    "downloaded and verified; without a network one line says what to put where; status 1",
)
@pytest.mark.slow
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "a folder"])
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_damaged_archive_is_downloaded_where_there_is_a_network(data_dir, mirror, name, fault):
    archive = data_dir / "MNIST" / "raw" / name
    FAULTS[fault](archive)
    FAULTS[fault](archive.with_suffix(""))
    said = []
    script.load_mnist(data_dir, True, CPU, said.append)
    assert same_as_committed(data_dir)
    assert set(mirror) == {f"/{name}"}
    assert said[-1] == f"data: {archive} is missing or damaged; downloading it"


def test_an_empty_data_folder_is_filled_from_the_network(tmp_path, mirror):
    script.load_mnist(tmp_path / "new" / "data", True, CPU, [].append)
    assert same_as_committed(tmp_path / "new" / "data")
    assert set(mirror) == {f"/{name}" for name in ARCHIVES}


def test_an_empty_data_folder_without_a_network_says_what_to_put_where(tmp_path, no_network, capsys):
    line = refused(capsys, "--evaluate", "--data-dir", tmp_path)
    archive = tmp_path / "MNIST" / "raw" / ARCHIVES[0]
    assert line == (
        f"{archive} is missing or damaged and cannot be downloaded; put a good copy there "
        "(md5 f68b3c2dcbeaaa9fbdd348bbdeb94873)"
    )


def test_a_folder_in_an_extracted_files_place_is_refused(data_dir, no_network, capsys):
    extracted = data_dir / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    FAULTS["a folder"](extracted)
    assert refused(capsys, "--evaluate", "--data-dir", data_dir) == f"cannot write {extracted}: Is a directory"


def unprivileged():
    """In a child before exec: let root, too, be bound by file permissions (Linux capabilities(7))."""
    if os.geteuid() == 0:
        drop_from_bounding_set, override_permissions, read_anything = 24, 1, 2
        libc = ctypes.CDLL(None, use_errno=True)
        for capability in (override_permissions, read_anything):
            if libc.prctl(drop_from_bounding_set, capability, 0, 0, 0):
                raise OSError(ctypes.get_errno(), "prctl")


OFFLINE = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", "no_proxy": ""}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="drops Linux capabilities")
def test_file_permissions(data_dir):
    raw = data_dir / "MNIST" / "raw"

    def evaluate():
        return command("--evaluate", "--data-dir", data_dir, preexec_fn=unprivileged, env={**os.environ, **OFFLINE})

    labels = raw / "t10k-labels-idx1-ubyte"
    labels.chmod(0)
    done = evaluate()
    assert done.returncode == 0
    assert done.stdout.startswith(f"data: {labels} is damaged or unreadable; extracting it again\nTest set: ")

    raw.chmod(0o555)
    assert evaluate().returncode == 0  # nothing is written where nothing is missing
    labels.chmod(0)
    done = evaluate()
    assert (done.returncode, done.stderr) == (1, f"script.py: error: cannot write {labels}: Permission denied\n")
    raw.chmod(0o755)
    labels.with_suffix(".gz").chmod(0)
    done = evaluate()
    assert done.returncode == 1
    assert "t10k-labels-idx1-ubyte.gz is missing or damaged and cannot be downloaded" in done.stderr


# ---------------------------------------------------------------- interruption


def child(moment, *arguments):
    """What a child process runs: main() on 640 images, killed without warning at a moment such as `write 5`.

    `step N` is inside the N-th step, `write N` in the N-th file's temporary, `renamed N` behind its rename.
    """
    load = script.load_mnist
    script.load_mnist = lambda *args: tuple(part[:640] for part in load(*args))
    if os.environ.get("COMPILE"):
        script.LONG_RUN = 0
    kind, _, count = moment.partition(" ")
    place = {"step": (torch.optim.Adam, "step"), "write": (os, "fsync"), "renamed": (os, "replace")}.get(kind)
    if place:
        original, calls = getattr(*place), []

        def deadly(*args, **options):
            calls.append(args)
            result = original(*args, **options) if kind == "renamed" else None
            if len(calls) == int(count):
                os.kill(os.getpid(), signal.SIGKILL)
            return result if kind == "renamed" else original(*args, **options)

        setattr(*place, deadly)
    sys.exit(script.main(list(arguments)))


def in_child(moment, *arguments, **environment):
    """Run child() in a process of its own."""
    code = f"import test_model; test_model.child{(moment, *map(str, arguments))!r}"
    environment = {**os.environ, "PYTHONPATH": str(HERE), **environment}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", env=environment, check=False
    )


THREE_EPOCHS = "--epochs", "3", "--device", "cpu", "--out-dir"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run of three epochs that nothing interrupts."""
    out = tmp_path_factory.mktemp("unbroken")
    assert in_child("never", *THREE_EPOCHS, out).returncode == 0
    return only_run(out)


def assert_same_end(run, unbroken):
    """Both runs ended with the same weights, the same history but for its times, and the same files."""
    first, second = (torch.load(folder / "model.pt", weights_only=True) for folder in (run, unbroken))
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    histories = [
        [{**row, "seconds": None} for row in csv.DictReader((folder / "history.csv").open())]
        for folder in (run, unbroken)
    ]
    assert histories[0] == histories[1]
    assert {path.name for path in run.iterdir()} == {path.name for path in unbroken.iterdir()}
    accuracies = [
        re.findall(r"Accuracy: .*", (folder / "train.log").read_text(encoding="utf-8")) for folder in (run, unbroken)
    ]
    assert accuracies[0] == accuracies[1]


# A run of three epochs saves recipe.json (1), then checkpoint.pt, history.csv and train.log after each epoch (2-4,
# 5-7, 8-10), then history.csv, train.log, model.pt (13) and four pictures (14-17). An epoch is 20 steps.


@fault(
    "killed (SIGKILL) before the first epoch ends",
    "nothing to resume, and `--resume` says so",
)
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["write 1", "step 10", "write 2"])
def test_killed_before_the_first_checkpoint_there_is_nothing_to_resume(tmp_path, moment):
    assert in_child(moment, *THREE_EPOCHS, tmp_path).returncode == -signal.SIGKILL
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
        "renamed 2",
        "write 3",
        "renamed 4",
        "step 30",
        "write 5",
        "write 6",
        "write 8",
        "write 9",
        "write 10",
        "write 11",
        "write 12",
        "write 13",
        "write 14",
        "write 15",
    ],
)
def test_killed_and_resumed_it_ends_in_the_same_bits(tmp_path, unbroken, moment):
    assert in_child(moment, *THREE_EPOCHS, tmp_path).returncode == -signal.SIGKILL
    run = only_run(tmp_path)
    done = in_child("never", "--resume", run)
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_end(run, unbroken)


@pytest.mark.slow
def test_killed_and_resumed_with_a_compiled_step_it_ends_in_the_same_bits(tmp_path):
    runs = []
    for name, moment in (("unbroken", "never"), ("killed", "step 30")):
        done = in_child(moment, *THREE_EPOCHS, tmp_path / name, COMPILE="1")
        runs.append(only_run(tmp_path / name))
    assert done.returncode == -signal.SIGKILL
    done = in_child("never", "--resume", runs[1], COMPILE="1")
    assert done.returncode == 0
    log = (runs[1] / "train.log").read_text(encoding="utf-8")
    if "step: eager" in log:
        pytest.skip("this machine cannot compile: " + re.search("step: eager.*", log)[0])
    assert log.count("step: compiled") == 2
    assert_same_end(*runs)


@fault(
    "Ctrl-C, SIGTERM",
    "the finished epochs are kept; one line says how to go on; status 130, 143",
)
@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_keeps_the_finished_epochs_and_says_how_to_go_on(tmp_path, number, status):
    arguments = ["--epochs", "2", "--batch-size", "250", "--out-dir", str(tmp_path / "my runs")]
    process = subprocess.Popen(
        [sys.executable, str(HERE / "script.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        # A suite that a shell put into the background ignores Ctrl-C, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith("Test set:"):
            process.send_signal(number)
            break
    _, errors = process.communicate()
    assert process.returncode == status
    run = only_run(tmp_path / "my runs")
    assert errors == (f"script.py: interrupted; what was finished is kept: python script.py --resume '{run}'\n")
    assert len(script.load(run / "checkpoint.pt")["history"]) == 1
    done = command("--resume", run)
    assert (done.returncode, done.stderr) == (0, "")
    assert len((run / "history.csv").read_text().splitlines()) == 3
    assert (run / "model.pt").exists()


def test_resuming_a_finished_run_does_nothing(small_run, capsys):
    before = {path: path.read_bytes() for path in small_run.iterdir()}
    assert script.main(["--resume", str(small_run), "--epochs", "2", "--seed", "7"]) == 0
    assert capsys.readouterr().out == f"{small_run} is finished: 2 epochs; nothing to do\n"
    assert {path: path.read_bytes() for path in small_run.iterdir()} == before


@fault(
    "`--resume` with a flag that contradicts the run",
    "refused, with the flag and both values; status 2",
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--epochs", "3"], "--epochs contradicts the run: epochs is 2 there, 3 here"),
        (["--max-lr", "0.5"], "--max-lr contradicts the run: max_lr is 0.02 there, 0.5 here"),
        (["--no-compile"], "--no-compile contradicts the run: compile is True there, False here"),
        (
            ["--recipe", "source", "--max-lr", "0.02"],
            "--recipe source contradicts the run: weight_decay is 2e-06 there, 0.0001 here",
        ),
    ],
)
def test_resuming_with_another_recipe_is_refused(small_run, capsys, arguments, message):
    with pytest.raises(SystemExit, match="2"):
        script.main(["--resume", str(small_run), *arguments])
    assert capsys.readouterr().err == f"script.py: error: {message}\n"


@fault(
    "a checkpoint that is truncated, foreign or a hostile pickle",
    "refused, and no code in it runs; status 1",
)
def test_checkpoints_that_are_none(small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = (small_run / "checkpoint.pt").read_bytes()
    for name, damaged, message in (
        ("cut", content[: len(content) // 2], "is not a checkpoint, or is damaged"),
        ("weights", (small_run / "model.pt").read_bytes(), "was not made by this script.py"),
        ("hostile", script.packed(Hostile()), "is not a checkpoint, or is damaged"),
    ):
        Path(name).mkdir()
        Path(name, "checkpoint.pt").write_bytes(damaged)
        assert refused(capsys, "--resume", name).startswith(f"{Path(name, 'checkpoint.pt')} {message}")
    assert refused(capsys, "--resume", "nowhere").startswith("cannot read nowhere")
    assert not Path("hostile", "hostile").exists()
    assert not Path("hostile").is_file()


# ---------------------------------------------------------------- faults of the machine


@fault(
    "the disk fills while any file is written",
    "the file and the cause are named, earlier files stay whole, `--resume` goes on; status 1",
)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "time"),
    [
        ("recipe.json", 1),
        ("checkpoint.pt", 1),
        ("checkpoint.pt", 2),
        ("history.csv", 2),
        ("train.log", 2),
        ("train.log", 3),
        ("model.pt", 1),
        ("curves.png", 1),
        ("misclassified.png", 1),
    ],
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
        finished = len(script.load(run / "checkpoint.pt")["history"])
        assert finished == calls[:-1].count("checkpoint.pt")
        monkeypatch.setattr(script, "save", save)
        assert script.main(["--resume", str(run)]) == 0
        assert len((run / "history.csv").read_text().splitlines()) == 3


@fault(
    "a loss that is not finite",
    "the run stops with epoch, step and learning rate; the last good checkpoint is kept; status 1",
)
def test_an_absurd_learning_rate_stops_the_run(tmp_path, capsys, few_images):
    line = refused(capsys, "--max-lr", "1e30", "--epochs", "1", "--device", "cpu", "--out-dir", tmp_path)
    found = re.fullmatch(
        r"the loss is not finite: epoch 1, step (\d+) of 30, learning rate (\S+); try a lower --max-lr", line
    )
    assert 1 < int(found[1]) <= 30
    assert 1e28 < float(found[2]) <= 1e30
    assert {path.name for path in only_run(tmp_path).iterdir()} == {"recipe.json"}


def test_divergence_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys, few_images):
    make_step, calls = script.make_step, []

    def poisoned(*args):
        step = make_step(*args)

        def once_nan(images, labels):
            loss, right = step(images, labels)
            calls.append(loss)
            return (loss * math.nan if len(calls) == 40 else loss), right

        return once_nan

    monkeypatch.setattr(script, "make_step", poisoned)
    line = refused(capsys, "--epochs", "2", "--device", "cpu", "--out-dir", tmp_path)
    assert line.startswith("the loss is not finite: epoch 2, step 10 of 30, learning rate 0.0")
    assert len(script.load(only_run(tmp_path) / "checkpoint.pt")["history"]) == 1


def test_out_of_memory_is_one_line(tmp_path, monkeypatch, capsys):
    def hungry(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(script, "load_mnist", hungry)
    line = refused(capsys, "--device", "cpu", "--out-dir", tmp_path)
    assert line == "cpu is out of memory; try a smaller --batch-size, or --device cpu"


@fault(
    "no C++ compiler, no home directory, one core",
    "it trains, and the log says why the step is not compiled",
)
@pytest.mark.slow
def test_without_compiler_home_or_second_core_it_trains_and_says_so(tmp_path):
    environment = {
        "COMPILE": "1",
        "CXX": str(tmp_path / "no compiler"),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "HOME": "/dev/null/nowhere",
        "OMP_NUM_THREADS": "1",
    }
    done = in_child("never", "--epochs", "1", "--device", "cpu", "--out-dir", tmp_path / "runs", **environment)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    line = re.search(r"^step: eager, float32, threads: 1 \(compilation failed: .+\)$", done.stdout, re.MULTILINE)
    assert line
    assert done.stdout.count("step: ") == 1


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the compiled step is tried where CI has it")
def test_the_compiled_step_trains_as_the_eager_one(test_set, monkeypatch):
    monkeypatch.setattr(script, "LONG_RUN", 0)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # float32, so that only the order of sums differs
    losses, said = {}, []
    for compiled in (False, True):
        torch.manual_seed(1)
        net, recipe = script.Net().to(memory_format=torch.channels_last), script.Recipe(compile=compiled)
        net.drop1.p = net.drop2.p = 0.0
        step, lines = step_of(net, recipe, 100)
        said += lines
        losses[compiled] = [step(*first_batch(test_set))[0].item() for _ in range(10)]
    assert "eager" in said[0]
    if "compiled, float32" not in said[1]:
        pytest.skip("this machine cannot compile: " + said[1])
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_captured_step_trains_as_the_eager_one(test_set, monkeypatch):
    monkeypatch.setattr(script, "LONG_RUN", 0)
    losses = {}
    for name in ("eager", "captured", "captured again"):
        torch.manual_seed(1)
        net, recipe = script.Net().cuda(), script.Recipe(compile=name != "eager")
        net.drop1.p = net.drop2.p = 0.0
        step, (line,) = step_of(net, recipe, 100)
        assert line.startswith(f"step: {name.split()[0]}")
        images, labels = (part.cuda() for part in first_batch(test_set))
        losses[name] = [step(images, labels)[0].item() for _ in range(10)]
        step(images[:7], labels[:7])  # an odd batch, eager, must not disturb the graph's gradients
        losses[name].append(step(images, labels)[0].item())
    assert losses["captured"] == losses["captured again"]
    assert losses["captured"] == pytest.approx(losses["eager"], rel=0.02)


# ---------------------------------------------------------------- study


STUDY = "--epochs", "2", "--holdout", "320", "--device", "cpu"


def table_of(folder):
    """study.csv without the seconds, which no two runs share."""
    with open(folder / "study.csv", newline="") as file:
        return [{name: row[name] for name in row if name != "seconds"} for row in csv.DictReader(file)]


def test_a_study_trains_each_seed_once_and_sums_them_up(tmp_path, capsys, few_images):
    folder = tmp_path / "a study"
    arguments = [*STUDY, "--out-dir", str(folder), "--seeds"]
    assert study.main([*arguments, "1,3"]) == 0
    printed = capsys.readouterr().out
    runs = {path.name.split("-")[-1]: path for path in folder.iterdir() if path.is_dir()}
    assert runs.keys() == {"seed1", "seed3"}
    assert len({(run / "model.pt").read_bytes() for run in runs.values()}) == 2
    accuracies = []
    for seed, row in zip((1, 3), table_of(folder), strict=True):
        with open(runs[f"seed{seed}"] / "history.csv", newline="") as file:
            last = list(csv.DictReader(file))[-1]  # the last epoch, whatever the best was
        accuracies.append(float(last["test_accuracy"]))
        assert row["seed"] == str(seed)
        assert float(row["accuracy"]) == round(accuracies[-1], 2)
        assert int(row["errors"]) == pytest.approx(320 * (1 - accuracies[-1] / 100), abs=1e-3)
        assert f"seed {seed}: {row['accuracy']}%, {row['errors']} errors" in printed
    told = [float(row["accuracy"]) for row in table_of(folder)]  # the mean is of the accuracies that the table shows
    assert f"n 2; mean {np.mean(told):.3f}%" in printed
    assert Image.open(folder / "study.png").width > 500

    before = {path: path.read_bytes() for run in runs.values() for path in run.iterdir()}
    assert study.main([*arguments, "1-4"]) == 0
    assert f"{folder}: 2 of 4 seeds are finished already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before
    assert [row["seed"] for row in table_of(folder)] == ["1", "2", "3", "4"]
    assert len(list(folder.glob("*-seed*"))) == 4

    with pytest.raises(SystemExit, match="2"):
        study.main([*arguments, "1", "--max-lr", "nan"])
    capsys.readouterr()
    assert study.main([*arguments, "1", "--max-lr", "0.03"]) == 1
    assert "was trained by another recipe: max_lr is 0.02 there, 0.03 here" in capsys.readouterr().err


def test_a_study_goes_on_with_a_seed_that_was_interrupted(tmp_path, monkeypatch, capsys, few_images):
    assert study.main([*STUDY, "--out-dir", str(tmp_path / "unbroken"), "--seeds", "5"]) == 0
    original, calls = script.save, []

    def interrupted(path, content):
        calls.append(path.name)
        if calls.count("checkpoint.pt") == 2:
            raise KeyboardInterrupt
        original(path, content)

    monkeypatch.setattr(script, "save", interrupted)
    assert study.main([*STUDY, "--out-dir", str(tmp_path / "broken"), "--seeds", "5,6"]) == 130
    assert "the same command goes on with it" in capsys.readouterr().err
    monkeypatch.setattr(script, "save", original)
    assert study.main([*STUDY, "--out-dir", str(tmp_path / "broken"), "--seeds", "5,6"]) == 0
    assert table_of(tmp_path / "broken")[:1] == table_of(tmp_path / "unbroken")
    (broken,), (unbroken,) = ((tmp_path / name).glob("*-seed5") for name in ("broken", "unbroken"))
    assert (broken / "model.pt").read_bytes() == (unbroken / "model.pt").read_bytes()


def test_a_study_names_the_seeds_that_failed(tmp_path, capsys, few_images):
    arguments = [*STUDY, "--max-lr", "1e30", "--out-dir", str(tmp_path), "--seeds", "1,2"]
    assert study.main(arguments) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "study.py: error: not finished: seeds 1, 2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "study.py: error: the following arguments are required: --seeds"),
        (["--seeds", "3-1"], "study.py: error: argument --seeds: '3-1' is no list of seeds like 1-20 or 1,2,5-8"),
        (["--seeds", "x"], "study.py: error: argument --seeds: 'x' is no list of seeds like 1-20 or 1,2,5-8"),
        (["--seeds", "1", "--epochs", "0"], "script.py: error: argument --epochs: '0' is not"),
        (["--seeds", "1", "--seed", "2"], "study.py: error: of script.py's flags, only"),
        (["--seeds", "1", "--resume", "run"], "study.py: error: of script.py's flags, only"),
    ],
)
def test_bad_usage_of_the_study(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        study.main(arguments)
    printed = capsys.readouterr().err
    assert printed.startswith(message)
    assert printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_seed_lists():
    assert study.seed_list("1-3") == [1, 2, 3]
    assert study.seed_list("7,1-2,2") == [1, 2, 7]


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (20, 2.093)])
def test_the_interval_uses_students_table(n, quantile):
    assert study.student(n) == pytest.approx(quantile, abs=2e-3)


def test_the_summary_is_numpys():
    values = [99.5, 99.61, 99.44, 99.58, 99.57]
    half = 2.776 * np.std(values, ddof=1) / np.sqrt(5)
    low, high = np.mean(values) - half, np.mean(values) + half
    assert study.summary(values) == (
        f"n 5; mean {np.mean(values):.3f}%; standard deviation {np.std(values, ddof=1):.3f}; "
        f"95% interval of the mean {low:.3f} to {high:.3f}; minimum 99.44%; maximum 99.61%"
    )


FEW = """\
import signal, sys, script, study
load = script.load_mnist
script.load_mnist = lambda *args: tuple(part[:1600] for part in load(*args))
signal.signal(signal.SIGTERM, script.interrupt)
sys.exit(study.main())
"""


def run_study(folder, *before):
    """A study of three seeds on few images in processes of its own, one thread each."""
    folder.parent.joinpath("few.py").write_text(FEW)
    line = [sys.executable, *before, folder.parent / "few.py", *STUDY, "--seeds", "1-3", "--out-dir", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    return subprocess.Popen(
        list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc to find a rank, and kills it")
def test_a_study_over_two_ranks_gives_the_same_table_and_survives_a_killed_rank(tmp_path):
    two = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    alone = run_study(tmp_path / "alone")
    assert alone.wait() == 0, alone.stderr.read()

    ranks = run_study(tmp_path / "ranks", *two)
    while not list((tmp_path / "ranks").glob("*-seed2/checkpoint.pt")):
        assert ranks.poll() is None, ranks.stderr.read()
        threading.Event().wait(0.05)
    children = Path(f"/proc/{ranks.pid}/task/{ranks.pid}/children").read_text().split()
    second = next(pid for pid in children if b"\0LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    os.kill(int(second), signal.SIGKILL)
    assert ranks.wait() != 0
    assert not (tmp_path / "ranks" / "study.csv").exists()

    again = run_study(tmp_path / "ranks", *two)
    printed, errors = again.communicate()
    assert again.returncode == 0, errors
    assert table_of(tmp_path / "ranks") == table_of(tmp_path / "alone")
    assert printed.count("n 3; mean") == 1  # one table, the first rank's
    assert len(list((tmp_path / "ranks").glob("*-seed2"))) == 1  # resumed, not begun anew


# ---------------------------------------------------------------- the claim


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
