"""From a picture to marks: the ink on its paper, connected ink, and what of it is lines, frames or edges.

Ink is what differs from the paper around it (find_ink, strokes). Connected ink is a mark (find_marks); frames and edges
of the paper are ignored (find_candidates), and so are printed lines (find_lines).
"""

import math
from collections.abc import Iterable
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
