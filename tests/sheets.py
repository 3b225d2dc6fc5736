"""Simulated photos of handwritten digits, and how many of the digits predict.py reads right on each kind.

python -m tests.sheets              print the table of docs/predict.md; MNIST's test digits, 100 a kind
python -m tests.sheets sheet.jpg    make the README's sheet
"""

import contextlib
import io
import sys
from difflib import SequenceMatcher
from math import ceil, cos, exp, log, pi, sin

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.morphology import skeletonize

from reader import classify, digits
from script import HERE, REFERENCE, Failure, Net, load_mnist, load_net

KINDS = """clean, lamp, vignette, shadow, dust, ruled, squared, noise, blur, JPEG, thin pen, thick pen, pencil, colours,
chalk, transparency, cropped, border, small, photo""".replace("\n", " ").split(", ")
PAGES = ["ten digits", "desk", "on lines", "boxes", "grid of 81", "faint pencil", "sizes", "slanting", "touching"]


def drawn(image: np.ndarray, height: float, pen: float | None) -> np.ndarray:
    """An MNIST image (28, 28) enlarged to this height, with its own strokes or a pen's: coverage in [0, 1]."""
    smooth = ndimage.gaussian_filter(ndimage.zoom(np.pad(image, 2) / 255, 6, order=1), 2)
    mask = smooth > 0.45
    scale = height / np.ptp(np.nonzero(mask.any(axis=1)))
    away = ndimage.distance_transform_edt(~(skeletonize(mask) if pen else mask))
    away = away if pen else away - ndimage.distance_transform_edt(mask) + 0.5
    cover = np.clip(0.5 + (pen or 0) / 2 - scale * ndimage.zoom(away, scale, order=1, mode="nearest"), 0, 1)
    ys, xs = np.nonzero(cover > 0.3)
    return np.float32(cover[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])


def sheet(kind: str, images: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A picture of this kind with an MNIST image of (1, 28, 28) redrawn somewhere on it."""
    uniform, height, width = rng.uniform, int(rng.uniform(320, 480)), int(rng.uniform(400, 640))
    size = height / 8 if kind == "small" else height * exp(uniform(log(1 / 8), log(0.75)))
    pens = {"thin pen": max(height, width) / 200 * uniform(1, 1.6), "thick pen": size * uniform(0.16, 0.24)}
    ink = drawn(images[0], size, pens.get(kind))
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


def page(kind: str, images: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A photo of this kind of a page with MNIST images (N, 28, 28) redrawn in rows."""
    uniform, columns, step = rng.uniform, 9 if kind == "grid of 81" else 5, 90
    shape, before = (ceil(len(images) / columns) * step, columns * step), 0
    down, across = np.mgrid[-100 : shape[0] + 100, -50 : shape[1] + 50]
    cover = np.zeros(down.shape, np.float32)
    slope = uniform(-0.04, 0.04) if kind == "on lines" else uniform(0.08, 0.15) if kind == "slanting" else 0
    for number, image in enumerate(images):
        part = drawn(image, 0.6 * step * uniform(*((0.5, 1.3) if kind == "sizes" else (0.85, 1.1))), None)
        row, column = divmod(number, columns)
        x = int((column + 0.5) * step - part.shape[1] / 2 + uniform(-4, 4))
        x = before - 2 if kind == "touching" and column % 2 else x
        y = (row + 0.8) * step - part.shape[0] if kind == "on lines" else (row + 0.5) * step - part.shape[0] / 2
        place = np.s_[(top := int(y + slope * x + 100)) : top + part.shape[0], x + 50 : x + 50 + part.shape[1]]
        cover[place], before = np.maximum(cover[place], part), x + part.shape[1]
    inside = (down >= -1) & (down <= shape[0]) & (across >= -1) & (across <= shape[1])
    grid = inside & ((down % step < 2) | (across % step < 2))
    lines = np.abs((down - slope * across) % step - 0.8 * step) < 1
    printed = {"boxes": grid, "grid of 81": grid, "on lines": lines}.get(kind, np.zeros_like(grid))
    light = uniform(170, 240) * (1 - uniform(0, 0.4) * (across - across.min()) / np.ptp(across))  # a lamp at the left
    pen = uniform(0.2, 0.3) if kind == "faint pencil" else uniform(0.6, 0.8)
    picture = light * (1 - np.maximum(cover * pen, 0.5 * printed))
    picture = Image.fromarray(np.uint8(np.clip(picture + 3 * rng.standard_normal(cover.shape), 0, 255)))
    if kind == "desk":
        wood = ndimage.gaussian_filter(rng.standard_normal((cover.shape[0] + 160, cover.shape[1] + 160)), (1, 30))
        wood = Image.fromarray(np.uint8(np.clip(uniform(50, 110) + 4 * wood / wood.std(), 0, 255)))
        angle, whole = uniform(-4, 4), Image.new("L", picture.size, 255)
        turned, whole = (layer.rotate(angle, Image.Resampling.BICUBIC, expand=True) for layer in (picture, whole))
        wood.paste(turned, [(a - b) // 2 for a, b in zip(wood.size, turned.size, strict=True)], whole)
        picture = wood
    return picture


def right(net: Net, kind: str, images: np.ndarray, labels: np.ndarray, number: int, seed: int) -> float:
    """The share of this number of digits that are read right, in order, less those seen where there is none."""
    many = 81 if kind == "grid of 81" else 10 if kind in PAGES else 1
    rng, total, pictures = np.random.default_rng(seed), 0, max(1, number // many)
    make = page if kind in PAGES else sheet
    for chosen in rng.choice(len(images), (pictures, many), replace=False):
        with contextlib.suppress(Failure):
            found = classify(net, [field for _, field in digits(make(kind, images[chosen], rng), net)]).argmax(dim=1)
            matcher = SequenceMatcher(None, labels[chosen].tolist(), found.tolist(), autojunk=False)
            total += sum(block.size for block in matcher.get_matching_blocks()) - max(0, len(found) - many)
    return total / (pictures * many)


def main(paths: list[str]) -> None:
    """Make the sheet of this path, or print the table."""
    images, labels = (part.numpy() for part in load_mnist(HERE / "data", False, "cpu"))
    if paths:
        rng = np.random.default_rng(2026)
        page("desk", images[rng.choice(800, 30, replace=False), 0], rng).save(paths[0], quality=85)
        return
    net = load_net(REFERENCE)
    print("kind of sheet   read right")
    for kind in KINDS + PAGES:
        print(f"{kind:<14}  {right(net, kind, images[:, 0], labels, 100, 13):>9.1%}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
