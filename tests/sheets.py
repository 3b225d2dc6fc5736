"""Simulated photos of handwritten digits, and how many of the digits predict.py reads right on each kind.

python -m tests.sheets                   print the table of docs/predict.md; MNIST's test digits, 100 a kind
python -m tests.sheets --strokes PATH    the same, and with digits drawn from a file of pen strokes
python -m tests.sheets sheet.jpg         make the README's sheet

The file of strokes is a JSON list of {"digit": 7, "strokes": [[[x, y], ...], ...]}, in any unit, y downwards.
"""

import argparse
import io
import json
from collections.abc import Iterable, Iterator
from math import ceil, cos, exp, log, pi, sin
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage.morphology import skeletonize

from reader import committed_net, read_picture
from script import HERE, Net, load_mnist

KINDS = """clean, lamp, vignette, shadow, dust, ruled, squared, noise, blur, JPEG, thin pen, thick pen, pencil, colours,
chalk, transparency, cropped, border, small, photo""".replace("\n", " ").split(", ")
PAGES = """ten digits, desk, phone shadow, on lines, boxes, grid of 81, faint pencil, sizes, slanting,
touching""".replace("\n", " ").split(", ")
FORMS = ["field", "tight boxes", "comb"]  # digits side by side that touch the printed lines


def drawn(digit: np.ndarray | list, height: float, pen: float | None) -> np.ndarray:
    """A digit of this height: coverage in [0, 1]. An MNIST image (28, 28) keeps its strokes, or has a pen's.

    Strokes are drawn by a round pen, 0.09 of the height wide if none is given.
    """
    if isinstance(digit, list):
        return written(digit, height, pen or 0.09 * height)
    smooth = ndimage.gaussian_filter(ndimage.zoom(np.pad(digit, 2) / 255, 6, order=1), 2)
    mask = smooth > 0.45
    scale = height / np.ptp(np.nonzero(mask.any(axis=1)))
    away = ndimage.distance_transform_edt(~(skeletonize(mask) if pen else mask))
    away = away if pen else away - ndimage.distance_transform_edt(mask) + 0.5
    return trimmed(np.clip(0.5 + (pen or 0) / 2 - scale * ndimage.zoom(away, scale, order=1, mode="nearest"), 0, 1))


def pen_of(digit: np.ndarray | list, rng: np.random.Generator) -> float:
    """A pen's width for strokes, as a share of a digit's height, or 0 for an MNIST image, which has its own."""
    return rng.uniform(0.05, 0.13) if isinstance(digit, list) else 0


def trimmed(cover: np.ndarray) -> np.ndarray:
    """The part of a coverage (H, W) that has ink."""
    ys, xs = np.nonzero(cover > 0.3)
    return np.float32(cover[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])


def written(strokes: list, height: float, pen: float) -> np.ndarray:
    """Strokes drawn by a round pen as a digit of this height: coverage in [0, 1]."""
    fine, points = 4, np.concatenate(strokes)  # fine: pixels that become one
    scale = fine * max(1, height - pen) / max(np.ptp(points[:, 1]), 0.5 * np.ptp(points[:, 0]))
    least, radius = points.min(axis=0), fine * pen / 2
    size = np.ceil((scale * np.ptp(points, axis=0) + 2 * radius) / fine).astype(int) + 1
    picture = Image.new("L", (size * fine).tolist())
    draw = ImageDraw.Draw(picture)
    for stroke in strokes:
        places = [tuple(scale * (np.array(point) - least) + radius) for point in stroke]
        draw.line(places, fill=255, width=round(2 * radius))
        for x, y in places:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
    return trimmed(np.asarray(picture.reduce(fine)) / 255)


