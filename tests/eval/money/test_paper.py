"""The paper's table: every figure from its stated inputs."""

from __future__ import annotations

import msgspec
import pytest

from kvzip.choice.auto import MEASURED
from kvzip.errors import KVZipError
from kvzip.eval.money.paper import LONG, RAW_BYTES, PaperRow, paper_table, ratio_needed
from kvzip.eval.money.prices import default_prices
from kvzip.eval.money.ratios import slowdown_of
from kvzip.eval.money.reproduction import reproduction
from kvzip.eval.results.exactness import ExactnessResult, ExactnessRow
from kvzip.eval.results.inputs import Inputs
from kvzip.eval.results.stored import load

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


def test_what_agrees_by_construction_says_so() -> None:
    made = {name for name, row in TABLE.items() if row.by_construction}
    assert made == {"Fleet, everyone prefills", "Egress of one load"}
    for row in TABLE.values():
        assert row.note.startswith("Agrees by construction") == row.by_construction
        assert row.note or row.agrees is not False, row.name


def test_which_size_a_figure_takes_is_said() -> None:
    """The paper's 0.54 GB, or the exact 0.5565."""
    for row in TABLE.values():
        if "0.54 GB" in row.inputs:
            assert "stated 0.54 GB" in row.formula
        if "556.5 MB" in row.inputs:
            assert "exact" in row.formula


def test_rows_are_json() -> None:
    rows = paper_table()
    assert msgspec.json.decode(msgspec.json.encode(rows), type=list[PaperRow]) == rows


def test_the_ratio_alone() -> None:
    assert ratio_needed() == TABLE["Ratio at which shipping beats prefill"].ours


# --- its open question ---------------------------------------------------------------------------

INPUTS = load(MEASURED, Inputs)
FOUND = reproduction(INPUTS)


def test_the_figures_of_its_case_under_short_names() -> None:
    assert {name: round(value, 2) for name, value in FOUND.figures.items()} == {
        "prefill_over_reuse_255": 8.59,
        "prefill_over_reuse_3774": 49.7,
        "fleet_prefill_million_usd": 1.51,
        "fleet_reuse_million_usd": 0.03,
        "egress_over_prefill": 2.58,
        "ratio_needed": 2.65,
    }


def test_every_codec_has_a_verdict_at_every_preset() -> None:
    codecs = {row.codec for row in INPUTS.rows if row.dtype == "bf16"}
    assert {(v.preset, v.codec) for v in FOUND.verdicts if v.dtype == "bf16"} == {
        (preset, codec) for preset in default_prices().preset for codec in codecs
    }
    for v in FOUND.verdicts:
        assert (v.verdict == "load") == (v.load_usd < v.prefill_usd) or v.verdict == "unknown"


def test_the_trap_opens_where_the_ratio_is_reached() -> None:
    assert {a.dtype for a in FOUND.answers} == {"fp16", "bf16"}
    for answer in FOUND.answers:
        assert answer.opens == (answer.ratio >= answer.ratio_needed)
        assert answer.egress_usd_per_gb / 0.09 == pytest.approx(answer.ratio / answer.ratio_needed)
    raw = next(a for a in FOUND.answers if a.codec == "raw")
    assert raw.egress_usd_per_gb == pytest.approx(0.034, abs=5e-4)
    assert raw.bandwidth_mbps == pytest.approx(309, rel=0.03)


def test_a_better_codec_opens_it() -> None:
    rows = [
        msgspec.structs.replace(row, ratio=2.7) if row.codec == "channel" else row
        for row in INPUTS.rows
    ]
    found = reproduction(msgspec.structs.replace(INPUTS, rows=rows))
    assert {a.codec for a in found.answers if a.opens} == {"channel"}


def test_inputs_of_other_dtypes_are_no_answer() -> None:
    rows = [msgspec.structs.replace(row, dtype="fp32") for row in INPUTS.rows]
    with pytest.raises(KVZipError, match="neither fp16 nor bf16"):
        reproduction(msgspec.structs.replace(INPUTS, rows=rows))


def test_measured_exactness_stands_beside_the_papers() -> None:
    row = ExactnessRow("channel", False, 1.5, 4, 4, 2, 96, 96, 96, 24, 0.0)
    made = ExactnessResult(
        command="",
        date="",
        machine=INPUTS.machine,
        versions={},
        model="m",
        revision="r",
        dtype="bf16",
        documents=["a", "b"],
        document_tokens=[512, 300],
        continuations=2,
        new_tokens=24,
        rows=[row, msgspec.structs.replace(row, name="int8", lossy=True, tokens_matching=50)],
        fresh=msgspec.structs.replace(row, max_logit_difference=0.25),
    )
    found = reproduction(INPUTS, exactness=made).beside
    assert [(b.paper, b.ours) for b in found] == [
        ("24 of 24", "96 of 96"),
        ("0.02", "0.25"),
        ("16 of 32", "50 of 96"),
    ]
    assert FOUND.beside == []


def test_a_wider_models_prediction_takes_longer() -> None:
    """Of both answers, the paper's document and its fleet, as of `kvzip advise`."""
    shape = default_prices().model["qwen3-4b"]
    slow = slowdown_of("predictive", shape, INPUTS)
    assert slow > 2
    measured = next(f for f in INPUTS.figures("bf16", LONG) if f.name == "predictive")
    found = next(
        v
        for v in FOUND.verdicts
        if (v.preset, v.dtype, v.codec) == ("paper-m1pro", "bf16", "predictive")
    )
    rent = default_prices().base("paper-m1pro").device.value
    seconds = RAW_BYTES / measured.decode_rate * slow
    assert found.decode_usd == pytest.approx(seconds / 3600 * rent)
    assert f"predictive {slow:.1f} times" in FOUND.basis
