"""The figures: a run's curves, confusions, misclassified and augmented images, and what predict.py saw."""

import io
import math

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator
from torch import Tensor


def png(figure: Figure, metadata: dict[str, str] | None = None) -> bytes:
    """The figure as a PNG file's content, with this metadata beside matplotlib's own."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120, metadata=metadata)
    return buffer.getvalue()


def curves(history: list[dict]) -> Figure:
    """Losses, errors and the learning rate over the epochs; history's rows are those of history.csv."""
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    losses, errors, learning_rate = figure.subplots(1, 3)
    epochs = range(1, len(history) + 1)
    for kind in "train", "test":
        losses.plot(epochs, [row[f"{kind}_loss"] for row in history], marker=".", label=kind)
        errors.plot(epochs, [100 - row[f"{kind}_accuracy"] for row in history], marker=".", label=kind)
    errors.axhline(0.6, color="grey", linestyle="--", label="99.4 % accuracy")
    learning_rate.plot(epochs, [row["learning_rate"] for row in history], marker=".")
    for axes in losses, errors:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda y, _: np.format_float_positional(y, trim="-"))  # not 5e-05
        axes.minorticks_off()
        axes.legend()
    for axes, title in (losses, "loss"), (errors, "misclassified images (%)"), (learning_rate, "learning rate"):
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    return figure


def confusion(table: Tensor) -> Figure:
    """The confusion matrix (10, 10); colour shows the errors, which the diagonal would drown."""
    figure = Figure(figsize=(5.6, 5.4), layout="constrained")
    axes = figure.subplots()
    errors = (table * ~torch.eye(10, dtype=torch.bool)).numpy()
    axes.imshow(errors, cmap="Reds", vmax=2 * errors.max() + 1)
    for true, read in table.nonzero().tolist():
        axes.text(read, true, int(table[true, read]), ha="center", va="center", fontsize=8)
    axes.set(xlabel="classified as", ylabel="true digit", xticks=range(10), yticks=range(10))
    return figure


def sheet(images: Tensor, titles: list[str]) -> Figure:
    """Images (N, 1, 28, 28), ten in a row, each under its title."""
    rows = max(1, math.ceil(len(images) / 10))
    figure = Figure(figsize=(10, 1.1 * rows))
    axes = figure.add_axes((0, 0, 1, 1))  # one for all: an axes an image takes seconds
    for index, (image, title) in enumerate(zip(images[:, 0].numpy(), titles, strict=True)):
        x, y = 32 * (index % 10), 35 * (index // 10)
        axes.imshow(image, cmap="gray_r", extent=(x, x + 28, y + 28, y))
        axes.text(x + 14, y - 1, title, ha="center", fontsize=7)
    axes.set(xlim=(-2, 318), ylim=(35 * rows - 5, -7))
    axes.axis("off")
    return figure


def seen(reading) -> Figure:
    """What predict.py saw: the picture of a reader.Reading, with frames around its marks, and the fields of its digits.

    Digits have red frames, the rest blue ones.
    """
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    height, width = (side * reading.scale for side in reading.sheet.shape[:2])
    left.imshow(reading.sheet, extent=(0, width, height, 0))
    marks = [(mark, "tab:blue", "") for mark in reading.left_out]
    for mark, colour, text in marks + [(digit.mark, "tab:red", digit.value) for digit in reading.digits]:
        x, y, x_end, y_end = reading.box(mark)
        left.add_patch(Rectangle((x, y), x_end - x, y_end - y, fill=False, edgecolor=colour))
        left.text(x, y, text, color=colour, fontsize=9, ha="right", va="bottom", clip_on=True)
    columns = max(4, math.ceil(math.sqrt(len(reading.digits))))
    for index, digit in enumerate(reading.digits):
        x, y = 32 * (index % columns), 38 * (index // columns)
        right.imshow(digit.field[0], cmap="gray", vmin=0, vmax=1, extent=(x, x + 28, y + 28, y))
        title = f"{digit.value} {100 * digit.probability:.0f}%"
        right.text(x + 14, y - 1, title, ha="center", fontsize=min(10, 60 / columns))
    right.set(xlim=(-4, 32 * columns), ylim=(38 * math.ceil(max(1, len(reading.digits)) / columns), -10))
    left.axis("off")
    right.axis("off")
    return figure


def misclassified(predicted: Tensor, loader) -> Figure:
    """The first hundred of the loader's images whose predicted digits (N,) are wrong."""
    images, labels = loader.images.cpu(), loader.labels.cpu()
    wrong = (labels != predicted).nonzero().flatten()[:100]
    return sheet(images[wrong], [f"{labels[i]} classified as {predicted[i]}" for i in wrong.tolist()])


def augmentation(loader) -> Figure:
    """The first image of each digit in the loader, one row each: the original, and nine augmented versions."""
    first = torch.stack([(loader.labels == digit).nonzero()[0, 0] for digit in loader.labels.unique()])
    torch.manual_seed(loader.recipe.seed)
    shown = loader.pixels(first.repeat_interleave(10)).cpu()
    shown[::10] = loader.images[first].cpu() / 255
    return sheet(shown, ["original", *["augmented"] * 9, *[""] * (len(shown) - 10)])


def draw(history: list[dict], _net, score, train_loader, test_loader) -> dict[str, bytes]:
    """A run's pictures as PNG files, by name. page.draw() has the same arguments, a script.Net among them."""
    return {
        "curves.png": png(curves(history)),
        "confusion.png": png(confusion(score.confusion)),
        "misclassified.png": png(misclassified(score.predicted, test_loader)),
        "augmentation.png": png(augmentation(train_loader)),
    }
