"""From marks to digits: each as the network reads it, cut where digits touch, in lines, in the best of several ways.

A mark is made into a 28x28 field as MNIST's own were (as_mnist), and marks of touching digits are cut (split). Specks
are ignored (read_mask). Where the same ink can be read in several ways, the network's probabilities decide (read_ink,
read_colours). The thresholds are fitted to other people's handwriting; docs/predict.md says which.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
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
    find_candidates,
    find_ink,
    find_lines,
    find_marks,
    flatten,
    partition,
    stroke_width,
    strokes,
    usual_contrast,
    usual_height,
)
from script import MEAN, REFERENCE, STD, Failure, Net, load_net

# ---------------------------------------------------------------- digits


class Digit(NamedTuple):
    """A mark as the network reads it: its field (1, 28, 28), and the probability of each of the ten digits.

    Its probability is printed, its certainty decides which marks are digits and where they are cut, and its
    plausibility which of several readings of a picture stands.
    """

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
    def certainty(self) -> float:
        """The probability of what is read, less for a mark wider than 0.8 of its height: it may be two digits."""
        return self.probability * np.clip(1.8 - self.mark.width / self.mark.height, 0.2, 1)

    @property
    def plausibility(self) -> float:
        """The certainty, less for strokes wider than a quarter of the mark: it may be a sheet, and its digit a hole."""
        return self.certainty * np.clip(3.5 - 10 * stroke_width(self.mark.mask) / self.mark.size, 0.2, 1)


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
        digit = np.clip(ink / np.percentile(ink[mask], 90), 0, 1) * grown
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


def cropped(mark: Mark, keep: np.ndarray) -> Mark:
    """The part of a mark that is to be kept (H, W)."""
    y, x = bounds(keep)
    top, left = (side.start for side in mark.place)
    return Mark((slice(top + y.start, top + y.stop), slice(left + x.start, left + x.stop)), keep[y, x], mark.contrast)


def price(digit: Digit) -> float:
    """What a digit costs in a way to cut a mark: the less certain, the more."""
    return EACH - math.log(digit.certainty)


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
            parts[left, right] = cropped(mark, keep)
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
    if price(digit) < 2 * EACH or not 0.6 <= digit.mark.width / digit.mark.height < 5:
        return [digit]  # two digits cost more
    ways = [(price(digit), [digit])] + [cut(digit.mark, slope, ink, net) for slope in SLOPES]
    return min(ways, key=lambda way: way[0])[1]


# ---------------------------------------------------------------- reading

MOST_DIGITS = 600  # more are noise or text


@dataclasses.dataclass
class Reading:
    """What is read in a picture: its digits, line by line, what was left out, and why it is refused if it is."""

    rows: list[list[Digit]] = dataclasses.field(default_factory=list)
    unread: list[Mark] = dataclasses.field(default_factory=list)  # of a digit's size, but not read
    frames: list[Mark] = dataclasses.field(default_factory=list)  # that hold other marks
    ignored: list[Mark] = dataclasses.field(default_factory=list)  # lines, the paper's edges, specks, faint marks
    problem: str = ""
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
        return self.unread + self.frames + self.ignored

    def explained(self, frames: bool = False) -> float:
        """The share, by certainty, that is read of the ink of digits, unread marks and, if asked, frames."""
        marks = [digit.mark for digit in self.digits] + self.unread + self.frames * frames
        ink_read = sum(digit.certainty * digit.mark.mask.sum() for digit in self.digits)
        return ink_read / max(1, sum(mark.mask.sum() for mark in marks))

    @property
    def merit(self) -> float:
        """The score by which one of several readings is chosen: the ink explained, and the number of likely digits.

        A digit of 50 % counts nothing, one of 100 % is 1. The root, or else ink that is cut into pieces would win.
        """
        return self.explained() * math.sqrt(sum(max(0, 2 * digit.plausibility - 1) for digit in self.digits))


def in_rows(digits: list[Digit]) -> list[list[Digit]]:
    """Part digits into lines, top down, each from left to right: a digit is added to the line that ends nearest."""
    rows = []

    def middle(digit: Digit) -> float:
        return (digit.mark.box.top + digit.mark.box.bottom) / 2

    for digit in sorted(digits, key=lambda digit: digit.mark.box.left):
        rows_near = []
        for row in rows:
            end, offset = row[-1], abs(middle(row[-1]) - middle(digit))
            if offset < 0.5 * max(end.mark.height, digit.mark.height):
                rows_near.append((offset + 0.2 * max(0, digit.mark.box.left - end.mark.box.right), row))
        if rows_near:
            _, nearest = min(rows_near, key=lambda pair: pair[0])
            nearest.append(digit)
        else:
            rows.append([digit])
    return sorted(rows, key=lambda row: np.median([middle(digit) for digit in row]))


def read_mask(mask: np.ndarray, ink: np.ndarray, net: Net, gap: float = 0.08) -> Reading:
    """Read the digits in a mask (H, W), those of the usual size and contrast, joined over gaps (see join_broken)."""
    marks, frames, edges = find_candidates(mask, ink, gap)
    if not marks:
        return Reading(frames=frames, ignored=edges)
    contrast = usual_contrast(marks)  # a desk's grain is fainter than ink; the usual height is that of ink
    faint, marks = partition(marks, [mark.contrast < 0.5 * contrast for mark in marks])
    usual = usual_height(marks)
    specks, marks = partition(marks, [mark.size < 0.15 * usual for mark in marks])
    if len(marks) > MOST_DIGITS:
        raise Failure(f"{len(marks)} marks are on it, more than on a sheet of digits")
    found, unread = [], []
    for digit in read_marks(marks, ink, net):
        mark = digit.mark
        fits = 0.35 * usual <= mark.height <= 2 * usual and mark.width < 8 * usual
        # One mark alone is a digit, and a wide one may be two.
        unsure = digit.certainty < 0.5 and len(marks) > 1 and mark.width < mark.height
        if fits and not unsure:
            found += split(digit, ink, net)
        else:
            unread.append(mark)
    if found and usual_height([digit.mark for digit in found]) < max(5, min(mask.shape) / 40):  # texture, perhaps
        unread += [digit.mark for digit in found]
        found = []
    return Reading(in_rows(found), unread, frames, edges + faint + specks)


def better(first: Reading, second: Reading, margin: float) -> Reading:
    """The second reading if its merit is larger by this factor and it explains nearly as much, or else the first."""
    if second.merit > margin * first.merit and second.explained() > 0.9 * first.explained():
        return second
    return first


def read_ink(ink: np.ndarray, smooth: np.ndarray, faintest: float, net: Net) -> Reading:
    """The best reading of ink (H, W), as find_ink() gives it."""
    mask = strokes(smooth, faintest)
    marks, _, _ = find_candidates(mask, smooth, gap=0)
    if marks:  # what is far fainter than most is no ink
        faintest = max(faintest, 0.3 * usual_contrast(marks))
        mask = strokes(smooth, faintest)
    best = read_mask(mask, ink, net)
    if best.explained(frames=True) < 0.8:
        lines = find_lines(mask, smooth)
        if lines.any():
            without_lines = read_mask(mask & ~lines, ink, net)
            without_lines.ignored += find_marks(label(lines), smooth)
            best = better(best, without_lines, 1.15)
        best = better(best, read_mask(mask, ink, net, gap=0.6), 1.15)  # badly broken strokes
    if best.rows:  # a pencil's digits between a pen's are not lost in silence
        least = 0.5 * usual_height([digit.mark for digit in best.digits])
        best.ignored += [m for m in marks if m.height > least and not (mask[m.place] & m.mask).any()]
    return best


def read_colours(colours: np.ndarray, net: Net) -> Reading:
    """The best reading of a picture (H, W, 3) in [0, 255]. Raises Failure where nothing stands out."""
    found = find_ink(colours, signs=(-1, 1), nearby=False)
    best = read_ink(*found, net)
    few = len(best.digits) < 3
    poor = best.explained(frames=True) < (0.6 if few else 0.9)
    other_ways = []
    if poor or few:  # light paper on a dark desk was taken for ink, perhaps
        other_ways.append(((-1,), False))
    if poor:  # or a shadow, or a note of another colour
        other_ways.append(((-1, 1), True))
    for signs, nearby in other_ways:
        with contextlib.suppress(Failure):
            ink, smooth, faintest = find_ink(colours, signs, nearby)
            if np.array_equal(ink, found[0]):
                continue
            other = read_ink(ink, smooth, faintest, net)
            if nearby and len(other.digits) < 3:
                continue  # pieces of a digit with strokes as wide as the square that removes ink, perhaps
            best = better(best, other, margin=2 if len(best.digits) < 3 else 1.15)
    if not best.rows:
        best.problem = "nothing on it has the size and shape of a digit"
    return best


def read_picture(picture: Image.Image, net: Net) -> Reading:
    """Read a picture."""
    try:
        colours = flatten(picture, "white")
        try:
            reading = read_colours(colours, net)
        except Failure:  # white ink on transparency, perhaps
            reading = read_colours(flatten(picture, "black"), net)
    except Failure as failure:
        return Reading(problem=str(failure))
    reading.scale = max(picture.size) / max(colours.shape[:2])
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
