"""From a picture to marks: the ink on its paper, the printed lines in it, and connected ink.

Ink is what differs from the paper around it (find_ink), and what is long and thin of it is a line (find_lines).
Connected ink is a mark, joined over small gaps (find_marks). The thresholds are shares of a length or a contrast.
"""

import contextlib
import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from scipy import ndimage
from skimage.filters import apply_hysteresis_threshold
from skimage.measure import label, regionprops

from script import Failure


class Box(NamedTuple):
    """A rectangle in a picture, in pixels from its upper left corner; right and bottom lie outside."""

    left: int
    top: int
    right: int
    bottom: int


class Mark(NamedTuple):
    """Connected ink: its rows and columns, and which of the pixels there (H, W) it covers."""

    place: tuple[slice, slice]
    mask: np.ndarray

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

    @property
    def length(self) -> float:
        """The length of its strokes."""
        return self.mask.sum() / stroke_width(self.mask)

    def fits(self, usual: float) -> bool:
        """Whether it may be a digit, or some that touch, among marks of this usual height: no speck, frame or line.

        Nor specks that were joined, whose strokes are shorter than half the mark, nor a blob.
        """
        fits = 0.35 * usual <= self.height <= 2 * usual and self.width < 8 * usual
        return fits and 2 * self.length > self.size > 2 * stroke_width(self.mask)

    @property
    def middle(self) -> float:
        """Its height on the sheet."""
        return (self.box.top + self.box.bottom) / 2

    def part(self, keep: np.ndarray) -> "Mark":
        """The pixels of the mark that are to be kept (H, W)."""
        y, x = bounds(keep)
        top, left = self.box.top, self.box.left
        return Mark((slice(top + y.start, top + y.stop), slice(left + x.start, left + x.stop)), keep[y, x].copy())


# ---------------------------------------------------------------- paper and ink

MOST_PIXELS = 1_000_000  # larger pictures are shrunk to this many
FAINTEST = 0.06  # ink differs from its paper by this share of the paper's brightness at least
WEAK, STRONG = 0.3, 0.5  # shares of the strongest ink nearby, and of the usual ink: what is connected, and what starts
LINE = 0.15  # share of the usual ink in which lines are found: between strong strokes they are fainter


def flatten(picture: Image.Image, paper: str) -> np.ndarray:
    """The picture, upright and over paper of this colour where it is transparent: (H, W, 3) in [0, 255]."""
    if picture.mode in ("L", "RGB", "CMYK"):  # what cameras and scanners make, cheaply before all else
        picture = picture.reduce(max(1, int(math.sqrt(picture.width * picture.height / MOST_PIXELS))))
    with contextlib.suppress(Exception):  # Pillow raises nearly anything for damaged EXIF
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


