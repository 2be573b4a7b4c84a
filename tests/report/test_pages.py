"""Charts, tables and the page as text; what they look like in a browser is in test_browser.py."""

from __future__ import annotations

import base64
import gzip
import json
import re
import xml.etree.ElementTree
from html.parser import HTMLParser

import pytest

from pymerge.errors import InputError, OutputError
from pymerge.report.figures import Chart, Section, Table, write_figures
from pymerge.report.page import html_of, write_page
from tests.report.pages import HOSTILE, every_chart, hostile_sections

AXES = {"x_label": "x", "y_label": "y", "alt": "what it shows"}


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the texts."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def data_of(page: str) -> dict:
    packed = re.search(r'id="data">([A-Za-z0-9+/=]+)</script>', page)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


@pytest.mark.parametrize("series", [{}, {"a": [1.0]}])
def test_a_chart_needs_a_value_a_place(series):
    with pytest.raises(ValueError, match="no series|'a' has 1 values at 2 places"):
        Chart("line", "title", [0, 1], series, **AXES)


def test_a_chart_is_of_a_known_kind_and_a_row_has_a_cell_a_column():
    with pytest.raises(ValueError, match="line, bar, heatmap, scatter, histogram, got 'pie'"):
        Chart("pie", "title", [0], {"a": [1]}, **AXES)
    with pytest.raises(ValueError, match="a row has 1 cells, there are 2 columns"):
        Table("title", ["a", "b"], [[1]])


def test_the_page_has_every_text_and_no_element_of_its_names():
    pytest.importorskip("plotly")
    page = html_of(HOSTILE[0], HOSTILE[1], hostile_sections())
    elements = Elements(page)
    tags = [tag for tag, _ in elements.found]
    assert tags.count("script") == 3 and not {"img", "b", "i", "iframe", "link"} & set(tags)
    assert not any(name.startswith("on") for _, attributes in elements.found for name in attributes)
    assert HOSTILE[0] in elements.texts and HOSTILE[1] in elements.texts and HOSTILE[2] in elements.texts


def test_the_page_carries_the_numbers_and_the_escaped_names():
    pytest.importorskip("plotly")
    page = html_of("title", "subtitle", hostile_sections())
    data = data_of(page)
    line = data["charts"][0]
    assert [name for name, _ in line["series"]] == [HOSTILE[1], "gaps", "_private"]
    assert line["series"][1][1] == [0.001, 0.01, 0.1, None, 10.0, 100.0, 1000.0, None, 100000.0, 1e6]
    assert line["series"][2][1][:3] == [None, None, 3.0]  # NaN and Inf
    (table,) = data["tables"]
    assert table["rows"][7] == [r"line\nbreak\x00\x1b[31m\u2028\u202e\ud800", 7, 1.0]
    assert table["rows"][3] == [HOSTILE[3], 3, 0.428571]


def test_the_same_sections_give_the_same_page(tmp_path):
    pytest.importorskip("plotly")
    for name in ("a.html", "b.html"):
        write_page(tmp_path / "new" / name, "title", "subtitle", hostile_sections())
    first, second = (tmp_path / "new" / name for name in ("a.html", "b.html"))
    assert first.read_bytes() == second.read_bytes() and first.stat().st_size < 2_500_000


def test_a_text_with_line_breaks_keeps_them():
    pytest.importorskip("plotly")
    page = html_of("title", "subtitle", [Section("s", ["one <b>", "a:\n  b: <i>"])])
    assert "<p>one &lt;b&gt;</p>" in page and "<pre>a:\n  b: &lt;i&gt;</pre>" in page


@pytest.mark.parametrize("what", ["page", "figures"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, what):
    pytest.importorskip("plotly")
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="file.*cannot be written"):
        if what == "page":
            write_page(tmp_path / "file" / "page.html", "title", "subtitle", [])
        else:
            write_figures(tmp_path / "file", hostile_sections())


def test_a_missing_library_is_named_with_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match=r'needs plotly: pip install "pymerge\[report\]"'):
        write_page(tmp_path / "page.html", "title", "subtitle", [])
    with pytest.raises(InputError, match=r'need matplotlib: pip install "pymerge\[report\]"'):
        write_figures(tmp_path, hostile_sections())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:Glyph")
def test_every_chart_is_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    written = write_figures(tmp_path, [Section("s", charts=every_chart())])
    kinds = ["lines", "bars", "heat", "points", "counts"]
    assert [path.name for path in written] == [f"{n:02d}-{kind}.png" for n, kind in enumerate(kinds, start=1)]
    for path in written:
        with image.open(path) as picture:
            assert picture.size == (1200, 675) and len(picture.convert("RGB").getcolors(1 << 20)) > 20


@pytest.mark.filterwarnings("ignore:Glyph")
def test_pictures_for_papers_have_names_as_text(tmp_path):
    pytest.importorskip("matplotlib")
    names = ("short", "<b>$x_1$</b>")
    chart = Chart("bar", "Bars", ["p", "q"], {name: [1.0, None] for name in names}, **AXES)
    (path,) = write_figures(tmp_path, [Section("s", charts=[chart])], "svg")
    texts = [node.text for node in xml.etree.ElementTree.parse(path).iter() if node.tag.endswith("}text")]
    assert {"Bars", "x", "y", "p", "q"} <= set(texts) and {name for name in names} <= {t.strip() for t in texts}
    first = path.read_bytes()
    write_figures(tmp_path, [Section("s", charts=[chart])], "svg")
    assert path.read_bytes() == first
