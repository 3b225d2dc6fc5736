"""The suite of predict.py: it draws its own sheets, other ones than the README's table."""

import io
import json
import os
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageOps

import predict
import reader
from script import HERE
from tests import sheets
from tests.helpers import STROKES

NET = reader.committed_net()


def write(picture, digit, left, top, height, width, colour=0):
    """Draw a digit of this height with a pen of this width."""
    ink = sheets.written(STROKES[digit], height, width)
    picture.paste(colour, (left, top), Image.fromarray(np.uint8(255 * ink)))


def drawing(size, *digits, paper=255):
    """A picture of this size (width, height) with digits on it, each as write() takes it."""
    picture = Image.new("L", size, paper)
    for digit in digits:
        write(picture, *digit)
    return picture


def reading(picture):
    """The digits that are read in a Pillow picture, in order."""
    return [digit.value for digit in reader.read_picture(picture, NET).digits]


def told(capsys, *arguments):
    """Status, and the lines on standard output and standard error, of predict.py with these arguments."""
    status = predict.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out.splitlines(), printed.err.splitlines()


@pytest.mark.parametrize("kind", sheets.KINDS + sheets.PAGES)
def test_each_kind_of_sheet_is_read(test_set, kind):
    """Other digits and other sheets than the table's, ten of each kind. One that is read as two costs 0.2."""
    assert sheets.right(NET, kind, test_set[0][:, 0].numpy(), test_set[1].numpy(), 10, 77) >= 0.7


@pytest.mark.parametrize("width", [2, 4, 8, 24])
def test_pens_of_every_width_draw_strokes_as_wide_as_mnist_s(width):
    for digit in STROKES:
        assert reading(drawing((400, 400), (digit, 120, 80, 220, width))) == [digit], (digit, width)
    ((_, field),) = reader.digits(drawing((400, 400), (1, 120, 80, 220, width)))
    assert 1.8 < field[0].sum(dim=1).max() < 3  # pixels of the field; MNIST's own are about 2 to 4


def test_dark_corners_a_shadow_a_desk_lines_across_and_specks_are_no_digits():
    y, x = np.mgrid[-1:1:400j, -1:1:600j]
    dimmed = np.asarray(drawing((600, 400), (8, 200, 150, 90, 8))) * (1 - 0.38 * (x**2 + y**2))
    assert reading(Image.fromarray(np.uint8(dimmed))) == [8]
    shaded = np.array(drawing((1000, 400), *[(digit, 60 + 120 * digit, 150, 110, 8) for digit in range(8)], paper=220))
    shaded[60:340, 285:535] //= 2
    assert reading(Image.fromarray(shaded)) == list(range(8))
    for digit in range(10):  # on a card on a dark desk
        card = drawing((800, 600), paper=60)
        ImageDraw.Draw(card).polygon([(200, 90), (610, 100), (600, 520), (190, 500)], fill=230)
        write(card, digit, 360, 225, 150, 12, 30)
        assert reading(card) == [digit]
    picture = drawing((800, 600), (3, 200, 200, 200, 14), (8, 500, 210, 190, 14), paper=240)
    draw = ImageDraw.Draw(picture)
    draw.line((0, 80, 799, 95), fill=0, width=3)
    draw.line((60, 0, 60, 599), fill=0, width=3)
    for x, y in np.random.default_rng(4).integers(0, 600, (20, 2)).tolist():
        draw.ellipse((x, y, x + 4, y + 4), fill=0)
    assert reading(picture) == [3, 8]


MODES = {  # what people make of a picture that is light on dark
    "light on dark": lambda picture: picture,
    "dark on light": ImageOps.invert,
    "palette": lambda picture: ImageOps.invert(picture).convert("P", palette=Image.Palette.ADAPTIVE),
    "black ink on transparency": lambda picture: Image.merge("LA", (picture.point(lambda _: 0), picture)),
    "white ink on transparency": lambda picture: Image.merge("LA", (picture.point(lambda _: 255), picture)),
    "16 bits": lambda picture: Image.fromarray(np.asarray(picture, dtype=np.uint16) * 256),
    "MNIST's own size": lambda picture: picture.resize((28, 28), Image.Resampling.BOX),
    "turned by the camera": lambda picture: ImageOps.invert(picture).rotate(90, expand=True),
    "four inks": lambda picture: ImageOps.invert(picture).convert("RGB").convert("CMYK"),
}
FILES = {"four inks": "tif", "turned by the camera": "jpg"}  # the others are PNGs


