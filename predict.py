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
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from scipy import ndimage
from skimage.filters import apply_hysteresis_threshold
from skimage.measure import label, regionprops
from torch import Tensor

from script import HERE, MEAN, STD, Failure, Net, load_net, run_command, save


class Box(NamedTuple):
    """A frame in a picture, in pixels from its upper left corner; right and bottom lie outside."""

    left: int
    top: int
    right: int
    bottom: int


class Mark(NamedTuple):
    """Ink that hangs together: its rows and columns, which of the pixels there (H, W) it covers, and its contrast."""

    place: tuple[slice, slice]
    mask: np.ndarray
    contrast: float

    @property
    def box(self) -> Box:
        y, x = self.place
        return Box(x.start, y.start, x.stop, y.stop)

    @property
    def height(self) -> int:
        return self.mask.shape[0]

    @property
    def width(self) -> int:
        return self.mask.shape[1]

    @property
    def size(self) -> int:
        return max(self.mask.shape)


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
    def certainty(self) -> float:
        """The probability of what is read, less where the mark is wider than a digit."""
        return self.probability * min(1, max(0.2, 1.8 - self.mark.width / self.mark.height))


@dataclass
class Reading:
    """What is read in a picture: its digits, line by line, what was left out, and why it is refused if it is."""

    rows: list[list[Digit]]
    unread: list[Mark]  # of a digit's size, but read as none
    frames: list[Mark]  # and lines, the paper's edges, specks
    problem: str = ""
    scale: float = 1  # pixels of the picture as it is shown, for one of a mark's

    def box(self, mark: Mark) -> Box:
        """A mark's box in pixels of the picture as it is shown, upright."""
        left, top, right, bottom = (side * self.scale for side in mark.box)
        return Box(int(left), int(top), math.ceil(right), math.ceil(bottom))

    @property
    def digits(self) -> list[Digit]:
        return [digit for row in self.rows for digit in row]

    @property
    def left_out(self) -> list[Mark]:
        return self.unread + self.frames

    @property
    def explained(self) -> float:
        """The share of the ink, without that of frames, that is read; each digit counts by its certainty."""
        total = sum(mark.mask.sum() for mark in [digit.mark for digit in self.digits] + self.unread)
        return sum(digit.certainty * digit.mark.mask.sum() for digit in self.digits) / max(1, total)

    @property
    def merit(self) -> float:
        """By which one of several readings is chosen: the ink explained, and how many digits more likely than not.

        The root, as ink that is cut into pieces gives many digits.
        """
        return self.explained * math.sqrt(sum(max(0, 2 * digit.certainty - 1) for digit in self.digits))


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

    It takes away what is narrower than a square that is wider than any stroke, and keeps gradients and straight edges
    of shadows. Beyond the border the paper goes on, but not the ink that touches it.
    """
    short, long = sorted(grey.shape)
    side = max(3, int(max(0.4 * short, min(0.3 * long, 2 * short))))
    sheet = np.pad(grey, 1, mode="edge")
    for border in sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]:
        border[:] = ndimage.grey_opening(border, max(3, 2 * len(border) // 3))
    sheet = ndimage.grey_opening(np.pad(sheet, side, mode="edge"), side)
    return sheet[side + 1 : -side - 1, side + 1 : -side - 1]


def roughness(grey: np.ndarray) -> float:
    """The sum of all differences between neighbours: the total variation."""
    return np.abs(np.diff(grey, axis=0)).sum() + np.abs(np.diff(grey, axis=1)).sum()


def ink(colours: np.ndarray, signs: tuple[int, ...] = (-1, 1)) -> tuple[np.ndarray, np.ndarray, float]:
    """How much each pixel differs from its paper, as a share of the light there, and the same without its finest grain.

    From (H, W, 3) in [0, 255] to two of (H, W), and the least that is not noise. signs: -1 where ink may be darker than
    its paper, 1 where it may be lighter. Raises Failure where nothing stands out.
    """
    small = Image.fromarray(np.uint8(colours))
    small.thumbnail((100, 100), Image.Resampling.BOX)
    weights, papers = [], []
    for channel in np.moveaxis(np.asarray(small, dtype=np.float32), 2, 0):
        # Dark ink or light? Where it is the right one, the paper is smooth and the ink has few edges.
        ways = [(sign, sign * without_ink(sign * channel)) for sign in signs]
        sign, paper = min(ways, key=lambda way: roughness(way[1]) + 0.8 * roughness(channel - way[1]))
        weights.append(sign * np.sqrt(np.mean((channel - paper) ** 2)))
        papers.append(paper)
    if not any(weights):
        raise Failure("nothing on it stands out from its paper")
    grey = colours @ np.float32(weights / np.abs(weights).sum())  # the mixture in which the ink is lightest
    height, width = grey.shape
    light = Image.fromarray(np.mean(papers, axis=0)).resize((width, height), Image.Resampling.BILINEAR)
    light = np.asarray(light) + 30  # a black board is no less noisy than a grey one
    blur = min(grey.shape) / 200
    smooth = ndimage.gaussian_filter(grey, blur / 2)
    paper = without_ink(smooth)
    strength = (smooth - paper) / light
    strength -= np.percentile(strength, 10)  # of paper: where there is noise, its lowest was taken for the paper
    noise = 1.5 * np.median(np.abs(strength - ndimage.gaussian_filter(strength, blur)))  # its standard deviation
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

MOST_MARKS, MOST_DIGITS = 3000, 600  # more are noise or text


def find_marks(labels: np.ndarray, strength: np.ndarray) -> list[Mark]:
    """A mark for each number in labels (H, W), other than specks. Raises Failure where they are too many."""
    marks = []
    for region in regionprops(labels):
        if max(region.image.shape) >= max(3, min(labels.shape) / 80):
            contrast = np.percentile(strength[region.slice][region.image], 90)
            marks.append(Mark(region.slice, region.image, float(contrast)))
    if len(marks) > MOST_MARKS:
        raise Failure(f"{len(marks)} marks are on it, more than on a sheet of digits")
    return marks


def canvas(marks: list[Mark], shape: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) of these marks."""
    mask = np.zeros(shape, bool)
    for mark in marks:
        mask[mark.place] |= mark.mask
    return mask


