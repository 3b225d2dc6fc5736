"""Simulated photos of handwritten digits, and how many of the digits predict.py reads right on each kind.

python tests/sheets.py              print the README's table; MNIST's test digits, 200 a kind
python tests/sheets.py sheet.jpg    make the README's sheet
"""

import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))  # run as a program, it has tests/ there only
from predict import digits, read  # noqa: E402
from script import Failure, Net, load_mnist, load_net  # noqa: E402

KINDS = """clean, lamp, vignette, shadow, dust, ruled, squared, noise, blur, JPEG, thin pen, thick pen, pencil, colours,
chalk, transparency, cropped, border, small, photo, ten digits""".replace("\n", " ").split(", ")


def thinned(mask: np.ndarray) -> np.ndarray:
    """A mask's centre lines, one pixel wide (Zhang and Suen, 1984)."""
    around = ((-1, 0), (-1, 1), (0, 1), (1, 1), (1, 0), (1, -1), (0, -1), (-1, -1))  # clockwise from the north
    before = None
    while before is None or (mask != before).any():
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
    inside, outside = (ndimage.distance_transform_edt(part) for part in (mask, ~mask))
    rows = np.nonzero(mask.any(axis=1))[0]
    scale = height / np.ptp(rows)
    distance = ndimage.distance_transform_edt(~thinned(mask)) if pen else outside - inside + 0.5
    distance = scale * ndimage.zoom(distance, scale, order=1, mode="nearest")
    cover = np.clip(0.5 + (pen or 0) / 2 - distance, 0, 1)
    ys, xs = np.nonzero(cover > 0.3)
    return np.float32(cover[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1])


def sheet(kind: str, images: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A simulated picture of this kind (one of KINDS) with digits drawn after MNIST images (N, 28, 28).

    One is anywhere on it, an eighth to three quarters of its height; more are five in a line.
    """
    uniform = rng.uniform
    rows, columns = math.ceil(len(images) / 5), min(len(images), 5)
    height, width = int(uniform(320, 480)), int(uniform(400, 640))
    size = (
        height * math.exp(uniform(math.log(1 / 8), math.log(0.75)))
        if len(images) == 1
        else 0.6 * min(height / rows, width / columns)
    )
    size = height / 8 if kind == "small" else size
    pens = {"thin pen": max(height, width) / 200 * uniform(1, 1.6), "thick pen": size * uniform(0.16, 0.24)}
    ink = [drawn(image, size * (uniform(0.8, 1.1) if columns > 1 else 1), pens.get(kind)) for image in images]
    if kind == "cropped":
        height, width = ink[0].shape
    height, width = max(height, ink[0].shape[0]), max(width, ink[0].shape[1])
    cover = np.zeros((height, width), np.float32)
    for number, part in enumerate(ink):
        room_y, room_x = height // rows - part.shape[0], width // columns - part.shape[1]
        margin = 0.02 if kind != "border" else 0
        y, x = (int(room * uniform(margin, 1 - margin)) for room in (room_y, room_x))
        if kind == "border":
            y, x = ((0, x), (room_y, x), (y, 0), (y, room_x))[rng.integers(4)]
        if columns > 1:  # not wherever there is room, but about the middle of its place
            y, x = int(room_y * uniform(0.4, 0.6)), int(room_x * uniform(0.4, 0.6))
        y, x = y + number // columns * (height // rows), x + number % columns * (width // columns)
        cover[y : y + part.shape[0], x : x + part.shape[1]] = part
    down, across = np.mgrid[:height, :width].astype(np.float32)
    paper, pen = np.full(3, uniform(215, 250)), np.full(3, uniform(20, 80))
    if kind == "pencil":
        pen = paper * uniform(0.55, 0.75)
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
        away = np.abs(down % step - step / 2)
        if kind == "squared":
            away = np.minimum(away, np.abs(across % step - step / 2))
        picture -= picture * np.clip(line / 2 + 0.5 - away, 0, 1)[..., None] * uniform(0.15, 0.4) * (1, 0.8, 0.6)
    for _ in range(rng.integers(4, 13) if kind == "dust" else 0):
        y, x, radius = uniform(0, height), uniform(0, width), height * uniform(0.002, 0.009)
        speck = np.clip(radius + 0.5 - np.hypot(down - y, (across - x) * uniform(0.6, 1)), 0, 1)[..., None]
        picture += speck * (paper * uniform(0.1, 0.7) - picture)
    picture += cover[..., None] * (pen - picture)
    angle = uniform(0, 2 * math.pi)
    x, y = across / width - 0.5, down / height - 0.5
    if kind in ("lamp", "photo"):
        strength = uniform(0.5, 0.75) if kind == "lamp" else 0.4
        picture *= 1 - strength * (0.5 + (x * math.cos(angle) + y * math.sin(angle)) / 1.2)[..., None]
    if kind == "vignette":
        picture *= 1 - 2 * uniform(0.4, 0.7) * (x**2 + y**2)[..., None]
    if kind in ("shadow", "photo", "ten digits"):
        angle = uniform(0, 2 * math.pi)
        beyond = (x - uniform(-0.2, 0.2)) * width * math.cos(angle) + (y - uniform(-0.2, 0.2)) * height * math.sin(
            angle
        )
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
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(uniform(8, 25)) if kind == "JPEG" else 60)
        picture = Image.open(file)
    return picture


def check(net: Net, images: np.ndarray, labels: np.ndarray, digits_a_kind: int = 200) -> Iterator[tuple[str, int, int]]:
    """(kind, digits, right) of every kind of sheet; where a sheet shows more or fewer digits, all of it is wrong."""
    for kind in KINDS:
        rng, right = np.random.default_rng(13), 0
        many = 10 if kind == "ten digits" else 1
        for chosen in rng.choice(len(images), (digits_a_kind // many, many), replace=False):
            try:
                fields = [field for _, field in digits(sheet(kind, images[chosen], rng))]
            except Failure:
                continue
            if len(fields) == many:
                right += int((read(net, fields).argmax(dim=1).numpy() == labels[chosen]).sum())
        yield kind, digits_a_kind, right


def main(paths: list[str]) -> None:
    """Make the sheet of this path, or print the table."""
    images, labels = (part.numpy() for part in load_mnist(HERE / "data", False, torch.device("cpu")))
    if paths:
        rng = np.random.default_rng(2026)
        chosen = [np.nonzero(labels == digit)[0][rng.integers(800)] for digit in (2, 0, 2, 6, 1, 3, 4, 5, 7, 8, 9, 1)]
        sheet("ten digits", images[chosen, 0], rng).save(paths[0], quality=85)
        return
    print("kind of sheet   digits  read right")
    for kind, number, right in check(load_net(HERE / "assets" / "model.pt"), images[:, 0], labels):
        print(f"{kind:<14}  {number:>6}  {100 * right / number:>9.1f}%", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
