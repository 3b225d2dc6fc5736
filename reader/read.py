"""From marks to digits: each as the network reads it, cut where digits touch, in lines, in the best of several ways.

A mark is made into a 28x28 field as MNIST's own were (as_mnist), and marks of touching digits are cut (split). Where
the same ink can be read in several ways, the reading with the highest score stands (read_colours).
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy import ndimage
from skimage.measure import label
from torch import Tensor

from reader.segment import (
    Box,
    Mark,
    bounds,
    connected,
    find_ink,
    find_marks,
    flatten,
    stroke_width,
    usual_height,
)
from script import MEAN, REFERENCE, STD, Failure, Net, load_net

# ---------------------------------------------------------------- digits


class Digit(NamedTuple):
    """A mark as the network reads it: its field (1, 28, 28), and the probability of each of the ten digits."""

    mark: Mark
    field: Tensor
    probabilities: Tensor

    @property
    def value(self) -> int:
        return self.probabilities.argmax().item()

    @property
    def probability(self) -> float:
        """Of the value; this is what is printed."""
        return self.probabilities.max().item()

    @property
    def score(self) -> float:
        """How surely the mark is one digit, to decide where it is cut: less if it is wider than 0.8 of its height."""
        return self.probability * np.clip(1.8 - self.mark.width / self.mark.height, 0.2, 1)


def as_mnist(ink: np.ndarray, mask: np.ndarray) -> Tensor:
    """A digit's ink (H, W) and its strokes as MNIST made its own: (1, 28, 28) in [0, 1].

    Scaled to fit 20x20 pixels, grey by antialiasing, and laid into 28x28 by its centre of mass,
    as LeCun, Cortes and Burges describe. Strokes that would shrink to less than MNIST's are first drawn anew, wider.
    """
    unit, stroke = max(mask[bounds(mask)].shape) / 20, stroke_width(mask)  # unit: a pixel of the field
    wider = (2.4 * unit - stroke) / 2 if stroke < 2 * unit else 0
    if wider >= 0.5:
        digit = np.clip(wider + 0.5 - ndimage.distance_transform_edt(~np.pad(mask, math.ceil(wider))), 0, 1)
    else:
        grown = ndimage.binary_dilation(mask, iterations=max(1, round(unit / 10)))  # with its grey edge
        digit = np.clip(ink / max(np.percentile(ink[mask], 90), 1e-6), 0, 1) * grown
    digit = digit[bounds(digit > 0.25)]
    height, width = (max(1, round(20 * side / max(digit.shape))) for side in digit.shape)
    digit = np.asarray(Image.fromarray(np.float32(digit)).resize((width, height), Image.Resampling.BOX))
    y, x = ndimage.center_of_mass(digit)
    # MNIST's centres of mass lie at pixel 14, counted from 0.
    top, left = np.clip((round(14 - y), round(14 - x)), 0, (28 - height, 28 - width))
    field = torch.zeros(1, 28, 28)
    field[0, top : top + height, left : left + width] = torch.from_numpy(digit / digit.max())
    return field


@torch.no_grad()
def classify(net: Net, fields: list[Tensor]) -> Tensor:
    """Each field's probabilities, (N, 10)."""
    return net((torch.stack(fields) - MEAN) / STD).exp()


def read_marks(marks: list[Mark], ink: np.ndarray, net: Net) -> list[Digit]:
    """Each mark as the network reads it, from the ink (H, W) there."""
    if not marks:
        return []
    margin = 1 + max(max(mark.mask.shape) for mark in marks) // 20  # the strokes' grey edge lies outside the mark
    ink, fields = np.pad(ink, margin), []
    for mark in marks:
        y, x = mark.place
        around = ink[y.start : y.stop + 2 * margin, x.start : x.stop + 2 * margin]
        fields.append(as_mnist(around, np.pad(mark.mask, margin)))
    return [Digit(*parts) for parts in zip(marks, fields, classify(net, fields), strict=True)]


# ---------------------------------------------------------------- digits that touch

SLOPES = (0, 0.3)  # of cuts: columns to the left, for a row down
MOST_CUTS = 10  # places to choose from
EACH, THROUGH = 0.3, 0.45  # what each digit costs, and each stroke that a cut goes through


