"""A picture of the reference run's draw.html, and how long it takes to show what was drawn.

python -m tests.screenshot assets/page.png
"""

import sys
from pathlib import Path

from script import REFERENCE
from tests.browser import Page

# The last stroke grows by a point; the page reads all anew and shows it. A hundred times, in milliseconds, in order.
TIMES = """
    const stroke = state.strokes[state.strokes.length - 1];
    return Array.from({ length: 100 }, () => {
        const [x, y] = stroke[stroke.length - 1];
        stroke.push([x, y + 0.0001]);
        const start = performance.now();
        update();
        return performance.now() - start;
    }).sort((a, b) => a - b);"""


def main(picture):
    """Write the picture, 1,000 pixels wide, and print the times."""
    page = Page()
    try:
        page.open(REFERENCE.with_name("draw.html"), 1000, 905)
        for digits in ("5", "853"):
            page.press("ESCAPE", *digits)
            print(f"an update of {page.answer}: {page.js(TIMES)[50]:.1f} ms, median of 100")
        page.press("ESCAPE", "8", "5")
        Path(picture).write_bytes(page.screenshot())
    finally:
        page.driver.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])
