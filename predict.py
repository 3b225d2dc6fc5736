"""Read handwritten digits from pictures and photos with a trained network.

    python predict.py picture.jpg folder ...       one line a picture: its digits, left to right, line by line
    python predict.py --json - <picture.jpg        the same with boxes and probabilities, as JSON
    python predict.py --seen seen.png photo.jpg    and draw what was found in it, and what the network saw

Ink is what differs from the paper around it. Ink that hangs together is a mark; lines, frames and the edges of the
paper are no digits. Each digit is made into a 28x28 field as MNIST's own were, and where two readings of the same
ink are possible, one digit or two, with a printed line or without, the network's more probable one stands.
"""

import argparse
import contextlib
import functools
import io
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from skimage.filters import apply_hysteresis_threshold, threshold_otsu
from torch import Tensor

from script import HERE, MEAN, STD, Failure, Net, load_net, run_command, save


class Box(NamedTuple):
    """A frame in a picture, in pixels from its upper left corner; right and bottom lie outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def size(self) -> int:
        return max(self.width, self.height)

    @property
    def middle(self) -> float:
        return (self.top + self.bottom) / 2

    @property
    def corner(self) -> tuple[slice, slice]:
        """Its pixels, as an index of the picture."""
        return np.s_[self.top : self.bottom, self.left : self.right]


class Mark(NamedTuple):
    """Ink that hangs together: its box, which of the box's pixels (H, W) it covers, and how strong it is."""

    box: Box
    mask: np.ndarray
    contrast: float


class Digit(NamedTuple):
    """A mark as the network reads it: its field (1, 28, 28), and the probability of each of the ten digits."""

    mark: Mark
    field: Tensor
    probabilities: Tensor

    @property
    def box(self) -> Box:
        return self.mark.box

    @property
    def certainty(self) -> float:
        """The probability of what is read, less where the mark is wider than a digit."""
        return self.probabilities.max().item() * min(1, max(0.2, 2.2 - self.box.width / self.box.height))


class Reading(NamedTuple):
    """What is read in a picture: its digits, line by line, what was left out, and why it is refused if it is."""

    rows: list[list[Digit]]
    left_out: list[Mark]
    problem: str = ""

    @property
    def digits(self) -> list[Digit]:
        return [digit for row in self.rows for digit in row]

    @property
    def worth(self) -> float:
        """How many digits are read, where one that is no better than a coin counts nothing."""
        return sum(2 * digit.probabilities.max().item() - 1 for digit in self.digits)

    @property
    def explained(self) -> float:
        """The share of the ink that is read, each digit's by its certainty."""
        read = sum(digit.certainty * digit.mark.mask.sum() for digit in self.digits)
        return read / max(1, sum(mark.mask.sum() for mark in [digit.mark for digit in self.digits] + self.left_out))


# ---------------------------------------------------------------- paper and ink

MOST_PIXELS = 1_000_000  # larger pictures are shrunk to this many
FAINTEST = 0.06  # ink differs from its paper by this share of the paper's brightness at least


def flatten(picture: Image.Image, paper: str) -> np.ndarray:
    """The picture, upright and over paper of this colour where it is transparent: (H, W, 3) in [0, 255]."""
    if picture.mode in ("L", "RGB", "CMYK"):  # what cameras and scanners make, cheaply before all else
        picture = picture.reduce(max(1, int(math.sqrt(picture.width * picture.height / (4 * MOST_PIXELS)))))
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel, which Pillow would clip to 8
        values = np.asarray(picture, dtype=np.float32)
        if not np.isfinite(values).all():
            raise Failure("it holds values that are not finite")
        picture = Image.fromarray(np.uint8(255 * (values - values.min()) / max(np.ptp(values), 1e-9)))
    layers = picture.convert("RGBA")
    shrink = min(1, math.sqrt(MOST_PIXELS / (layers.width * layers.height)))
    layers = layers.resize([max(1, round(side * shrink)) for side in layers.size], Image.Resampling.BOX)
    sheet = Image.alpha_composite(Image.new("RGBA", layers.size, paper), layers)
    return np.asarray(sheet.convert("RGB"), dtype=np.float32)


