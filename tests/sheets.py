"""Simulated photos of handwritten digits, and how many of the digits predict.py reads right on each kind.

python tests/sheets.py              print the README's table; MNIST's test digits, 200 a kind
python tests/sheets.py sheet.jpg    make the README's sheet
"""

import contextlib
import io
import sys
from math import ceil, cos, exp, log, pi, sin
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a program, it has tests/ there only
from predict import digits, read
from script import HERE, Failure, Net, load_mnist, load_net

KINDS = """clean, lamp, vignette, shadow, dust, ruled, squared, noise, blur, JPEG, thin pen, thick pen, pencil, colours,
chalk, transparency, cropped, border, small, photo, ten digits""".replace("\n", " ").split(", ")


def thinned(mask: np.ndarray) -> np.ndarray:
    """A mask's centre lines, one pixel wide (Zhang and Suen, 1984)."""
    around = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # clockwise from the north
    before = np.zeros_like(mask)
    while (mask != before).any():
        before = mask
        for turn in (0, 4):
            ring = np.array([np.roll(mask, (-y, -x), (0, 1)) for y, x in around])
            north, east, south, west = np.roll(ring[::2], turn // 2, axis=0)
            count, starts = ring.sum(axis=0), (~ring & np.roll(ring, -1, axis=0)).sum(axis=0)
            mask = mask & ~((count >= 2) & (count <= 6) & (starts == 1) & ~(east & south & (north | west)))
    return mask


def drawn(image: np.ndarray, height: float, pen: float | None) -> np.ndarray:
    """An MNIST image (28, 28) enlarged to this height, with its own strokes or a pen's: coverage in [0, 1]."""
    smooth = ndimage.gaussian_filter(ndimage.zoom(np.pad(image, 2) / 255, 6, order=1), 2)
    mask = smooth > 0.45
    scale = height / np.ptp(np.nonzero(mask.any(axis=1)))
    away = ndimage.distance_transform_edt(~(thinned(mask) if pen else mask))
    away = away if pen else away - ndimage.distance_transform_edt(mask) + 0.5
    cover = np.clip(0.5 + (pen or 0) / 2 - scale * ndimage.zoom(away, scale, order=1, mode="nearest"), 0, 1)
    ys, xs = np.nonzero(cover > 0.3)
    return np.float32(cover[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])


def sheet(kind: str, images: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A picture of this kind with MNIST images (N, 28, 28) redrawn on it: one anywhere, or more, five in a line."""
    uniform, rows, columns = rng.uniform, ceil(len(images) / 5), min(len(images), 5)
    height, width = int(uniform(320, 480)), int(uniform(400, 640))
    size = height * exp(uniform(log(1 / 8), log(0.75))) if columns == 1 else 0.6 * min(height / rows, width / columns)
    size = height / 8 if kind == "small" else size
    pens = {"thin pen": max(height, width) / 200 * uniform(1, 1.6), "thick pen": size * uniform(0.16, 0.24)}
    ink = [drawn(image, size * (uniform(0.8, 1.1) if columns > 1 else 1), pens.get(kind)) for image in images]
    height, width = ink[0].shape if kind == "cropped" else np.maximum((height, width), ink[0].shape).tolist()
    cover = np.zeros((height, width), np.float32)
    place = np.array((height // rows, width // columns))
    for number, part in enumerate(ink):
        room, margin = place - part.shape, 0 if kind == "border" else 0.02
        y, x = (room * uniform(margin, 1 - margin, 2)).astype(int)
        if kind == "border":
            y, x = ((0, x), (room[0], x), (y, 0), (y, room[1]))[rng.integers(4)]
        if columns > 1:  # not wherever there is room, but about the middle of its place
            y, x = (room * uniform(0.4, 0.6, 2)).astype(int)
        y, x = (y, x) + place * divmod(number, columns)
        cover[y : y + part.shape[0], x : x + part.shape[1]] = part
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
    if kind in ("shadow", "photo", "ten digits"):
        angle = uniform(0, 2 * pi)
        beyond = (x - uniform(-0.2, 0.2)) * width * cos(angle) + (y - uniform(-0.2, 0.2)) * height * sin(angle)
        picture *= 1 - uniform(0.3, 0.55) * np.clip(0.5 + beyond / uniform(1, 12), 0, 1)[..., None]
    if kind in ("blur", "photo"):
        blur = size * uniform(0.01, 0.04) if kind == "blur" else uniform(0.5, 1.2)
        picture = ndimage.gaussian_filter(picture, (blur, blur, 0))
    noise = {"noise": uniform(8, 25), "photo": 6, "ten digits": 6}.get(kind, 0)
    picture = Image.fromarray(np.uint8(np.clip(picture + noise * rng.standard_normal(picture.shape), 0, 255)))
    if kind == "transparency":
        picture = Image.new("RGB", picture.size, rng.choice(("white", "black")))
        picture.putalpha(Image.fromarray(np.uint8(255 * cover)))
    if kind in ("JPEG", "photo"):
        picture.save(file := io.BytesIO(), "JPEG", quality=int(uniform(8, 25)) if kind == "JPEG" else 60)
        picture = Image.open(file)
    return picture


def right(net: Net, kind: str, images: np.ndarray, labels: np.ndarray, number: int, seed: int) -> int:
    """How many of this number of digits are read right; where a sheet shows more or fewer, all of it is wrong."""
    rng, total, many = np.random.default_rng(seed), 0, 10 if kind == "ten digits" else 1
    for chosen in rng.choice(len(images), (number // many, many), replace=False):
        with contextlib.suppress(Failure):
            fields = [field for _, field in digits(sheet(kind, images[chosen], rng))]
            if len(fields) == many:
                total += int((read(net, fields).argmax(dim=1).numpy() == labels[chosen]).sum())
    return total


def main(paths: list[str]) -> None:
    """Make the sheet of this path, or print the table."""
    images, labels = (part.numpy() for part in load_mnist(HERE / "data", False, "cpu"))
    if paths:
        rng = np.random.default_rng(2026)
        chosen = [np.nonzero(labels == digit)[0][rng.integers(800)] for digit in (2, 0, 2, 6, 1, 3, 4, 5, 7, 8, 9, 1)]
        sheet("ten digits", images[chosen, 0], rng).save(paths[0], quality=85)
        return
    net = load_net(HERE / "assets" / "model.pt")
    print("kind of sheet   digits  read right")
    for kind in KINDS:
        print(f"{kind:<14}     200  {right(net, kind, images[:, 0], labels, 200, 13) / 2:>9.1f}%", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
