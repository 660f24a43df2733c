"""A demo's result in words, for a terminal."""

from __future__ import annotations

from kvzip.eval.quantities import speed
from kvzip.eval.results.demo import DemoResult


def summary(result: DemoResult) -> str:
    """The result in a few lines."""
    best = max(result.codecs, key=lambda c: c.ratio)
    lines = [
        f"{result.model.id}, {result.tokens:,} tokens, {result.dtype}: "
        f"{result.raw_bytes / 1e6:.1f} MB of KV cache, prefill {result.prefill_seconds:.2f} s",
        f"best ratio: {best.name} {best.ratio:.3f} ({best.bits_per_value:.2f} bits a number), "
        f"decodes {speed(best.decode_gbps)}",
        f"exact: {'yes, every byte' if result.exact else 'NO'}; tokens equal: "
        f"{result.tokens_equal} of {result.new_tokens} (a new prefill, which rounds "
        f"otherwise: {result.fresh_prefill.tokens_equal})",
    ]
    return "\n".join(lines)
