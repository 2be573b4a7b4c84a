"""The pictures of docs/images: a page as headless Chromium shows it, whole, on a screen and on a phone.

python tests/report/screenshots.py PAGE OUT    (OUT-1280.png, OUT-390.png, and OUT-diagnostics.png, a part)
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.report.test_browser import CHROMIUM, SANDBOX, SIZES, draw_all  # noqa: E402


def main(page_file: Path, out: str) -> None:
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=SANDBOX)
        for (width, height), theme in zip(SIZES.values(), ("light", "dark"), strict=True):
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=theme)
            page.goto(page_file.absolute().as_uri())
            draw_all(page)
            page.evaluate("scrollTo(0, 0)")
            save(page.screenshot(full_page=True), f"{out}-{width}.png")
            if width == 1280:
                page.get_by_role("link", name="Diagnostics", exact=True).click()
                save(page.screenshot(), f"{out}-diagnostics.png")


def save(shot: bytes, path: str) -> None:
    """In 256 colours."""
    picture = Image.open(io.BytesIO(shot)).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)


main(Path(sys.argv[1]), sys.argv[2])
