"""The suite of draw.html: in a real browser, with its own events, against PyTorch and reader/'s fields."""

import base64
import os

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import script
from page import LIMIT, build_page
from page.__main__ import main
from reader.read import as_mnist
from script import MEAN, REFERENCE, STD
from tests.browser import Missing, Page
from tests.helpers import STROKES


def placed(digit, left=0.38, top=0.15, height=0.45):
    """A digit's strokes on the drawing area, which is 1 wide and 0.75 high."""
    return [[(left + x * height / 100, top + y * height / 100) for x, y in stroke] for stroke in STROKES[digit]]


@pytest.fixture(scope="session")
def browser():
    """The browser. Without one these tests are skipped, or fail where REQUIRE_BROWSER is set."""
    try:
        page = Page()
    except Missing as missing:
        (pytest.fail if os.environ.get("REQUIRE_BROWSER") else pytest.skip)(str(missing))
    yield page
    page.driver.quit()


def scores(net, images):
    """Log-probabilities (N, 10) of images (N, 1, 28, 28)."""
    with torch.no_grad():
        return torch.cat([net((batch.float() / 255 - MEAN) / STD) for batch in images.split(1000)])


def write_page(path, net, images, labels):
    """Write a network's page, and return its path."""
    html = build_page(net, script.Loader(images, labels), scores(net, images).argmax(dim=1))
    path.write_bytes(html.encode())
    return path


@pytest.fixture(scope="session")
def file(tmp_path_factory):
    """The reference run's page, made by the command."""
    path = tmp_path_factory.mktemp("page") / "draw.html"
    assert main([str(REFERENCE), str(path)]) == 0
    assert main([str(REFERENCE), str(path)]) == 1  # an existing file stays
    return path


@pytest.fixture
def page(browser, file):
    """The reference run's page, as it opens."""
    browser.open(file)
    yield browser
    assert browser.log("browser") == []  # no message on the console
    assert browser.requests() == [file.as_uri()]


def random_relu_net():
    """A network with ReLU, and statistics of batch normalisation that are not 0 and 1."""
    net = script.Net("relu")
    net((torch.rand(500, 1, 28, 28) - MEAN) / STD)
    return net.eval()


ALL = pytest.param("reference", 10_000, marks=pytest.mark.slow)


@pytest.mark.parametrize(("kind", "count"), [("relu", 100), ("reference", 1000), ALL])
def test_the_page_computes_what_pytorch_computes(browser, tmp_path, test_set, kind, count):
    net = random_relu_net() if kind == "relu" else script.load_net(REFERENCE)
    images, labels = (part[:count] for part in test_set)
    browser.open(write_page(tmp_path / "draw.html", net, images, labels))
    code = """return arguments[0].map((pixels) =>
        [...forward(net, Float32Array.from(bytes(pixels), (value) => value / 255)).logProbabilities])"""
    found = []
    for batch in images.split(1000):
        found += browser.js(code, [base64.b64encode(image.numpy().tobytes()).decode() for image in batch])
    found, expected = torch.tensor(found), scores(net, images)
    assert (found.argmax(dim=1) == expected.argmax(dim=1)).all()
    assert (found - expected).abs().max() < 1e-4


def field_of_picture(strokes):
    """What reader/ makes of a picture of these strokes, (28, 28)."""
    picture = Image.new("L", (1000, 750))
    draw = ImageDraw.Draw(picture)
    for stroke in strokes:
        points = [(x * 1000, y * 1000) for x, y in stroke]
        draw.line(points, fill=255, width=20, joint="curve")
        for x, y in points:
            draw.ellipse((x - 10, y - 10, x + 10, y + 10), fill=255)
    ink = np.asarray(picture) / 255
    return as_mnist(ink)[0].numpy()


WAYS = {  # size and place on the drawing area, and whether with a finger
    "large": ((0.3, 0.02, 0.7), False),
    "small, in a corner": ((0.93, 0.66, 0.07), False),
    "with a finger": ((0.1, 0.3, 0.3), True),
}


@pytest.mark.parametrize("way", WAYS)
def test_each_digit_is_read_of_every_size_and_in_every_place(page, way):
    place, touch = WAYS[way]
    for digit in STROKES:
        page.draw(placed(digit, *place), touch)
        assert page.answer == str(digit)
        assert page.js("return state.strokes[0][0]") == pytest.approx(placed(digit, *place)[0][0], abs=0.003)
        field = np.reshape(page.js("return [...makeField(state.strokes)]"), (28, 28))
        expected = field_of_picture(placed(digit))  # a centre of mass halfway between two pixels may go to either
        moved = [np.roll(expected, (y, x), (0, 1)) for y in (-1, 0, 1) for x in (-1, 0, 1)]
        assert min(np.abs(field - other).mean() for other in moved) < 0.03
        page.js("document.getElementById('clear').click()")
        assert page.answer == ""


def test_digits_beside_and_below_each_other_are_read_in_order(page):
    for text, height, pitch in (("47", 0.45, 0.37), ("515", 0.38, 0.29), ("11", 0.45, 0.1), ("508", 0.3, 0.27)):
        for place, digit in enumerate(text):
            page.draw(placed(int(digit), 0.05 + place * pitch, 0.1, height))
        assert page.answer == " ".join(text)
        page.press("ESCAPE")
    for digit, left, top in ((3, 0.6, 0.37), (1, 0.2, 0.05), (2, 0.5, 0.08), (9, 0.2, 0.4)):
        page.draw(placed(digit, left, top, 0.25))
    assert page.answer == "1 2 / 9 3"
    page.js("document.querySelectorAll('#digits button')[2].click()")
    page.settle()
    assert page.js("return document.querySelector('#question').textContent") == "Evidence for 9"


