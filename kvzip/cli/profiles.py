"""kvzip fit, eval pages: what a codec can learn of a model, and pages coded with it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Literal

import msgspec
from rich.table import Table

import kvzip
from kvzip.cli.app import app, evaluate
from kvzip.cli.arguments import Json, Output, integers
from kvzip.cli.documents import sizes
from kvzip.cli.terminal import bar, emit, say, show_table, steps
from kvzip.errors import UsageError
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot


@app.command
def fit(
    snapshots: list[Path],
    *,
    output: Output,
    codec: Literal["predictive", "channel"] = "predictive",
    held_out: int | None = None,
    token_table: bool | None = None,
    regions: int | None = None,
    max_bytes: int | None = None,
    resume: Path | None = None,
    as_json: Json = False,
) -> None:
    """Learn a profile of a model from snapshots of its caches.

    Parameters
    ----------
    snapshots
        Documents of one model, as `kvzip capture` writes them.
    codec
        What the profile is for: predictive, or channel, which takes its tables from there; they
        are then neither made for each document nor stored with it. The options below
        `--held-out` are for predictive.
    held_out
        How many of them are not learned from but measured on. Default: a tenth, if there are more
        than two.
    token_table
        Keep what the first layers make of each token that is seen. Default: yes.
    regions
        Predictors of each layer, of which a token takes one. Default: as many as the documents
        and `max_bytes` allow, more in the first layers.
    max_bytes
        How big the profile may get; one predictor a layer it always has. Default: 134 MB.
    resume
        A folder for finished layers: the same command goes on where it was ended.
    """
    count = len(snapshots) // 10 + (len(snapshots) > 2) if held_out is None else held_out
    if not 0 <= count < len(snapshots):
        raise UsageError(f"--held-out {count}: {len(snapshots)} snapshots are given")
    given = {"token_table": token_table, "regions": regions, "max_bytes": max_bytes}
    settings = {name: v for name, v in (given | {"resume": resume}).items() if v is not None}
    if codec != "predictive" and settings:
        option = next(iter(settings)).replace("_", "-")
        raise UsageError(f"--{option} is for predictive, not for {codec}")
    apart = {int((i + 0.5) * len(snapshots) / count) for i in range(count)}
    learned = [p for i, p in enumerate(snapshots) if i not in apart]
    began = time.perf_counter()
    with steps() as tell:
        profile = Profile.fit(learned, tell, codec, **settings)
    seconds = time.perf_counter() - began
    profile.save(output)
    measured = _measured([snapshots[i] for i in sorted(apart)], profile)
    bits = [m["bits_per_value"] for m in measured]
    result = {
        "profile": str(output),
        "codec": codec,
        "id": profile.id,
        "bytes": profile.nbytes,
        "documents": len(learned),
        "tokens": profile.description["tokens"],
        "seconds": seconds,
        "held_out": measured,
        "held_out_bits_per_value": sum(bits) / len(bits) if bits else None,
    }
    taken = f"{len(learned)} documents, {seconds:.0f} s"
    if codec == "predictive":
        from kvzip.codecs.predictive.fit import multiplications

        products = multiplications(profile)
        result |= {
            "multiplications_per_token": sum(products),
            "multiplications_per_token_and_layer": products,
            "regions": [len(profile.tensors[f"{i}.bias"]) for i in range(len(products))],
        }
        taken += f"; {sum(products):,} multiplications a token, {max(products):,} at most a layer"

    def show() -> None:
        say(f"{output}: {profile.nbytes:,} bytes from {taken}")
        for m in measured:
            line = f"held out: {m['bits_per_value']:.2f} bits a number, ratio {m['ratio']:.3f}"
            say(f"{line}, {m['file']}")

    emit(result, as_json, show)


def _measured(held_out: list[Path], profile: Profile) -> list[dict[str, Any]]:
    """How small documents become with the profile."""
    measured = []
    with bar("held-out documents", len(held_out), in_bytes=False) as advance:
        for path in held_out:
            snapshot = Snapshot.load(path)
            found = sizes(snapshot.layout, len(kvzip.encode(snapshot, profile.codec, profile)))
            measured.append({"file": str(path)} | found | {"tokens": snapshot.tokens})
            advance(1)
    return measured


@evaluate.command
def pages(
    snapshots: list[Path], *, profile: Path, tokens: str = "16,32,64,128,256", as_json: Json = False
) -> None:
    """How small documents become as pages, blocks of a few tokens that engines move; each page is
    decoded again and compared.

    Parameters
    ----------
    snapshots
        Documents, as `kvzip capture` writes them.
    profile
        One with tables of channel: kvzip fit --codec channel.
    tokens
        Of a page, with commas between.
    """
    from kvzip.eval.speed.pages import measure

    with steps() as tell:
        found = measure(snapshots, Profile.load(profile), integers("--tokens", tokens), tell)
    rows = [
        msgspec.to_builtins(f) | {"ratio": f.ratio, "bits_per_value": f.bits_per_value}
        for f in found
    ]

    def show() -> None:
        table = Table("tokens", "layers", "pages", "bytes a page", "bits a number", "ratio")
        for f in found:
            sizes = (f"{f.encoded_bytes / f.pages:,.0f}", f"{f.bits_per_value:.2f}")
            counts = (f"{f.tokens}", f"{f.layers}", f"{f.pages:,}")
            table.add_row(*counts, *sizes, f"{f.ratio:.3f}")
        show_table(table)

    emit({"pages": rows}, as_json, show)
