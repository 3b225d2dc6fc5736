"""Read handwritten digits from pictures and photos with a trained network.

    python predict.py picture.jpg folder ...       one line a picture: its digits, left to right, line by line
    python predict.py --json - <picture.jpg        the same with boxes and probabilities, as JSON
    python predict.py --seen seen.png photo.jpg    and draw what was found in it, and what the network saw

Ink is what differs from the paper around it (find_ink, strokes). Connected ink is a mark (find_marks); frames and edges
of the paper are ignored (find_candidates), and so are printed lines (find_lines) and specks (read_mask). A mark is made
into a 28x28 field as MNIST's own were (as_mnist), and marks of touching digits are cut (split). Where the same ink can
be read in several ways, the network's probabilities decide (read_ink, read_colours). The thresholds are fitted to other
people's handwriting; docs/predict.md says which.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
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
    """A rectangle in a picture, in pixels from its upper left corner; right and bottom lie outside."""

    left: int
    top: int
    right: int
    bottom: int


class Mark(NamedTuple):
    """Connected ink: its rows and columns, which of the pixels there (H, W) it covers, and how strong its ink is."""

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


def without_ink(grey: np.ndarray, nearby: bool) -> np.ndarray:
    """What is left of a sheet (H, W) when light ink is removed: a morphological opening.

    It removes what is narrower than a square that is wider than any stroke, and keeps gradients and straight edges of
    shadows. nearby: the square is smaller, so that shadows, notes and the desk are paper, too. Around the sheet its
    border is continued, without the ink that touches it.
    """
    short, long = sorted(grey.shape)
    side = max(3, int(0.12 * short if nearby else np.clip(0.3 * long, 0.4 * short, 2 * short)))
    sheet = np.pad(grey, 1, mode="edge")
    for border in sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]:
        border[:] = ndimage.grey_opening(border, max(3, 2 * len(border) // 3))
    sheet = ndimage.grey_opening(np.pad(sheet, side, mode="edge"), side)
    return sheet[side + 1 : -side - 1, side + 1 : -side - 1]


def roughness(grey: np.ndarray) -> float:
    """The sum of all differences between neighbours: the total variation."""
    return np.abs(np.diff(grey, axis=0)).sum() + np.abs(np.diff(grey, axis=1)).sum()


def find_ink(colours: np.ndarray, signs: tuple[int, ...], nearby: bool) -> tuple[np.ndarray, np.ndarray, float]:
    """How much each pixel differs from its paper, or from the paper nearby, as a share of the light there.

    From (H, W, 3) in [0, 255] to ink (H, W), the same smoothed, and the value below which the latter is noise. signs:
    -1 where ink may be darker than its paper, 1 where it may be lighter. Raises Failure where nothing stands out.
    """
    small = Image.fromarray(np.uint8(colours))
    small.thumbnail((100, 100), Image.Resampling.BOX)
    weights, papers = [], []
    for channel in np.moveaxis(np.asarray(small, dtype=np.float32), 2, 0):
        # Dark ink or light? With the right sign the paper is smooth, and the ink has few edges.
        guesses = [(sign, sign * without_ink(sign * channel, nearby)) for sign in signs]
        sign, paper = min(guesses, key=lambda guess: roughness(guess[1]) + 0.8 * roughness(channel - guess[1]))
        weights.append(sign * np.sqrt(np.mean((channel - paper) ** 2)))
        papers.append(paper)
    weights = np.array(weights) / max(np.abs(weights).sum(), 1e-9)
    grey = colours @ np.float32(weights)  # the mixture of the channels in which the ink is lightest
    height, width = grey.shape
    light = Image.fromarray(np.mean(papers, axis=0)).resize((width, height), Image.Resampling.BILINEAR)
    light = np.asarray(light) + 30  # a black board is no less noisy than a grey one
    blur = min(grey.shape) / 200
    smooth = ndimage.gaussian_filter(grey, blur / 2)
    paper = without_ink(smooth, nearby)
    smooth = (smooth - paper) / light
    smooth -= np.percentile(smooth, 10)  # of paper: where there is noise, its lowest was taken for the paper
    noise = 1.5 * np.median(np.abs(smooth - ndimage.gaussian_filter(smooth, blur)))  # its standard deviation
    faintest = max(FAINTEST, 5 * noise)
    if smooth.max() <= faintest:
        raise Failure("nothing on it stands out from its paper")
    return (grey - paper) / light, smooth, faintest


def strokes(ink: np.ndarray, faintest: float) -> np.ndarray:
    """Where ink (H, W) is a stroke: half as strong as the strongest near it, or weaker and connected to such ink."""
    strongest = ndimage.maximum_filter(ink, 1 + min(ink.shape) // 8)
    weak, strong = (np.maximum(faintest, share * strongest) for share in (0.3, 0.5))
    return apply_hysteresis_threshold(ink, weak, strong)


# ---------------------------------------------------------------- marks

MOST_MARKS = 3000  # more are noise or text


def find_marks(labels: np.ndarray, ink: np.ndarray) -> list[Mark]:
    """A mark for each number in labels (H, W), with its contrast in this ink or smoothed ink (H, W).

    Dust is omitted, and not counted as left out. Raises Failure where the marks are too many.
    """
    marks = []
    for region in regionprops(labels):
        if max(region.image.shape) >= max(3, min(labels.shape) / 80):
            contrast = max(1e-6, float(np.percentile(ink[region.slice][region.image], 90)))  # noise may be below 0
            marks.append(Mark(region.slice, region.image, contrast))
    if len(marks) > MOST_MARKS:
        raise Failure(f"{len(marks)} marks are on it, more than on a sheet of digits")
    return marks


def bounds(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns of the smallest box around a mask (H, W)."""
    (place,) = ndimage.find_objects(mask.astype(int))
    return place


