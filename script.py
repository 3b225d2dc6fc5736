"""Train a 15,440-parameter CNN on MNIST past 99.4 % in 20 epochs.

    python script.py                           train; leaves runs/<time>-seed<N>/
    python script.py --resume runs/<run>       go on with an interrupted run
    python script.py --evaluate [model.pt]     score weights on MNIST's 10,000 test images

Reached: 99.60 % of the test images, mean of seeds 1 to 100 (99.47 to 99.75), after the last epoch; see README.md.
Network and kind of recipe are those of the source document, the README that this project began with.
"""

import argparse
import contextlib
import dataclasses
import gzip
import importlib
import io
import json
import math
import os
import shlex
import sys
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchsummary
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
REFERENCE = HERE / "results" / "reference" / "model.pt"  # the weights of the reference run in README.md


class Failure(Exception):
    """A person's mistake or a machine's fault. The program ends with it as one line."""


# ---------------------------------------------------------------- recipe
ACTIVATIONS = {"hardswish": F.hardswish, "relu": F.relu}


def setting(default, meaning: str, **limits):
    """A field of the recipe. meaning: its line in --help. limits: the least and the most, or choices."""
    return dataclasses.field(default=default, metadata={"meaning": meaning, **limits})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the result, on a given machine. Each field is a flag. Raises ValueError for a bad value."""

    epochs: int = setting(20, "passes over the training images", least=1, most=1_000_000)
    batch_size: int = setting(32, "images in a batch", least=1, most=60_000)
    max_lr: float = setting(0.02, "Adam's learning rate at the peak of the cycle", least=0, most=1e30)
    weight_decay: float = setting(2e-6, "Adam's L2 penalty", least=0, most=1e30)
    seed: int = setting(1, "random seed", least=0, most=2**63 - 1)
    activation: str = setting("hardswish", "activation function", choices=tuple(ACTIVATIONS))
    cpp: bool = setting(True, "use the C++ backend where it is faster; its last digits differ", choices=(False, True))
    # The cycle (OneCycleLR): the learning rate rises to max_lr, then falls to max_lr / div_factor / final_div_factor.
    pct_start: float = setting(0.2, "share of the steps in which the learning rate rises", least=0, most=0.99)
    div_factor: float = setting(10.0, "max_lr divided by the first learning rate", least=1, most=1e30)
    final_div_factor: float = setting(100.0, "first learning rate divided by the last", least=1, most=1e30)
    cycle_momentum: bool = setting(False, "move Adam's beta1 from 0.95 to 0.85 and back", choices=(False, True))
    # The augmentation, drawn anew for each image: a rotation, then an affine transformation, as in the source document.
    rotation: float = setting(5.0, "± degrees of a first rotation", least=0, most=89)
    affine_rotation: float = setting(5.0, "± degrees of rotation after the shear", least=0, most=89)
    shear: float = setting(10.0, "± degrees of shear along x", least=0, most=89)
    translate: float = setting(0.07, "± shift, as a share of the image's side", least=0, most=0.99)
    scale: float = setting(0.04, "± change of size, as a share", least=0, most=0.99)
    interpolation: str = setting("bicubic", "how the augmentation samples", choices=("bicubic", "bilinear", "nearest"))
    # Choices are made on training images that are held out, not on the test images.
    holdout: int = setting(0, "score on the last N training images, train on the others", least=0, most=59_999)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, kind, limits = getattr(self, field.name), type(field.default), field.metadata
            if "choices" in limits:
                good, wanted = value in limits["choices"], f"one of {', '.join(map(str, limits['choices']))}"
            else:
                good = isinstance(value, (int, kind)) and limits["least"] <= value <= limits["most"]
                wanted = f"a {'whole ' if kind is int else ''}number from {limits['least']} to {limits['most']}"
            if not good:
                raise ValueError(f"{field.name} is {value!r}; it must be {wanted}")


# ---------------------------------------------------------------- network
class Net(nn.Module):
    """Three convolutional blocks, 15,440 parameters: images (B, 1, 28, 28) -> log-probabilities (B, 10).

    Where a block has a max-pool, the activation comes after it, on a quarter of the values. As Hardswish is not
    monotonic, the other order would be another network.
    """

    def __init__(self, activation: str = Recipe.activation) -> None:
        super().__init__()
        self.set_extra_state(activation)
        self.conv1 = nn.Conv2d(1, 10, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(10)
        self.conv2 = nn.Conv2d(10, 20, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(20)
        self.pool1 = nn.MaxPool2d(2)
        self.drop1 = nn.Dropout(0.1)

        self.conv3 = nn.Conv2d(20, 10, 1)
        self.conv4 = nn.Conv2d(10, 20, 3, padding=1)
        self.norm4 = nn.BatchNorm2d(20)
        self.conv5 = nn.Conv2d(20, 20, 3, padding=1)
        self.norm5 = nn.BatchNorm2d(20)
        self.pool2 = nn.MaxPool2d(2)
        self.drop2 = nn.Dropout(0.1)

        self.conv6 = nn.Conv2d(20, 40, 3, padding=1)
        self.norm6 = nn.BatchNorm2d(40)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.conv7 = nn.Conv2d(40, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm1(self.conv1(x)))  # (B, 10, 28, 28)
        x = self.activation(self.pool1(self.norm2(self.conv2(x))))  # (B, 20, 14, 14)
        x = self.conv3(self.drop1(x))  # (B, 10, 14, 14)
        x = self.activation(self.norm4(self.conv4(x)))  # (B, 20, 14, 14)
        x = self.activation(self.pool2(self.norm5(self.conv5(x))))  # (B, 20, 7, 7)
        x = self.activation(self.norm6(self.conv6(self.drop2(x))))  # (B, 40, 7, 7)
        x = self.conv7(self.gap(x))  # (B, 10, 1, 1)
        return F.log_softmax(x.flatten(1), dim=1)  # (B, 10)

    # state_dict() and load_state_dict() call these: the activation is saved with the weights.
    def get_extra_state(self) -> str:
        return self.activation_name

    def set_extra_state(self, activation: str) -> None:
        self.activation_name, self.activation = activation, ACTIVATIONS[activation]


# ---------------------------------------------------------------- augmentation and batches
MEAN, STD = 0.1307, 0.3081  # of the training images' pixels, scaled to [0, 1]


def affine_matrices(rotation: Tensor, affine_rotation: Tensor, shear: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The inverse of each image's transformation, (B, 2, 3): where each output pixel comes from, for F.affine_grid.

    The image is turned by `rotation`, then sheared along x, scaled, turned by `affine_rotation` and shifted, all about
    its centre. Angles (B,) in degrees, clockwise; shift (B, 2) as a share of the image's side, right and down.
    Signs and order are those of torchvision.transforms.v2.functional.affine. The inverse undoes the last step first.
    """

    def turn_back(degrees: Tensor) -> Tensor:  # (B,) -> (B, 2, 2)
        cos, sin = degrees.deg2rad().cos(), degrees.deg2rad().sin()
        return torch.stack((cos, sin, -sin, cos), dim=1).view(-1, 2, 2)

    one, zero = torch.ones_like(shear), torch.zeros_like(shear)
    unshear = torch.stack((one, shear.deg2rad().tan(), zero, one), dim=1).view(-1, 2, 2)
    linear = turn_back(rotation) @ unshear @ turn_back(affine_rotation) / scale[:, None, None]
    return torch.cat((linear, linear @ (-2 * shift[:, :, None])), dim=2)  # the grid is 2 wide, from -1 to 1


