"""Read handwritten digits from pictures and photos with a trained network.

    python predict.py picture.jpg ...              one line a picture: its digits, left to right, line by line
    python predict.py --seen seen.png photo.jpg    and draw what was found in it, and what the network saw

What differs from its paper is ink; ink that hangs together is a stroke, strokes that belong together are a
digit, and each digit is made into a 28x28 field as MNIST's own were.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback for a Ctrl-C in the imports, which take seconds

import contextlib
import itertools
import math
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from scipy import ndimage
from torch import Tensor

from pictures import png
from script import HERE, MEAN, STD, Failure, Net, Parser, load_net, run_program, save


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
    def middle(self) -> float:
        return (self.top + self.bottom) / 2


Digit = tuple[Box, Tensor]  # where it is, and the field (1, 28, 28) that the network reads

# ---------------------------------------------------------------- paper and ink

MOST_PIXELS = 1_000_000  # larger pictures are shrunk to this many
FAINTEST = 0.06  # ink differs from its paper by this share of the paper's brightness at least


def flatten(picture: Image.Image, paper: str) -> np.ndarray:
    """The picture over paper of this colour where it is transparent: (H, W, 3) in [0, 255]."""
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


def ink(colours: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How much darker, lighter or otherwise coloured each pixel is than its paper, as a share of the light there.

    From (H, W, 3) in [0, 255] to ink (H, W) and a mask of the same shape: where it is a stroke. Raises Failure
    where nothing is.
    """
    height, width = colours.shape[:2]
    size = [max(1, round(side * min(1, 100 / max(width, height)))) for side in (width, height)]
    small = np.asarray(Image.fromarray(np.uint8(colours)).resize(size, Image.Resampling.BOX), dtype=np.float32)
    papers, weights = [], []
    for channel in np.moveaxis(small, 2, 0):
        # Dark ink or light? Where it is the right one, the paper is smooth and the ink has few edges.
        ways = [(sign, sign * without_ink(sign * channel)) for sign in (-1, 1)]
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
    strong = strength > max(FAINTEST, 5 * noise)
    if not strong.any():
        raise Failure("nothing on it stands out from its paper")
    return (grey - paper) / light, strong & (strength > 0.8 * otsu(strength[strong]))


def otsu(values: np.ndarray) -> float:
    """The threshold between two classes of values with the largest variance between them (Otsu, 1979)."""
    counts, edges = np.histogram(values, 100, (0, values.max()))
    sums = (counts * (edges[1:] + edges[:-1]) / 2).cumsum()
    below = np.maximum(counts.cumsum(), 1)
    above = np.maximum(len(values) - below, 1)
    return edges[1 + np.argmax(below * above * (sums / below - (sums[-1] - sums) / above) ** 2)]


# ---------------------------------------------------------------- strokes and digits


def boxes_of(labels: np.ndarray) -> list[Box]:
    """The box of each label, from 1 on."""
    return [Box(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)]


def is_line(box: Box, width: int, height: int) -> bool:
    """Whether a stroke runs straight from border to border of its picture, as what is printed on paper does."""
    return box.width == width > 20 * box.height or box.height == height > 20 * box.width


def is_one_digit(one: Box, other: Box) -> bool:
    """Whether two strokes are one digit's: one above the other, near by, and a part of a digit by its height."""
    short, tall = sorted((one.height, other.height))
    shared = min(one.right, other.right) - max(one.left, other.left)
    gap = max(one.top, other.top) - min(one.bottom, other.bottom)
    return shared > 0.5 * min(one.width, other.width) and gap < 0.4 * tall and short < 0.7 * tall


def label_digits(mask: np.ndarray) -> np.ndarray:
    """Number what may be digits in a mask (H, W) from 1 on: their pixels hold the number, all others 0."""
    neighbours, (height, width) = np.ones((3, 3)), mask.shape
    labels, _ = ndimage.label(mask, neighbours)
    boxes = boxes_of(labels)
    lines = np.array([is_line(box, width, height) for box in boxes])
    if not lines.all():  # a line that is alone may be a 1
        mask = mask & ~np.append(False, lines)[labels]
        boxes = [box for box, line in zip(boxes, lines, strict=True) if not line]

    reach = 0.04 * max(max(box.width, box.height) for box in boxes)  # a stroke that is broken by less is one
    labels = ndimage.label(ndimage.distance_transform_edt(~mask) <= reach, neighbours)[0] * mask
    boxes = boxes_of(labels)
    sizes = np.array([max(box.width, box.height) for box in boxes])
    number = np.append(0, np.arange(1, len(boxes) + 1) * (sizes >= 0.15 * sizes.max()))  # specks are no strokes
    strokes = [label for label in number if label]
    if len(strokes) > 200:
        raise Failure(f"{len(strokes)} marks are on it, which are no digits")
    for one, other in itertools.combinations(strokes, 2):
        if is_one_digit(boxes[one - 1], boxes[other - 1]):
            number[number == number[other]] = number[one]
    return np.unique(number, return_inverse=True)[1][labels]