def sheet(kind: str, digits: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A picture of this kind with the only digit of a list (1,), see drawn(), somewhere on it."""
    uniform, height, width = rng.uniform, int(rng.uniform(320, 480)), int(rng.uniform(400, 640))
    size = height / 8 if kind == "small" else height * exp(uniform(log(1 / 8), log(0.75)))
    pens = {"thin pen": max(height, width) / 200 * uniform(1, 1.6), "thick pen": size * uniform(0.16, 0.24)}
    ink = drawn(digits[0], size, pens.get(kind, pen_of(digits[0], rng) * size))
    height, width = ink.shape if kind == "cropped" else np.maximum((height, width), ink.shape).tolist()
    cover, margin = np.zeros((height, width), np.float32), 0 if kind == "border" else 0.02
    room = np.array(cover.shape) - ink.shape
    y, x = (room * uniform(margin, 1 - margin, 2)).astype(int)
    if kind == "border":
        y, x = ((0, x), (room[0], x), (y, 0), (y, room[1]))[rng.integers(4)]
    cover[y : y + ink.shape[0], x : x + ink.shape[1]] = ink
    down, across = np.mgrid[:height, :width].astype(np.float32)
    paper, pen = np.full(3, uniform(215, 250)), np.full(3, uniform(20, 80))
    pen = paper * uniform(0.55, 0.75) if kind == "pencil" else pen
    if kind == "chalk":
        paper, pen = np.full(3, uniform(25, 70)), np.full(3, uniform(170, 240))
    while kind == "colours" and (pen[0] == pen[1] or np.linalg.norm(paper - pen) < 110):
        paper, pen = uniform(20, 240, 3), uniform(20, 240, 3)
    if kind in ("pencil", "chalk"):
        grain = ndimage.gaussian_filter(rng.standard_normal(cover.shape), 0.9)
        cover *= np.clip(0.85 + 0.2 * grain / grain.std(), 0.3, 1)
    picture = np.ones((height, width, 1), np.float32) * np.float32(paper)
    if kind in ("ruled", "squared"):
        step, line = height * uniform(0.05, 0.1), max(1, height * 0.004)
        axes = (down, across) if kind == "squared" else (down,)
        away = np.min([np.abs(axis % step - step / 2) for axis in axes], axis=0)
        picture -= picture * np.clip(line / 2 + 0.5 - away, 0, 1)[..., None] * uniform(0.15, 0.4) * (1, 0.8, 0.6)
    for _ in range(rng.integers(4, 13) if kind == "dust" else 0):
        y, x, radius = uniform(0, height), uniform(0, width), height * uniform(0.002, 0.009)
        speck = np.clip(radius + 0.5 - np.hypot(down - y, (across - x) * uniform(0.6, 1)), 0, 1)[..., None]
        picture += speck * (paper * uniform(0.1, 0.7) - picture)
    picture += cover[..., None] * (pen - picture)
    angle = uniform(0, 2 * pi)
    x, y = across / width - 0.5, down / height - 0.5
    if kind in ("lamp", "photo"):
        strength = uniform(0.5, 0.75) if kind == "lamp" else 0.4
        picture *= 1 - strength * (0.5 + (x * cos(angle) + y * sin(angle)) / 1.2)[..., None]
    if kind == "vignette":
        picture *= 1 - 2 * uniform(0.4, 0.7) * (x**2 + y**2)[..., None]
    if kind in ("shadow", "photo"):
        angle = uniform(0, 2 * pi)
        beyond = (x - uniform(-0.2, 0.2)) * width * cos(angle) + (y - uniform(-0.2, 0.2)) * height * sin(angle)
        picture *= 1 - uniform(0.3, 0.55) * np.clip(0.5 + beyond / uniform(1, 12), 0, 1)[..., None]
    if kind in ("blur", "photo"):
        blur = size * uniform(0.01, 0.04) if kind == "blur" else uniform(0.5, 1.2)
        picture = ndimage.gaussian_filter(picture, (blur, blur, 0))
    noise = {"noise": uniform(8, 25), "photo": 6}.get(kind, 0)
    picture = Image.fromarray(np.uint8(np.clip(picture + noise * rng.standard_normal(picture.shape), 0, 255)))
    if kind == "transparency":
        picture = Image.new("RGB", picture.size, rng.choice(("white", "black")))
        picture.putalpha(Image.fromarray(np.uint8(255 * cover)))
    if kind in ("JPEG", "photo"):
        picture.save(file := io.BytesIO(), "JPEG", quality=int(uniform(8, 25)) if kind == "JPEG" else 60)
        picture = Image.open(file)
    return picture


def page(kind: str, digits: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A photo of this kind of a page with digits (N,), see drawn(), in rows."""
    uniform, columns, step = rng.uniform, 9 if kind == "grid of 81" else 5, 90
    pitch = 58 if kind in FORMS else step  # from column to column
    shape, before = (ceil(len(digits) / columns) * step, columns * pitch), 0
    down, across = np.mgrid[-100 : shape[0] + 100, -50 : shape[1] + 50]
    cover = np.zeros(down.shape, np.float32)
    slope = uniform(-0.04, 0.04) if kind == "on lines" else uniform(0.08, 0.15) if kind == "slanting" else 0
    pen = pen_of(digits[0], rng) * 0.6 * step
    for number, digit in enumerate(digits):
        part = drawn(digit, 0.6 * step * uniform(*((0.5, 1.3) if kind == "sizes" else (0.85, 1.1))), pen)
        row, column = divmod(number, columns)
        x = int((column + 0.5) * pitch - part.shape[1] / 2 + uniform(-4, 4))
        x = before - 2 if kind == "touching" and column % 2 else x
        y = (row + 0.8) * step - part.shape[0] if kind == "on lines" else (row + 0.5) * step - part.shape[0] / 2
        y += uniform(-4, 4) if kind in FORMS else 0
        place = np.s_[(top := int(y + slope * x + 100)) : top + part.shape[0], x + 50 : x + 50 + part.shape[1]]
        cover[place], before = np.maximum(cover[place], part), x + part.shape[1]
    inside = (down >= -1) & (down <= shape[0]) & (across >= -1) & (across <= shape[1])
    grid = inside & ((down % step < 2) | (across % step < 2))
    lines = np.abs((down - slope * across) % step - 0.8 * step) < 1
    middle = down % step - step / 2  # forms have a field a row, 66 pixels high
    inside &= (np.abs(middle) < 33) & (down >= 0) & (down < shape[0])
    between = across % pitch < 2  # the columns
    field = inside & ((np.abs(middle) > 30) | (across < 2) | (across > shape[1] - 2))
    printed = {"boxes": grid, "grid of 81": grid, "on lines": lines, "field": field}
    printed |= {"tight boxes": field | inside & between, "comb": (field | inside & between) & (middle > 10)}
    printed = printed.get(kind, np.zeros_like(grid))
    light = uniform(170, 240) * (1 - uniform(0, 0.4) * (across - across.min()) / np.ptp(across))  # a lamp at the left
    if kind == "phone shadow":  # narrow, and over some of the digits
        centre, half = uniform(0.3, 0.7) * shape[1], uniform(0.15, 0.25) * shape[1]
        light = light * (1 - uniform(0.3, 0.55) * np.clip((half - np.abs(across - centre)) / uniform(1, 12), 0, 1))
    ink = uniform(0.2, 0.3) if kind == "faint pencil" else uniform(0.6, 0.8)
    picture = light * (1 - np.maximum(cover * ink, 0.5 * printed))
    picture = Image.fromarray(np.uint8(np.clip(picture + 3 * rng.standard_normal(cover.shape), 0, 255)))
    if kind == "desk":
        wood = ndimage.gaussian_filter(rng.standard_normal((cover.shape[0] + 160, cover.shape[1] + 160)), (1, 30))
        wood = Image.fromarray(np.uint8(np.clip(uniform(50, 110) + 4 * wood / wood.std(), 0, 255)))
        angle, whole = uniform(-4, 4), Image.new("L", picture.size, 255)
        turned, whole = (layer.rotate(angle, Image.Resampling.BICUBIC, expand=True) for layer in (picture, whole))
        wood.paste(turned, [(a - b) // 2 for a, b in zip(wood.size, turned.size, strict=True)], whole)
        picture = wood
    return picture


def compare(truth: str, found: str) -> tuple[int, int]:
    """How many digits are read right, and how many more are read than there are, in the alignment of fewest edits."""
    best = [(-j, 0, j) for j in range(len(found) + 1)]  # of beginnings: minus the edits, right, too many
    for digit in truth:
        before, best = best, [(best[0][0] - 1, 0, 0)]
        for j, other in enumerate(found):
            same = digit == other
            ways = [(before[j], same - 1, same, 0), (before[j + 1], -1, 0, 0), (best[j], -1, 0, 1)]
            best.append(max((way[0] + a, way[1] + b, way[2] + c) for way, a, b, c in ways))
    return best[-1][1:]


def pictures(
    kind: str, digits: np.ndarray, labels: np.ndarray, number: int, seed: int
) -> Iterator[tuple[str, Image.Image]]:
    """Pictures of this kind with this number of digits in all, and what stands on each."""
    many = 81 if kind == "grid of 81" else 10 if kind in PAGES + FORMS else 1
    rng, make = np.random.default_rng(seed), page if kind in PAGES + FORMS else sheet
    for chosen in rng.choice(len(digits), (max(1, number // many), many), replace=False):
        yield "".join(map(str, labels[chosen])), make(kind, digits[chosen], rng)


def count(cases: Iterable[tuple[str, Image.Image]], net: Net) -> np.ndarray:
    """Of digits in pictures: how many there are, are read right, and are read where there is none."""
    total = np.zeros(3, int)
    for truth, picture in cases:
        found = "".join(str(digit.value) for digit in read_picture(picture, net).digits)
        total += (len(truth), *compare(truth, found))
    return total


def right(net: Net, kind: str, digits: np.ndarray, labels: np.ndarray, number: int, seed: int) -> float:
    """The share of this number of digits that are read right, in order, less those read where there is none."""
    digits, right, extra = count(pictures(kind, digits, labels, number, seed), net)
    return (right - extra) / digits


def load(strokes: Path | None) -> tuple[np.ndarray, np.ndarray]:
    """The digits and their labels: MNIST's test images (N, 28, 28), or lists of strokes (N,) from this file."""
    if strokes is None:
        images, labels = (part.numpy() for part in load_mnist(HERE / "data", False, "cpu"))
        return images[:, 0], labels
    items = json.loads(strokes.read_text())
    digits = np.empty(len(items), object)
    digits[:] = [item["strokes"] for item in items]
    return digits, np.array([item["digit"] for item in items])


def main() -> None:
    """Make the sheet of this path, or print the table."""
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("--strokes", type=Path)
    parser.add_argument("sheet", type=Path, nargs="?")
    args = parser.parse_args()
    digits, labels = load(None)
    if args.sheet:
        rng = np.random.default_rng(2026)
        page("desk", digits[rng.choice(800, 30, replace=False)], rng).save(args.sheet, quality=85)
        return
    sources = {"MNIST": (digits, labels)} | ({"strokes": load(args.strokes)} if args.strokes else {})
    print(f"{'kind of sheet':<14}" + "".join(f"{source:>10}" for source in sources))
    for kind in KINDS + PAGES + FORMS:
        shares = [right(committed_net(), kind, *source, 100, 13) for source in sources.values()]
        print(f"{kind:<14}" + "".join(f"{share:>10.1%}" for share in shares), flush=True)


if __name__ == "__main__":
    main()