def warp(images: Tensor, matrices: Tensor, interpolation: str) -> Tensor:
    """Resample each image (B, 1, H, W) by its own matrix (B, 2, 3): one interpolation; outside is background (0)."""
    grid = F.affine_grid(matrices, images.shape, align_corners=False)  # (B, H, W, 2)
    warped = F.grid_sample(images, grid, interpolation, padding_mode="zeros", align_corners=False)
    return warped.clamp_(0, 1)  # bicubic interpolation overshoots


def augment(images: Tensor, recipe: Recipe) -> Tensor:
    """Turn, shear, scale and shift each image (B, 1, H, W) of [0, 1] pixels by a draw of its own."""

    def uniform(spread: float, *shape: int) -> Tensor:  # (B, *shape) in ± spread
        return (torch.rand(len(images), *shape, device=images.device) * 2 - 1) * spread

    rotation, affine_rotation = uniform(recipe.rotation), uniform(recipe.affine_rotation)
    shear, scale, shift = uniform(recipe.shear), 1 + uniform(recipe.scale), uniform(recipe.translate, 2)
    return warp(images, affine_matrices(rotation, affine_rotation, shear, scale, shift), recipe.interpolation)


class Loader:
    """Batches (normalised images (B, 1, 28, 28), labels (B,)) of uint8 images; with a recipe shuffled and augmented."""

    CHUNK = 2000  # images made ready at a time: enough to amortise the calls, few enough for the cache
    mean, std = MEAN, STD  # for page/, which does not import this file

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int = 1000, recipe: Recipe | None = None):
        self.images, self.labels, self.batch_size, self.recipe = images, labels, batch_size, recipe

    def __len__(self) -> int:
        return math.ceil(len(self.images) / self.batch_size)

    def pixels(self, indices: Tensor) -> Tensor:
        """The images (B, 1, 28, 28) at these indices (B,), in [0, 1]; augmented, each anew, if there is a recipe."""
        images = self.images[indices].float() / 255
        return augment(images, self.recipe) if self.recipe else images

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, device = len(self.images), self.images.device
        order = torch.randperm(count, device=device) if self.recipe else torch.arange(count, device=device)
        chunk = self.batch_size * math.ceil(self.CHUNK / self.batch_size)  # whole batches
        for indices in order.split(chunk):
            images = (self.pixels(indices) - MEAN) / STD  # after the augmentation, so that background is background
            yield from zip(images.split(self.batch_size), self.labels[indices].split(self.batch_size), strict=True)


