"""From marks to digits: each as the network reads it, cut where digits touch, in rows, and the best of a few readings.

A mark is made into a 28x28 field as MNIST's own were (as_mnist), and marks of touching digits are cut (split). A sheet
is read in a few ways, until nearly all ink is read, and the reading with most ink in digits stands (read_sheet).
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

from reader.segment import Box, Mark, bounds, connected, find_ink, find_marks, flatten, stroke_width, usual_height
from script import MEAN, REFERENCE, STD, Failure, Net, load_net

# ---------------------------------------------------------------- digits

PEN = 2.4  # pixels of the field: strokes are drawn this wide where they would be thinner than MNIST's


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
        return self.probabilities.max().item()

    @property
    def score(self) -> float:
        """How likely the mark is one digit: the probability, less if it is wider than 0.8 of its height."""
        return self.probability * np.clip(1.8 - self.mark.width / self.mark.height, 0.2, 1)

    @property
    def cost(self) -> float:
        """What it adds to a way to cut a mark."""
        return EACH - math.log(self.score)


def as_mnist(ink: np.ndarray, mask: np.ndarray) -> Tensor:
    """A digit's ink (H, W) and its strokes as MNIST made its own: (1, 28, 28) in [0, 1].

    Scaled to fit 20x20 pixels, grey by antialiasing, and laid into 28x28 by its centre of mass,
    as LeCun, Cortes and Burges describe. Strokes that would shrink to less than MNIST's are first drawn anew, wider.
    """
    unit, stroke = max(mask[bounds(mask)].shape) / 20, stroke_width(mask)  # unit: a pixel of the field
    wider = (PEN * unit - stroke) / 2 if stroke < 2 * unit else 0
    strength = np.percentile(ink[mask], 90)
    if wider >= 0.5 or strength <= 0:
        digit = np.clip(wider + 0.5 - ndimage.distance_transform_edt(~np.pad(mask, math.ceil(wider))), 0, 1)
    else:
        grown = ndimage.binary_dilation(mask, iterations=max(1, round(unit / 10)))  # with its grey edge
        digit = np.clip(ink / strength, 0, 1) * grown
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
    margin = 1 + max(mark.size for mark in marks) // 20  # the strokes' grey edge lies outside the mark
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


def cut(mark: Mark, slope: float, ink: np.ndarray, net: Net) -> tuple[float, list[Digit]]:
    """The cheapest way to cut a mark along lines of this slope into digits side by side: its cost, and the digits."""
    down, across = np.mgrid[: mark.height, : mark.width]
    column = np.round(across + slope * down).astype(int)
    column -= column[mark.mask].min()
    crossed = np.bincount(column[mark.mask]) / stroke_width(mark.mask)  # how many strokes a cut goes through
    # From each strip the column that crosses the fewest strokes, and of these the best.
    strip, end = max(2, mark.height // 10), len(crossed)
    cuts = [start + np.argmin(crossed[start : start + strip]) for start in range(strip, end - strip, strip)]
    cuts = sorted(sorted(cuts, key=lambda place: crossed[place])[:MOST_CUTS])
    cuts = [place for place in cuts if crossed[place] < 3]
    crossed[0] = 0  # the left end is no cut
    parts = {}
    for left, right in itertools.combinations([0, *cuts, end], 2):
        keep = mark.mask & (left <= column) & (column < right)
        if right - left <= 1.2 * mark.height and keep.any() and np.ptp(np.nonzero(keep)[0]) >= 0.6 * mark.height:
            parts[left, right] = mark.part(keep)
    cheapest = {0: (0.0, [])}  # the cheapest way up to each place
    for (left, right), digit in zip(parts, read_marks(list(parts.values()), ink, net), strict=True):  # by their left
        if left in cheapest:
            cost, before = cheapest[left]
            way = (cost + digit.cost + THROUGH * crossed[left], [*before, digit])
            cheapest[right] = min(cheapest.get(right, way), way, key=lambda way: way[0])
    return cheapest.get(end, (math.inf, []))


def split(digit: Digit, ink: np.ndarray, net: Net) -> list[Digit]:
    """The digit, or those that touch in it.

    Of all ways to cut it the cheapest stands, as in the heuristic over-segmentation of LeCun, Bottou, Bengio and
    Haffner (1998).
    """
    if digit.cost < 2 * EACH:
        return [digit]  # two digits cost more
    ways = [(digit.cost, [digit])] + [cut(digit.mark, slope, ink, net) for slope in SLOPES]
    return min(ways, key=lambda way: way[0])[1]


# ---------------------------------------------------------------- reading

INKS = (((-1, 1), False), ((-1,), False), ((-1, 1), True))  # signs and paper, see find_ink(): as it seems, dark where
# a light sheet on a desk or a digit as large as the picture was misleading, and nearby for shadows and coloured notes
GAPS = (0.08, 0.6)  # over which ink is joined, as shares of the usual height; the second for badly broken strokes
SURE = 0.9  # of its ink surely in digits, a reading needs no other
MANY, UNLIKELY = 50, 0.75  # more marks with a lower median score are texture, noise or print, not worth cutting
DOUBTFUL = 0.9  # a less probable digit has a ? behind it; where most have, nothing is read
MOST = 600  # marks; more are those, too


@dataclasses.dataclass
class Reading:
    """What is read in a picture: its digits, row by row, what was left out, and why it is refused if it is."""

    rows: list[list[Digit]] = dataclasses.field(default_factory=list)
    unread: list[Mark] = dataclasses.field(default_factory=list)  # too large or too small for a digit
    ignored: list[Mark] = dataclasses.field(default_factory=list)  # lines, the paper's edges
    problem: str = ""
    sheet: np.ndarray | None = None  # the picture over its paper, (H, W, 3) in [0, 255]
    scale: float = 1  # the picture's pixels to one of the sheet's

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
        """By this one of several readings is chosen: the length of strokes in digits, less those in unlikely ones."""
        return sum((2 * digit.score - 1) * digit.mark.length for digit in self.digits)

    @property
    def is_sure(self) -> bool:
        marks = [digit.mark for digit in self.digits] + self.unread
        read = sum(digit.score * digit.mark.length for digit in self.digits)
        return read > SURE * sum(mark.length for mark in marks)


def in_rows(digits: list[Digit]) -> list[list[Digit]]:
    """Part digits into rows, top down, each from left to right: a digit is added to the row that ends nearest."""
    rows = []
    for digit in sorted(digits, key=lambda digit: digit.mark.box.left):
        mark = digit.mark
        nearest = min(rows, key=lambda row: abs(row[-1].mark.middle - mark.middle), default=None)
        if nearest and abs(nearest[-1].mark.middle - mark.middle) < max(nearest[-1].mark.height, mark.height) / 2:
            nearest.append(digit)
        else:
            rows.append([digit])
    return sorted(rows, key=lambda row: np.median([digit.mark.middle for digit in row]))


def read_mask(mask: np.ndarray, ink: np.ndarray, net: Net, gap: float) -> Reading:
    """Read the digits in a mask (H, W), those of the usual size, joined over gaps (see find_marks)."""
    marks, edges = find_marks(mask, gap)
    if len(marks) > MOST:
        raise Failure(f"{len(marks)} marks are on it, more than on a sheet of digits")
    digits = read_marks(marks, ink, net)
    if len(marks) > MANY and np.median([digit.score for digit in digits]) < UNLIKELY:
        return Reading(unread=marks, ignored=edges)
    usual = usual_height(marks)
    found = [part for digit in digits if digit.mark.fits(usual) for part in split(digit, ink, net)]
    return Reading(in_rows(found), [mark for mark in marks if not mark.fits(usual)], edges)


def read_ink(sheet: np.ndarray, signs: tuple, nearby: bool, net: Net) -> Iterator[Reading]:
    """Read a sheet's ink, see find_ink(), in each way, the usual one first. Raises Failure where nothing stands out."""
    ink, mask, lines = find_ink(sheet, signs, nearby)
    if lines.any():
        yield read_mask(mask | lines, ink, net, GAPS[0])
    for gap in GAPS:
        reading = read_mask(mask, ink, net, gap)
        reading.ignored += connected(label(lines))
        if len(reading.digits) > 2 or not nearby:  # fewer may be the rest of one digit with wide strokes
            yield reading


