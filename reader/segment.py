"""From a picture to marks: ink on paper (find_ink), the lines in it (find_lines), and connected ink (find_marks).

Thresholds are shares of a length or of a contrast. docs/predict.md has what each rule earns.
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

MOST_PIXELS = 1_000_000  # larger pictures are shrunk to this many
NEARBY = 0.12  # of the sheet's shorter side: what is wider is paper, when paper is looked for nearby
FAINTEST = 0.06  # ink differs from its paper by at least this share of the paper's brightness
NOISE = 8  # and by this many times the usual noise
WEAK, STRONG = 0.3, 0.5  # of the usual ink, or of stronger ink nearby: ink if connected to strong, and ink by itself
LINE = 0.25  # of the usual ink: lines are looked for in all that is stronger, as they are fainter than strokes
LONG, LONGER = 0.45, 1.3  # a line is longer than this share of the sheet's side, and of the usual height
THICK = 1 / 40  # of the sheet's longer side: a line is thinner than this, or than 12 pixels if that is more
CORNERS = [0, 0, -1, -1], [0, -1, 0, -1]  # of a sheet: rows, columns
WIDEST = 8  # of the usual height: digits that touch are at most this wide


class Mark(NamedTuple):
    """Connected ink: where on the sheet it begins, and the ink in its box (H, W), 0 where there is none."""

    left: int
    top: int
    ink: np.ndarray

    @property
    def height(self) -> int:
        return self.ink.shape[0]

    @property
    def width(self) -> int:
        return self.ink.shape[1]

    @property
    def stroke_width(self) -> float:
        return stroke_width(self.ink > 0)

    @property
    def length(self) -> float:
        """The length of its strokes."""
        return (self.ink > 0).sum() / self.stroke_width

    def fits(self, usual: float) -> bool:
        """Whether it may be a digit, or some that touch, among marks of this usual height.

        Its strokes are longer than half its box, unlike those of joined specks, and its box is twice as long as they
        are wide, unlike that of a blob.
        """
        if not usual / 2 <= self.height <= 2 * usual or self.width >= WIDEST * usual:
            return False
        return 2 * self.length > max(self.ink.shape) > 2 * self.stroke_width


def mark_of(ink: np.ndarray, left: int, top: int) -> Mark:
    """A mark for the ink in a part (H, W) of the sheet that begins here, cut to this ink."""
    y, x = bounds(ink)
    return Mark(left + x.start, top + y.start, ink[y, x])


def bounds(ink: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns of the smallest box around all ink (H, W)."""
    return next(iter(ndimage.find_objects((ink > 0).astype(int))), (slice(0, 0), slice(0, 0)))


def stroke_width(mask: np.ndarray) -> float:
    """The mean width of strokes (H, W). In one w pixels wide the mean distance to the paper is about w / 4 + 1 / 2."""
    return 4 * (ndimage.distance_transform_edt(np.pad(mask, 1)).sum() / max(1, mask.sum()) - 1 / 2)


def usual_height(marks: list[Mark]) -> float:
    """The median height, weighted by height: a few digits outweigh many specks or lines."""
    heights = [mark.height for mark in marks]
    return float(np.quantile(heights, 1 / 2, weights=heights, method="inverted_cdf")) if marks else 0


def flatten(picture: Image.Image, paper: str) -> np.ndarray:
    """The picture, upright and over paper of this colour where it is transparent: (H, W, 3) in [0, 255], 8 bits.

    Raises Failure if it has values that are not finite.
    """
    if picture.mode in ("L", "RGB", "CMYK"):  # what cameras and scanners make, cheaply before all else
        picture = picture.reduce(max(1, int(math.sqrt(picture.width * picture.height / MOST_PIXELS))))
    with contextlib.suppress(Exception):  # Pillow raises nearly anything for damaged EXIF
        picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel, which Pillow would clip to 8
        values = np.asarray(picture, dtype=np.float32)
        if not np.isfinite(values).all():
            raise Failure("it holds values that are not finite")
        picture = Image.fromarray(np.uint8(255 * (values - values.min()) / (np.ptp(values) or 1)))
    layers = picture.convert("RGBA")
    shrink = min(1, math.sqrt(MOST_PIXELS / (layers.width * layers.height)))
    layers = layers.resize([max(1, round(side * shrink)) for side in layers.size], Image.Resampling.BOX)
    sheet = Image.alpha_composite(Image.new("RGBA", layers.size, paper), layers)
    return np.asarray(sheet.convert("RGB"))


