"""kvzip entropy and bench: how far a cache can be compressed, and how fast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import Parameter
from rich.table import Column, Table

import kvzip
from kvzip import entropy
from kvzip.cli.app import app
from kvzip.cli.arguments import (
    Json,
    ProfilePath,
    ResultFile,
    Threads,
    check_folders,
    command_line,
    read_profile,
    refuse_twice,
)
from kvzip.cli.failures import CheckFailed
from kvzip.cli.terminal import bar, counted, emit, say, show_table, steps
from kvzip.codec_spec import split_specs
from kvzip.entropy.ladder import BEFORE_ROPE, ENOUGH_TOKENS, PREDICTED, PROFILE, TABLES
from kvzip.entropy.tables import LEVELS
from kvzip.errors import UsageError
from kvzip.eval.measured_codecs import CODECS_WITHOUT_PROFILE
from kvzip.files import replacing
from kvzip.snapshot import Snapshot

_COLUMNS = 4
"""Parts that a table of the ladder has a column for, at most; of more there is a table."""

if TYPE_CHECKING:
    from kvzip.eval.results.bench import BenchResult
    from kvzip.eval.results.entropy import CheckRow, EntropyResult


@app.command(name="entropy")
def entropy_command(
    snapshots: list[Path],
    *,
    train: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    profile: ProfilePath = None,
    check: Annotated[bool, Parameter(negative=())] = False,
    out: ResultFile = None,
    as_json: Json = False,
) -> None:
    """Bits per number of snapshots, by part, field of the numbers, layer, head and channel, under
    models from tables of frequencies to prediction from layer to layer.

    Figures are ideal code lengths. Those of other documents' models are in floating point. Keys and
    values predict each other; other parts (states, latents, scales) only have tables. Keys of bf16
    have tables of keys before RoPE, too, where a capture notes what turned them.

    Parameters
    ----------
    snapshots
        Documents of one model to measure; the ladder is the mean over them.
    train
        Other documents of the model, to learn from: without, tables know the frequencies of the
        documents that they are measured on, and nothing is predicted.
    profile
        Its bits, too: of its integer model where it predicts, else of its tables.
    check
        Code all blocks with another coder, constriction's, under the same models: the ladder's
        tables by channel, and those of whole files by `channel` and by the profile's codec. Exit
        code 1 if ours is more than 0.1 % above it. Takes about a minute a document with a profile
        that predicts.
    out
        Folder for entropy.json and the figures (ladder, layers and heads, spectrum) as SVG.
    """
    from kvzip.eval import entropy_check
    from kvzip.eval.results import stored
    from kvzip.eval.results.entropy import EntropyResult, FilePlanes
    from kvzip.eval.results.provenance import made_by

    refuse_twice(snapshots)
    if check:
        entropy_check.check_installed()  # known before minutes of measuring
    files, known = [], read_profile(profile)
    with bar("fields", len(snapshots), in_bytes=False) as advance:
        for path in snapshots:
            snapshot = Snapshot.load(path)
            files.append(FilePlanes(str(path), snapshot.dtype, entropy.planes(snapshot)))
            advance(1)
    with steps() as tell:
        fitted = entropy.fit(train, tell) if train else None
        ladder = entropy.measure(snapshots, fitted, known, tell)
        checks = entropy_check.check(snapshots, known, tell) if check else []
    result = EntropyResult(**made_by(command_line()), files=files, ladder=ladder, checks=checks)
    said = msgspec.to_builtins(result)
    if out is not None:
        from kvzip.eval.report import pictures

        out.mkdir(parents=True, exist_ok=True)
        drawn = pictures.ladder_files(ladder)
        stored.save(result, out / "entropy.json")
        for name, content in drawn.items():
            with replacing(out / name, private=False) as file:
                file.write(content)
        said["figures"] = [str(out / name) for name in drawn]

    emit(said, as_json, lambda: _show_entropy(result, fitted))
    over = [row for row in checks if row.more > entropy_check.MOST]
    if over:
        worst = max(over, key=lambda row: row.more)
        raise CheckFailed(
            f"{worst.file} by {worst.model} takes {worst.more:.3%} more than constriction, and "
            f"{entropy_check.MOST:.1%} is allowed"
        )


def _show_entropy(result: EntropyResult, fitted: entropy.Fitted | None) -> None:
    from kvzip.eval.report.parts import by_dtype, format_labels, part_label, unpredicted_line

    for found in result.files:
        say(f"{found.file} ({found.dtype})")
        for dtype, planes in by_dtype(found.planes):
            table = Table(f"field of {dtype}", "bits", *map(part_label, planes[0].parts))
            for m in planes:
                table.add_row(m.plane, str(m.width), *(f"{b:.3f}" for b in m.parts.values()))
            show_table(table)
    ladder = result.ladder
    labels = format_labels(ladder.rungs[0].parts)
    few = len(labels) <= _COLUMNS
    columns = ("model", "learned from", "bits", *(labels if few else ()), "ratio")
    table = Table(*columns, title="ideal code length")
    for rung in ladder.rungs:
        ratio = f"{ladder.width / rung.bits:.3f}" if rung.bits else ""
        bits = [f"{p.bits:.3f}" for p in rung.parts] if few else []
        table.add_row(rung.name, rung.learned, f"{rung.bits:.3f}", *bits, ratio)
    show_table(table)
    if not few:
        # All would be too wide.
        chosen = (LEVELS[0], LEVELS[-1], BEFORE_ROPE, PREDICTED[-1], PROFILE, TABLES)
        shown = [rung for rung in ladder.rungs if rung.name in chosen]
        names = [rung.name for rung in shown]
        table = Table("part", "numbers", *names, title="ideal code length by part")
        for i, label in enumerate(labels):
            parts = [rung.parts[i] for rung in shown]
            table.add_row(label, f"{parts[0].numbers:,}", *(f"{p.bits:.3f}" for p in parts))
        show_table(table)
    if any(rung.learned == "these documents" for rung in ladder.rungs):
        say(
            "Tables of these documents themselves are not counted, and of few tokens they fit too "
            "well: no file is as small. kvzip encode tells what a file takes."
        )
    if fitted is not None and fitted.few_tokens:
        enough = ENOUGH_TOKENS * fitted.most_inputs
        say(
            f"{counted(fitted.tokens, 'token')} to learn from are few: a number is predicted from "
            f"up to {fitted.most_inputs:,} others. From fewer than {enough:,} tokens, "
            f"{ENOUGH_TOKENS} times as many, figures of predictions tell little of the model."
        )
    if ladder.unpredicted:
        say(unpredicted_line(ladder.unpredicted))
    if result.checks:
        _show_checks(result.checks)


def _show_checks(rows: Sequence[CheckRow]) -> None:
    columns = ("model", "ideal", "constriction", "ours", "difference")
    for file in dict.fromkeys(row.file for row in rows):
        table = Table(*columns, title=f"bits a number, {file}")
        for row in (row for row in rows if row.file == file):
            bits = (row.ideal_bits, row.coder_bits, row.our_bits)
            each = [f"{b / max(row.numbers, 1):.4f}" for b in bits]
            table.add_row(row.model, *each, f"{row.more:+.3%}")
        show_table(table)
    say(
        "by channel: the ladder's figure, without its tables. In files all that is no coded block "
        "(header, index, tables) counts the same on both sides"
        + (
            f"; so do {sum(row.left_out for row in rows):,} numbers that are stored otherwise."
            if any(row.left_out for row in rows)
            else "."
        )
    )


@app.command
def bench(
    snapshots: list[Path] | None = None,
    *,
    codecs: str | None = None,
    profile: ProfilePath = None,
    peers: bool = False,
    threads: Threads = 1,
    repeat: int = 5,
    out: ResultFile = None,
    draw: Path | None = None,
    as_json: Json = False,
) -> None:
    """Ratio and speed of codecs on snapshots, side by side in one run; or draw such a run.

    Parameters
    ----------
    codecs
        Names, with commas between; settings after a colon, theirs with + between. Default: raw,
        zstd, lz4, planes, channel, and with --profile the one that it was learned for.
    peers
        Measure other compressors, too: those of the extra `bench` and any other that is installed.
    repeat
        Times each is run; tables show the fastest.
    out
        File for the result as JSON; with --draw, for the page.
    draw
        A stored result: its tables and charts become an HTML page (default: beside it; tables in
        Markdown where --out ends in .md), and nothing is run.
    """
    if draw is not None:
        if snapshots:
            raise UsageError("--draw takes a stored result and no snapshots")
        _draw(draw, out or draw.with_suffix(".html"), as_json)
        return
    if not snapshots:
        raise UsageError("name the snapshots to measure on, or a stored result with --draw")
    refuse_twice(snapshots)
    check_folders(out)
    from kvzip.benchmarks.run import run
    from kvzip.eval.results import stored

    learned = read_profile(profile)
    default = [*CODECS_WITHOUT_PROFILE, *([learned.codec] if learned is not None else [])]
    chosen = list(dict.fromkeys(default)) if codecs is None else split_specs(codecs)
    with bar("bench", len(snapshots) * (repeat + 1), in_bytes=False) as advance:
        result = run(
            snapshots,
            [kvzip.get_codec(spec) for spec in chosen],
            peers=peers,
            profile=learned,
            threads=threads,
            repeat=repeat,
            command=command_line(),
            progress=advance,
        )
    if out is not None:
        stored.save(result, out)

    emit(msgspec.to_builtins(result), as_json, lambda: _show_bench(result))
    if not result.exact:
        raise CheckFailed("a codec did not give back what it was given")


def _draw(stored_result: Path, page: Path, as_json: bool) -> None:
    """Write the page of a stored benchmark."""
    from kvzip.eval.report import bench as drawing
    from kvzip.eval.results import stored
    from kvzip.eval.results.bench import BenchResult

    drawing.write(stored.load(stored_result, BenchResult), page)
    emit({"page": str(page)}, as_json, lambda: say(str(page)))


def _show_bench(result: BenchResult) -> None:
    from kvzip.eval.quantities import speed
    from kvzip.eval.report.text import size

    how = f"{counted(result.threads, 'thread')}, the fastest of {counted(result.repeat, 'run')}"
    for snapshot in result.snapshots:
        columns = ("ratio", "bits", "encode", "decode", "of memcpy", "exact")
        say(
            f"{snapshot.file}: {snapshot.model or 'no model named'}, {snapshot.dtype}, "
            f"{counted(snapshot.tokens, 'token')}, {size(snapshot.raw_bytes)}; {how}"
        )
        table = Table(Column("codec", no_wrap=True), *columns)
        for r in result.rows:
            if r.file == snapshot.file:
                table.add_row(
                    r.title,
                    f"{r.ratio:.3f}",
                    f"{r.bits_per_value:.2f}",
                    speed(r.encode_gbps),
                    speed(r.decode_gbps),
                    f"{r.decode_of_memcpy:.2f}",
                    "yes" if r.exact else "NO",
                )
        show_table(table)
    for m in result.missing:
        say(f"missing: {m.name}: {m.reason}")