def without_ink(grey: np.ndarray) -> np.ndarray:
    """What is left of a sheet (H, W) when light ink is taken from it: a morphological opening.

    It takes away what is narrower than a square that is wider than any stroke, and keeps gradients and straight
    edges of shadows. Beyond the border the sheet goes on as it is along it, so that a shadow that ends at the
    border stays and ink that touches it does not: the border is a closed line, on which ink is short.
    """
    height, width = grey.shape
    short, long = sorted((height, width))
    side = max(3, int(max(0.4 * short, min(0.3 * long, 2 * short))))
    border = np.concatenate((grey[0], grey[:, -1], grey[-1, ::-1], grey[::-1, 0]))
    border = ndimage.grey_opening(border, max(3, len(border) // 6), mode="wrap")
    top, right, bottom, left = np.split(border, np.cumsum((width, height, width)))
    framed = np.pad(grey, 1)
    framed[0, 1:-1], framed[1:-1, -1], framed[-1, 1:-1], framed[1:-1, 0] = top, right, bottom[::-1], left[::-1]
    framed[0, :: width + 1], framed[-1, :: width + 1] = top[[0, -1]], bottom[[-1, 0]]
    opened = ndimage.grey_opening(np.pad(framed, side, mode="edge"), side)
    return opened[side + 1 : -side - 1, side + 1 : -side - 1]


def roughness(grey: np.ndarray) -> float:
    """The sum of all differences between neighbours: the total variation."""
    return np.abs(np.diff(grey, axis=0)).sum() + np.abs(np.diff(grey, axis=1)).sum()


def ink(colours: np.ndarray, dark: bool = False) -> tuple[np.ndarray, np.ndarray, float]:
    """How much darker, lighter or otherwise coloured each pixel is than its paper, as a share of the light there.

    From (H, W, 3) in [0, 255] to ink (H, W), the same without its finest grain, and the least that is not noise.
    Raises Failure where nothing is more.
    """
    height, width = colours.shape[:2]
    size = [max(1, round(side * min(1, 100 / max(width, height)))) for side in (width, height)]
    small = np.asarray(Image.fromarray(np.uint8(colours)).resize(size, Image.Resampling.BOX), dtype=np.float32)
    papers, weights = [], []
    for channel in np.moveaxis(small, 2, 0):
        # Dark ink or light? Where it is the right one, the paper is smooth and the ink has few edges.
        ways = [(sign, sign * without_ink(sign * channel)) for sign in ((-1,) if dark else (-1, 1))]
        sign, paper = min(ways, key=lambda way: roughness(way[1]) + 0.8 * roughness(channel - way[1]))
        papers.append(paper)
        weights.append(sign * np.sqrt(np.mean((channel - paper) ** 2)))
    if not any(weights):
        raise Failure("nothing on it stands out from its paper")
    grey = colours @ np.float32(weights / np.abs(weights).sum())  # the mixture in which the ink is lightest
    light = Image.fromarray(np.mean(papers, axis=0)).resize((width, height), Image.Resampling.BILINEAR)
    blur = min(width, height) / 400
    smooth = ndimage.gaussian_filter(grey, blur)
    paper, light = without_ink(smooth), np.asarray(light) + 30  # a black board is no less noisy than a grey one
    strength = (smooth - paper) / light
    strength -= np.percentile(strength, 10)  # of paper: where there is noise, its lowest was taken for the paper
    noise = 1.5 * np.median(np.abs(strength - ndimage.gaussian_filter(strength, 2 * blur)))  # its standard deviation
    faintest = max(FAINTEST, 5 * noise)
    if strength.max() <= faintest:
        raise Failure("nothing on it stands out from its paper")
    return (grey - paper) / light, strength, faintest


def strokes(strength: np.ndarray, faintest: float) -> np.ndarray:
    """Where ink (H, W) is a stroke: half as strong as the strongest near by, or weaker and joined to such."""
    strongest = ndimage.maximum_filter(strength, 1 + min(strength.shape) // 8)
    weak, strong = (np.maximum(faintest, share * strongest) for share in (0.3, 0.5))
    return apply_hysteresis_threshold(strength, weak, strong)


# ---------------------------------------------------------------- marks

NEIGHBOURS = np.ones((3, 3))
MOST_MARKS, MOST_DIGITS = 3000, 600  # more are noise or text


def find_marks(mask: np.ndarray, strength: np.ndarray) -> list[Mark]:
    """The marks in a mask (H, W) that are larger than specks."""
    labels, _ = ndimage.label(mask, NEIGHBOURS)
    marks = []
    for number, place in enumerate(ndimage.find_objects(labels), 1):
        y, x = place
        box = Box(x.start, y.start, x.stop, y.stop)
        if box.size >= max(3, min(mask.shape) / 80):
            part = labels[place] == number
            marks.append(Mark(box, part, float(np.percentile(strength[place][part], 90))))
    if len(marks) > MOST_MARKS:
        raise Failure(f"{len(marks)} marks are on it, which are no digits")
    return marks


def union(marks: list[Mark]) -> Mark:
    """Marks as one."""
    boxes = np.array([mark.box for mark in marks])
    box = Box(*boxes[:, :2].min(axis=0).tolist(), *boxes[:, 2:].max(axis=0).tolist())
    mask = np.zeros((box.height, box.width), bool)
    for (left, top, right, bottom), part, _ in marks:
        mask[top - box.top : bottom - box.top, left - box.left : right - box.left] |= part
    return Mark(box, mask, max(mark.contrast for mark in marks))


def canvas(marks: list[Mark], shape: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) of these marks."""
    mask = np.zeros(shape, bool)
    for mark in marks:
        mask[mark.box.corner] |= mark.mask
    return mask


def weighted_median(values: list[float], weights: list[float]) -> float:
    """The value that splits the weights into halves."""
    order = np.argsort(values)
    sums = np.cumsum(np.array(weights)[order])
    return float(np.array(values)[order][np.searchsorted(sums, sums[-1] / 2)])


def usual_height(marks: list[Mark]) -> float:
    """The median height, to which a mark counts by its height: a few digits outweigh many specks or lines."""
    heights = [mark.box.height for mark in marks]
    return weighted_median(heights, heights)


def usual_contrast(marks: list[Mark]) -> float:
    """The median contrast, to which a mark counts by its height and contrast."""
    return weighted_median([mark.contrast for mark in marks], [mark.contrast * mark.mask.sum() for mark in marks])


def partition(marks: list[Mark], chosen: np.ndarray) -> tuple[list[Mark], list[Mark]]:
    """The marks that are chosen (N,), and the others."""
    pairs = list(zip(marks, chosen, strict=True))
    return [mark for mark, yes in pairs if yes], [mark for mark, yes in pairs if not yes]


def are_edges(marks: list[Mark], shape: tuple[int, int]) -> np.ndarray:
    """Which marks (N,) run along the picture's border, as a desk around the paper does. Not all: one is the digit."""
    border = np.ones(shape, bool)
    border[1:-1, 1:-1] = False
    edges = np.array([(border[mark.box.corner] & mark.mask).sum() > 0.6 * mark.box.size for mark in marks], bool)
    return edges & ~edges.all()


def count_holes(mask: np.ndarray) -> int:
    """How many holes of a thousandth of its box or more a mark has; a digit has two, and few more where ink is pale."""
    labels, _ = ndimage.label(~np.pad(mask, 1))
    return int((np.bincount(labels.ravel())[1:] > mask.size / 1000).sum()) - 1  # the ground around it is none


def are_frames(marks: list[Mark]) -> np.ndarray:
    """Which marks (N,) are grids, or have others in their box that are no specks beside them, nor their noise."""
    left, top, right, bottom = np.array([mark.box for mark in marks]).reshape(-1, 4).T
    sizes, contrasts = np.array([(mark.box.size, mark.contrast) for mark in marks]).reshape(-1, 2).T
    inside = (left[:, None] <= left) & (top[:, None] <= top) & (right[:, None] >= right) & (bottom[:, None] >= bottom)
    inside &= (contrasts > 0.3 * contrasts[:, None]) & ~np.eye(len(marks), dtype=bool)
    return (inside @ sizes > 0.3 * sizes) | np.array([count_holes(mark.mask) > 20 for mark in marks], bool)


def joined(marks: list[Mark], grown: np.ndarray) -> list[Mark]:
    """The marks, those as one whose pixels hang together in a mask (H, W) that was grown from theirs."""
    labels, groups = ndimage.label(grown, NEIGHBOURS)[0], {}
    for mark in marks:
        groups.setdefault(labels[mark.box.corner][mark.mask][0], []).append(mark)
    return [union(group) for group in groups.values()]


def join_broken(marks: list[Mark], shape: tuple[int, int], reach: float | None) -> list[Mark]:
    """The marks, with strokes as one that are broken by less than twice this reach, or 0.04 of the usual height.

    A dot, a mark that is hardly longer than strokes are wide, is no digit but part of what is next to it.
    """
    width = weighted_median([stroke_width(mark.mask) for mark in marks], [mark.mask.sum() for mark in marks])
    mask, dots = canvas(marks, shape), [mark for mark in marks if mark.box.size < 3 * width]
    if dots:
        near = 1.5 * min(width, np.median([mark.box.size for mark in dots]))
        marks = joined(marks, mask | (ndimage.distance_transform_edt(~canvas(dots, shape)) <= near))
    reach = reach or 0.04 * usual_height(marks)
    return joined(marks, ndimage.distance_transform_edt(~mask) <= reach)


def digit_like(marks: list[Mark], shape: tuple[int, int]) -> list[Mark]:
    """The marks that are neither edges nor frames."""
    _, marks = partition(marks, are_edges(marks, shape))
    return partition(marks, are_frames(marks))[1]


def part_frames(mask: np.ndarray, strength: np.ndarray, reach: float | None = None) -> tuple[list[Mark], list[Mark]]:
    """The frames and edges in a mask (H, W), and the marks that may be digits."""
    marks = find_marks(mask, strength)
    edges, marks = partition(marks, are_edges(marks, mask.shape))
    marks = join_broken(marks, mask.shape, reach) if marks else []
    frames, marks = partition(marks, are_frames(marks))
    return edges + frames, marks


# ---------------------------------------------------------------- lines


def lines_across(mask: np.ndarray) -> np.ndarray:
    """The pixels of long thin lines in a mask (H, W) that run from left to right."""
    ink, width, reach = mask.astype(np.uint8), mask.shape[1], max(1, min(mask.shape) // 300)
    bar = int(max(6, width / 12, min(4 * stroke_width(mask), width / 4)))
    sloping = ndimage.maximum_filter1d(ink, 2 * reach + 1, axis=0)
    runs = ndimage.maximum_filter1d(ndimage.minimum_filter1d(sloping, bar), bar, origin=-1 + bar % 2) & ink
    labels = ndimage.label(ndimage.maximum_filter(runs, 2 * reach + 1), NEIGHBOURS)[0] * runs
    line = np.zeros_like(mask)
    for number, place in enumerate(ndimage.find_objects(labels), 1):
        part = labels[place] == number
        tall, long = part.shape
        if long >= 0.45 * width and part.sum() <= long**2 / 8 and tall <= long / 6:
            line[place] |= part
    return line


def crossed(line: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """The pixels of lines from left to right (H, W) that have a digit's ink near by, both above and below."""
    near, ink = max(3, min(line.shape) // 60), digits.astype(np.uint8)
    above = ndimage.maximum_filter1d(ink, near, axis=0, origin=(near - 1) // 2)
    below = ndimage.maximum_filter1d(ink, near, axis=0, origin=-(near // 2))
    return line & (ndimage.maximum_filter1d(above, 3) & ndimage.maximum_filter1d(below, 3) > 0)


def find_lines(mask: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """The pixels of lines in a mask (H, W), across and down, that are longer than the digits, but no digit's."""
    across, down = lines_across(mask), lines_across(mask.T).T
    labels, number = ndimage.label(across | down, NEIGHBOURS)
    marks = digit_like(find_marks(mask & (labels == 0), strength), mask.shape)
    if not number or not marks:
        return labels > 0
    least = 1.3 * usual_height(marks)
    long = [max(y.stop - y.start, x.stop - x.start) > least for y, x in ndimage.find_objects(labels)]
    line = np.array([False, *long])[labels]
    return line & ~crossed(across, mask & ~line) & ~crossed(down.T, (mask & ~line).T).T


# ---------------------------------------------------------------- fields


def stroke_width(mask: np.ndarray) -> float:
    """The strokes' mean width: their pixels' mean distance to an edge is a quarter of it, and half a pixel."""
    return 4 * (ndimage.distance_transform_edt(np.pad(mask, 1)).sum() / max(1, mask.sum()) - 0.5)


def as_mnist(strength: np.ndarray, mask: np.ndarray) -> Tensor:
    """A digit's ink (H, W) and its strokes as MNIST made its own: (1, 28, 28) in [0, 1].

    Scaled to fit 20x20 pixels, grey by antialiasing, and laid into 28x28 with its centre of mass in the middle,
    as LeCun, Cortes and Burges describe. Strokes that would shrink to less than MNIST's are drawn wider first.
    """
    (place,) = ndimage.find_objects(mask.astype(int))
    unit = max(mask[place].shape) / 20  # a pixel of the field
    width = stroke_width(mask)
    wider = (2.4 * unit - width) / 2 if width < 2 * unit else 0
    if wider >= 0.5:
        digit = np.clip(wider + 0.5 - ndimage.distance_transform_edt(~np.pad(mask, math.ceil(wider))), 0, 1)
    else:
        nearby = ndimage.binary_dilation(mask, iterations=max(1, round(unit / 10)))  # with its grey edge
        digit = np.clip(strength / np.percentile(strength[mask], 90), 0, 1) * nearby
    (place,) = ndimage.find_objects((digit > 0.25).astype(int))
    digit = digit[place]
    height, width = (max(1, round(20 * side / max(digit.shape))) for side in digit.shape)
    digit = np.asarray(Image.fromarray(np.float32(digit)).resize((width, height), Image.Resampling.BOX))
    y, x = ndimage.center_of_mass(digit)
    top, left = min(max(round(14 - y), 0), 28 - height), min(max(round(14 - x), 0), 28 - width)
    field = torch.zeros(1, 28, 28)
    field[0, top : top + height, left : left + width] = torch.from_numpy(digit / digit.max())
    return field


@torch.no_grad()
def read(net: Net, fields: list[Tensor]) -> Tensor:
    """Each field's probabilities, (N, 10)."""
    return net((torch.stack(fields) - MEAN) / STD).exp()


def read_marks(marks: list[Mark], strength: np.ndarray, net: Net) -> list[Digit]:
    """Each mark as the network reads it, from the ink (H, W) there."""
    fields = []
    for mark in marks:
        more, (height, width), (left, top, right, bottom) = 1 + mark.box.size // 20, strength.shape, mark.box
        around = Box(max(left - more, 0), max(top - more, 0), min(right + more, width), min(bottom + more, height))
        margins = (top - around.top, around.bottom - bottom), (left - around.left, around.right - right)
        fields.append(as_mnist(strength[around.corner], np.pad(mark.mask, margins)))
    return [Digit(*parts) for parts in zip(marks, fields, read(net, fields), strict=True)] if marks else []


# ---------------------------------------------------------------- one digit or two


def may_be_one(one: Box, other: Box) -> bool:
    """Whether two marks may be one digit's: one above the other, near by, and a part of a digit by its height."""
    short, tall = sorted((one.height, other.height))
    shared = min(one.right, other.right) - max(one.left, other.left)
    gap = max(one.top, other.top) - min(one.bottom, other.bottom)
    return shared > 0.5 * min(one.width, other.width) and gap < 0.4 * tall and short < 0.7 * tall


def join(digits: list[Digit], strength: np.ndarray, net: Net) -> list[Digit]:
    """The digits, with two as one that may be one digit's where the network is surer of the one."""
    digits = list(digits)
    pairs = [pair for pair in itertools.combinations(digits, 2) if may_be_one(pair[0].box, pair[1].box)]
    for pair, both in zip(pairs, read_marks([union([a.mark, b.mark]) for a, b in pairs], strength, net), strict=True):
        apart = [digit for digit in digits if any(digit is one for one in pair)]
        if len(apart) == 2 and both.certainty > min(digit.certainty for digit in apart):
            digits = [digit for digit in digits if not any(digit is one for one in pair)] + [both]
    return digits


def cuts(mark: Mark) -> list[tuple[Mark, Mark]]:
    """The ways to cut a mark in two along a straight line through little ink, the least ink first."""
    (height, width), edge = mark.mask.shape, max(1, mark.box.height // 10)
    stroke = stroke_width(mark.mask)
    if ndimage.label(mark.mask, NEIGHBOURS)[1] > 3 or stroke > 0.35 * height:  # a broken stroke, or no stroke at all
        return []
    wide = width > 1.4 * height
    most, ways = (4 if wide else 3) * stroke, []
    down, across = np.mgrid[:height, :width]
    for slope in (-0.2, 0, 0.2, 0.4, 0.6):
        upright = np.round(across + slope * (down - height / 2)).astype(int)  # the column after the slope is taken out
        sheared = np.zeros((height + 1, width), bool)
        inside = mark.mask & (upright >= 0) & (upright < width)
        sheared[down[inside] + 1, upright[inside]] = True
        amount, strokes = sheared.sum(axis=0), (sheared[1:] & ~sheared[:-1]).sum(axis=0)
        least = (amount == ndimage.minimum_filter1d(amount, 2 * edge + 1)) & (amount <= most) & (strokes <= 1 + wide)
        ways += [(amount[x], slope, x, upright < x) for x in np.nonzero(least)[0][::2] if edge <= x < width - edge]
    found = []
    for *_, left in sorted(ways, key=lambda way: way[:3])[: 24 * (1 + wide)]:
        if (mark.mask & left).any() and (mark.mask & ~left).any():
            pair = cropped(mark, left), cropped(mark, ~left)
            if min(part.box.height for part in pair) >= 0.6 * height:
                found.append(pair)
    return found[: 12 * (1 + wide)]


def cropped(mark: Mark, keep: np.ndarray) -> Mark:
    """The part of a mark that is to be kept (H, W)."""
    ((y, x),) = ndimage.find_objects((mark.mask & keep).astype(int))
    box = Box(mark.box.left + x.start, mark.box.top + y.start, mark.box.left + x.stop, mark.box.top + y.stop)
    return Mark(box, (mark.mask & keep)[y, x], mark.contrast)


def split(digit: Digit, strength: np.ndarray, net: Net, most: int = 4) -> list[Digit]:
    """The digit, or those that touch in it, at most this many cuts, where the network is surer of each of them."""
    if digit.certainty > 0.9 or not most:
        return [digit]
    best, sure = [digit], max(0.85, digit.certainty + 0.05)
    parts = iter(read_marks([part for pair in cuts(digit.mark) for part in pair], strength, net))
    pairs = sorted(zip(parts, parts, strict=True), key=lambda pair: -pair[0].certainty)
    for left, right in pairs[:most]:
        if left.certainty > sure:
            rest = split(right, strength, net, most - 1)
            if (least := min(part.certainty for part in (left, *rest))) > sure:
                best, sure = [left, *rest], least
    return best


# ---------------------------------------------------------------- reading


def read_mask(mask: np.ndarray, strength: np.ndarray, net: Net, reach: float | None = None) -> Reading:
    """Read the digits in a mask (H, W), those of the usual size and contrast."""
    left_out, marks = part_frames(mask, strength, reach)
    if not marks:
        return Reading([], left_out)
    usual, contrast = usual_height(marks), usual_contrast(marks)
    faint = [mark.box.size < 0.15 * usual or mark.contrast < 0.5 * contrast for mark in marks]
    out, marks = partition(marks, np.array(faint))
    if len(marks) > MOST_DIGITS:
        raise Failure(f"{len(marks)} marks are on it, which are no digits")
    digits = join(read_marks(marks, strength, net), strength, net)
    left_out, kept = left_out + out, []
    for digit in digits:
        if digit.certainty < 0.5 and len(digits) > 1 and digit.box.width < digit.box.height:
            left_out.append(digit.mark)
        elif 0.35 * usual <= digit.box.height <= 2 * usual and digit.box.width < 8 * usual:
            kept += split(digit, strength, net)
        else:
            left_out.append(digit.mark)
    return Reading(lines(kept), left_out)


def lines(digits: list[Digit]) -> list[list[Digit]]:
    """Part digits into lines, top down, each from left to right: a digit goes on with the line that ends next to it."""
    rows = []
    for digit in sorted(digits, key=lambda digit: digit.box.left):
        ends = [(row[-1].box, row) for row in rows]
        near = [
            (abs(end.middle - digit.box.middle) + 0.2 * max(0, digit.box.left - end.right), number)
            for number, (end, _) in enumerate(ends)
            if abs(end.middle - digit.box.middle) < 0.5 * max(end.height, digit.box.height)
        ]
        if near:
            rows[min(near)[1]].append(digit)
        else:
            rows.append([digit])
    return sorted(rows, key=lambda row: np.median([digit.box.middle for digit in row]))


def look(picture: Image.Image, net: Net) -> Reading:
    """Read a picture. All boxes are in pixels of the picture as it is shown, upright."""
    try:
        try:
            inked = ink(colours := flatten(picture, "white"))
        except Failure:  # white ink on transparency, perhaps
            inked = ink(colours := flatten(picture, "black"))
        reading = read_ink(*inked, net)
        with contextlib.suppress(Failure):  # light paper on a dark desk was taken for ink, perhaps
            dark = ink(colours, dark=True)
            if not np.array_equal(dark[1], inked[1]):
                other = read_ink(*dark, net)
                reading = other if other.worth > 2 * reading.worth else reading
    except Failure as failure:
        return Reading([], [], str(failure))
    enlarged = max(picture.size) / max(colours.shape)

    def shown(mark: Mark) -> Mark:
        left, top, right, bottom = (side * enlarged for side in mark.box)
        return mark._replace(box=Box(int(left), int(top), math.ceil(right), math.ceil(bottom)))

    rows = [[digit._replace(mark=shown(digit.mark)) for digit in row] for row in reading.rows]
    left_out, shortest = [shown(mark) for mark in reading.left_out], max(5, min(colours.shape[:2]) / 40)
    if not rows or usual_height([digit.mark for digit in reading.digits]) < shortest:
        return Reading([], left_out, "nothing on it has the size and shape of a digit")
    return Reading(rows, left_out)


def read_ink(sharp: np.ndarray, strength: np.ndarray, faintest: float, net: Net) -> Reading:
    """The best reading of ink (H, W), sharp and without its finest grain."""
    mask = strokes(strength, faintest)
    marks = digit_like(find_marks(mask, strength), mask.shape)
    if marks:  # what is far weaker than the marks is no ink
        mask = strokes(strength, max(faintest, 0.3 * usual_contrast(marks)))
    best = read_mask(mask, sharp, net)
    if len(best.digits) == 1 and best.digits[0].certainty > 0.9 and not best.left_out:
        return best
    if len(best.digits) < 30 and any(digit.certainty < 0.9 for digit in best.digits):  # one digit in many pieces?
        marks = digit_like(find_marks(mask, strength), mask.shape)
        coarse = read_mask(mask, sharp, net, 0.04 * union(marks).box.size) if marks else best
        best = coarse if coarse.explained > best.explained + 0.05 else best
    line = find_lines(mask, strength)
    alone = len(best.digits) == 1 and best.digits[0].certainty > 0.9
    largest = alone and all(mark.box.size <= best.digits[0].box.size for mark in best.left_out)
    if line.any() and not largest:
        cut = read_mask(mask & ~line, sharp, net)
        if cut.worth > 0.7 * best.worth:
            best = cut._replace(left_out=cut.left_out + find_marks(line, strength))
    if best.explained < 0.7:  # much ink is no digit's: pale lines, perhaps, that one threshold for all leaves out
        plain = read_mask(strength > 0.8 * threshold_otsu(strength[strength > faintest]), sharp, net)
        best = plain if plain.explained > 0.9 else best
    return best


@functools.cache
def committed_net() -> Net:
    """The network of assets/model.pt."""
    return load_net(HERE / "assets" / "model.pt")


def digits(picture: Image.Image, net: Net | None = None) -> list[tuple[Box, Tensor]]:
    """Find the digits in a picture: (box, field) of each, left to right and line by line.

    The box is in pixels of the picture as it is shown, upright. The field, (1, 28, 28) in [0, 1] with ink
    towards 1, is what the network reads, less MEAN and over STD. Where ink may be one digit or two, this network
    decides, by default that of assets/model.pt. Raises Failure where there is no digit. look() tells more.
    """
    reading = look(picture, net or committed_net())
    if reading.problem:
        raise Failure(reading.problem)
    return [(digit.box, digit.field) for digit in reading.digits]


# ---------------------------------------------------------------- command line

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_READ = 150_000_000  # pixels
OWN = {"Software": "predict.py --seen"}  # by which a PNG says that it may be overwritten


def draw(picture: Image.Image, reading: Reading) -> bytes:
    """The picture with a red frame around each digit, a blue one around what was left out, and the fields, as a PNG."""
    from matplotlib.figure import Figure  # here, as it takes as long to import as a picture to be read

    from pictures import png

    shown, found = Image.fromarray(np.uint8(flatten(picture, "white"))), reading.digits
    height = 6
    wide, columns = min(18, max(1, height * shown.width / shown.height)), max(4, math.ceil(math.sqrt(len(found) / 1.2)))
    rows = max(3, math.ceil(len(found) / columns))
    panel = height * 32 * columns / (38 * rows + 10) if found else 0
    figure = Figure(figsize=(wide + panel, height))
    axes = figure.add_axes((0, 0, wide / figure.get_figwidth(), 1))
    longest = max(picture.size)
    across, down = (longest * side / max(shown.size) for side in shown.size)
    axes.imshow(shown, extent=(0, across, down, 0))
    axes.axis("off")
    for mark, colour, text in [
        *((mark, "tab:blue", "") for mark in reading.left_out),
        *((digit.mark, "tab:red", str(digit.probabilities.argmax().item())) for digit in found),
    ]:
        left, top, right, bottom = mark.box
        axes.plot((left, right, right, left, left), (top, top, bottom, bottom, top), color=colour, linewidth=1)
        axes.text(left, top, text, color=colour, fontsize=9, ha="right", va="bottom", clip_on=True)
    if found:
        axes = figure.add_axes((wide / figure.get_figwidth(), 0, panel / figure.get_figwidth(), 1))
        for number, digit in enumerate(found):
            x, y = 32 * (number % columns), 38 * (number // columns)
            axes.imshow(digit.field[0].numpy(), cmap="gray", vmin=0, vmax=1, extent=(x, x + 28, y + 28, y))
            best = digit.probabilities.max().item()
            title = f"{digit.probabilities.argmax()} {100 * best:.0f}%"
            axes.text(x + 14, y - 1, title, ha="center", fontsize=min(10, 60 / columns))
        axes.set(xlim=(-4, 32 * columns), ylim=(38 * rows, -10))
        axes.axis("off")
    return png(figure, OWN)


def pictures_in(paths: list[str]) -> Iterator[tuple[str, io.BytesIO | Path]]:
    """The names of picture files, and the files: those in a folder, and standard input for "-"."""
    for path in paths:
        if path == "-":
            yield path, io.BytesIO(sys.stdin.buffer.read())
        elif Path(path).is_dir():
            endings = [ending for ending, name in Image.registered_extensions().items() if name in FORMATS]
            inside = [file for file in sorted(Path(path).iterdir()) if file.suffix.lower() in endings]
            yield from ((str(file), file) for file in inside or [Path(path)])  # an empty one is an error
        else:
            yield path, Path(path)


def pages(name: str, file: io.BytesIO | Path) -> Iterator[tuple[str, Image.Image]]:
    """The pages of a picture file with their names. Raises Failure, or what Pillow raises for a damaged one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of damage that does not hinder
        content = file.read_bytes() if isinstance(file, Path) else file.getvalue()
        if content[4:8] == b"ftyp":
            raise Failure("it is a HEIC or AVIF picture, or a film; save it as JPEG")
        try:
            picture = Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.UnidentifiedImageError as error:
            raise Failure("it is not a picture") from error
        if picture.width * picture.height > MOST_READ:
            raise Failure(f"it is too large: more than {MOST_READ:,} pixels")
        last = getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1
        for number in range(last):
            picture.seek(number)
            picture.load()
            yield name if last == 1 else f"{name} page {number + 1}", picture


def line_of(reading: Reading) -> str:
    """What is read, as text: a single digit with the runner-up, or lines of them, with ? where one is not sure."""
    if len(reading.digits) == 1:
        (p, q), (first, second) = (part.tolist() for part in reading.digits[0].probabilities.topk(2))
        return f"{first} ({100 * p:.1f}%), then {second} ({100 * q:.1f}%)"
    texts = [
        " ".join(f"{row.argmax()}{'?' * (row.max().item() < 0.9)}" for row in (digit.probabilities for digit in line))
        for line in reading.rows
    ]
    return " / ".join(texts)


def object_of(name: str, reading: Reading) -> str:
    """What is read, as a JSON object."""
    read = [
        {"line": number, "box": digit.box, "digit": p.argmax().item(), "probability": round(p.max().item(), 4)}
        for number, line in enumerate(reading.rows, 1)
        for digit in line
        for p in [digit.probabilities]
    ]
    problem = {"error": reading.problem} if reading.problem else {}
    return json.dumps({"file": name, "digits": read, "left_out": [mark.box for mark in reading.left_out], **problem})


def predict(paths: list[str], net: Net, as_json: bool, seen: Path | None) -> int:
    """Print what each picture's digits are, and draw the picture to seen. Returns the exit status: 1 if any failed."""
    status = 0
    for path, file in pictures_in(paths):
        try:
            for name, picture in pages(path, file):
                reading = look(picture, net)
                if seen:
                    save(seen, draw(picture, reading))
                if as_json:
                    print(object_of(name, reading))
                elif not reading.problem:
                    print(f"{name}: {line_of(reading)}")
                if reading.problem:
                    raise Failure(reading.problem)
                if reading.left_out:
                    print(f"predict.py: {name}: {len(reading.left_out)} marks left out", file=sys.stderr)
        except Exception as error:  # Pillow's decoders raise nearly anything for a broken file
            problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
            print(f"predict.py: error: cannot read {path}: {problem}", file=sys.stderr)
            status = 1
    return status


def is_own(path: Path) -> bool:
    """Whether a file is a picture that --seen drew."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return OWN.items() <= picture.info.items()
    except OSError:
        return False


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 success, 1 failure, 130 Ctrl-C."""
    parser = argparse.ArgumentParser("predict.py", usage=argparse.SUPPRESS, description=__doc__.splitlines()[0])
    text = "picture files of any size and mode, folders of them, or - for standard input"
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help=text)
    default = HERE / "assets" / "model.pt"
    parser.add_argument("--weights", type=Path, default=default, metavar="FILE", help="default: assets/model.pt")
    parser.add_argument("--json", action="store_true", help="print a JSON object a picture, with boxes, in a line")
    text = "draw one picture, what was found in it and what the network saw, as a new PNG or one drawn before"
    parser.add_argument("--seen", type=Path, metavar="FILE.png", help=text)
    args = parser.parse_args(argv)
    if args.seen and (len(args.pictures) != 1 or Path(args.pictures[0]).is_dir()):
        parser.error("--seen goes with one picture")
    if args.seen and (args.seen.suffix != ".png" or (os.path.exists(args.seen) and not is_own(args.seen))):
        parser.error(f"--seen {args.seen}: not a new file that ends in .png, nor one that --seen drew")
    return run_command("predict.py", lambda: predict(args.pictures, load_net(args.weights), args.json, args.seen))


if __name__ == "__main__":
    sys.exit(main())