def without_ink(grey: np.ndarray, nearby: bool) -> np.ndarray:
    """A sheet (H, W) without ink that is lighter than its paper. For dark ink, pass its negative.

    A morphological opening by a square half as wide as the sheet's longer side: what is narrower is removed, gradients
    and straight edges of shadows stay. nearby: the square is only wider than strokes, so that shadows, notes and the
    desk are paper, too.
    """
    side = max(3, int(NEARBY * min(grey.shape)) if nearby else max(grey.shape) // 2)
    sheet = np.pad(grey, 1, mode="edge")  # its border is continued outwards, without ink that touches it
    for border in sheet[0], sheet[-1], sheet[:, 0], sheet[:, -1]:
        border[:] = ndimage.grey_opening(border, max(3, 2 * len(border) // 3))
    half = side // 2 + 1
    sheet = ndimage.grey_opening(np.pad(sheet, half, mode="edge"), side, mode="nearest")
    return sheet[half + 1 : -half - 1, half + 1 : -half - 1]


def roughness(grey: np.ndarray) -> float:
    """The sum of all differences between neighbours: the total variation."""
    return np.abs(np.diff(grey, axis=0)).sum() + np.abs(np.diff(grey, axis=1)).sum()


def find_ink(sheet: np.ndarray, nearby: bool) -> tuple[np.ndarray, np.ndarray]:
    """The ink on a sheet (H, W, 3) in [0, 255], 0 where there is none, and where lines are looked for: (H, W) each.

    Ink is what differs from its paper, in shares of the paper's brightness. nearby: see without_ink().
    """
    small = Image.fromarray(sheet)
    small.thumbnail((100, 100), Image.Resampling.BOX)
    weights, papers = [], []
    for channel in np.moveaxis(np.asarray(small, dtype=np.float32), 2, 0):
        guesses, total = [], roughness(channel)
        for sign in -1, 1:  # dark ink or light? The right sign gives few edges, most of them in the ink
            paper = sign * without_ink(sign * channel, nearby)
            ink = np.abs(channel - paper)
            covered = min(ink.mean() / max(1, ink.max()), 0.3)  # no more, as crops are mostly ink
            # With these weights the sign is wrong on 1 of 2,600 simulated sheets, but on a third of small cards.
            cost = roughness(paper) + 0.84 * roughness(ink) + 0.3 * total * math.sqrt(covered)
            guesses.append((cost, sign * np.sqrt(np.mean(ink**2)), paper.mean()))
        _, weight, paper = min(guesses)
        weights.append(weight)
        papers.append(paper)
    # The channels mixed so that ink is lighter than its paper, in shares of the paper's brightness.
    grey = sheet @ np.float32(np.array(weights) / (np.abs(weights).sum() or 1) / max(1, np.mean(papers)))
    blur = min(grey.shape) / 400
    smooth = ndimage.gaussian_filter(grey, blur)
    paper = without_ink(smooth, nearby)
    smooth -= paper
    smooth -= np.percentile(smooth, 10)  # where there is noise, its lowest was taken for the paper
    noise = np.median(np.abs(smooth - ndimage.gaussian_filter(smooth, 2 * blur)))
    faintest = max(FAINTEST, NOISE * noise)
    # Twice, as the usual ink is known only after the first time.
    strongest, usual_ink = ndimage.maximum_filter(smooth, 1 + min(smooth.shape) // 8), 0
    for _ in range(2):
        weak, strong = (np.maximum(faintest, share * np.maximum(strongest, usual_ink)) for share in (WEAK, STRONG))
        mask = apply_hysteresis_threshold(smooth, weak, strong)
        if mask.any():  # a little ink outweighs much grain
            usual_ink = np.average(smooth[mask], weights=smooth[mask] ** 3)
    return np.maximum(grey - paper, FAINTEST) * mask, smooth > max(faintest, LINE * usual_ink)


def lines_across(mask: np.ndarray) -> np.ndarray:
    """The pixels of long thin lines in a mask (H, W) that run from left to right."""
    width, lines = mask.shape[1], np.zeros_like(mask)
    shortest = int(max(6, width / 12, 3 * stroke_width(mask)))  # piece of a line
    thick = ndimage.maximum_filter(mask, (3, 1))  # so that sloping lines have long pieces, too
    pieces = ndimage.grey_opening(thick, (1, shortest)) & mask
    for region in regionprops(label(ndimage.maximum_filter(pieces, 3)) * pieces):  # pieces that nearly touch are one
        height, length = region.image.shape
        if length >= LONG * width and height <= length / 6:
            lines[region.slice] |= region.image
    return lines


def find_lines(mask: np.ndarray) -> np.ndarray:
    """The pixels of lines in a mask (H, W), across and down, that are longer than the digits."""
    lines = lines_across(mask) | lines_across(mask.T).T
    usual = usual_height(connected(mask & ~lines))
    longer = [line for line in connected(lines) if max(line.ink.shape) > LONGER * usual]
    return pixels(longer, mask.shape) & ~ndimage.grey_opening(mask, max(12, int(THICK * max(mask.shape))))


def connected(ink: np.ndarray, near: np.ndarray | None = None) -> list[Mark]:
    """The ink (H, W) as marks, without dust: what is connected, or lies in one region of near (H, W)."""
    regions = regionprops(label(ink > 0 if near is None else near) * (ink > 0))
    marks = [Mark(region.bbox[1], region.bbox[0], ink[region.slice] * region.image) for region in regions]
    return [mark for mark in marks if max(mark.ink.shape) > 2]


def pixels(marks: list[Mark], shape: tuple[int, int]) -> np.ndarray:
    """Which pixels of a sheet (H, W) these marks cover."""
    mask = np.zeros(shape, bool)
    for mark in marks:
        mask[mark.top : mark.top + mark.height, mark.left : mark.left + mark.width] |= mark.ink > 0
    return mask


def find_marks(ink: np.ndarray, gap: float) -> tuple[list[Mark], list[Mark]]:
    """The marks in ink (H, W), joined over gaps of this share of the usual height, and the desk in the corners."""
    numbers = label(ink > 0)
    corners = numbers[CORNERS]
    desk = np.isin(numbers, corners[corners > 0])
    marks = connected(ink * ~desk)
    if not marks:  # perhaps one digit as large as the picture
        return connected(ink), []
    mask = pixels(marks, ink.shape)
    near = ndimage.distance_transform_edt(~mask) <= gap / 2 * usual_height(marks)  # half a gap from either side
    return connected(ink * mask, near), connected(ink * desk)
