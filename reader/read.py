"""From marks to digits: as the network reads them, cut where they touch, in rows, and the best of a few readings."""

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
from torch import Tensor

from reader import segment
from reader.segment import Mark, bounds, mark_of, stroke_width, usual_height
from script import MEAN, REFERENCE, STD, Failure, Net, load_net

SIDE, INSIDE = 28, 20  # pixels of an MNIST field, and of the box in it that a digit fits
FINE = 4  # pixels to one of the field, in which a digit is black or white before it becomes grey
PEN = 2.4  # pixels of the field: strokes are drawn this wide where they would be thinner than MNIST's
WIDE = 0.8  # of its height: a mark wider than this is less likely to be one digit
EACH, THROUGH = 0.2, 0.45  # what each digit costs, and each stroke that a cut goes through, as -log(score)
PAPERS = False, True  # the values of nearby, see find_ink(), in this order
GAPS = (0.08, 0.6)  # over which ink is joined, as shares of the usual height; the second for badly broken strokes
SURE = 0.8  # of the length of all strokes: a reading with a higher score needs no other
MOST, MANY, UNLIKELY = 600, 50, 0.75  # more marks, or more than MANY with a lower median score, are noise or print
DOUBTFUL = 0.9  # a less probable digit has a ? behind it; where most of three or more have, nothing is read


class Box(NamedTuple):
    """A rectangle in a picture, in pixels from its upper left corner; right and bottom lie outside."""

    left: int
    top: int
    right: int
    bottom: int


class Digit(NamedTuple):
    """A mark as the network reads it."""

    mark: Mark
    field: Tensor  # (1, 28, 28) in [0, 1], ink towards 1
    probabilities: Tensor  # of each of the ten digits
    value: int  # the most probable digit
    probability: float
    score: float  # how likely the mark is one digit: the probability, less where it is wide


def resized(ink: np.ndarray, size: int) -> np.ndarray:
    """The ink (H, W), resized so that its longer side has this size."""
    height, width = (max(1, round(size * side / max(ink.shape))) for side in ink.shape)
    way = Image.Resampling.BOX if size < max(ink.shape) else Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(np.float32(ink)).resize((width, height), way))


def as_mnist(ink: np.ndarray) -> Tensor:
    """A digit's ink (H, W), 0 where there is none, as MNIST made its own: (1, 28, 28) in [0, 1].

    Black on white, scaled to fit 20x20 pixels, grey by antialiasing, and laid into 28x28 by its centre of mass, as
    LeCun, Cortes and Burges describe. Strokes that would be thinner than MNIST's are drawn wider.
    """
    large = resized(ink[bounds(ink)], FINE * INSIDE)
    black = np.pad(large > min(ink[ink > 0].mean(), large.max()) / 2, 2 * FINE)  # with room for wider strokes
    wider = max(0, FINE * PEN - stroke_width(black)) / 2
    digit = np.clip(wider + 1 - ndimage.distance_transform_edt(~black), 0, 1)
    digit = resized(digit[bounds(digit)], INSIDE)
    height, width = digit.shape
    y, x = ndimage.center_of_mass(digit)
    # MNIST's centres of mass lie at pixel 14, counted from 0.
    top, left = np.clip((round(SIDE / 2 - y), round(SIDE / 2 - x)), 0, (SIDE - height, SIDE - width))
    field = torch.zeros(1, SIDE, SIDE)
    field[0, top : top + height, left : left + width] = torch.from_numpy(digit / digit.max())
    return field


@torch.no_grad()
def classify(net: Net, fields: list[Tensor]) -> Tensor:
    """Each field's probabilities, (N, 10)."""
    return net((torch.stack(fields) - MEAN) / STD).exp()


def read_marks(marks: list[Mark], net: Net) -> list[Digit]:
    """Each mark as the network reads it."""
    fields, read = [as_mnist(mark.ink) for mark in marks], []
    for mark, field, row in zip(marks, fields, classify(net, fields) if marks else [], strict=True):
        narrowness = np.clip(1 + WIDE - mark.width / mark.height, 0.2, 1)  # 1 up to WIDE
        read.append(Digit(mark, field, row, row.argmax().item(), row.max().item(), row.max().item() * narrowness))
    return read