def is_sharp(strength: np.ndarray, mask: np.ndarray) -> bool:
    """Whether the ink (H, W) of these strokes ends at their edges, as a pen's does and a dark corner's does not."""
    near = 2 * max(1, round(0.03 * max(mask.shape))) + 1
    contrast = ndimage.maximum_filter(strength, near) - ndimage.minimum_filter(strength, near)
    edge = mask & ~ndimage.binary_erosion(mask, border_value=1)
    return np.median(contrast[edge]) > 0.3 * np.percentile(strength[mask], 90)


def as_mnist(strength: np.ndarray, mask: np.ndarray) -> Tensor:
    """A digit's ink (H, W) and its strokes as MNIST made its own: (1, 28, 28) in [0, 1].

    Scaled to fit 20x20 pixels, grey by antialiasing, and laid into 28x28 with its centre of mass in the middle,
    as LeCun, Cortes and Burges describe. Strokes that would shrink to less than MNIST's are drawn wider first.
    """
    (box,) = boxes_of(mask.astype(int))
    unit = max(box.width, box.height) / 20  # a pixel of the field
    # The mean distance from a stroke's pixels to its edge is a quarter of its width, and half a pixel.
    width = 4 * (ndimage.distance_transform_edt(np.pad(mask, 1)).sum() / mask.sum() - 0.5)
    wider = (2.4 * unit - width) / 2 if width < 2 * unit else 0
    if wider >= 0.5:
        digit = np.clip(wider + 0.5 - ndimage.distance_transform_edt(~np.pad(mask, math.ceil(wider))), 0, 1)
    else:
        nearby = ndimage.binary_dilation(mask, iterations=max(1, round(unit / 10)))  # with its grey edge
        digit = np.clip(strength / np.percentile(strength[mask], 90), 0, 1) * nearby
    (box,) = boxes_of((digit > 0.25).astype(int))
    digit = digit[box.top : box.bottom, box.left : box.right]
    width, height = (max(1, round(20 * side / max(digit.shape))) for side in (box.width, box.height))
    digit = np.asarray(Image.fromarray(np.float32(digit)).resize((width, height), Image.Resampling.BOX))
    y, x = ndimage.center_of_mass(digit)
    top, left = min(max(round(14 - y), 0), 28 - height), min(max(round(14 - x), 0), 28 - width)
    field = torch.zeros(1, 28, 28)
    field[0, top : top + height, left : left + width] = torch.from_numpy(digit / digit.max())
    return field


def digits(picture: Image.Image) -> list[Digit]:
    """Find the digits in a picture: (box, field) of each, left to right and line by line.

    The box is in pixels of the picture as it is shown, upright. The field, (1, 28, 28) in [0, 1] with ink
    towards 1, is what the network reads, less MEAN and over STD. Raises Failure where there is no digit.
    """
    picture = ImageOps.exif_transpose(picture)
    try:
        strength, mask = ink(flatten(picture, "white"))
    except Failure:  # white ink on transparency, perhaps
        strength, mask = ink(flatten(picture, "black"))
    labels, candidates = label_digits(mask), []
    for number, box in enumerate(boxes_of(labels), 1):
        more = 1 + max(box.width, box.height) // 20
        part = np.s_[max(box.top - more, 0) : box.bottom + more, max(box.left - more, 0) : box.right + more]
        strokes = labels[part] == number
        if box.width <= 2 * box.height and is_sharp(strength[part], strokes):
            candidates.append((box, strength[part], strokes))
    tallest = max((box.height for box, *_ in candidates), default=0)
    if tallest < max(5, min(mask.shape) / 25):
        raise Failure("nothing on it has the size and shape of a digit")
    found, x, y = [], picture.width / mask.shape[1], picture.height / mask.shape[0]
    for box, *rest in candidates:
        if box.height >= 0.35 * tallest:
            box = Box(int(box.left * x), int(box.top * y), math.ceil(box.right * x), math.ceil(box.bottom * y))
            found.append((box, as_mnist(*rest)))
    return [digit for line in lines(found) for digit in line]


def lines(found: list[Digit]) -> list[list[Digit]]:
    """Part digits into lines, top down, and order each from left to right."""
    rows: list[list[Digit]] = []
    for digit in sorted(found, key=lambda digit: digit[0].middle):
        above = rows[-1][-1][0] if rows else None
        if above and (digit[0].middle < above.bottom or above.middle > digit[0].top):
            rows[-1].append(digit)
        else:
            rows.append([digit])
    return [sorted(row, key=lambda digit: digit[0].left) for row in rows]


