"""report.png: the first screens of a report, in an installed Chromium.

make demo
python docs/make_screenshot.py runs/DATE-AND-TIME docs/report.png
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from rewire.report import write

COLOURS = 256


def main(run: str, picture: str = "docs/report.png") -> None:
    """Write the report of ``run``, and show it down to where it stops being a picture."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        page_file = write([Path(run)], out=Path(folder) / "report.html")
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        page = browser.new_page(viewport={"width": 1120, "height": 900}, color_scheme="light")
        page.goto(page_file.resolve().as_uri())
        height = page.locator("#trust").bounding_box()["y"]
        page.screenshot(path=picture, full_page=True, clip={"x": 0, "y": 0, "width": 1120, "height": height})
        browser.close()
    with Image.open(picture) as shot:
        shot.convert("RGB").quantize(COLOURS).save(picture, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
