"""Decoders on a GPU: the price book's, or measured ones in their place; each says which it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import run_json
from gpu_results import gpu_result, gpu_row

from kvzip.errors import KVZipError
from kvzip.eval.money.gpu_inputs import with_gpu
from kvzip.eval.money.prices import default_prices
from kvzip.eval.results import stored
from kvzip.eval.results.gpu import COPY, KERNELS, LINK, GpuResult

BOOK = default_prices()


def result(**rates: float) -> GpuResult:
    rows = [gpu_row(name, tokens, rate) for name, rate in rates.items() for tokens in (4096, 1024)]
    rows[1::2] = [gpu_row(r.name, r.tokens) for r in rows[1::2]]
    return gpu_result(rows)


def test_measured_rates_take_the_books_place() -> None:
    book = with_gpu(BOOK, result(**{KERNELS: 900.0, COPY: 2000.0, LINK: 50.0}))
    assert (book.decoder["channel"].value, book.decoder["raw"].value) == (900.0, 2000.0)
    assert (book.link["host-to-h100"].value, book.link["host-to-h100"].unit) == (400.0, "Gb/s")
    assert book.decoder["channel"].basis == "measured"
    assert "Some GPU, bf16, 4,096 tokens, median of 9" in book.decoder["channel"].source
    # What was not measured stays, and so does the book itself.
    assert book.decoder["predictive"] == BOOK.decoder["predictive"]
    assert BOOK.decoder["channel"].value == 639.0
    with pytest.raises(KVZipError, match="has no row"):
        with_gpu(BOOK, result(other=5.0))


def test_the_books_own_say_what_they_are() -> None:
    assert {name: price.basis for name, price in BOOK.decoder.items()} == {
        "raw": "measured", "channel": "measured", "predictive": "target"
    }  # fmt: skip


def test_advice_with_a_gpu_that_decodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["advise", "--model", "qwen3-4b", "--tokens", "8192", "--link", "nvme-gen5"]
    by_cpu = run_json(capsys, *command)[1]
    by_gpu = run_json(capsys, *command, "--decode", "device")[1]
    seconds = {
        name: {o["name"]: o["seconds"] for o in found["options"]}
        for name, found in (("cpu", by_cpu), ("gpu", by_gpu))
    }
    assert seconds["gpu"]["channel"] < seconds["gpu"]["raw"] < seconds["cpu"]["channel"]
    assert seconds["gpu"]["zstd"] == seconds["cpu"]["zstd"]  # which no GPU decodes
    assert "channel a measured rate, predictive a target" in "; ".join(by_gpu["basis"])
    assert "decoders on the GPU" not in "; ".join(by_cpu["basis"])
    stored.save(result(**{KERNELS: 1.0}), tmp_path / "gpu.json")
    slow = run_json(capsys, *command, "--decode", "device", "--gpu", tmp_path / "gpu.json")[1]
    raw = 8192 * 147456
    [channel] = [o["seconds"] for o in slow["options"] if o["name"] == "channel"]
    assert channel == pytest.approx(raw / 1e9 * (1 + 1 / 36))
