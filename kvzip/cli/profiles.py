"""kvzip fit: what a codec can learn of a model."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from kvzip.cli.app import app
from kvzip.cli.arguments import Json, Output, refuse_twice
from kvzip.cli.terminal import bar, counted, emit, say, steps
from kvzip.errors import UsageError
from kvzip.files import scratch_folder
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.statistics.documents import check_apart, hold_out
from kvzip.statistics.splits import Cut


@app.command
def fit(
    snapshots: list[Path],
    *,
    output: Output,
    codec: Literal["predictive", "channel"] = "predictive",
    split: str | None = None,
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
    split
        For a model that an engine cuts over workers, `tp=2`, `pp=2` or `tp=2,pp=2`: a profile for
        each part of its heads and layers. `-o m.kvprofile` writes m.tp2pp1.0.kvprofile and so on;
        an engine that is told of m.kvprofile takes those of its own split.
    held_out
        How many of them are not learned from but measured on. Default: a tenth, if there are more
        than two.
    token_table
        Keep what the first layers make of each token that is seen. Default: yes.
    regions
        Predictors of each layer, of which a token takes one. Default: as many as the documents
        and `max_bytes` allow, more in the first layers.
    max_bytes
        How big the profile may get, where `regions` is not given. One predictor a layer it always
        has; if need be it knows fewer tokens and its weights are coarser. Default: 134 MB, or what
        the smallest takes. If there is no room for that, the error says about how many it takes.
    resume
        A folder for finished layers: the same command goes on where it was ended.
    """
    refuse_twice(snapshots)
    count = len(snapshots) // 10 + (len(snapshots) > 2) if held_out is None else held_out
    if not 0 <= count < len(snapshots):
        raise UsageError(f"--held-out {count}: {len(snapshots)} snapshots are given")
    given = {"token_table": token_table, "regions": regions, "max_bytes": max_bytes}
    settings = {name: v for name, v in (given | {"resume": resume}).items() if v is not None}
    if codec != "predictive" and settings:
        option = next(iter(settings)).replace("_", "-")
        raise UsageError(f"--{option} is for predictive, not for {codec}")
    learned, left_out = hold_out(snapshots, count)
    check_apart(learned, left_out)
    if split is None:
        result = _learned(learned, left_out, output, codec, settings)
        emit(result, as_json, lambda: _show(result))
        return
    results = _learned_parts(Cut.read(split), learned, left_out, output, codec, settings)
    emit({"profiles": results}, as_json, lambda: _show(*results))


def _learned_parts(
    cut: Cut,
    learned: list[Path],
    left_out: list[Path],
    output: Path,
    codec: str,
    settings: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """Learn a profile of each part of the model, from documents that hold nothing else; these lie
    beside the output meanwhile, one part's at a time."""
    found = []
    for part in range(cut.parts(Snapshot.load(learned[0]))):
        own = dict(settings)
        if "resume" in own:
            own["resume"] = own["resume"] / str(part)
        with scratch_folder(output.parent) as folder:
            cuts = []
            for number, path in enumerate([*learned, *left_out]):
                cuts.append(folder / f"{number}-{path.name}")
                cut.of(Snapshot.load(path), part).save(cuts[-1])
            mine, apart = cuts[: len(learned)], cuts[len(learned) :]
            result = _learned(mine, apart, cut.path(output, part), codec, own)
        for measured, path in zip(result["held_out"], left_out, strict=True):
            measured["file"] = str(path)
        found.append(result)
    return found


def _learned(
    learned: list[Path],
    left_out: list[Path],
    output: Path,
    codec: str,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Learn a profile, write it, and measure it on the documents that are left out."""
    from kvzip.eval.speed.profile_sizes import held_out_sizes

    began = time.perf_counter()
    with steps() as tell:
        profile = Profile.fit(learned, tell, codec, **settings)
    seconds = time.perf_counter() - began
    profile.save(output)
    with bar("held-out documents", len(left_out), in_bytes=False) as advance:
        measured = held_out_sizes(left_out, profile, advance)
    bits = [found.bits_per_value for found in measured]
    result = {
        "profile": str(output),
        "codec": codec,
        "id": profile.id,
        "bytes": profile.nbytes,
        "documents": len(learned),
        "tokens": profile.description["tokens"],
        "seconds": seconds,
        "held_out": msgspec.to_builtins(measured),
        "held_out_bits_per_value": sum(bits) / len(bits) if bits else None,
    }
    if codec == "predictive":
        result |= _predictive_costs(profile)
        # The profile counts only those that its predictors were learned from.
        result["calibration_documents"] = len(learned) - profile.description["documents"]
    return result


def _predictive_costs(profile: Profile) -> dict[str, Any]:
    """What predicting with a profile takes."""
    from kvzip.codecs.predictive.fit import multiplications

    products = multiplications(profile)
    return {
        "multiplications_per_token": sum(products),
        "multiplications_per_token_and_layer": products,
        "regions": [len(profile.tensors[f"{i}.bias"]) for i in range(len(products))],
    }


def show_profile(path: Path, as_json: bool) -> None:
    """What `kvzip info` tells of a profile."""
    found = Profile.load(path)
    layers = found.description.get("layers") or found.description.get("channel", {}).get("layers")
    result = {
        "id": found.id,
        "key": f"profiles/{found.id}",
        "codec": found.codec,
        "model": found.description.get("model"),
        "documents": found.description.get("documents"),
        "tokens": found.description.get("tokens"),
        "layers": len(layers or []),
        "bytes": found.nbytes,
        "memory_bytes": found.unpacked_bytes,
    }

    def show() -> None:
        say(f"a profile of {result['model'] or 'an unnamed model'} for {found.codec}")
        say(f"{found.nbytes:,} bytes, {found.unpacked_bytes:,} in memory")
        say(f"its key in a store: {result['key']}")

    emit(result, as_json, show)


def _show(*results: Mapping[str, Any]) -> None:
    for result in results:
        _show_one(result)


def _show_one(result: Mapping[str, Any]) -> None:
    line = f"{result['profile']}: {result['bytes']:,} bytes "
    line += f"from {counted(result['documents'], 'document')}, "
    line += f"{result['seconds']:.0f} s"
    if "multiplications_per_token" in result:
        line += f"; {result['multiplications_per_token']:,} multiplications a token, "
        line += f"{max(result['multiplications_per_token_and_layer']):,} at most a layer"
    say(line)
    if "calibration_documents" in result:
        apart = result["calibration_documents"]
        over = "the documents that the predictors were learned from: too few to keep any apart"
        if apart:
            over = f"{apart} of them, from which no predictor was learned"
        say(f"scales and densities were set over {over}")
    for m in result["held_out"]:
        say(
            f"held out: {m['bits_per_value']:.2f} bits a number, ratio {m['ratio']:.3f}, "
            f"{m['file']}"
        )
