"""What a model's family changes: sizes by hand, rates as they are stated, and the sentence."""

from __future__ import annotations

import msgspec
import pytest
from command import run, run_json

from kvzip.choice.cost import CodecFigures, break_even_bandwidth
from kvzip.errors import KVZipError
from kvzip.eval.money.families import document_bytes, families, prefill_of, sentence
from kvzip.eval.money.prices import default_prices, load_prices

BOOK = default_prices()
CHANNEL = CodecFigures("channel", 1.54, 1e9)


def rows(**changes: object) -> dict[str, object]:
    given = {"device": "h200", "tokens": 32768, "dtype": "bf16", "codecs": [CHANNEL], **changes}
    return {row.model: row for row in families(BOOK, **given)}  # type: ignore[arg-type]


def test_bytes_a_token_by_hand() -> None:
    wanted = {
        "minimax-m2-5": 2 * 62 * 8 * 128,
        "qwen3-235b": 2 * 94 * 4 * 128,
        "qwen3-5-397b": 2 * 15 * 2 * 256,
        "mimo-v2-flash": 9 * 4 * (192 + 128),
        "deepseek-v3": 61 * (512 + 64),
        "deepseek-v4-pro": 30 * (512 + 128) // 4 + 31 * 512 // 128,
        "deepseek-v4-flash": 21 * (512 + 128) // 4 + 20 * 512 // 128,
    }
    assert {n: BOOK.model[n].numbers_per_token for n in wanted} == wanted
    states = 45 * (64 * 128 * 128 + 3 * (2 * 16 * 128 + 64 * 128))
    assert BOOK.model["qwen3-5-397b"].fixed_numbers == pytest.approx(states, rel=0.01)
    windows = 39 * 128 * 8 * (192 + 128)
    assert BOOK.model["mimo-v2-flash"].fixed_numbers == pytest.approx(windows, rel=0.01)
    # What vLLM's page says of 2^20 tokens.
    pro = document_bytes(BOOK.model["deepseek-v4-pro"], 2**20, 2)
    assert pro / 2**30 == pytest.approx(9.62, abs=0.01)


def test_stated_rates_come_out_as_they_are_stated() -> None:
    found = rows()
    stated = {"minimax-m2-5": 59.93, "qwen3-235b": 33.35, "qwen3-5-397b": 8.25,
              "mimo-v2-flash": 4.66}  # fmt: skip
    for name, gbps in stated.items():
        assert found[name].kv_gbps == pytest.approx(gbps) and found[name].basis == "stated"  # type: ignore[attr-defined]
    others = [r for r in found.values() if r.model not in stated]  # type: ignore[attr-defined]
    assert {r.basis for r in others} == {"modelled"}  # type: ignore[attr-defined]
    assert {r.basis for r in rows(tokens=8192).values()} == {"modelled"}  # type: ignore[attr-defined]


def test_the_rate_is_the_break_even_bandwidth() -> None:
    for row in families(BOOK, "h200", 32768, "bf16", [CHANNEL]):
        for gbps, ratio in ((row.kv_gbps, 1.0), (row.codec_gbps["channel"], 1.54)):
            limit = break_even_bandwidth(row.prefill_seconds, row.raw_bytes, ratio)
            assert limit.value == pytest.approx(1e9 * gbps)


def test_fp8_caches_are_half() -> None:
    half, whole = rows(dtype="fp8_e4m3fn"), rows()
    for name, row in whole.items():
        assert half[name].kv_gbps == pytest.approx(row.kv_gbps / 2)  # type: ignore[attr-defined]


def test_the_sentence() -> None:
    found = families(BOOK, "h200", 32768, "bf16")
    assert "by 4.0 to 12.9" in sentence(found, CHANNEL) and "channel by 1.54" in sentence(
        found, CHANNEL
    )
    assert sentence(families(BOOK, "h100", 1000, "bf16"), CHANNEL) == ""


def test_a_prefill_takes_the_gpus_that_the_weights_take() -> None:
    shape, peak = BOOK.model["deepseek-v3"], BOOK.compute["h200"]
    eight, words = prefill_of(shape, peak, BOOK)
    one, _ = prefill_of(msgspec.structs.replace(shape, gpus=1), peak, BOOK)
    assert one.seconds(1000) == pytest.approx(8 * eight.seconds(1000)) and "each of 8" in words


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("gpus = 0", "gpus is 0"),
        ("kv_gbps = 5.0", "no compute entry"),
        ("utilisation = -1.0", "-1"),
    ],
)
def test_shapes_that_cannot_be(tmp_path, line, says) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "mine.toml"
    path.write_text(
        "[model.mine]\nlayers = 2\nkv_heads = 1\nhead_dim = 8\nquery_heads = 1\nparameters = 1e6\n"
        f'date = "2026"\nsource = "us"\n{line}\n'
    )
    with pytest.raises(KVZipError, match=says):
        load_prices(path)


def test_the_command(capsys) -> None:  # type: ignore[no-untyped-def]
    code, found = run_json(capsys, "eval", "families")
    assert code == 0 and found["rows"][1]["model"] == "minimax-m2-5"
    assert "more" not in found["sentence"] and "4.0 to 12.9" in found["sentence"]
    words = run(capsys, "eval", "families")[1]
    assert "hybrid:" in words
    assert "ratios measured on SmolLM2-135M, taken to hold for every other model" in words
    for row in found["rows"]:
        own = row["model"] == "smollm2-135m"
        held = "" if own else f", taken to hold for {row['model']}"
        assert row["ratio_basis"] == f"ratios measured on SmolLM2-135M{held}"
    command = ["advise", "--model", "qwen3-5-397b", "--tokens", "32768", "--link", "10Gb/s"]
    code, found = run_json(capsys, *command, "--prices", "h200")
    assert code == 0 and found["raw_bytes"] == pytest.approx(32768 * 30720 + 97.6e6)
    assert found["seconds"]["prefill"] == pytest.approx(found["raw_bytes"] * 8 / 8.25e9)
    assert found["dollars"]["prefill"] == pytest.approx(
        found["seconds"]["prefill"] * 8 * 3.59 / 3600
    )