def canvas(marks: list[Mark], shape: tuple[int, int]) -> np.ndarray:
    """The mask (H, W) of these marks."""
    mask = np.zeros(shape, bool)
    for mark in marks:
        mask[mark.place] |= mark.mask
    return mask


def partition(marks: list[Mark], chosen: Iterable[bool]) -> tuple[list[Mark], list[Mark]]:
    """The marks that are chosen, and the others."""
    pairs = list(zip(marks, chosen, strict=True))
    return [mark for mark, yes in pairs if yes], [mark for mark, yes in pairs if not yes]


def weighted_median(values: list[float], weights: list[float]) -> float:
    """The value that splits the weights into halves."""
    return float(np.quantile(values, 0.5, weights=weights, method="inverted_cdf"))


def usual_height(marks: list[Mark]) -> float:
    """The median height, weighted by height: a few digits outweigh many specks or lines."""
    heights = [mark.height for mark in marks]
    return weighted_median(heights, heights)


def usual_contrast(marks: list[Mark]) -> float:
    """The median contrast, weighted by ink."""
    return weighted_median([mark.contrast for mark in marks], [mark.contrast * mark.mask.sum() for mark in marks])


def are_edges(marks: list[Mark], shape: tuple[int, int]) -> np.ndarray:
    """Which marks (N,) run along the picture's border, as a desk around the paper does. If all do, none."""
    border = np.ones(shape, bool)
    border[1:-1, 1:-1] = False
    edges = np.array([(border[mark.place] & mark.mask).sum() > 0.6 * mark.size for mark in marks], bool)
    return edges & ~edges.all()


def are_frames(marks: list[Mark]) -> np.ndarray:
    """Which marks (N,) have others in their box that add up to 0.3 of their size, or are grids, with over 20 holes."""
    left, top, right, bottom = np.array([mark.box for mark in marks]).reshape(-1, 4).T
    sizes, contrasts = np.array([(mark.size, mark.contrast) for mark in marks]).reshape(-1, 2).T
    # inside[i, j]: mark j lies in the box of mark i
    inside = (left[:, None] <= left) & (top[:, None] <= top) & (right[:, None] >= right) & (bottom[:, None] >= bottom)
    inside &= (contrasts > 0.3 * contrasts[:, None]) & ~np.eye(len(marks), dtype=bool)
    holes = [np.bincount(label(~mark.mask).flat)[1:] > mark.mask.size / 1000 for mark in marks]  # pale ink has smaller
    return (inside @ sizes > 0.3 * sizes) | (np.array([large.sum() for large in holes]) > 20)


def stroke_width(mask: np.ndarray) -> float:
    """The strokes' mean width: in a stroke w pixels wide the mean distance to the paper is w / 4 + 1 / 2."""
    return 4 * (ndimage.distance_transform_edt(np.pad(mask, 1)).sum() / max(1, mask.sum()) - 0.5)


def join_broken(marks: list[Mark], ink: np.ndarray, gap: float) -> list[Mark]:
    """The marks, with those joined that are less than a gap apart, a share of the usual height.

    A dot, a mark shorter than three stroke widths, is no digit but part of what is next to it.
    """
    mask = canvas(marks, ink.shape)
    widths, areas = np.array([(stroke_width(mark.mask), mark.mask.sum()) for mark in marks]).T
    width = weighted_median(widths, areas / widths)  # by length: a stamp is no long stroke
    dots = [mark for mark in marks if mark.size < 3 * width]
    near = ndimage.distance_transform_edt(~mask) <= gap / 2 * usual_height(marks)  # half a gap from either side
    if dots:
        far = 1.5 * min(width, np.median([mark.size for mark in dots]))
        near |= ndimage.distance_transform_edt(~canvas(dots, ink.shape)) <= far
    return find_marks(label(near) * mask, ink)


def find_candidates(mask: np.ndarray, ink: np.ndarray, gap: float) -> tuple[list[Mark], list[Mark], list[Mark]]:
    """The marks in a mask (H, W) that may be digits, joined over gaps (see join_broken), the frames, and the edges."""
    marks = find_marks(label(mask), ink)
    edges, marks = partition(marks, are_edges(marks, mask.shape))
    if marks and gap:
        marks = join_broken(marks, ink, gap)
    frames, marks = partition(marks, are_frames(marks))
    return marks, frames, edges