def price(digit: Digit) -> float:
    """What a digit costs in a way to cut a mark: the less certain, the more."""
    return EACH - math.log(digit.score)


def cut(mark: Mark, slope: float, ink: np.ndarray, net: Net) -> tuple[float, list[Digit]]:
    """The cheapest way to cut a mark along lines of this slope into digits side by side: its cost, and the digits."""
    down, across = np.mgrid[: mark.height, : mark.width]
    column = np.round(across + slope * down).astype(int)
    column -= column[mark.mask].min()
    crossed = np.bincount(column[mark.mask]) / stroke_width(mark.mask)  # how many strokes a cut goes through
    # From each strip the column that crosses the fewest strokes, and of these the best.
    strip, end = max(2, mark.height // 10), len(crossed)
    cuts = [start + np.argmin(crossed[start : start + strip]) for start in range(strip, end - strip, strip)]
    cuts = sorted((place for place in cuts if crossed[place] < 3), key=lambda place: crossed[place])[:MOST_CUTS]
    ends = [*sorted(cuts), end]
    crossed[0] = 0  # the left end is no cut
    parts = {}
    for left, right in itertools.combinations([0, *ends], 2):
        keep = mark.mask & (left <= column) & (column < right)
        if right - left <= 1.2 * mark.height and keep.any() and np.ptp(np.nonzero(keep)[0]) >= 0.6 * mark.height:
            parts[left, right] = mark.part(keep)
    cheapest = {0: (0.0, [])}  # the cheapest way up to each place
    for (left, right), digit in zip(parts, read_marks(list(parts.values()), ink, net), strict=True):  # by their left
        if left in cheapest:
            cost, before = cheapest[left]
            way = (cost + price(digit) + THROUGH * crossed[left], [*before, digit])
            cheapest[right] = min(cheapest.get(right, way), way, key=lambda way: way[0])
    return cheapest.get(end, (math.inf, []))


def split(digit: Digit, ink: np.ndarray, net: Net) -> list[Digit]:
    """The digit, or those that touch in it.

    Of all ways to cut it the cheapest stands, as in the heuristic over-segmentation of LeCun, Bottou, Bengio and
    Haffner (1998).
    """
    if price(digit) < 2 * EACH:
        return [digit]  # two digits cost more
    ways = [(price(digit), [digit])] + [cut(digit.mark, slope, ink, net) for slope in SLOPES]
    return min(ways, key=lambda way: way[0])[1]


# ---------------------------------------------------------------- reading

MOST_MARKS = 600  # more are noise or text


@dataclasses.dataclass
class Reading:
    """What is read in a picture: its digits, line by line, what was left out, and why it is refused if it is."""

    rows: list[list[Digit]] = dataclasses.field(default_factory=list)
    unread: list[Mark] = dataclasses.field(default_factory=list)  # too large or too small for a digit
    ignored: list[Mark] = dataclasses.field(default_factory=list)  # lines, the paper's edges
    problem: str = ""
    sheet: np.ndarray | None = None  # the picture over its paper, (H, W, 3) in [0, 255]
    scale: float = 1  # the picture's pixels to one of the marks', which are found in a smaller copy

    def box(self, mark: Mark) -> Box:
        """A mark's box in pixels of the picture as it is shown, upright."""
        left, top, right, bottom = (side * self.scale for side in mark.box)
        return Box(int(left), int(top), math.ceil(right), math.ceil(bottom))

    @property
    def digits(self) -> list[Digit]:
        return [digit for row in self.rows for digit in row]

    @property
    def left_out(self) -> list[Mark]:
        return self.unread + self.ignored

    @property
    def score(self) -> float:
        """By this one of several readings is chosen: the ink of digits. With a score of 0.5 a digit's counts nothing."""
        return sum((2 * digit.score - 1) * digit.mark.area for digit in self.digits)

    @property
    def is_sure(self) -> bool:
        """Whether nearly all ink is read, so that no other reading is needed."""
        return self.score > 0.8 * sum(mark.area for mark in [digit.mark for digit in self.digits] + self.unread)


def in_rows(digits: list[Digit]) -> list[list[Digit]]:
    """Part digits into lines, top down, each from left to right: a digit is added to the line that ends nearest."""
    rows = []

    def middle(digit: Digit) -> float:
        return (digit.mark.box.top + digit.mark.box.bottom) / 2

    for digit in sorted(digits, key=lambda digit: digit.mark.box.left):
        nearest = min(rows, key=lambda row: abs(middle(row[-1]) - middle(digit)), default=None)
        if nearest and abs(middle(nearest[-1]) - middle(digit)) < max(nearest[-1].mark.height, digit.mark.height) / 2:
            nearest.append(digit)
        else:
            rows.append([digit])
    return sorted(rows, key=lambda row: np.median([middle(digit) for digit in row]))


def read_mask(mask: np.ndarray, ink: np.ndarray, net: Net, gap: float) -> Reading:
    """Read the digits in a mask (H, W), those of the usual size, joined over gaps (see find_marks)."""
    marks, edges = find_marks(mask, gap)
    if not marks:
        return Reading(ignored=edges)
    if len(marks) > MOST_MARKS:
        raise Failure(f"{len(marks)} marks are on it, more than on a sheet of digits")
    usual = usual_height(marks)
    digits = read_marks(marks, ink, net)
    if len(marks) > 50 and np.median([digit.score for digit in digits]) < 0.75:  # texture, noise, print
        return Reading(unread=marks, ignored=edges)
    found, unread = [], []
    for digit in digits:
        mark = digit.mark
        fits = 0.35 * usual <= mark.height <= 2 * usual and mark.width < 8 * usual
        if fits and max(mark.mask.shape) > 2 * stroke_width(mark.mask):
            found += split(digit, ink, net)
        else:
            unread.append(mark)
    return Reading(in_rows(found), unread, edges)


def ways(sheet: np.ndarray, net: Net) -> Iterator[Reading]:
    """Each way to read a sheet (H, W, 3) in [0, 255], the most usual first. Raises Failure where nothing stands out."""
    for nearby in False, True:  # a shadow, or a note of another colour
        ink, mask, lines = find_ink(sheet, nearby)
        if lines.any():
            yield read_mask(mask | lines, ink, net, 0.08)
        for gap in 0.08, 0.6:  # badly broken strokes
            reading = read_mask(mask, ink, net, gap)
            reading.ignored += connected(label(lines))
            yield reading


def read_sheet(sheet: np.ndarray, net: Net) -> Reading:
    """The best reading of a sheet (H, W, 3) in [0, 255]."""
    best, problem = None, ""
    try:
        for reading in ways(sheet, net):
            best = max(best or reading, reading, key=lambda reading: reading.score)
            if best.is_sure:
                break
    except Failure as failure:  # in one of the later ways, perhaps
        problem = str(failure)
    best = best or Reading()
    if not best.rows:
        best.problem = problem or "nothing on it has the size and shape of a digit"
    return best


def read_picture(picture: Image.Image, net: Net) -> Reading:
    """Read a picture."""
    papers = ("white", "black") if picture.has_transparency_data else ("white",)
    for paper in papers:  # ink on transparency may be white
        try:
            sheet = flatten(picture, paper)
        except Failure as failure:
            return Reading(problem=str(failure))
        reading = read_sheet(sheet, net)
        reading.sheet = sheet
        reading.scale = max(picture.size) / max(sheet.shape[:2])
        if not reading.problem:
            break
    return reading


@functools.cache
def committed_net() -> Net:
    """The network of the reference run."""
    return load_net(REFERENCE)


def digits(picture: Image.Image, net: Net | None = None) -> list[tuple[Box, Tensor]]:
    """Find the digits in a picture: (box, field) of each, left to right and line by line.

    The box is in pixels of the picture as it is shown, upright. The field is (1, 28, 28) in [0, 1] with ink
    towards 1; classify() gives its probabilities. Where ink may be one digit or two, the network decides, by default
    the reference run's. Raises Failure where there is no digit. read_picture() returns more.
    """
    reading = read_picture(picture, net or committed_net())
    if reading.problem:
        raise Failure(reading.problem)
    return [(reading.box(digit.mark), digit.field) for digit in reading.digits]