def test_undo_clear_and_what_is_no_stroke(page):
    assert page.js("return document.querySelector('#hint').textContent")
    first, bar = placed(5, 0.1)
    page.draw([first, bar])
    page.draw([[(0.9, 0.2)], [(0.8, 0.5)]])  # taps
    page.draw(placed(1, 0.6), touch=True)
    assert page.answer == "5 1"
    for count in (4, 3, 2, 1, 0, 0):
        page.driver.find_element("id", "undo").click()
        page.settle()
        assert len(page.js("return state.strokes")) == count
    assert page.answer == ""
    page.draw(placed(8))
    page.command("Emulation.setDeviceMetricsOverride", width=400, height=700, deviceScaleFactor=2, mobile=False)
    assert page.answer == "8"  # the drawing fits the window
    page.driver.find_element("id", "clear").click()
    assert page.answer == ""


def test_a_second_finger_and_a_touch_that_the_device_takes_back_do_not_write(page):
    left, top, width = page.js("const r = pad.getBoundingClientRect(); return [r.left, r.top, r.width]")
    points = [{"x": left + x * width, "y": top + y * width, "id": 0} for x, y in placed(1)[0]]
    palm = {"x": left + 0.9 * width, "y": top + 0.6 * width, "id": 1}
    page.command("Input.dispatchTouchEvent", type="touchStart", touchPoints=points[:1])
    for kind, point in (("touchStart", points[0]), ("touchMove", points[1]), ("touchMove", points[2])):
        palm["x"] -= 0.1 * width
        page.command("Input.dispatchTouchEvent", type=kind, touchPoints=[point, palm])
    page.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
    assert (page.answer, len(page.js("return state.strokes"))) == ("1", 1)
    page.finger([(left + 20, top + 20), (left + 90, top + 90)], end=False)
    page.command("Input.dispatchTouchEvent", type="touchCancel", touchPoints=[])
    assert (page.answer, len(page.js("return state.strokes"))) == ("1", 1)


def test_everything_is_reached_with_keys(page, file):
    for digit in range(10):
        page.press("ESCAPE", str(digit))
        assert page.answer == str(digit)
    page.press("ESCAPE", *"0123456789")
    assert page.answer == "0 1 2 3 4 5 6 7 8 9"
    assert page.js("return state.strokes.flat().every(([x]) => 0 < x && x < 1)")
    page.press("ESCAPE", "4", "2", "CONTROL+z")
    assert page.answer == "4"
    stops = []
    for _ in range(5):
        page.press("TAB")
        stops.append(page.js("const a = document.activeElement; return a.id || a.parentElement.id"))
    assert stops == ["undo", "clear", "digits", "bars", "misread"]
    labels = []
    for key in ("ARROW_RIGHT", "ARROW_RIGHT", "ARROW_LEFT", "END"):
        page.press(key)
        labels.append(page.js("return document.activeElement.getAttribute('aria-label')"))
        assert labels[-1].endswith(page.answer)  # what the list says is what the page reads
        assert page.js("return document.querySelector('#hint').textContent").startswith(labels[-1].split(",")[0])
    assert len({*labels}) == 3
    page.press("CONTROL+z")
    assert page.answer == "4"  # what was written before


def test_on_a_phone_all_is_on_the_first_screen_and_nothing_beside_it(browser, file):
    browser.open(file, 360, 640, dark=True, density=3, phone=True)
    browser.draw(placed(9), touch=True)
    assert browser.answer == "9"
    assert browser.js("return [document.documentElement.scrollWidth, scrollY]") == [360, 0]
    for name in ("pad", "answer", "bars"):
        assert browser.js("return document.getElementById(arguments[0]).getBoundingClientRect().bottom", name) <= 640
    red, green, blue = browser.js("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(red, green, blue) < 60


def test_nothing_can_be_sent_from_the_page(browser, file):
    browser.open(file)
    refused = """const [address, done] = arguments, directives = [];
        document.addEventListener("securitypolicyviolation", (event) => directives.push(event.effectiveDirective));
        fetch(address).catch(() => {});
        new Image().src = address;
        setTimeout(() => done(directives.sort()), 300);"""
    assert browser.driver.execute_async_script(refused, "http://127.0.0.1:9/") == ["connect-src", "img-src"]


def test_every_net_of_script_py_gets_a_page_of_limited_size_and_a_changed_one_none(test_set):
    net, loader = script.Net().train(), script.Loader(*test_set)
    assert len(build_page(net, loader, (test_set[1] + 1) % 10).encode()) <= LIMIT  # all misread
    assert net.training
    assert "misread" in build_page(net, loader, test_set[1])  # none
    other_layer, other_order, other_width = script.Net(), script.Net(), script.Net()
    other_layer.conv3 = torch.nn.Identity()
    other_order.forward = lambda x: script.Net.forward(other_order, x.flip(3))
    other_width.conv6, other_width.norm6 = torch.nn.Conv2d(20, 400, 3, padding=1), torch.nn.BatchNorm2d(400)
    other_width.conv7 = torch.nn.Conv2d(400, 10, 1)
    for changed, problem in ((other_layer, "another"), (other_order, "another"), (other_width, "larger than 200 KB")):
        with pytest.raises(ValueError, match=problem):
            build_page(changed, loader, test_set[1])
