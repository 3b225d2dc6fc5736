"""Headless Chrome or Chromium with draw.html, driven by trusted events: DevTools injects them as a device does."""

import base64
import json
import os
import shutil

BROWSERS = "google-chrome", "chromium", "chromium-browser"


class Missing(Exception):
    """No browser, or nothing to drive it with."""


class Page:
    """draw.html in a window. Coordinates are shares of the drawing area's width, from its upper left corner."""

    def __init__(self) -> None:
        try:
            from selenium import webdriver
        except ImportError as error:
            raise Missing("selenium is not installed: pip install -r requirements-dev.txt") from error
        # Both are named, so that Selenium downloads nothing.
        browser, driver = next(filter(None, map(shutil.which, BROWSERS)), None), shutil.which("chromedriver")
        if not browser or not driver:
            raise Missing("no Chrome or Chromium with its chromedriver on the PATH")
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        options.add_argument("--headless=new")
        options.add_argument("--hide-scrollbars")
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            options.add_argument("--no-sandbox")  # which Chrome refuses to have as root
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(driver))
        self.driver.set_script_timeout(300)

    def open(self, path, width=1000, height=800, dark=False, density=1, phone=False) -> None:
        """Load the file in a window of this size, in pixels of CSS; a phone has a touch screen."""
        size = {"width": width, "height": height, "deviceScaleFactor": density, "mobile": phone}
        self.command("Emulation.setDeviceMetricsOverride", **size)
        self.command("Emulation.setTouchEmulationEnabled", enabled=phone)
        wishes = {"prefers-color-scheme": "dark" if dark else "light", "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wishes.items()]
        self.command("Emulation.setEmulatedMedia", features=features)
        self.log("browser"), self.log("performance")  # what an earlier page left
        self.driver.get(path.as_uri())

    def command(self, name: str, **parameters):
        """A command of the Chrome DevTools Protocol."""
        return self.driver.execute_cdp_cmd(name, parameters)

    def log(self, kind: str) -> list[str]:
        """The messages since the last call: of the console ("browser") or of DevTools ("performance")."""
        return [entry["message"] for entry in self.driver.get_log(kind)]

    def requests(self) -> list[str]:
        """The addresses that were asked for since the last call."""
        messages = [json.loads(message)["message"] for message in self.log("performance")]
        return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]

    def js(self, script: str, *arguments):
        """What a script returns in the page."""
        return self.driver.execute_script(script, *arguments)

    def settle(self) -> None:
        """Wait until the page has shown what happened."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    @property
    def answer(self) -> str:
        self.settle()
        return self.js("return document.querySelector('[role=status]').textContent")

    def draw(self, strokes, touch=False) -> None:
        """Draw strokes with the mouse or a finger."""
        left, top, width = self.js("const r = pad.getBoundingClientRect(); return [r.left, r.top, r.width]")
        for stroke in strokes:
            points = [(left + x * width, top + y * width) for x, y in stroke]
            self.finger(points) if touch else self.mouse(points)

    def mouse(self, points) -> None:
        """Press the button at the first of these points of the window, and let it go at the last."""
        kinds = ["mousePressed"] + ["mouseMoved"] * len(points) + ["mouseReleased"]
        for kind, (x, y) in zip(kinds, [points[0], *points, points[-1]], strict=True):
            self.command("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)

    def finger(self, points, end=True) -> None:
        """Touch the first of these points of the window, and lift the finger at the last."""
        kinds = ["touchStart"] + ["touchMove"] * (len(points) - 1)
        for kind, (x, y) in zip(kinds, points, strict=True):
            self.command("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
        if end:
            self.command("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def press(self, *keys: str) -> None:
        """Press keys, one after the other; "Control+z" for two at once."""
        from selenium.webdriver import ActionChains, Keys

        for key in keys:
            *held, last = (getattr(Keys, part.upper(), part) for part in key.split("+"))
            chain = ActionChains(self.driver)
            for part in held:
                chain.key_down(part)
            chain.send_keys(last)
            for part in held:
                chain.key_up(part)
            chain.perform()

    def screenshot(self) -> bytes:
        """The window as a PNG."""
        self.settle()
        return base64.b64decode(self.command("Page.captureScreenshot", format="png")["data"])