def find_ink(sheet: np.ndarray, signs: tuple, nearby: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How much each pixel differs from its paper, as a share of its brightness, where that is a stroke, and the lines.

    From (H, W, 3) in [0, 255] to (H, W) each. signs: -1 where ink may be darker than its paper, 1 where it may be
    lighter. nearby: see without_ink(). Raises Failure where nothing stands out.
    """
    small = Image.fromarray(np.uint8(sheet))
    small.thumbnail((100, 100), Image.Resampling.BOX)
    weights, papers = [], []
    for channel in np.moveaxis(np.asarray(small, dtype=np.float32), 2, 0):
        # Dark ink or light? With the right sign the paper is smooth, and the ink has few edges.
        guesses = [(sign, sign * without_ink(sign * channel, nearby)) for sign in signs]
        sign, paper = min(guesses, key=lambda guess: roughness(guess[1]) + 0.8 * roughness(channel - guess[1]))
        weights.append(sign * np.sqrt(np.mean((channel - paper) ** 2)))
        papers.append(paper)
    weights = np.array(weights) / max(np.abs(weights).sum(), 1e-9)
    grey = sheet @ np.float32(weights)  # the mixture of the channels in which the ink is lightest
    grey /= np.mean(papers) + 30  # a black board is no less noisy than a grey one
    blur = min(grey.shape) / 200
    smooth = ndimage.gaussian_filter(grey, blur / 2)
    paper = without_ink(smooth, nearby)
    smooth -= paper
    smooth -= np.percentile(smooth, 10)  # where there is noise, its lowest was taken for the paper
    noise = 1.5 * np.median(np.abs(smooth - ndimage.gaussian_filter(smooth, blur)))  # its standard deviation
    faintest = max(FAINTEST, 5 * noise)
    if smooth.max() <= faintest:
        raise Failure("nothing on it stands out from its paper")
    # A stroke is half as strong as the strongest ink near it and the usual ink, or weaker and connected to such ink.
    strongest, usual = ndimage.maximum_filter(smooth, 1 + min(smooth.shape) // 8), 0
    for _ in range(2):
        weak, strong = (np.maximum(faintest, share * np.maximum(strongest, usual)) for share in (WEAK, STRONG))
        mask = apply_hysteresis_threshold(smooth, weak, strong)
        usual = np.average(smooth[mask], weights=smooth[mask] ** 3)  # a little ink outweighs much grain
    lines = find_lines(smooth > max(faintest, LINE * usual))
    return grey - paper, mask & ~lines, mask & lines


# ---------------------------------------------------------------- marks

BORDER = 0.6  # of its size: a mark along so much of the picture's border is a desk around the paper
DOT = 3  # stroke widths: what is shorter is part of what is next to it


def bounds(mask: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns of the smallest box around a mask (H, W)."""
    (place,) = ndimage.find_objects(mask.astype(int))
    return place


def stroke_width(mask: np.ndarray) -> float:
    """The strokes' mean width: in a stroke w pixels wide the mean distance to the paper is w / 4 + 1 / 2."""
    return 4 * (ndimage.distance_transform_edt(np.pad(mask, 1)).sum() / max(1, mask.sum()) - 0.5)


def usual_height(marks: list[Mark]) -> float:
    """The median height, weighted by height: a few digits outweigh many specks or lines."""
    heights = [mark.height for mark in marks]
    return float(np.quantile(heights, 0.5, weights=heights, method="inverted_cdf")) if marks else 0


def connected(labels: np.ndarray) -> list[Mark]:
    """A mark for each number in labels (H, W), without dust."""
    least = max(3, min(labels.shape) / 80)
    return [Mark(region.slice, region.image) for region in regionprops(labels) if max(region.image.shape) >= least]


def distance(marks: list[Mark], shape: tuple[int, int]) -> np.ndarray:
    """How far each pixel (H, W) is from these marks."""
    away = np.ones(shape, bool)
    for mark in marks:
        away[mark.place] &= ~mark.mask
    return ndimage.distance_transform_edt(away)


def find_marks(mask: np.ndarray, gap: float) -> tuple[list[Mark], list[Mark]]:
    """The marks in a mask (H, W), joined over gaps of this share of the usual height, and those along its border."""
    border = np.ones(mask.shape, bool)
    border[1:-1, 1:-1] = False
    marks, edges = [], []
    for mark in connected(label(mask)):
        (edges if (border[mark.place] & mark.mask).sum() > BORDER * mark.size else marks).append(mark)
    if not marks:  # perhaps one digit as large as the picture
        return edges, []
    away = distance(marks, mask.shape)
    width, near = stroke_width(away == 0), away <= gap / 2 * usual_height(marks)  # half a gap from either side
    dots = [mark for mark in marks if mark.size < DOT * width]
    if dots:
        near |= distance(dots, mask.shape) <= 1.5 * min(width, np.median([dot.size for dot in dots]))
    return connected(label(near) * (away == 0)), edges


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
        if long >= 0.45 * width and tall <= long / 6:
            line[region.slice] |= region.image
    return line


def find_lines(mask: np.ndarray) -> np.ndarray:
    """The pixels of lines in a mask (H, W), across and down, that are longer than the digits."""
    lines = lines_across(mask) | lines_across(mask.T).T
    marks = connected(label(mask & ~lines))
    short = [line for line in connected(label(lines)) if line.size <= 1.3 * usual_height(marks)]
    if short:
        lines &= distance(short, mask.shape) > 0
    return lines & ~ndimage.grey_opening(mask, max(12, max(mask.shape) // 40))  # a stroke's thick parts stay
