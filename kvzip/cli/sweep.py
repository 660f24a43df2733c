"""kvzip sweep: a grid of measurements, one row each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kvzip.cli.app import app
from kvzip.cli.arguments import Json, NativeBf16, OutFolder, choose_products
from kvzip.cli.terminal import emit, say, steps

if TYPE_CHECKING:
    from kvzip.eval.results.sweep import SweepRow
    from kvzip.eval.sweep.run import Summary


@app.command
def sweep(
    config: Path,
    *,
    out: OutFolder = Path("sweep"),
    workers: int = 1,
    ray: str | None = None,
    retry: bool = False,
    native_bf16: NativeBf16 = False,
    as_json: Json = False,
) -> None:
    """Measure every point of a grid; go on where an earlier run of it stopped.

    Parameters
    ----------
    config
        TOML: [grid] with a list for each of codec, model, text, tokens, document, dtype, profile,
        threads; [[points]] one by one; repeats = N. With kind = "traffic" points are replays of a
        trace: trace, strategy, codec or ratio, capacity_blocks, tiers, policy, ...
    out
        Folder for the rows, as Parquet, and the captured caches.
    workers
        Processes of this machine. More than one disturb each other's timings.
    ray
        Address of a Ray cluster (auto, or HOST:PORT) that runs the tasks instead.
    retry
        Measure points again that failed.
    """
    choose_products(native_bf16)
    from kvzip.eval.sweep.grid import read_config
    from kvzip.eval.sweep.run import run

    points = read_config(config)
    with steps() as tell:

        def progress(row: SweepRow | None, done: int, total: int) -> None:
            tell("sweep", done, total)

        summary = run(points, out, workers=workers, ray=ray, retry=retry, progress=progress)
    emit(msgspec.to_builtins(summary), as_json, lambda: _show(summary))


def _show(summary: Summary) -> None:
    say(
        f"{summary.folder}: {summary.points} points, {summary.measured} measured now, "
        f"{summary.kept} from before, {len(summary.failed)} failed",
    )
    for path in summary.damaged:
        say(f"damaged, so its points were measured anew: {path}")
    for f in summary.failed:
        say(f"failed: {f['codec']} on {f['model']}: {f['reason']}")
