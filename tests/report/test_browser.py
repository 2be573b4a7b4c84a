"""Pages in a real browser: headless Chromium draws, sorts, hovers, switches themes, and runs no hostile name.

`make test-browser` has what they need: playwright and the system's Chromium (or the one that CHROMIUM names).
"""

from __future__ import annotations

import io
import os
import re
import shutil
from pathlib import Path

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is missing: make test-browser")
pytest.importorskip("plotly", reason='plotly is missing: pip install "pymerge[report]"')
images = pytest.importorskip("PIL.Image", reason="pillow is missing: make test-browser")

from pymerge.report.merge_page import report  # noqa: E402
from pymerge.report.page import write_page  # noqa: E402
from tests.report.pages import HOSTILE, hostile_sections, summary_of_a_large_merge  # noqa: E402

CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium, or set CHROMIUM")
WAIT = 60_000  # milliseconds until what never comes is given up
sync_api.expect.set_options(timeout=WAIT)
SANDBOX = [] if os.geteuid() else ["--no-sandbox"]  # root has none
SIZES = {"wide": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        found = play.chromium.launch(executable_path=CHROMIUM, args=SANDBOX)
        yield found
        found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """The pages, by name."""
    folder = tmp_path_factory.mktemp("pages")
    write_page(folder / "hostile.html", HOSTILE[0], HOSTILE[1], hostile_sections())
    report(summary_of_a_large_merge(folder / "large"), folder / "large.html")
    return {"hostile": folder / "hostile.html", "large": folder / "large.html"}


@pytest.fixture
def opened(browser, files):
    """Opens a page; at the end nothing may have been said on the console or asked of the network."""
    said, contexts = [], []

    def open_page(name: str, size: str = "wide", **options):
        width, height = SIZES[size]
        context = browser.new_context(viewport={"width": width, "height": height}, has_touch=size == "phone", **options)
        context.set_default_timeout(WAIT)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith(("file:", "data:", "blob:")) or said.append(request.url)
        )
        page.goto(files[name].as_uri())
        return page

    open_page.said = said
    yield open_page
    for context in contexts:
        context.close()
    assert said == []


def draw_all(page) -> None:
    """Scrolls to each chart and table of the open sections, until it is drawn."""
    for box in page.locator("details[open] > figure, details[open] > .table").all():
        box.scroll_into_view_if_needed()
        box.locator(".main-svg, table").first.wait_for()


def colours(shot: bytes) -> int:
    return len(images.open(io.BytesIO(shot)).convert("RGB").getcolors(1 << 24))


def cells(page, column: int, title: str) -> list[str]:
    return (
        page.get_by_role("region", name=title, exact=True).locator(f"tbody tr > :nth-child({column})").all_inner_texts()
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["hostile", "large"])
def test_every_chart_is_drawn_and_nothing_is_wider_than_the_screen(opened, name, size):
    page = opened(name, size)
    draw_all(page)
    plots = page.locator("details[open] > figure .plot")
    assert plots.count() >= 5
    for plot in plots.all():
        assert colours(plot.screenshot()) > 10  # background alone: one; axes and text: shades of grey
        marks = plot.locator(".points path, .lines path, .hm image, .trace path")
        assert marks.count() > 0
    assert page.evaluate("document.documentElement.scrollWidth") == SIZES[size][0]
    assert colours(page.screenshot(full_page=True)) > 100


def test_hostile_names_are_shown_and_never_run(opened):
    page = opened("hostile")
    draw_all(page)
    page.evaluate("document.querySelectorAll('details').forEach((closed) => (closed.open = true))")
    draw_all(page)
    assert page.evaluate("window.hacked") is None
    assert page.title() == page.locator("h1").inner_text() == HOSTILE[0]
    assert page.locator("img[src=x], h1 script, td script, b, i").count() == 0
    # All are there, word for word, with control characters as their escape sequences.
    assert cells(page, 1, HOSTILE[2])[: len(HOSTILE) - 1] == list(HOSTILE[:-1])
    assert cells(page, 1, HOSTILE[2])[len(HOSTILE) - 1] == r"line\nbreak\x00\x1b[31m\u2028\u202e\ud800"
    assert HOSTILE[5] in page.locator("figure").nth(1).locator(".legend").text_content()
    ticks = page.locator("figure").nth(1).locator(".xtick").all_text_contents()
    assert HOSTILE[0] in ticks and HOSTILE[6] in ticks


def test_the_policy_of_the_page_runs_no_other_script_and_loads_nothing(opened):
    page = opened("hostile")
    add = "(code) => document.body.append(Object.assign(document.createElement('script'), {textContent: code}))"
    page.evaluate(add, "window.hacked = 1")
    image = "https://example.org/x.png"
    page.evaluate("(src) => document.body.append(Object.assign(new Image(), {src}))", image)
    page.get_by_role("button", name="theme").click()  # the page's own goes on
    assert page.evaluate("[window.hacked, document.documentElement.dataset.theme]") == [None, "dark"]
    said = [text for text in opened.said if text != image]  # which the browser counts as asked for and not sent
    opened.said.clear()
    assert len(said) == 2 and all("Content Security Policy" in text and "blocked" in text for text in said)


