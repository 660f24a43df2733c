"""Sweeps: the same measurement at every point of a grid, one row a measurement.

A point names all that the measurement depends on; its id is a hash of that. What has a row is done,
so a sweep that was killed goes on where it stopped. The same tasks run in processes of this machine
or on a Ray cluster; only this process writes.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import msgspec

from kvzip.errors import (
    DiskFullError,
    KVZipError,
    UsageError,
    disk_full_told,
    extra_told,
    first_line,
)
from kvzip.eval.results.sweep import SweepRow
from kvzip.eval.sweep.kinds import AnyPoint, measure, row_form
from kvzip.eval.sweep.rows import RowFolder

Progress = Callable[[SweepRow | None, int, int], None]
"""Called with a row, or None for those that are there at the beginning; how many points are done,
and how many there are."""


class Summary(msgspec.Struct, frozen=True):
    """What a run of a sweep did."""

    folder: str
    points: int
    measured: int
    """Now."""
    kept: int
    """Rows that were there."""
    failed: list[dict[str, str]]
    """Points without figures: codec, model, reason."""
    seconds: float
    damaged: list[str] = []
    """Files of rows that could not be read. They are renamed, and their points measured anew."""


def run(
    points: Sequence[AnyPoint],
    folder: str | os.PathLike[str],
    *,
    workers: int = 1,
    ray: str | None = None,
    retry: bool = False,
    progress: Progress = lambda row, done, total: None,
) -> Summary:
    """Measure every point that has no row in `folder` yet.

    `workers`: processes of this machine; more than one disturb each other's timings. `ray`: the
    address of a Ray cluster that runs the tasks instead, as many at once as it has cores; nodes
    that do not share `folder`'s path capture their own caches. `retry`: measure failed points
    again. Rows that are damaged are set aside, and their points measured anew. Raises KVZipError
    when a worker dies or a disk is full; what was finished is kept.
    """
    began = time.perf_counter()
    rows = RowFolder(folder, row_form(points))
    with disk_full_told(rows.folder), rows.alone():
        damaged = rows.set_aside()
        if retry:
            rows.drop(row["id"] for row in rows.read() if row["status"] == "failed")
        there = {row["id"] for row in rows.read()}
        left = [point for point in points if point.id not in there]
        done = len(points) - len(left)
        progress(None, done, len(points))
        tasks = (
            _on_ray(left, rows.folder, ray) if ray else _in_processes(left, rows.folder, workers)
        )
        for row in tasks:
            rows.add(row)
            done += 1
            progress(row, done, len(points))
        rows.merge()
        ids = {point.id for point in points}
        failed = [
            {key: row[key] for key in ("codec", "model", "dtype", "reason")}
            for row in rows.read()
            if row["id"] in ids and row["status"] == "failed"
        ]
    return Summary(
        str(rows.folder),
        len(points),
        len(left),
        len(points) - len(left),
        failed,
        time.perf_counter() - began,
        damaged,
    )


def _in_processes(points: Sequence[AnyPoint], folder: Path, workers: int) -> Iterator[SweepRow]:
    """Rows as processes of this machine finish them."""
    if workers < 1:
        raise UsageError(f"workers is {workers}; it must be 1 or more")
    if not points:
        return
    context = multiprocessing.get_context("spawn")  # torch and threads do not survive a fork
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(
        min(workers, len(points)), context, initializer=_end_with, initargs=(os.getpid(),)
    ) as pool:
        waiting = iter(points)
        pending = {}
        try:
            # Few ahead, so that an end by hand does not wait for all.
            for point in itertools.islice(waiting, 2 * workers):
                pending[pool.submit(measure, point, str(folder))] = point
            while pending:
                finished, _ = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
                    del pending[future]
                    for point in itertools.islice(waiting, 1):
                        pending[pool.submit(measure, point, str(folder))] = point
        except BrokenProcessPool:
            names = ", ".join(f"{p.codec} on {p.model}" for p in list(pending.values())[:workers])
            raise KVZipError(
                f"a worker died, out of memory or in native code; it was at one of: {names}. What "
                "was finished is kept: run again to go on"
            ) from None
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            # One that a signal ended may have held the lock of the queue that the rest wait at.
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise
        finally:
            for future in pending:
                future.cancel()


def _end_with(parent: int) -> None:
    """Let this worker end when its parent is gone: nobody would take its rows."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _on_ray(points: Sequence[AnyPoint], folder: Path, address: str) -> Iterator[SweepRow]:
    """Rows as the nodes of a Ray cluster finish them."""
    with extra_told("--ray needs Ray", "ray"):
        import ray
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error")
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise KVZipError(f"no Ray cluster at {address!r}: {first_line(error)}") from None
    try:
        # A worker that dies is the cluster's to replace; the task is the same again.
        task = ray.remote(num_cpus=1, max_retries=3, scheduling_strategy="SPREAD")(measure)
        cores = max(int(ray.cluster_resources().get("CPU", 1)), 1)
        waiting = iter(points)
        pending = [
            task.remote(p, str(folder.resolve())) for p in itertools.islice(waiting, 2 * cores)
        ]
        while pending:
            finished, pending = ray.wait(pending)
            try:
                yield from ray.get(finished)
            except ray.exceptions.RayError as error:
                if isinstance(cause := getattr(error, "cause", None), DiskFullError):
                    raise cause from None
                raise KVZipError(
                    f"a task failed on the cluster: {first_line(error)}. What was finished is "
                    "kept: run again to go on"
                ) from None
            pending += [task.remote(p, str(folder.resolve())) for p in itertools.islice(waiting, 1)]
    finally:
        ray.shutdown()
