"""The paper's table: every figure from its stated inputs."""

from __future__ import annotations

import msgspec
import pytest

from kvzip.eval.paper import PaperRow, paper_table, ratio_needed

TABLE = {row.name: row for row in paper_table()}


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("Reuse against prefill, 255 tokens", "8.6"),
        ("Reuse against prefill, 3,774 tokens", "49.7"),
        ("Break-even reads, 255 tokens", "1.13"),
        ("Break-even reads, 3,774 tokens", "1.02"),
        ("Fleet, everyone prefills", "1.5"),
        ("Fleet, compute of reuse", "0.03"),
        ("Egress of one load", "0.049"),
        ("Egress over the prefill it saves", "2.6"),
        ("What a reader's tariff saves", "10"),
    ],
)
def test_figures_that_agree(name: str, figure: str) -> None:
    row = TABLE[name]
    assert f"{row.ours:.{row.digits}f}" == figure
    assert row.paper == float(figure)
    assert row.agrees is True


@pytest.mark.parametrize(
    ("name", "figure"),
    [
        ("Ratio at which shipping beats prefill", "2.65"),
        ("The same at $0.05/GB", "1.47"),
        ("Egress price at which raw bytes break even", "0.034"),
        ("Break-even bandwidth, raw", "309"),
        ("Break-even bandwidth, ratio 1.5x", "206"),
        ("Break-even bandwidth, ratio 2.2x", "140"),
    ],
)
def test_figures_that_follow_are_marked_derived(name: str, figure: str) -> None:
    row = TABLE[name]
    assert f"{row.ours:.{row.digits}f}" == figure
    assert row.paper is None and row.agrees is None and row.derived


def test_where_the_paper_rounds_otherwise_it_is_said() -> None:
    assert {name for name, row in TABLE.items() if row.agrees is False} == {
        "Cache of a token",
        "Cache of 3,774 tokens",
    }
    assert TABLE["Cache of 3,774 tokens"].ours == pytest.approx(0.5565, abs=5e-5)
    assert "556.5 MB" in TABLE["Cache of 3,774 tokens"].note
    assert "2.65x" in TABLE["Egress over the prefill it saves"].note
    assert "6.03 bits" in TABLE["Ratio at which shipping beats prefill"].note


def test_every_figure_that_rests_on_a_derived_price_says_so() -> None:
    for row in TABLE.values():
        if "per Mtok" in row.inputs or "/GB" in row.inputs:
            assert row.derived, row.name


def test_rows_are_json() -> None:
    rows = paper_table()
    assert msgspec.json.decode(msgspec.json.encode(rows), type=list[PaperRow]) == rows


def test_the_ratio_alone() -> None:
    assert ratio_needed() == TABLE["Ratio at which shipping beats prefill"].ours