def test_a_table_is_sorted_and_filtered(opened):
    page = opened("hostile")
    draw_all(page)
    table = page.get_by_role("region", name=HOSTILE[2], exact=True)
    head = table.locator("thead th").nth(2)
    as_given = cells(page, 3, HOSTILE[2])
    assert len(as_given) == 200  # of 258: the rest behind a button
    head.get_by_role("button").click()
    rising = cells(page, 3, HOSTILE[2])
    assert head.get_attribute("aria-sort") == "ascending"
    assert [float(text) for text in rising] == sorted(float(text) for text in rising) and rising[0] == "0"
    head.get_by_role("button").press("Enter")  # by keyboard
    assert head.get_attribute("aria-sort") == "descending" and cells(page, 3, HOSTILE[2])[0] == "1"
    page.get_by_role("button", name="Show all 258 rows").click()
    assert len(cells(page, 3, HOSTILE[2])) == 258 and cells(page, 3, HOSTILE[2])[-1] == ""  # no value: last
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "none" and cells(page, 3, HOSTILE[2])[:200] == as_given
    page.get_by_role("searchbox", name=f"Filter rows of {HOSTILE[2]}").fill("ROW 24")
    assert cells(page, 1, HOSTILE[2]) == ["row 24", *(f"row {n}" for n in range(240, 250))]


def test_a_chart_says_its_values_under_the_mouse_and_by_the_keyboard(opened):
    page = opened("hostile")
    draw_all(page)
    bars = page.locator("figure").nth(1)
    bars.scroll_into_view_if_needed()
    bars.locator(".points path").first.hover(force=True)
    hover = bars.locator(".hoverlayer .hovertext")
    hover.first.wait_for()
    assert HOSTILE[0] in "".join(hover.all_text_contents())
    plot, said = bars.locator(".plot"), bars.locator(".said")
    plot.focus()
    plot.press("ArrowRight")
    assert said.inner_text() == f"first, {HOSTILE[1]}: 2"
    plot.press("ArrowDown")
    assert said.inner_text() == f"{HOSTILE[5]}, {HOSTILE[1]}: 9"
    assert plot.get_attribute("role") == "img"
    assert page.locator(f"#{plot.get_attribute('aria-labelledby')}").inner_text() == HOSTILE[2]


def test_a_chart_is_filtered_and_ordered_and_has_its_values_as_a_table(opened):
    page = opened("hostile")
    draw_all(page)
    bars = page.locator("figure").nth(1)
    bars.get_by_label("largest first").check()
    sync_api.expect(bars.locator(".xtick").first).to_have_text("last")
    bars.get_by_role("searchbox").fill("pla")
    sync_api.expect(bars.locator(".xtick")).to_have_text(["plain"])
    bars.locator("summary").click()
    row = bars.locator("tbody tr").first
    sync_api.expect(row.locator("th, td")).to_have_text([HOSTILE[0], "1", "10"])  # filled when it is opened: waits


@pytest.mark.parametrize("system", ["light", "dark"])
def test_theme_follows_the_system_until_it_is_switched_and_is_kept(opened, system):
    page = opened("large", color_scheme=system)
    draw_all(page)

    def brightness() -> tuple[float, float]:
        """Of the page, and of the words in a chart."""
        page_colour, ink = page.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('.xtick text')).fill]"
        )
        return tuple(sum(map(int, text[4:-1].split(","))) / 765 for text in (page_colour, ink))

    def is_dark() -> bool:
        paper, ink = brightness()
        assert abs(paper - ink) > 0.5
        return paper < ink

    assert is_dark() == (system == "dark")
    other = "light" if system == "dark" else "dark"
    page.get_by_role("button", name=f"{other} theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == other and is_dark() == (other == "dark")
    page.reload()
    draw_all(page)
    assert is_dark() == (other == "dark")


def test_closed_sections_are_drawn_when_they_are_opened(opened):
    page = opened("large")
    draw_all(page)
    section = page.locator("details", has=page.get_by_role("heading", name="Checksums"))
    assert section.locator("table").count() == 0
    page.get_by_role("link", name="Checksums").click()
    section.locator("table").wait_for()
    assert section.locator("tbody tr").count() == 200


def test_a_chart_whose_section_was_closed_meanwhile_has_size_and_theme_of_the_page(opened):
    page = opened("hostile", color_scheme="light")
    draw_all(page)
    plot = page.locator("figure .plot").first
    width, summary = plot.bounding_box()["width"], page.locator("summary").first
    summary.click()
    page.get_by_role("button", name="dark theme").click()
    summary.click()
    label = plot.locator(".xtick text").first
    sync_api.expect(label).to_have_css("fill", "rgb(230, 234, 240)")
    assert plot.locator(".main-svg").first.bounding_box()["width"] == width


def test_axes_name_what_is_in_sight(opened):
    page = opened("large", "phone")
    draw_all(page)
    heat = page.locator("figure", has=page.get_by_role("heading", name="SVC: mean divisor"))
    before = heat.locator(".xtick").count()
    assert 2 < before < 80
    page.evaluate("(box) => Plotly.relayout(box, {'xaxis.range': [9.5, 14.5]})", heat.locator(".plot").element_handle())
    in_sight = heat.locator(".xtick").filter(has_text=re.compile(r"\d"))
    sync_api.expect(in_sight).to_have_text(["10", "11", "12", "13", "14"])