# ---------------------------------------------------------------- lines


def lines_across(mask: np.ndarray) -> np.ndarray:
    """The pixels of long thin lines in a mask (H, W) that run from left to right."""
    width, window = mask.shape[1], 2 * max(1, min(mask.shape) // 300) + 1
    bar = int(max(6, width / 12, min(4 * stroke_width(mask), width / 4)))  # the shortest piece of a line
    thick = ndimage.maximum_filter(mask, (window, 1))  # in which sloping lines have long runs, too
    runs = ndimage.grey_opening(thick, (1, bar)) & mask
    line = np.zeros_like(mask)
    for region in regionprops(label(ndimage.maximum_filter(runs, window)) * runs):
        tall, long = region.image.shape
        if long >= 0.45 * width and region.area <= long**2 / 8 and tall <= long / 6:
            line[region.slice] |= region.image
    return line


def find_lines(mask: np.ndarray, ink: np.ndarray) -> np.ndarray:
    """The pixels of lines in a mask (H, W), across and down, that are longer than the digits."""
    lines = lines_across(mask) | lines_across(mask.T).T
    marks, _, _ = find_candidates(mask & ~lines, ink, gap=0)
    least = 1.3 * usual_height(marks) if marks else 0
    for region in regionprops(label(lines)):
        if max(region.image.shape) <= least:
            lines[region.slice] &= ~region.image
    return lines


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
def read(net: Net, fields: list[Tensor]) -> Tensor:
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
    return [Digit(*parts) for parts in zip(marks, fields, read(net, fields), strict=True)]


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


def look(picture: Image.Image, net: Net) -> Reading:
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
    """The network of assets/model.pt."""
    return load_net(HERE / "assets" / "model.pt")


def digits(picture: Image.Image, net: Net | None = None) -> list[tuple[Box, Tensor]]:
    """Find the digits in a picture: (box, field) of each, left to right and line by line.

    The box is in pixels of the picture as it is shown, upright. The field is (1, 28, 28) in [0, 1] with ink
    towards 1; read() gives its probabilities. Where ink may be one digit or two, the network decides, by default that
    of assets/model.pt. Raises Failure where there is no digit. look() returns more.
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
    import pictures  # here, as matplotlib takes as long to import as a picture to be read

    frames = [(reading.box(mark), "tab:blue", "") for mark in reading.left_out]
    frames += [(reading.box(digit.mark), "tab:red", str(digit.value)) for digit in reading.digits]
    fields = [(digit.field[0], f"{digit.value} {100 * digit.probability:.0f}%") for digit in reading.digits]
    size = ImageOps.exif_transpose(picture).size
    return pictures.png(pictures.seen(np.uint8(flatten(picture, "white")), size, frames, fields), OWN)


def is_own(path: Path) -> bool:
    """Whether a file is a picture that --seen drew."""
    try:
        with Image.open(path, formats=["PNG"]) as picture:
            return OWN.items() <= picture.info.items()
    except Exception:  # Pillow's decoders raise nearly anything
        return False


def picture_files(paths: list[str]) -> Iterator[str]:
    """These paths, with the pictures in a folder instead of the folder."""
    endings = [ending for ending, name in Image.registered_extensions().items() if name in FORMATS]
    endings += [".heic", ".heif"]  # phones' pictures, to be refused with a reason
    for path in paths:
        inside = sorted(Path(path).iterdir()) if os.path.isdir(path) else []
        yield from [str(file) for file in inside if file.suffix.lower() in endings] or [path]


def pages(path: str) -> Iterator[tuple[str, Image.Image]]:
    """The pages of a picture file with their names. Raises Failure, or what Pillow raises for a damaged one."""
    if os.path.isdir(path):
        raise Failure("it is a folder without pictures")
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


def readings(files: Iterable[str], net: Net) -> Iterator[tuple[str, Reading, Image.Image | None]]:
    """The name of each picture and what is read in it, and the picture itself where the file can be opened."""
    for file in files:
        try:
            for name, picture in pages(file):
                yield name, look(picture, net), picture
        except Exception as error:  # Pillow's decoders raise nearly anything for a broken file
            problem = getattr(error, "strerror", None) or str(error) or type(error).__name__
            yield file, Reading(problem=problem), None


def predict(paths: list[str], net: Net, as_json: bool, seen: Path | None) -> int:
    """Print what each picture's digits are, and draw the picture to seen. Returns the exit status: 1 if any failed."""
    warnings.simplefilter("ignore")  # Pillow's, of damage that does not hinder
    status = 0
    for name, reading, picture in readings(picture_files(paths), net):
        if as_json:
            print(object_of(name, reading))
        elif reading.digits:
            print(f"{name}: {line_of(reading)}")
        if reading.problem:
            print(f"predict.py: error: cannot read {name}: {reading.problem}", file=sys.stderr)
            status = 1
        elif reading.left_out:
            print(f"predict.py: {name}: marks left out: {len(reading.left_out)}", file=sys.stderr)
        if seen and picture:
            save(seen, draw(picture, reading))
    return status


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