# ---------------------------------------------------------------- training and test
class EagerBackend:
    """A network's passes by PyTorch. backend/ has the same in C++, for this class and Net as they stand here."""

    kind = "eager"

    def __init__(self, net: Net) -> None:
        self.net = net.to(memory_format=torch.channels_last)  # oneDNN is faster with it, and backend/ needs it

    def forward_backward(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """A batch's (mean loss, number right). The parameters' .grad holds its gradients, and nothing from before."""
        self.net.zero_grad()
        log_probabilities = self.net(images)  # (B, 10)
        loss = F.nll_loss(log_probabilities, labels)
        loss.backward()
        return loss.item(), (log_probabilities.argmax(dim=1) == labels).sum().item()

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, 10) of images (B, 1, 28, 28)."""
        return self.net(images)

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()


def make_optimizer(net: nn.Module, recipe: Recipe, total_steps: int) -> tuple[torch.optim.Adam, OneCycleLR]:
    """Adam, and its schedule over total_steps steps."""
    optimizer = torch.optim.Adam(net.parameters(), recipe.max_lr, weight_decay=recipe.weight_decay, fused=True)
    cycle = {name: getattr(recipe, name) for name in ("pct_start", "div_factor", "final_div_factor", "cycle_momentum")}
    if recipe.pct_start * total_steps == 1:  # OneCycleLR would divide by 0
        cycle["pct_start"] = 0.0
    return optimizer, OneCycleLR(optimizer, recipe.max_lr, total_steps, **cycle)


def train(backend, loader: Loader, optimizer, scheduler, epoch: int) -> tuple[float, float, float, str]:
    """One epoch: (mean loss, accuracy in percent, last learning rate, finished bar). Raises Failure if it diverges."""
    backend.net.train()
    total_loss, total_right, images_seen, start = 0.0, 0, 0, time.perf_counter()
    bar = tqdm(loader, leave=False, dynamic_ncols=True, disable=None)  # on a terminal only
    for index, (images, labels) in enumerate(bar):
        learning_rate = scheduler.get_last_lr()[0]
        loss, right = backend.forward_backward(images, labels)
        if not math.isfinite(loss):
            where = f"epoch {epoch}, step {index + 1} of {len(loader)}, learning rate {learning_rate:.3g}"
            raise Failure(f"the loss is not finite: {where}; begin anew with a lower --max-lr")
        backend.step(optimizer)
        scheduler.step()
        total_loss += loss * len(labels)
        total_right += right
        images_seen += len(labels)
        text = f"loss={total_loss / images_seen:.4f} batch_id={index}"
        bar.set_description_str(text, refresh=False)
    line = tqdm.format_meter(len(loader), len(loader), time.perf_counter() - start, ncols=100, ascii=False, prefix=text)
    return total_loss / images_seen, 100 * total_right / images_seen, learning_rate, line


class Score(NamedTuple):
    """An evaluation; as a string, what the log's result line says."""

    loss: float  # mean over the images
    predicted: Tensor  # (N,) int64, on the CPU, in the loader's order
    confusion: Tensor  # (10, 10) int64: how often each true digit (row) was classified as each (column)

    @property
    def accuracy(self) -> float:  # in percent
        return 100 * self.confusion.trace().item() / len(self.predicted)

    def __str__(self) -> str:
        right, count = self.confusion.trace().item(), len(self.predicted)
        return f"Average loss: {self.loss:.4f}, Accuracy: {right}/{count} ({self.accuracy:.2f}%)"