def split(digit: Digit, net: Net) -> list[Digit]:
    """The digit, or those that touch in it: the cheapest of all ways to cut it between columns.

    A digit costs EACH and minus the logarithm of its score. Such a heuristic over-segmentation is described by LeCun,
    Bottou, Bengio and Haffner (1998).
    """
    whole = EACH - math.log(digit.score), [digit]
    if whole[0] < 2 * EACH:
        return [digit]  # two digits cost more
    mark, parts = digit.mark, {}
    # How many strokes a cut before each column goes through; of each step columns, one with the fewest is a cut.
    strokes, step = (mark.ink > 0).sum(axis=0) / mark.stroke_width, max(2, mark.height // 6)
    strokes[0] = 0
    steps = range(step, mark.width - step, step)
    cuts = [0, *(start + int(strokes[start : start + step].argmin()) for start in steps), mark.width]
    for left, right in itertools.combinations(cuts, 2):  # in the order of their left ends
        part = mark_of(mark.ink[:, left:right], mark.left + left, mark.top)
        if right - left <= 1.2 * mark.height and 2 * part.height >= mark.height:
            parts[left, right] = part
    ways = {0: (0, []), mark.width: whole}  # the cheapest way up to each column: its cost, and its digits
    for (left, right), part in zip(parts, read_marks(list(parts.values()), net), strict=True):
        if left in ways:
            cost, before = ways[left]
            way = cost + THROUGH * strokes[left] + EACH - math.log(part.score), [*before, part]
            ways[right] = min(ways.get(right, way), way, key=lambda way: way[0])
    return ways[mark.width][1]


@dataclasses.dataclass
class Reading:
    """What is read in a picture: its digits, row by row, what was left out, and why it is refused if it is."""

    rows: list[list[Digit]] = dataclasses.field(default_factory=list)
    unread: list[Mark] = dataclasses.field(default_factory=list)  # unlike a digit in size or shape
    ignored: list[Mark] = dataclasses.field(default_factory=list)  # lines, the desk
    problem: str = ""
    sheet: np.ndarray | None = None  # the picture over its paper, (H, W, 3) in [0, 255]
    scale: float = 1  # the picture's pixels to one of the sheet's

    def box(self, mark: Mark) -> Box:
        """A mark's box in pixels of the picture as it is shown, upright."""
        box = mark.left, mark.top, mark.left + mark.width, mark.top + mark.height
        left, top, right, bottom = (side * self.scale for side in box)
        return Box(int(left), int(top), math.ceil(right), math.ceil(bottom))

    @property
    def digits(self) -> list[Digit]:
        return [digit for row in self.rows for digit in row]

    @property
    def left_out(self) -> list[Mark]:
        return self.unread + self.ignored

    @property
    def length(self) -> float:
        """The length of strokes in digits."""
        return sum(digit.mark.length for digit in self.digits)

    @property
    def unread_length(self) -> float:
        """The length of strokes in marks that are no digits."""
        return sum(mark.length for mark in self.unread)

    @property
    def score(self) -> float:
        """For the choice between readings: the length of strokes in likely digits, less that in unlikely ones."""
        return sum((2 * digit.score - 1) * digit.mark.length for digit in self.digits) if self.rows else -math.inf

    @property
    def is_sure(self) -> bool:
        """Whether nearly all but the lines and the desk is read as likely digits."""
        return self.score > SURE * (self.length + self.unread_length)


def in_rows(digits: list[Digit]) -> list[list[Digit]]:
    """Part digits into rows, top down, each from left to right: a digit joins the row whose last digit is nearest."""
    rows, middle = [], lambda digit: digit.mark.top + digit.mark.height / 2
    for digit in sorted(digits, key=lambda digit: digit.mark.left):
        nearest = min(rows, key=lambda row: abs(middle(row[-1]) - middle(digit)), default=[])
        if nearest and abs(middle(nearest[-1]) - middle(digit)) < max(nearest[-1].mark.height, digit.mark.height) / 2:
            nearest.append(digit)
        else:
            rows.append([digit])
    return sorted(rows, key=lambda row: np.median([middle(digit) for digit in row]))


def read_ink(ink: np.ndarray, gap: float, net: Net) -> Reading:
    """Read the digits in ink (H, W), joined over gaps (see find_marks). Noise and print are refused."""
    marks, desk = segment.find_marks(ink, gap)
    refused = Reading(unread=marks, ignored=desk, problem=f"{len(marks)} marks are on it, most of them unlike digits")
    if len(marks) > MOST:
        return refused
    read, usual = read_marks(marks, net), usual_height(marks)
    if len(marks) > MANY and np.median([digit.score for digit in read]) < UNLIKELY:
        return refused
    found, unread = [], []
    for digit in read:
        if digit.mark.fits(usual):
            found += split(digit, net)
        else:
            unread.append(digit.mark)
    reading = Reading(in_rows(found), unread, desk)
    doubtful = len(found) > 2 and np.median([digit.probability for digit in found]) < DOUBTFUL
    few = 0 < len(found) < len(unread) and reading.length < reading.unread_length
    if doubtful or few:
        return refused
    if not found:
        what = "has the size and shape of a digit" if marks else "stands out from its paper"
        reading.problem = f"nothing on it {what}"
    return reading


def readings(sheet: np.ndarray, net: Net) -> Iterator[Reading]:
    """Read a sheet in up to six ways: with its lines, without, and over larger gaps; then with paper from nearby."""
    most = 0  # the length of strokes in digits, at most, where paper is not looked for nearby
    for nearby in PAPERS:
        ink, fainter = segment.find_ink(sheet, nearby)
        lines = segment.find_lines(fainter) & (ink > 0)
        line_marks = segment.connected(lines)
        if lines.any():
            yield read_ink(ink, GAPS[0], net)
        for gap in GAPS:
            reading = read_ink(ink * ~lines, gap, net)
            reading.ignored += line_marks
            most = most if nearby else max(most, reading.length)
            # Of one digit with wide strokes, paper from nearby leaves a rest: a few short pieces.
            if not nearby or reading.is_sure or reading.length > most:
                yield reading


def read_sheet(sheet: np.ndarray, net: Net) -> Reading:
    """The best reading of a sheet (H, W, 3) in [0, 255]: the first that is sure, or else the best."""
    tried = []
    for reading in readings(sheet, net):
        if reading.is_sure:
            return reading
        tried.append(reading)
    return max(tried, key=lambda reading: reading.score)


def read_picture(picture: Image.Image, net: Net) -> Reading:
    """Read a picture."""
    for paper in ("white", "black") if picture.has_transparency_data else ("white",):  # the ink may be white
        try:
            sheet = segment.flatten(picture, paper)
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
    """Each digit's box and field (1, 28, 28) in a picture, row by row. The net is the reference run's by default.

    Boxes are in pixels of the picture as it is shown, upright. classify() gives a field's probabilities, and
    read_picture() returns more. Raises Failure where there is no digit.
    """
    reading = read_picture(picture, net or committed_net())
    if reading.problem:
        raise Failure(reading.problem)
    return [(reading.box(digit.mark), digit.field) for digit in reading.digits]
