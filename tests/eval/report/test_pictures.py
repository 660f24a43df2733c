"""Charts as files of their own."""

from __future__ import annotations

from pathlib import Path

from kvzip.eval.report import pictures, svg
from kvzip.eval.results import stored
from kvzip.eval.results.links import Links

DOCS = Path(__file__).parents[3] / "docs"


def test_every_series_has_a_colour() -> None:
    """What a page would style, a file must: a line without a colour is not seen."""
    numbers = range(svg.COLOURS)
    axis = svg.Axis("x", 0, 10, [(0, "0"), (10, "10")], log=False)
    lines = [svg.Curve(f"{i}", f"{i}", f"s{i}", [(0.0, i), (10.0, i)]) for i in numbers]
    drawn = pictures.standalone([svg.curves("c", "t", "d", axis, axis, lines, size=(600, 300))])
    for i in numbers:
        assert f'class="line s{i}"' in drawn
        assert f".s{i} {{ stroke: var(--s{i}); }}" in drawn
        assert drawn.count(f"--s{i}: #") == 2  # on a light ground and on a dark one


def test_the_picture_of_links_is_drawn_from_what_is_stored() -> None:
    found = stored.load(DOCS / "results" / "links.json", Links)
    assert (DOCS / "links.svg").read_text() == pictures.links_file(found)