def partition(marks: list[Mark], chosen: np.ndarray) -> tuple[list[Mark], list[Mark]]:
    """The marks that are chosen (N,), and the others."""
    pairs = list(zip(marks, chosen, strict=True))
    return [mark for mark, yes in pairs if yes], [mark for mark, yes in pairs if not yes]


def weighted_median(values: list[float], weights: list[float]) -> float:
    """The value that splits the weights into halves."""
    return float(np.quantile(values, 0.5, weights=weights, method="inverted_cdf"))


def usual_height(marks: list[Mark]) -> float:
    """The median height, to which a mark counts by its height: a few digits outweigh many specks or lines."""
    heights = [mark.height for mark in marks]
    return weighted_median(heights, heights)


def usual_contrast(marks: list[Mark]) -> float:
    """The median contrast, to which a mark counts by its ink."""
    return weighted_median([mark.contrast for mark in marks], [mark.contrast * mark.mask.sum() for mark in marks])


def are_edges(marks: list[Mark], shape: tuple[int, int]) -> np.ndarray:
    """Which marks (N,) run along the picture's border, as a desk around the paper does. Not all: one is the digit."""
    border = np.ones(shape, bool)
    border[1:-1, 1:-1] = False
    edges = np.array([(border[mark.place] & mark.mask).sum() > 0.6 * mark.size for mark in marks], bool)
    return edges & ~edges.all()


def are_frames(marks: list[Mark]) -> np.ndarray:
    """Which marks (N,) are grids, or have others in their box that are no specks beside them, nor their noise."""
    left, top, right, bottom = np.array([mark.box for mark in marks]).reshape(-1, 4).T
    sizes, contrasts = np.array([(mark.size, mark.contrast) for mark in marks]).reshape(-1, 2).T
    inside = (left[:, None] <= left) & (top[:, None] <= top) & (right[:, None] >= right) & (bottom[:, None] >= bottom)
    inside &= (contrasts > 0.3 * contrasts[:, None]) & ~np.eye(len(marks), dtype=bool)
    holes = [sum(hole.area > mark.mask.size / 1000 for hole in regionprops(label(~mark.mask))) for mark in marks]
    return (inside @ sizes > 0.3 * sizes) | (np.array(holes) > 20)  # pale ink has small holes


