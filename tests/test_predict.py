"""The suite of predict.py: it draws its own sheets, other ones than the README's table."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sheets
import torch
from PIL import Image, ImageDraw

import predict
import script
from conftest import fault

HERE = Path(__file__).resolve().parents[1]

# A person's ten digits as strokes, lists of (x, y) in a box of 60 by 100; 4, 5 and 7 are drawn in more than one.
STROKES = {
    0: [[(30, 0), (10, 12), (0, 45), (8, 85), (30, 100), (52, 85), (60, 50), (50, 12), (30, 0)]],
    1: [[(30, 0), (30, 100)]],
    2: [[(3, 22), (8, 6), (28, 0), (48, 8), (52, 25), (42, 50), (20, 78), (2, 97), (25, 93), (60, 98)]],
    3: [[(3, 10), (25, 0), (50, 10), (50, 32), (25, 47), (52, 58), (58, 80), (35, 100), (3, 92)]],
    4: [[(18, 0), (2, 60), (45, 60)], [(51, 25), (50, 100)]],
    5: [[(8, 4), (4, 45), (35, 42), (56, 62), (48, 90), (22, 100), (0, 92)], [(17, 0), (58, 0)]],
    6: [[(45, 0), (18, 25), (3, 62), (12, 93), (35, 100), (55, 85), (52, 62), (32, 52), (8, 66)]],
    7: [[(0, 2), (58, 2), (38, 45), (24, 100)], [(18, 50), (54, 50)]],
    8: [[(30, 48), (8, 28), (15, 5), (38, 0), (50, 20), (12, 60), (5, 85), (28, 100), (52, 85), (30, 48)]],
    9: [[(54, 25), (42, 50), (18, 52), (4, 32), (16, 6), (40, 0), (54, 20), (52, 60), (44, 100)]],
}


def write(picture, digit, left, top, height, width, colour=0):
    """Draw a digit of this height with a pen of this width."""
    draw = ImageDraw.Draw(picture)
    for stroke in STROKES[digit]:
        points = [(left + x * height / 100, top + y * height / 100) for x, y in stroke]
        draw.line(points, fill=colour, width=width, joint="curve")
        for x, y in points:
            draw.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=colour)


@pytest.fixture(scope="session")
def net():
    """The committed network."""
    return script.load_net(HERE / "assets" / "model.pt")


def reading(net, picture):
    """The digits that are read in a Pillow picture, in order."""
    return predict.read(net, [field for _, field in predict.digits(picture)]).argmax(dim=1).tolist()


def told(capsys, *arguments):
    """Status, and the lines on standard output and standard error, of predict.py with these arguments."""
    status = predict.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err.splitlines()


# ---------------------------------------------------------------- one digit


@pytest.mark.parametrize("kind", sheets.KINDS)
def test_each_kind_of_sheet_is_read(net, test_set, kind):
    """Other digits and other sheets than the table's; at 97 % each, three wrong of ten are one test in 400."""
    rng, many = np.random.default_rng(77), 10 if kind == "ten digits" else 1
    right = 0
    for chosen in rng.choice(10_000, (10 // many, many), replace=False):
        picture = sheets.sheet(kind, test_set[0][chosen, 0].numpy(), rng)
        want = test_set[1][chosen].tolist()
        right += sum(a == b for a, b in zip(reading(net, picture), want, strict=False))
    assert right >= 8


@pytest.mark.parametrize("width", [2, 3, 4, 8, 16, 24])
def test_pens_of_every_width_and_digits_of_several_strokes(net, width):
    for digit in STROKES:
        picture = Image.new("L", (400, 400), 255)
        write(picture, digit, 120, 80, 220, width)
        assert reading(net, picture) == [digit], (digit, width)


@pytest.mark.parametrize("width", [2, 4, 8])
def test_thin_strokes_are_as_wide_as_mnist_s(width):
    picture = Image.new("L", (400, 400), 255)
    write(picture, 1, 120, 80, 220, width)
    ((_, field),) = predict.digits(picture)
    assert 1.8 < field[0].sum(dim=1).max() < 3  # pixels of the field; MNIST's own are about 2 to 4


def test_a_five_whose_bar_stands_apart_is_one_digit(net):
    picture = Image.new("L", (400, 400), 255)
    write(picture, 5, 120, 100, 220, 12)
    ImageDraw.Draw(picture).rectangle((110, 80, 260, 112), fill=255)  # the bar goes, and
    ImageDraw.Draw(picture).line((160, 72, 250, 68), fill=0, width=12)  # comes back higher
    ((box, _),) = predict.digits(picture)
    assert box.top == pytest.approx(63, abs=4)
    assert reading(net, picture) == [5]


def test_dark_corners_are_no_digits(net):
    y, x = np.mgrid[-1:1:400j, -1:1:600j]
    picture = Image.new("L", (600, 400), 255)
    write(picture, 8, 200, 150, 90, 8)
    dimmed = np.asarray(picture) * (1 - 0.38 * (x**2 + y**2))
    assert reading(net, Image.fromarray(np.uint8(dimmed))) == [8]


def test_a_wide_picture_of_many_digits(net):
    picture = Image.new("L", (40_000, 60), 255)
    for place in range(10):
        write(picture, place, 4000 * place + 20, 8, 44, 4)
    assert reading(net, picture) == list(range(10))


def inverted(picture):
    return picture.point(lambda value: 255 - value)


def clear(picture, colour):
    """Ink of this colour on transparency."""
    sheet = Image.new("RGB", picture.size, colour)
    sheet.putalpha(picture)
    return sheet


MODES = {  # what people make of a picture that is light on dark
    "light on dark": lambda picture: picture,
    "dark on light": inverted,
    "palette": lambda picture: inverted(picture).convert("P", palette=Image.Palette.ADAPTIVE),
    "black ink on transparency": lambda picture: clear(picture, "black"),
    "white ink on transparency": lambda picture: clear(picture, "white"),
    "16 bits": lambda picture: Image.fromarray(np.asarray(picture, dtype=np.uint16) * 256),
    "two colours": lambda picture: inverted(picture).convert("1"),
    "low contrast": lambda picture: picture.point(lambda value: 100 + value // 4),
    "MNIST's own size": lambda picture: picture.resize((28, 28), Image.Resampling.BOX),
    "four inks": lambda picture: inverted(picture).convert("RGB").convert("CMYK"),
}


@pytest.mark.parametrize("kind", MODES)
def test_every_mode_of_file_is_read(tmp_path, capsys, test_set, kind):
    names = [tmp_path / f"a digit {digit}.{'tif' if kind == 'four inks' else 'png'}" for digit in range(10)]
    for digit, name in enumerate(names):
        image = test_set[0][(test_set[1] == digit).nonzero()[1, 0], 0]
        large = Image.fromarray(image.numpy()).resize((196, 196), Image.Resampling.BICUBIC)
        MODES[kind](large).save(name)
    status, out, _ = told(capsys, *names)
    assert status == 0
    rows = [re.fullmatch(r"(.+): (\d) \((\d+\.\d)%\), then (\d) \((\d+\.\d)%\)", line).groups() for line in out]
    assert [row[0] for row in rows] == [str(name) for name in names]
    assert [int(row[1]) for row in rows] == list(range(10))
    assert all(row[1] != row[3] and float(row[2]) > float(row[4]) for row in rows)


def test_the_camera_s_orientation_is_kept_to(tmp_path, capsys):
    picture = Image.new("L", (200, 300), 255)
    write(picture, 7, 50, 50, 180, 12)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees to the right
    picture.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif)
    assert told(capsys, tmp_path / "turned.jpg")[1][0].startswith(f"{tmp_path / 'turned.jpg'}: 7 (")


def test_mnist_s_own_images_come_back(test_set):
    """They are cropped and centred already, so most come back as they were."""
    similar = []
    for image in test_set[0][:200, 0]:
        field = max(predict.digits(Image.fromarray(image.numpy())), key=lambda digit: digit[1].sum())[1][0]
        for axis in (0, 1):
            mean = (field.sum(dim=axis) * torch.arange(28)).sum() / field.sum()
            assert mean.item() == pytest.approx(14, abs=0.75)
            assert (field > 0.25).any(dim=axis).sum() <= 20
        similar.append(torch.corrcoef(torch.stack((field.flatten(), image.float().flatten())))[0, 1].item())
    assert np.median(similar) > 0.99


# ---------------------------------------------------------------- several digits


def test_digits_are_told_line_by_line_with_boxes_around_them(tmp_path, capsys):
    picture, places = Image.new("RGB", (900, 600), "white"), {}
    for row, text in enumerate(("2026", "54", "117")):
        for column, digit in enumerate(text):
            left, top = 60 + 140 * column, 40 + 180 * row + 12 * (column % 2)
            places[row, column] = left, top
            write(picture, int(digit), left, top, 110, 8, (20, 40, 160))
    picture.save(tmp_path / "sheet.png")
    status, out, err = told(capsys, tmp_path / "sheet.png", "--seen", tmp_path / "seen.png")
    assert (status, out, err) == (0, [f"{tmp_path / 'sheet.png'}: 2 0 2 6 / 5 4 / 1 1 7"], [])
    with Image.open(tmp_path / "seen.png") as seen:
        red = np.asarray(seen.convert("RGB"), dtype=int)
    assert (red[..., 0] - red[..., 1] > 120).sum() > 500  # the frames
    found = predict.digits(picture)
    for (left, top, right, bottom), field in found:
        assert field.shape == (1, 28, 28)
        assert 0 <= field.min() <= field.max() <= 1
        assert 100 <= bottom - top <= 125
        assert right - left <= 80
    assert [place[1] for place in places.values()] == pytest.approx([box[1] for box, _ in found], abs=8)


def test_lines_across_and_specks_are_no_digits(net):
    picture = Image.new("L", (800, 600), 240)
    write(picture, 3, 200, 200, 200, 14)
    write(picture, 8, 500, 210, 190, 14)
    draw = ImageDraw.Draw(picture)
    draw.line((0, 80, 799, 95), fill=0, width=3)
    draw.line((60, 0, 60, 599), fill=0, width=3)
    for x, y in np.random.default_rng(4).integers(0, 600, (20, 2)).tolist():
        draw.ellipse((x, y, x + 4, y + 4), fill=0)
    assert reading(net, picture) == [3, 8]


# ---------------------------------------------------------------- refusals


@fault(
    "a picture that is empty, truncated, no picture, blank, noise, huge, a folder or missing, among good ones",
    "predict.py names each, with its reason; the good ones are answered; status 1",
)
def test_bad_pictures_are_named_and_the_good_ones_answered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good = Image.new("L", (300, 300), 255)
    write(good, 7, 100, 60, 180, 12)
    good.save("good.png")
    rng = np.random.default_rng(5)
    Path("empty.png").touch()
    Path("cut.png").write_bytes(Path("good.png").read_bytes()[:500])
    Path("text.png").write_text("seven")
    Image.new("L", (1, 1), 255).save("dot.png")
    Image.new("RGB", (300, 200), "white").save("white.png")
    Image.new("RGBA", (300, 200), (0, 0, 0, 0)).save("clear.png")
    Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)).save("noise.png")
    Image.fromarray(np.uint8(np.linspace(60, 250, 400) * np.ones((300, 1)))).save("gradient.png")
    line = Image.new("L", (400, 300), 255)
    ImageDraw.Draw(line).line((50, 150, 350, 160), fill=0, width=6)
    line.save("line.png")
    Image.new("1", (10_000, 10_000)).save("huge.png")
    Path("folder.png").mkdir()
    bad = {
        "empty.png": "it is not a picture",
        "cut.png": "image file is truncated",
        "text.png": "it is not a picture",
        "dot.png": "nothing on it stands out from its paper",
        "white.png": "nothing on it stands out from its paper",
        "clear.png": "nothing on it stands out from its paper",
        "noise.png": "424 marks are on it, which are no digits",
        "gradient.png": "nothing on it",
        "line.png": "nothing on it has the size and shape of a digit",
        "huge.png": "it is too large",
        "folder.png": "Is a directory",
        "missing.png": "No such file or directory",
    }
    status, out, err = told(capsys, *[name for name in bad for name in (name, "good.png")])
    assert status == 1
    assert [line.split(" (")[0] for line in out] == ["good.png: 7"] * len(bad)
    for line, (name, problem) in zip(err, bad.items(), strict=True):
        assert line.startswith(f"predict.py: error: cannot read {name}: {problem}")


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (2, 2), (40_000, 1), (40_000, 30)])
def test_strange_sizes_are_read_or_refused(size):
    noise = np.random.default_rng(6).integers(0, 256, size[::-1], dtype=np.uint8)
    try:
        found = predict.digits(Image.fromarray(noise))
    except script.Failure:
        return
    assert all(field.isfinite().all() for _, field in found)