@torch.no_grad()
def test(backend, loader: Loader) -> Score:
    """Score the network on a loader's images."""
    backend.net.eval()
    batches = [(backend.forward(images), labels) for images, labels in loader]
    log_probabilities, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))  # (N, 10), (N,)
    loss, predicted = F.nll_loss(log_probabilities, labels), log_probabilities.argmax(dim=1)
    confusion = torch.bincount(labels * 10 + predicted, minlength=100).view(10, 10)
    return Score(loss.item(), predicted.cpu(), confusion.cpu())


def make_backend(eager: EagerBackend, recipe: Recipe, kind: str | None = None):
    """The backend to train with, the faster one or that of a resumed run's kind, and the reason in words."""
    if not recipe.cpp:
        return eager, "--no-cpp"
    try:
        from backend import choose_backend
    except ImportError as error:
        return eager, str(error)
    return choose_backend(eager, recipe.batch_size, kind)


# ---------------------------------------------------------------- files and data
def save(path: Path, content: object) -> None:
    """Write a file whole or not at all, or raise Failure: bytes as they are, anything else by torch.save."""
    if not isinstance(content, bytes):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        content = buffer.getvalue()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # no other writer has this one
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise Failure(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path) -> dict:
    """Read what torch.save wrote: tensors and plain values only, so that a hostile pickle runs no code."""
    try:
        content = path.read_bytes()
        if zipfile.ZipFile(io.BytesIO(content)).testzip():  # by checksums, which torch.load does not read
            raise ValueError
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except OSError as error:
        raise Failure(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # torch.load has no one exception for a file that is not its own
        raise Failure(f"{path} is damaged, or not a file of this script.py") from error


def load_net(weights: Path) -> Net:
    """The network with the weights of a model.pt or a run's folder, on the CPU, in evaluation mode. Raises Failure."""
    weights = weights / "model.pt" if weights.is_dir() else weights
    net, state = Net().eval(), load(weights)
    try:
        net.load_state_dict(state)
    except Exception as error:  # whatever does not fit
        raise Failure(f"{weights} does not hold the weights of this network") from error
    return net


def read_archive(archive: Path, md5: str) -> bytes:
    """What one of MNIST's archives holds. One that is missing or damaged is downloaded. Raises Failure."""
    from torchvision.datasets import MNIST
    from torchvision.datasets.utils import check_integrity, download_url

    if not check_integrity(archive, md5):
        with contextlib.suppress(OSError, EOFError, zlib.error):  # none of these: it is not damaged, it is other data
            gzip.decompress(archive.read_bytes())
            raise Failure(f"{archive} is not MNIST's, by its checksum; other data cannot be used under MNIST's names")
        temporary = archive.with_name(f".{archive.name}.tmp")
        for mirror in MNIST.mirrors:
            try:
                download_url(mirror + archive.name, archive.parent, temporary.name, md5)
                break
            except Exception as error:  # whatever is wrong with this mirror, the next may be good
                print(f"no good copy at {mirror}: {error}")
        else:
            temporary.unlink(missing_ok=True)
            raise Failure(f"{archive} is missing or damaged, and no mirror has it; put a good copy there (md5 {md5})")
        if archive.exists():  # whatever it is, somebody may want it
            aside = archive.rename(archive.with_name(f"{archive.name}.{uuid.uuid4().hex}.bad"))
            print(f"{archive} was damaged and is replaced; the old file is now {aside.name}")
        os.replace(temporary, archive)
    return gzip.decompress(archive.read_bytes())


def load_mnist(data_dir: Path, train: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """The training or the test set, verified: images uint8 (N, 1, 28, 28), labels int64 (N,). Raises Failure."""
    from torchvision.datasets import MNIST  # here, as its import takes seconds that predict.py need not wait

    archives = MNIST.resources[:2] if train else MNIST.resources[2:]  # (name, md5) of the images, of the labels
    pixels, digits = (read_archive(data_dir / "MNIST" / "raw" / name, md5) for name, md5 in archives)
    images = torch.tensor(np.frombuffer(pixels, np.uint8, offset=16)).view(-1, 1, 28, 28)  # after IDX's header
    labels = torch.tensor(np.frombuffer(digits, np.uint8, offset=8)).long()
    return images.to(device), labels.to(device)


def make_loaders(recipe: Recipe, data_dir: Path, device: torch.device) -> tuple[Loader, Loader]:
    """A loader for training, and one for scoring: the test images, or the held-out ones if recipe.holdout > 0."""
    images, labels = load_mnist(data_dir, True, device)
    count = len(images) - recipe.holdout
    scored = (images[count:], labels[count:]) if recipe.holdout else load_mnist(data_dir, False, device)
    return Loader(images[:count], labels[:count], recipe.batch_size, recipe), Loader(*scored)


# ---------------------------------------------------------------- a run: its folder, its files, its epochs
# An epoch's numbers. test_: from the held-out images if there are any. learning_rate: the last step's.
HISTORY = "epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "learning_rate", "seconds"


def seed_torch(seed: int, epoch: int) -> None:
    """Seed from (seed, epoch) alone, so that a resumed run draws what an unbroken one would."""
    torch.backends.cudnn.deterministic = True  # the same seed gives the same bits on CUDA, too
    torch.manual_seed(int(np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)[0]))


class Run:
    """A training run: its folder, and all that its checkpoint holds."""

    def __init__(self, folder: Path, recipe: Recipe, total_steps: int, device: torch.device) -> None:
        self.folder, self.recipe, self.device = folder, recipe, device
        self.history: list[dict] = []  # a row for each epoch
        self.log: list[str] = []  # what was printed
        self.backend_kind: str | None = None  # make_backend() chooses it when the run begins
        seed_torch(recipe.seed, 0)
        self.net = Net(recipe.activation).to(device)
        self.eager = EagerBackend(self.net)  # it changes the parameters' memory format: before the optimizer has them
        self.optimizer, self.scheduler = make_optimizer(self.net, recipe, total_steps)
        self.parts = {"net": self.net, "optimizer": self.optimizer, "scheduler": self.scheduler}

    def say(self, line: str) -> None:
        """Print a line, and keep it for train.log."""
        print(line)
        self.log.append(line)

    def save_checkpoint(self) -> None:
        """Write checkpoint.pt and the tables. A checkpoint that cannot be written raises Failure; a table does not."""
        checkpoint = {name: part.state_dict() for name, part in self.parts.items()}
        checkpoint |= {"history": self.history, "log": self.log, "backend_kind": self.backend_kind}
        save(self.folder / "checkpoint.pt", checkpoint | {"recipe": dataclasses.asdict(self.recipe)})
        self.save_tables()

    def save_tables(self) -> None:
        """Write history.csv and train.log. One that is open in another program is written the next time."""
        rows = [",".join(map(str, row)) for row in (HISTORY, *(row.values() for row in self.history))]
        for name, lines in (("history.csv", rows), ("train.log", self.log)):
            try:  # a path in the log may have bytes that are not UTF-8
                save(self.folder / name, "".join(line + "\n" for line in lines).encode(errors="replace"))
            except Failure as failure:
                if f"{failure}; the run goes on" not in self.log:
                    self.say(f"{failure}; the run goes on")


def load_run(folder: Path, device: torch.device) -> Run:
    """The run in a folder as its checkpoint has it. Raises Failure."""
    file = folder / "checkpoint.pt"
    if folder.is_dir() and not file.exists():
        raise Failure(f"{folder} has no finished epoch, so there is nothing to resume")
    checkpoint = load(file)
    try:
        recipe = Recipe(**checkpoint["recipe"])
        if dataclasses.asdict(recipe) != checkpoint["recipe"]:
            raise ValueError("a field is missing")
        run = Run(folder, recipe, checkpoint["scheduler"]["total_steps"], device)
        for name, part in run.parts.items():
            part.load_state_dict(checkpoint[name])
        run.history, run.log, run.backend_kind = (checkpoint[name] for name in ("history", "log", "backend_kind"))
    except Exception as error:  # whatever does not fit
        raise Failure(f"{file} is not from this version of script.py") from error
    return run


def fit(run: Run, train_loader: Loader, test_loader: Loader) -> None:
    """Train a run from where it stands to its last epoch. Its files are whole after each. Raises Failure."""
    if run.history:
        run.say(f"resumed after epoch {len(run.history)}")
    else:
        content = dataclasses.asdict(run.recipe) | {"torch": torch.__version__, "device": run.device.type}
        save(run.folder / "recipe.json", (json.dumps(content, indent=2) + "\n").encode())
        with contextlib.redirect_stdout(io.StringIO()) as table:
            torchsummary.summary(Net(), (1, 28, 28), device="cpu")  # it would assume CUDA
        run.say(table.getvalue().rstrip())
        run.say(f"device: {run.device.type}; torch {torch.__version__}\nseed: {run.recipe.seed}")
    backend, reason = make_backend(run.eager, run.recipe, run.backend_kind)
    run.backend_kind = backend.kind
    run.say(f"backend: {backend.kind}, float32, threads: {torch.get_num_threads()} ({reason})")

    for epoch in range(len(run.history) + 1, run.recipe.epochs + 1):
        start = time.perf_counter()
        seed_torch(run.recipe.seed, epoch)
        loss, accuracy, learning_rate, bar = train(backend, train_loader, run.optimizer, run.scheduler, epoch)
        score = test(backend, test_loader)
        if not math.isfinite(score.loss):
            raise Failure(f"the network's output is not finite after epoch {epoch}; begin anew with a lower --max-lr")
        row = epoch, loss, accuracy, score.loss, score.accuracy, learning_rate, round(time.perf_counter() - start, 2)
        run.history.append(dict(zip(HISTORY, row, strict=True)))
        run.say(f"{bar}\n\n{'Held-out' if run.recipe.holdout else 'Test'} set: {score}\n")
        run.save_checkpoint()
    # Scored again: a run that is resumed only for its pictures has no score from above.
    finish(run, test(backend, test_loader), train_loader, test_loader)


def finish(run: Run, score: Score, train_loader: Loader, test_loader: Loader) -> None:
    """Draw the pictures and the page, print the final accuracy, and write model.pt: then the run is finished."""
    net = Net()  # on the CPU, in the usual memory format
    net.load_state_dict(run.net.state_dict())
    for module in "pictures", "page":
        try:
            files = importlib.import_module(module).draw(run.history, net, score, train_loader, test_loader)
        except Exception as error:  # the module is not beside this file, or fails: the result counts more
            run.say(f"no {module}: {error}")
            continue
        for name, content in files.items():
            save(run.folder / name, content)
            if name.endswith(".html"):
                run.say(f"draw a digit of your own: open {run.folder / name} in a browser")
    minutes, seconds = divmod(round(sum(row["seconds"] for row in run.history)), 60)
    took = f"{run.recipe.epochs} epochs in {minutes} min {seconds} s"
    measure = "held-out accuracy" if run.recipe.holdout else "accuracy"
    run.say(f"Final {measure}: {score.accuracy:.2f}% after {took}; see {run.folder}")
    run.save_tables()
    save(run.folder / "model.pt", net.state_dict())


def evaluate(weights: Path, data_dir: Path, device: torch.device) -> None:
    """Print the test line, each digit's accuracy and the confusion matrix."""
    score = test(EagerBackend(load_net(weights).to(device)), Loader(*load_mnist(data_dir, False, device)))
    print(f"Test set: {score}\n\ndigit  accuracy  classified as" + "".join(f"{digit:>6}" for digit in range(10)))
    for digit, row in enumerate(score.confusion.tolist()):
        print(f"{digit:>5}  {100 * row[digit] / sum(row):7.2f}%         " + "".join(f"{count:>6}" for count in row))


# ---------------------------------------------------------------- command line
# The source document's own values; where it names none, the usual ones: ReLU, OneCycleLR's and torchvision's.
SOURCE_TRAINING = {"max_lr": 0.01, "weight_decay": 1e-4, "activation": "relu", "cycle_momentum": True}
SOURCE_AUGMENTATION = {"shear": 5.0, "translate": 0.0, "scale": 0.0, "interpolation": "nearest"}
RECIPES = {"ours": Recipe(), "source": Recipe(**SOURCE_TRAINING, **SOURCE_AUGMENTATION)}


def parse_arguments(argv: list[str] | None, program: str = "script.py") -> tuple[argparse.Namespace, Recipe]:
    """The arguments, and the recipe that they make; exits with 2 on bad usage, in one line that names the program."""
    able = {"cuda": torch.cuda.is_available(), "cpu": True, "mps": torch.backends.mps.is_available()}
    devices = [device for device in able if able[device]]  # the first is the default; on so small a network mps is slow
    parser = argparse.ArgumentParser(program, usage=argparse.SUPPRESS, description=__doc__)  # an error is one line
    parser.formatter_class = argparse.RawDescriptionHelpFormatter  # keeps the lines of __doc__
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--resume", type=Path, metavar="RUN", help="go on with the interrupted run in this folder")
    text = "score weights on the test images (default: the reference run's)"
    mode.add_argument("--evaluate", type=Path, nargs="?", const=REFERENCE, metavar="WEIGHTS", help=text)
    parser.add_argument("--device", choices=devices, default=devices[0], help=f"default here: {devices[0]}")
    text = "the folder with MNIST's files (default: data/ beside script.py)"
    parser.add_argument("--data-dir", type=Path, default=HERE / "data", help=text)
    new = parser.add_argument_group("a new run")
    new.add_argument("--out-dir", type=Path, help="where its folder is made (default: runs/)")
    new.add_argument("--recipe", choices=RECIPES, help="the values to start from (default: ours)")
    for field in dataclasses.fields(Recipe):
        flag, text = f"--{field.name.replace('_', '-')}", f"{field.metadata['meaning']} (default: {field.default})"
        if isinstance(field.default, bool):
            new.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            new.add_argument(flag, type=type(field.default), choices=field.metadata.get("choices"), help=text)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if name in vars(Recipe()) and value is not None}
    if (args.resume or args.evaluate) and (given or args.recipe or args.out_dir):
        parser.error("with --resume or --evaluate, only --device and --data-dir can be given")
    try:
        return args, dataclasses.replace(RECIPES[args.recipe or "ours"], **given)
    except ValueError as error:  # it begins with the field's name
        parser.error("--" + str(error).replace("_", "-"))