@pytest.mark.parametrize("kind", MODES)
def test_every_mode_of_file_is_read(tmp_path, capsys, test_set, kind):
    names, exif = [tmp_path / f"a digit {digit}.{FILES.get(kind, 'png')}" for digit in range(10)], Image.Exif()
    exif[274] = 6 if kind == "turned by the camera" else 1  # 6: to be turned by 90 degrees to the right
    for digit, name in enumerate(names):
        image = test_set[0][(test_set[1] == digit).nonzero()[1, 0], 0]
        large = Image.fromarray(image.numpy()).resize((196, 196), Image.Resampling.BICUBIC)
        MODES[kind](large).save(name, exif=exif)
    status, out, _ = told(capsys, *names)
    assert status == 0
    for digit, (name, line) in enumerate(zip(names, out, strict=True)):
        pattern = re.escape(str(name)) + r": (\d) \((\d+\.\d)%\), then (\d) \((\d+\.\d)%\)"
        first, p, second, q = map(float, re.fullmatch(pattern, line).groups())
        assert first == digit != second
        assert p > q


def test_digits_are_told_line_by_line_with_boxes_around_them(tmp_path, capsys):
    picture, tops = Image.new("RGB", (900, 600), "white"), []
    for row, text in enumerate(("2026", "54", "117")):
        for column, digit in enumerate(text):
            tops.append(40 + 180 * row + 12 * (column % 2))
            write(picture, int(digit), 60 + 140 * column, tops[-1], 110, 8, (20, 40, 160))
    picture.save(tmp_path / "sheet.png")
    status, out, err = told(capsys, tmp_path / "sheet.png", "--seen", tmp_path / "seen.png")
    assert (status, out, err) == (0, [f"{tmp_path / 'sheet.png'}: 2 0 2 6 / 5 4 / 1 1 7"], [])
    with Image.open(tmp_path / "seen.png") as seen:
        red = np.asarray(seen.convert("RGB"), dtype=int)
    assert (red[..., 0] - red[..., 1] > 120).sum() > 500  # the frames
    found = reader.digits(picture)
    for (left, top, right, bottom), field in found:
        assert field.shape == (1, 28, 28)
        assert 0 <= field.min() <= field.max() <= 1
        assert 100 <= bottom - top <= 125
        assert right - left <= 80
    assert tops == pytest.approx([box.top for box, _ in found], abs=8)