def test_otsu_parts_two_inks_and_takes_one_that_is_all_but_even():
    assert 0.3 < predict.otsu(np.float32([0.25] * 50 + [0.3] * 50 + [0.7] * 40)) < 0.7
    even = np.float32(0.5)
    assert 0 < predict.otsu(np.array([even, np.nextafter(even, np.float32(1))] * 50)) <= 0.6


def test_a_page_of_print_is_refused():
    page = Image.new("L", (800, 1000), 255)
    for row in range(60):
        ImageDraw.Draw(page).text((20, 15 * row + 20), "the quick brown fox jumps over the lazy dog " * 3, fill=0)
    with pytest.raises(script.Failure, match=r"marks|size and shape"):
        predict.digits(page)


def test_bad_usage(capsys):
    for arguments in ([], ["--nonsense", "a.png"], ["a.png", "b.png", "--seen", "c.png"]):
        with pytest.raises(SystemExit, match="2"):
            predict.main(arguments)
        assert re.fullmatch(r"predict\.py: error: .+\n", capsys.readouterr().err)


@pytest.mark.parametrize("content", [None, b"", "numbers", "not finite"])
def test_weights_that_are_none(tmp_path, capsys, content):
    weights = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        weights.write_bytes(content)
    elif content:
        state = script.load_net(HERE / "assets" / "model.pt").state_dict()
        state["conv7.bias"][3] = float("nan")
        torch.save({1: 2} if content == "numbers" else state, weights)
    status, out, err = told(capsys, HERE / "assets" / "seven.png", "--weights", weights)
    assert (status, out, len(err)) == (1, [], 1)
    assert err[0].startswith("predict.py: error: ")


def test_the_readme_shows_what_is_printed(tmp_path):
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ python (predict\.py .+)$", readme, re.MULTILINE)
    assert commands
    for command in commands:
        line = [sys.executable, *command.replace("seen.png", str(tmp_path / "seen.png")).split()]
        done = subprocess.run(line, cwd=HERE, capture_output=True, text=True, check=False)
        assert f"$ python {command}\n{done.stdout}{done.stderr}" in readme
    rows = re.findall(r"^(.{14}) +200 +(\d+\.\d)%$", readme, re.MULTILINE)
    assert [kind.rstrip() for kind, _ in rows] == sheets.KINDS
    assert all(float(right) >= 97 for kind, right in rows if kind.rstrip() != "photo")  # of several faults at once