def run_script(args: argparse.Namespace, recipe: Recipe) -> int:
    """Evaluate, or train a new run or one that was interrupted. Returns the exit status."""
    device = torch.device(args.device)
    if args.evaluate:
        evaluate(args.evaluate, args.data_dir, device)
        return 0
    if args.resume:
        folder = args.resume.parent if args.resume.is_file() else args.resume
        if (folder / "model.pt").exists():
            print(f"{folder} is finished; nothing to do")
            return 0
        run = load_run(folder, device)
        loaders = make_loaders(run.recipe, args.data_dir, device)
    else:
        loaders = make_loaders(recipe, args.data_dir, device)
        for ending in "", *(f"-{number}" for number in range(2, 1000)):  # of runs that begin in the same second
            folder = (args.out_dir or Path("runs")) / f"{time.strftime('%Y-%m-%d_%H-%M-%S')}-seed{recipe.seed}{ending}"
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                break
        run = Run(folder, recipe, recipe.epochs * len(loaders[0]), device)
    try:
        fit(run, *loaders)
    except KeyboardInterrupt as interrupt:
        if not (run.folder / "checkpoint.pt").exists():  # nothing to go on with
            raise
        flags = "--resume", str(run.folder), "--device", args.device, "--data-dir", str(args.data_dir)
        command = shlex.join([sys.executable, str(HERE / "script.py"), *flags])
        raise KeyboardInterrupt(f"go on with: {command}") from interrupt
    return 0


def run_command(program: str, work: Callable[[], int]) -> int:
    """The exit status of work(). A mistake, a fault or Ctrl-C is one line on standard error: status 1, or 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a console that cannot print the bar's blocks gets ?
        sys.stdout.reconfigure(errors="replace", line_buffering=True)
    torch.set_flush_denormal(True)  # or a dead filter's weights, decayed to 1e-40, make a step ten times as slow
    try:
        return work()
    except (Failure, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as interrupt:  # with a hint, perhaps
        print("; ".join([f"{program}: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 success, 1 failure, 130 Ctrl-C."""
    return run_command("script.py", lambda: run_script(*parse_arguments(argv)))


if __name__ == "__main__":
    sys.exit(main())