def read_sheet(sheet: np.ndarray, net: Net) -> Reading:
    """The best reading of a sheet (H, W, 3) in [0, 255]: the first that is sure, or else the best."""
    best, problem = Reading(), ""
    for ink in INKS:
        try:
            for reading in read_ink(sheet, *ink, net):
                if reading.is_sure:
                    return reading
                best = reading if not best.rows or reading.score > best.score else best
        except Failure as failure:
            problem = problem or str(failure)
    if len(best.digits) > 2 and np.median([digit.probability for digit in best.digits]) < DOUBTFUL:  # noise
        best = Reading(unread=best.unread + [digit.mark for digit in best.digits], ignored=best.ignored)
    if not best.rows:
        best.problem = problem or "nothing on it has the size and shape of a digit"
    return best


def read_picture(picture: Image.Image, net: Net) -> Reading:
    """Read a picture."""
    for paper in ("white", "black") if picture.has_transparency_data else ("white",):  # the ink may be white
        try:
            sheet = flatten(picture, paper)
        except Failure as failure:
            return Reading(problem=str(failure))
        reading = read_sheet(sheet, net)
        reading.sheet, reading.scale = sheet, max(picture.size) / max(sheet.shape)
        if reading.rows:
            break
    return reading


@functools.cache
def committed_net() -> Net:
    """The network of the reference run."""
    return load_net(REFERENCE)


def digits(picture: Image.Image, net: Net | None = None) -> list[tuple[Box, Tensor]]:
    """Find the digits in a picture: (box, field) of each, left to right and row by row.

    The box is in pixels of the picture as it is shown, upright. The field is (1, 28, 28) in [0, 1] with ink
    towards 1; classify() gives its probabilities. Where ink may be one digit or two, the network decides, by default
    the reference run's. Raises Failure where there is no digit. read_picture() returns more.
    """
    reading = read_picture(picture, net or committed_net())
    if reading.problem:
        raise Failure(reading.problem)
    return [(reading.box(digit.mark), digit.field) for digit in reading.digits]