def test_bad_pictures_are_named_and_the_good_ones_answered(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    seven = drawing((300, 300), (7, 100, 60, 180, 12))
    for name in "good.png", "half.jpg":
        seven.save(name)
    noise = np.random.default_rng(5).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(np.full((300, 200), np.nan, np.float32)).save("nan.tif")
    line, page, large = (Image.new("L", size, 250) for size in ((400, 300), (800, 1000), (1200, 900)))
    ImageDraw.Draw(line).line((50, 150, 350, 160), fill=0, width=6)
    text = ("the quick brown fox jumps over the lazy dog " * 3 + "\n") * 60
    ImageDraw.Draw(page).text((20, 20), text, fill=0)
    ImageDraw.Draw(large).text((20, 20), text, fill=20, font_size=24, spacing=16)
    Path("folder.png").mkdir()
    Path("locked.png").mkdir(mode=0)
    bad = {
        "empty": (b"", "it is empty"),
        "half": (Path("half.jpg").read_bytes()[:3000], "image file is truncated"),
        "nan": (Path("nan.tif").read_bytes(), "it holds values that are not finite"),
        "cut": (Path("good.png").read_bytes()[:500], "image file is truncated"),
        "text": (b"seven", "it is not a picture"),
        "dot": (Image.new("L", (1, 1), 255), "nothing on it stands out from its paper"),
        "white": (Image.new("RGB", (300, 200), "white"), "nothing on it stands out from its paper"),
        "clear": (Image.new("RGBA", (300, 200), (0, 0, 0, 0)), "nothing on it stands out from its paper"),
        "noise": (Image.fromarray(noise), r"(\d+ marks are on it|nothing on it)"),
        "HEIC": (b"\0\0\0\x18ftypheic" + bytes(40), "it is HEIC, AVIF or a film; save it as JPEG"),
        "gradient": (Image.fromarray(np.uint8(np.linspace(60, 250, 400) * np.ones((300, 1)))), "nothing on it"),
        "line": (line, "nothing on it has the size and shape of a digit"),
        "print": (page, r"(\d+ marks are on it|nothing on it has the size and shape)"),
        "large print": (large, r"\d+ marks are on it, most of them unlike digits"),
        "huge": (Image.new("1", (16_000, 12_000)), "it is too large"),
        "folder": (None, "it is a folder without pictures"),
        "locked": (None, "(Permission denied|it is a folder without pictures)"),  # root may read it
        "missing": (None, "No such file or directory"),
    }
    for name, (content, _) in bad.items():
        if isinstance(content, bytes):
            Path(f"{name}.png").write_bytes(content)
        elif content:
            content.save(f"{name}.png")
    status, out, err = told(capsys, *[file for name in bad for file in (f"{name}.png", "good.png")])
    assert (status, [line.split(" (")[0] for line in out]) == (1, ["good.png: 7"] * len(bad))
    for line, (name, (_, problem)) in zip(err, bad.items(), strict=True):
        assert re.match(rf"predict\.py: error: cannot read {name}\.png: {problem}", line)


def test_bad_usage(capsys, tmp_path):
    seven, jpeg = str(HERE / "assets" / "seven.png"), tmp_path / "photo.jpg"
    jpeg.write_bytes(b"a photo")
    own = [seven, "--seen", seven], [seven, "--seen", str(jpeg)], [seven, "--seen", str(tmp_path)]
    for arguments in ([], ["--nonsense", "a.png"], ["a.png", "b.png", "--seen", "c.png"], *own):
        with pytest.raises(SystemExit, match="2"):
            predict.main(arguments)
        assert re.fullmatch(r"predict\.py: error: .+\n", capsys.readouterr().err)
    assert jpeg.read_bytes() == b"a photo"


def test_seen_draws_what_is_left_out_and_a_refused_picture_over_its_own_file_only(tmp_path, capsys):
    page, seen = tmp_path / "page.png", tmp_path / "seen.png"
    Image.new("L", (300, 200), 255).save(page)
    assert told(capsys, page, "--seen", seen)[0] == 1
    refused = seen.read_bytes()
    picture = drawing((900, 400), (7, 100, 100, 150, 12), (3, 400, 100, 150, 12), paper=240)
    ImageDraw.Draw(picture).rectangle((50, 50, 850, 350), outline=0, width=6)
    picture.save(page)
    status, out, (line,) = told(capsys, page, "--seen", seen)
    assert (status, out) == (0, [f"{page}: 7 3"])
    assert re.fullmatch(r"predict\.py: .+page\.png: marks left out: \d+", line)
    assert seen.read_bytes() != refused
    ink = drawing((300, 300), (7, 99, 60, 180, 12, 255), paper=0)
    white = Image.merge("LA", (Image.new("L", (300, 300), 255), ink))
    assert reader.read_picture(white, NET).sheet.min() == 0  # not white on white


def test_json_folders_and_the_pages_of_a_tiff(tmp_path, capsys):
    pages = [drawing((300, 300), (digit, 100, 60, 180, 12)) for digit in (4, 7)]
    pages[0].save(tmp_path / "scan.tif", save_all=True, append_images=pages[1:])
    pages[1].save(tmp_path / "seven.png")
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "._seven.png").write_bytes(b"what macOS writes")
    os.mkfifo(tmp_path / "pipe.png")
    told(capsys, tmp_path / "seven.png", "--seen", tmp_path / "seen.png")
    # Damage that leaves every pixel: a tag that is not text, and no end of the file.
    exif = bytes.fromhex("49492a0008000000020012010300010000000600000000010100020000001400000004a439b4408a")
    pages[1].save(tmp_path / "turned.jpg", exif=b"Exif\0\0" + exif)
    (tmp_path / "turned.jpg").write_bytes((tmp_path / "turned.jpg").read_bytes()[:-2])
    status, out, err = told(capsys, "--json", tmp_path)
    objects = [json.loads(line) for line in out]
    assert (status, err) == (0, [])
    assert [each["digits"][0]["digit"] for each in objects] == [4, 7, 7, 7]
    assert objects[1]["file"] == f"{tmp_path / 'scan.tif'} page 2"
    assert objects[2]["digits"][0]["box"] == pytest.approx((94, 54, 210, 246), abs=6)
    assert 0.9 < objects[2]["digits"][0]["probability"] <= 1
    status, out, err = told(capsys, tmp_path / "scan.tif", "--seen", tmp_path / "seen.png")
    assert (status, out, len(err)) == (1, [], 1)


def test_a_defect_of_the_reader_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(predict, "read_picture", lambda picture, net: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        predict.main([str(HERE / "assets" / "seven.png")])


def test_no_input_and_no_weights(tmp_path, monkeypatch, capsys):
    for stream in None, io.TextIOWrapper(io.BytesIO()):
        monkeypatch.setattr("sys.stdin", stream)
        assert told(capsys, "-")[2] == ["predict.py: error: cannot read -: nothing comes from standard input"]
    (tmp_path / "empty").touch()
    torch.save({1: 2}, tmp_path / "numbers")
    for weights in ("missing", "empty", "numbers"):
        status, out, (line,) = told(capsys, HERE / "assets" / "seven.png", "--weights", tmp_path / weights)
        assert (status, out, line[:19]) == (1, [], "predict.py: error: ")


def test_the_readme_shows_what_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(HERE)
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    commands = re.findall(r"^\$ python predict\.py (.+)$", readme, re.MULTILINE)
    assert commands
    for command in commands:
        arguments = command.replace("seen.png", str(tmp_path / "seen.png")).split()
        monkeypatch.setattr("sys.argv", ["predict.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path("predict.py", run_name="__main__")
        assert ended.value.code == ("missing.png" in command)
        assert "$ python predict.py " + command + "\n" + "".join(capsys.readouterr()) in readme
    table = (HERE / "results" / "sheets.txt").read_text(encoding="utf-8")
    rows = re.findall(r"^(.{14}) +\d+\.\d% +\d+\.\d%$", table, re.MULTILINE)
    assert [kind.rstrip() for kind in rows] == sheets.KINDS + sheets.PAGES + sheets.FORMS
