"""kvzip fit: what a codec can learn of a model."""

from __future__ import annotations

import time
from pathlib import Path

import kvzip
from kvzip.cli.app import app
from kvzip.cli.arguments import Json, Output
from kvzip.cli.documents import sizes
from kvzip.cli.terminal import bar, emit, say, steps
from kvzip.errors import UsageError
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot


@app.command
def fit(
    snapshots: list[Path],
    *,
    output: Output,
    held_out: int | None = None,
    token_table: bool = True,
    regions: int | None = None,
    max_bytes: int = 134_000_000,
    resume: Path | None = None,
    as_json: Json = False,
) -> None:
    """Learn a profile of a model from snapshots of its caches.

    Parameters
    ----------
    snapshots
        Documents of one model, as `kvzip capture` writes them.
    held_out
        How many of them are not learned from but measured on. Default: a tenth, if there are more
        than two.
    token_table
        Keep what the first layers make of each token that is seen.
    regions
        Predictors of each layer, of which a token takes one. Default: as many as the documents
        and `max_bytes` allow, more in the first layers.
    max_bytes
        How big the profile may get; one predictor a layer it always has.
    resume
        A folder for finished layers: the same command goes on where it was ended.
    """
    from kvzip.codecs.predictive.fit import multiplications

    count = len(snapshots) // 10 + (len(snapshots) > 2) if held_out is None else held_out
    if not 0 <= count < len(snapshots):
        raise UsageError(f"--held-out {count}: {len(snapshots)} snapshots are given")
    apart = {int((i + 0.5) * len(snapshots) / count) for i in range(count)}
    learned = [p for i, p in enumerate(snapshots) if i not in apart]
    began = time.perf_counter()
    with steps() as tell:
        profile = Profile.fit(
            learned,
            progress=tell,
            token_table=token_table,
            regions="auto" if regions is None else regions,
            max_bytes=max_bytes,
            resume=resume,
        )
    seconds = time.perf_counter() - began
    profile.save(output)
    measured = []
    with bar("held-out documents", count, in_bytes=False) as advance:
        for i in sorted(apart):
            snapshot = Snapshot.load(snapshots[i])
            blob = kvzip.encode(snapshot, "predictive", profile)
            measured.append(
                {"file": str(snapshots[i])}
                | sizes(snapshot.layout, len(blob))
                | {"tokens": snapshot.tokens}
            )
            advance(1)
    products = multiplications(profile)
    bits = [m["bits_per_value"] for m in measured]
    result = {
        "profile": str(output),
        "id": profile.id,
        "bytes": profile.nbytes,
        "documents": len(learned),
        "tokens": profile.description["tokens"],
        "seconds": seconds,
        "multiplications_per_token": sum(products),
        "multiplications_per_token_and_layer": products,
        "regions": [len(profile.tensors[f"{i}.bias"]) for i in range(len(products))],
        "held_out": measured,
        "held_out_bits_per_value": sum(bits) / len(bits) if bits else None,
    }

    def show() -> None:
        say(
            f"{output}: {profile.nbytes:,} bytes from {len(learned)} documents, {seconds:.0f} s; "
            f"{sum(products):,} multiplications a token, {max(products):,} at most a layer",
        )
        for m in measured:
            line = f"held out: {m['bits_per_value']:.2f} bits a number, ratio {m['ratio']:.3f}"
            say(f"{line}, {m['file']}")

    emit(result, as_json, show)