def join_broken(marks: list[Mark], strength: np.ndarray, reach: float) -> list[Mark]:
    """The marks, with strokes as one that are broken by less than twice this share of the usual height.

    A dot, a mark that is hardly longer than strokes are wide, is no digit but part of what is next to it.
    """
    mask = canvas(marks, strength.shape)
    width = weighted_median([stroke_width(mark.mask) for mark in marks], [mark.mask.sum() for mark in marks])
    dots = [mark for mark in marks if mark.size < 3 * width]
    near = mask.copy()
    if dots:
        far = 1.5 * min(width, np.median([mark.size for mark in dots]))
        near |= ndimage.distance_transform_edt(~canvas(dots, strength.shape)) <= far
    near |= ndimage.distance_transform_edt(~mask) <= reach * usual_height(marks)
    return find_marks(label(near) * mask, strength)


def digit_like(mask: np.ndarray, strength: np.ndarray, reach: float) -> tuple[list[Mark], list[Mark]]:
    """The marks in a mask (H, W) that may be digits, broken ones joined, and the others: frames and edges."""
    marks = find_marks(label(mask), strength)
    edges, marks = partition(marks, are_edges(marks, mask.shape))
    marks = join_broken(marks, strength, reach) if marks and reach else marks
    frames, marks = partition(marks, are_frames(marks))
    return marks, edges + frames


# ---------------------------------------------------------------- lines