# ---------------------------------------------------------------- reading


@torch.no_grad()
def read(net: Net, fields: list[Tensor]) -> Tensor:
    """Each field's probabilities, (N, 10)."""
    return net((torch.stack(fields) - MEAN) / STD).exp()


def draw(picture: Image.Image, found: list[Digit], probabilities: Tensor) -> bytes:
    """The picture with a frame around each digit and, beside it, what the network saw and read, as a PNG."""
    rows = math.ceil(len(found) / 5)
    figure = Figure(figsize=(11, max(4, 1.3 * rows)), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(7, 6))
    axes = left.subplots()
    shown = Image.fromarray(np.uint8(flatten(picture, "white")))
    axes.imshow(shown, extent=(0, picture.width, picture.height, 0))
    axes.axis("off")
    panels = right.subplots(max(rows, 2), 5, squeeze=False).flat
    for panel in panels:
        panel.axis("off")
    for number, ((box, field), row) in enumerate(zip(found, probabilities, strict=True)):
        x, y, x2, y2 = box
        axes.plot((x, x2, x2, x, x), (y, y, y2, y2, y), color="tab:red", linewidth=1)
        title = f"{row.argmax()} ({100 * row.max():.1f}%)"
        axes.text(x, y, str(row.argmax().item()), color="tab:red", fontsize=9, ha="right", va="bottom")
        panels[number].imshow(field[0].numpy(), cmap="gray", vmin=0, vmax=1)
        panels[number].set_title(title, fontsize=9)
    return png(figure)


def predict(pictures: list[Path], net: Net, seen: Path | None = None) -> bool:
    """Print what each picture's digits are, and draw the picture to seen; whether all of them could be read."""
    unread = 0
    for path in pictures:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of damage that does not hinder
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                with Image.open(path) as file:
                    picture = ImageOps.exif_transpose(file)
            found = digits(picture)
            probabilities = read(net, [field for _, field in found])
            content = draw(picture, found, probabilities) if seen else b""
        except Exception as error:  # Pillow's decoders raise nearly anything for a broken file
            problem = {
                Image.UnidentifiedImageError: "it is not a picture",
                Image.DecompressionBombWarning: "it is too large",
                Image.DecompressionBombError: "it is too large",
            }.get(type(error), getattr(error, "strerror", None) or str(error) or type(error).__name__)
            print(f"predict.py: error: cannot read {path}: {problem}", file=sys.stderr)
            unread += 1
            continue
        if len(found) == 1:
            (p, q), (first, second) = (part[0].tolist() for part in probabilities.topk(2))
            print(f"{path}: {first} ({100 * p:.1f}%), then {second} ({100 * q:.1f}%)")
        else:
            each = iter(probabilities.argmax(dim=1).tolist())
            read_lines = [" ".join(str(next(each)) for _ in line) for line in lines(found)]
            print(f"{path}: {' / '.join(read_lines)}")
        if seen:
            save(seen, content)
    return not unread


# ---------------------------------------------------------------- command line


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status: 0 success, 1 failure, 130 Ctrl-C."""
    parser = Parser("predict.py", description="Read handwritten digits from pictures and photos.")
    parser.add_argument("pictures", nargs="+", type=Path, metavar="PICTURE", help="picture files of any size and mode")
    default = HERE / "assets" / "model.pt"
    parser.add_argument("--weights", type=Path, default=default, metavar="FILE", help="default: assets/model.pt")
    text = "draw the picture, what was found in it and what the network saw, as a PNG; for one picture"
    parser.add_argument("--seen", type=Path, metavar="FILE", help=text)
    args = parser.parse_args(argv)
    if args.seen and len(args.pictures) != 1:
        parser.error("--seen goes with one picture")
    with contextlib.suppress(OSError):  # what is not there, or cannot be looked at, is told when it is used
        inputs = args.weights, args.pictures[0]
        if args.seen and args.seen.exists() and (not args.seen.is_file() or any(map(args.seen.samefile, inputs))):
            parser.error(f"--seen {args.seen}: it is read itself, or not a file that could be replaced")
    try:
        return 0 if predict(args.pictures, load_net(args.weights), args.seen) else 1
    except (Failure, OSError) as failure:  # an OSError where nobody reads what is printed
        print(f"predict.py: error: {failure}", file=sys.stderr)
    except KeyboardInterrupt:
        print("predict.py: interrupted", file=sys.stderr)
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(run_program(main))