def lines_across(mask: np.ndarray) -> np.ndarray:
    """The pixels of long thin lines in a mask (H, W) that run from left to right."""
    pixels, width, reach = mask.astype(np.uint8), mask.shape[1], max(1, min(mask.shape) // 300)
    bar = int(max(6, width / 12, min(4 * stroke_width(mask), width / 4)))
    sloping = ndimage.maximum_filter1d(pixels, 2 * reach + 1, axis=0)
    runs = ndimage.maximum_filter1d(ndimage.minimum_filter1d(sloping, bar), bar, origin=-1 + bar % 2) & pixels
    line = np.zeros_like(mask)
    for region in regionprops(label(ndimage.maximum_filter(runs, 2 * reach + 1)) * runs):
        tall, long = region.image.shape
        if long >= 0.45 * width and region.area <= long**2 / 8 and tall <= long / 6:
            line[region.slice] |= region.image
    return line


def find_lines(mask: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """The pixels of lines in a mask (H, W), across and down, that are longer than the digits."""
    labels = label(lines_across(mask) | lines_across(mask.T).T)
    marks, _ = digit_like(mask & (labels == 0), strength, reach=0)
    least = 1.3 * usual_height(marks) if marks else 0
    short = [region.label for region in regionprops(labels) if max(region.image.shape) <= least]
    return (labels > 0) & ~np.isin(labels, short)


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
        margin = 1 + mark.size // 20  # the strokes' grey edge lies outside the mark
        around = tuple(slice(max(0, side.start - margin), side.stop + margin) for side in mark.place)
        fields.append(as_mnist(strength[around], canvas([mark], strength.shape)[around]))
    return [Digit(*parts) for parts in zip(marks, fields, read(net, fields), strict=True)] if marks else []


# ---------------------------------------------------------------- digits that touch

SLOPES = (0, 0.3)  # of cuts: columns to the left, for a row down
MOST_CUTS = 10  # places to choose from
EACH, THROUGH = 0.3, 0.45  # what each digit costs, and each stroke that a cut goes through


def cropped(mark: Mark, keep: np.ndarray) -> Mark:
    """The part of a mark that is to be kept (H, W)."""
    ((y, x),) = ndimage.find_objects((mark.mask & keep).astype(int))
    top, left = (side.start for side in mark.place)
    place = slice(top + y.start, top + y.stop), slice(left + x.start, left + x.stop)
    return Mark(place, (mark.mask & keep)[y, x], mark.contrast)


def price(digit: Digit) -> float:
    """What a digit costs in a way to cut a mark: the less certain, the more."""
    return EACH - math.log(digit.certainty)


def cut(mark: Mark, slope: float, strength: np.ndarray, net: Net) -> tuple[float, list[Digit]]:
    """The cheapest way to cut a mark along lines of this slope into digits side by side: its cost, and the digits."""
    down, across = np.mgrid[: mark.height, : mark.width]
    column = np.round(across + slope * down).astype(int)
    column -= column[mark.mask].min()
    crossed = np.bincount(column[mark.mask]) / stroke_width(mark.mask)  # how many strokes a cut goes through
    step, end = max(2, mark.height // 10), len(crossed)
    places = [start + np.argmin(crossed[start : start + step]) for start in range(step, end - step, step)]
    places = sorted((place for place in places if crossed[place] < 3), key=lambda place: crossed[place])[:MOST_CUTS]
    places = [0, *sorted(places), end]
    parts = {}
    for left, right in itertools.combinations(places, 2):
        keep = mark.mask & (left <= column) & (column < right)
        if right - left <= 1.2 * mark.height and keep.any() and np.ptp(np.nonzero(keep)[0]) >= 0.6 * mark.height:
            parts[left, right] = cropped(mark, keep)
    digits = dict(zip(parts, read_marks(list(parts.values()), strength, net), strict=True))
    ways = {0: (0.0, [])}  # the cheapest up to each place
    for place in places[1:]:
        able = []
        for (left, right), digit in digits.items():
            if right == place and left in ways:
                cost, before = ways[left]
                able.append((cost + price(digit) + (left > 0) * THROUGH * crossed[left], [*before, digit]))
        if able:
            ways[place] = min(able, key=lambda way: way[0])
    return ways.get(end, (math.inf, []))


def split(digit: Digit, strength: np.ndarray, net: Net) -> list[Digit]:
    """The digit, or those that touch in it.

    Of all ways to cut it the cheapest stands, as in the heuristic over-segmentation of LeCun, Bottou, Bengio and
    Haffner (1998).
    """
    if price(digit) < 2 * EACH or not 0.6 <= digit.mark.width / digit.mark.height < 5:
        return [digit]  # two digits cost more
    ways = [(price(digit), [digit])] + [cut(digit.mark, slope, strength, net) for slope in SLOPES]
    return min(ways, key=lambda way: way[0])[1]


# ---------------------------------------------------------------- reading


def read_mask(mask: np.ndarray, strength: np.ndarray, net: Net, reach: float = 0.04) -> Reading:
    """Read the digits in a mask (H, W), those of the usual size and contrast."""
    marks, frames = digit_like(mask, strength, reach)
    if not marks:
        return Reading([], [], frames)
    usual, contrast = usual_height(marks), usual_contrast(marks)
    faint = [mark.size < 0.15 * usual or mark.contrast < 0.5 * contrast for mark in marks]
    specks, marks = partition(marks, np.array(faint))
    if len(marks) > MOST_DIGITS:
        raise Failure(f"{len(marks)} marks are on it, more than on a sheet of digits")
    found, unread, frames = [], [], frames + specks
    for digit in read_marks(marks, strength, net):
        mark = digit.mark
        unsure = digit.certainty < 0.5 and len(marks) > 1 and mark.width < mark.height
        if unsure or not (0.35 * usual <= mark.height <= 2 * usual and mark.width < 8 * usual):
            unread.append(mark)
        else:
            found += split(digit, strength, net)
    return Reading(in_rows(found), unread, frames)


def in_rows(digits: list[Digit]) -> list[list[Digit]]:
    """Part digits into lines, top down, each from left to right: a digit goes on with the line that ends next to it."""
    rows = []

    def middle(digit: Digit) -> float:
        return (digit.mark.box.top + digit.mark.box.bottom) / 2

    for digit in sorted(digits, key=lambda digit: digit.mark.box.left):
        near = []
        for row in rows:
            end, beside = row[-1], abs(middle(row[-1]) - middle(digit))
            if beside < 0.5 * max(end.mark.height, digit.mark.height):
                near.append((beside + 0.2 * max(0, digit.mark.box.left - end.mark.box.right), row))
        if near:
            min(near, key=lambda pair: pair[0])[1].append(digit)
        else:
            rows.append([digit])
    return sorted(rows, key=lambda row: np.median([middle(digit) for digit in row]))


def read_ink(sharp: np.ndarray, strength: np.ndarray, faintest: float, net: Net) -> Reading:
    """The best reading of ink (H, W), sharp and without its finest grain."""
    mask = strokes(strength, faintest)
    if marks := digit_like(mask, strength, reach=0)[0]:  # what is far weaker than the marks is no ink
        mask = strokes(strength, max(faintest, 0.3 * usual_contrast(marks)))
    ways = [read_mask(mask, sharp, net)]
    if ways[0].explained > 0.8:
        return ways[0]
    line = find_lines(mask, strength)
    if line.any():
        ways.append(read_mask(mask & ~line, sharp, net))
        ways[-1].frames += find_marks(label(line), strength)
    ways.append(read_mask(mask, sharp, net, reach=0.3))  # strokes that are broken further
    return max(ways, key=lambda way: way.merit)


def look(picture: Image.Image, net: Net) -> Reading:
    """Read a picture. All boxes are in pixels of the picture as it is shown, upright."""
    try:
        try:
            inked = ink(colours := flatten(picture, "white"))
        except Failure:  # white ink on transparency, perhaps
            inked = ink(colours := flatten(picture, "black"))
        reading = read_ink(*inked, net)
        if len(reading.digits) < 3 or reading.explained < 0.9:  # light paper on a dark desk was taken for ink, perhaps
            with contextlib.suppress(Failure):
                dark = ink(colours, signs=(-1,))
                if not np.array_equal(dark[0], inked[0]):
                    other = read_ink(*dark, net)
                    reading = other if other.merit > 2 * reading.merit else reading
    except Failure as failure:
        return Reading([], [], [], str(failure))
    shortest = max(5, min(colours.shape[:2]) / 40)
    if not reading.rows or usual_height([digit.mark for digit in reading.digits]) < shortest:
        reading.problem = "nothing on it has the size and shape of a digit"
        reading.unread, reading.rows = reading.unread + [digit.mark for digit in reading.digits], []
    reading.scale = max(picture.size) / max(colours.shape)
    return reading


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
    return [(reading.box(digit.mark), digit.field) for digit in reading.digits]


# ---------------------------------------------------------------- command line

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MOST_READ = 150_000_000  # pixels
OWN = {"Software": "predict.py --seen"}  # by which a PNG says that it may be overwritten


def draw(picture: Image.Image, reading: Reading) -> bytes:
    """The picture with a red frame around each digit, a blue one around what was left out, and the fields, as a PNG."""
    from matplotlib.figure import Figure  # here, as it takes as long to import as a picture to be read
    from matplotlib.patches import Rectangle

    from pictures import png

    found, shown = reading.digits, ImageOps.exif_transpose(picture)
    figure = Figure(figsize=(12, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.imshow(np.uint8(flatten(picture, "white")), extent=(0, shown.width, shown.height, 0))
    frames = [(mark, "tab:blue", "") for mark in reading.left_out]
    frames += [(digit.mark, "tab:red", str(digit.value)) for digit in found]
    for mark, colour, text in frames:
        box = reading.box(mark)
        size = box.right - box.left, box.bottom - box.top
        left.add_patch(Rectangle(box[:2], *size, fill=False, edgecolor=colour))
        left.text(*box[:2], text, color=colour, fontsize=9, ha="right", va="bottom", clip_on=True)
    columns = max(4, math.ceil(math.sqrt(len(found))))
    for number, digit in enumerate(found):
        x, y = 32 * (number % columns), 38 * (number // columns)
        right.imshow(digit.field[0].numpy(), cmap="gray", vmin=0, vmax=1, extent=(x, x + 28, y + 28, y))
        title = f"{digit.value} {100 * digit.probability:.0f}%"
        right.text(x + 14, y - 1, title, ha="center", fontsize=min(10, 60 / columns))
    right.set(xlim=(-4, 32 * columns), ylim=(38 * math.ceil(max(1, len(found)) / columns), -10))
    left.axis("off")
    right.axis("off")
    return png(figure, OWN)


def picture_files(paths: list[str]) -> Iterator[str]:
    """These paths, with the pictures in a folder instead of the folder."""
    endings = [ending for ending, name in Image.registered_extensions().items() if name in FORMATS]
    endings += [".heic", ".heif"]  # phones' pictures, to be refused with a reason
    for path in map(Path, paths):
        inside = [file for file in sorted(path.iterdir()) if file.suffix.lower() in endings] if path.is_dir() else []
        yield from map(str, inside or [path])  # a folder without pictures is an error


def pages(path: str) -> Iterator[tuple[str, Image.Image]]:
    """The pages of a picture file with their names. Raises Failure, or what Pillow raises for a damaged one."""
    content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        kind = "is HEIC, AVIF or a film" if content[4:8] == b"ftyp" else "is not a picture"
        raise Failure(f"it {kind}; save it as JPEG") from error
    if picture.width * picture.height > MOST_READ:
        raise Failure(f"it is too large: more than {MOST_READ:,} pixels")
    last = getattr(picture, "n_frames", 1) if picture.format == "TIFF" else 1
    for number in range(last):
        picture.seek(number)
        picture.load()
        yield path if last == 1 else f"{path} page {number + 1}", picture


def line_of(reading: Reading) -> str:
    """What is read, as text: a single digit with the runner-up, or lines of them, with ? where one is not sure."""
    if len(reading.digits) == 1:
        (p, q), (first, second) = (part.tolist() for part in reading.digits[0].probabilities.topk(2))
        return f"{first} ({100 * p:.1f}%), then {second} ({100 * q:.1f}%)"
    texts = [" ".join(f"{digit.value}{'?' * (digit.probability < 0.9)}" for digit in row) for row in reading.rows]
    return " / ".join(texts)


def object_of(name: str, reading: Reading) -> str:
    """What is read, as a JSON object."""
    read = [
        {"line": n, "box": reading.box(digit.mark), "digit": digit.value, "probability": round(digit.probability, 4)}
        for n, row in enumerate(reading.rows, 1)
        for digit in row
    ]
    problem = {"error": reading.problem} if reading.problem else {}
    left_out = [reading.box(mark) for mark in reading.left_out]
    return json.dumps({"file": name, "digits": read, "left_out": left_out, **problem})


def readings(path: str, net: Net, drawn: bool) -> Iterator[tuple[str, Reading, bytes]]:
    """The name of each page of a picture file, what is read on it, and draw()'s picture where it is wanted."""
    try:
        for name, picture in pages(path):
            reading = look(picture, net)
            yield name, reading, draw(picture, reading) if drawn else b""
    except Exception as error:  # Pillow's decoders raise nearly anything for a broken file
        problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
        yield path, Reading([], [], [], problem), b""


def predict(paths: list[str], net: Net, as_json: bool, seen: Path | None) -> int:
    """Print what each picture's digits are, and draw the picture to seen. Returns the exit status: 1 if any failed."""
    warnings.simplefilter("ignore")  # Pillow's, of damage that does not hinder
    status = 0
    for path in picture_files(paths):
        for name, reading, drawn in readings(path, net, seen is not None):
            if as_json:
                print(object_of(name, reading))
            elif reading.digits:
                print(f"{name}: {line_of(reading)}")
            if reading.problem:
                print(f"predict.py: error: cannot read {name}: {reading.problem}", file=sys.stderr)
                status = 1
            elif reading.left_out:
                print(f"predict.py: {name}: {len(reading.left_out)} marks left out", file=sys.stderr)
            if drawn:
                save(seen, drawn)
    return status


def is_own(path: Path) -> bool:
    """Whether a file is a picture that --seen drew."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return OWN.items() <= picture.info.items()
    except Exception:  # Pillow's decoders raise nearly anything
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
