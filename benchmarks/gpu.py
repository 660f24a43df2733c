"""How fast a GPU decodes and encodes: `python -m kvzip.benchmarks.gpu`, or `make bench-gpu`.

A cache of Qwen3-4B's shape with synthetic numbers: normal ones, each channel with a scale of its
own, whose values take about as many bits as those of real caches; for `predictive`, numbers that
follow those of the layer before, and a profile that says so. GB = 10^9 bytes of raw numbers,
but for the link's own row, which counts the bytes that cross.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import kvzip
from kvzip import dtypes
from kvzip.benchmarks.predictable import predictable
from kvzip.codecs.native.cuda import nvcomp
from kvzip.codecs.native.cuda.arrays import empty
from kvzip.codecs.native.cuda.device import Device, get_device
from kvzip.errors import UnsupportedError
from kvzip.eval.results import stored
from kvzip.eval.results.gpu import COPY, KERNELS, LINK, GpuResult, GpuRow
from kvzip.eval.results.provenance import made_by

LAYERS, HEADS, DIM = 36, 8, 128
"""Qwen3-4B's."""


def timed(work: Callable[[], object], runs: int) -> list[float]:
    """Seconds that each run takes after one that is not counted."""
    work()
    found = []
    for _ in range(runs):
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return found


def snapshot(torch: Any, tokens: int, dtype: str) -> kvzip.Snapshot:
    """Synthetic keys and values of the shape."""
    generator = torch.Generator("cuda").manual_seed(1)
    kind = getattr(torch, dtypes.get(dtype).torch)
    layers = []
    for _ in range(LAYERS):
        pair = []
        for _ in range(2):
            options = {"device": "cuda", "generator": generator}
            scale = torch.exp2(4 * torch.randn(HEADS, 1, DIM, **options) / 3)
            numbers = torch.randn(HEADS, tokens, DIM, **options) * scale
            pair.append(numbers.to(kind).cpu())
        layers.append((pair[0], pair[1]))
    return kvzip.Snapshot.from_arrays(layers, dtype)


def kernels_only(device: Device, reader: Any) -> Callable[[], None]:
    """Launches everything that decodes a file whose bytes and jobs are on the device already."""
    from kvzip.codecs.native.cuda import work as works
    from kvzip.codecs.native.cuda.work import Work
    from kvzip.container import on_device

    started: list[Any] = []

    class Kept(Work):
        def start(self, upload: Any, run: Any) -> None:
            super().start(upload, run)
            started.append((self, run))

    pieces, changed = (on_device.FIRST, on_device.PIECE), vars(works)
    on_device.FIRST = on_device.PIECE = 1 << 62
    changed["Work"] = Kept
    try:
        out = [
            tuple(empty(device, part.shape, part.form)[0] for part in layer.parts.values())
            for layer in reader.layout.layers
        ]
        reader.decode(out=out, device=device)
    finally:
        (on_device.FIRST, on_device.PIECE), changed["Work"] = pieces, Work
    ((work, stream),) = started

    def run() -> None:
        with device.current():
            work.launch(stream)
            device.synchronize(device.record(stream))

    run.out = out  # type: ignore[attr-defined]
    return run


class Case:
    """A cache on the host, the file that it makes, and a place for it on the device."""

    def __init__(self, tokens: int, dtype: str):
        import torch

        self.snapshot = snapshot(torch, tokens, dtype)
        self.raw = self.snapshot.raw_bytes
        self.blob = kvzip.encode(self.snapshot, "channel")
        self.pinned = torch.empty(len(self.blob), dtype=torch.uint8, pin_memory=True)
        self.pinned.numpy()[:] = np.frombuffer(self.blob, np.uint8)
        pairs = self.snapshot.tensors()
        self.out = [tuple(torch.empty_like(t, device="cuda") for t in pair) for pair in pairs]


def check_same(out: Any, snap: kvzip.Snapshot) -> None:
    """Raise AssertionError unless tensors of the device have a cache's numbers, bit for bit."""
    for pair, layer in zip(out, snap.layers, strict=True):
        for mine, want in zip(pair, layer, strict=True):
            if not np.array_equal(dtypes.as_bits(mine.cpu(), snap.dtype)[0], want):
                raise AssertionError("other numbers than were encoded")


def measured(device: Device, tokens: int, dtype: str, runs: int) -> Iterator[tuple[Any, ...]]:
    """Name, bytes and seconds of each thing; first the ratio."""
    case = Case(tokens, dtype)
    yield "ratio", case.raw / len(case.blob), None
    yield from copy_rows(case, runs)
    yield from decoding_rows(device, case, runs)
    yield from paged_rows(device, case, runs)
    yield from host_rows(case)
    check_same(case.out, case.snapshot)  # what they hold now is encoded where it lies
    there = kvzip.Snapshot.from_arrays(case.out)
    yield from encoding_rows(device, there, case.snapshot, case.blob, runs)


def copy_rows(case: Case, runs: int) -> Iterator[tuple[Any, ...]]:
    """What the device's memory and its link take, without kvzip."""
    import torch

    def synchronized(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            work()
            torch.cuda.synchronize()

        return run

    yield COPY, case.raw, timed(synchronized(_copy(torch, case.raw)), runs)
    there = torch.empty(len(case.blob), dtype=torch.uint8, device="cuda")
    upload = synchronized(lambda: there.copy_(case.pinned, non_blocking=True))
    yield LINK, len(case.blob), timed(upload, runs)
    uploads = synchronized(_uploads(case.snapshot, case.out))
    yield "raw bytes by torch from pinned memory", case.raw, timed(uploads, runs)


def decoding_rows(device: Device, case: Case, runs: int) -> Iterator[tuple[Any, ...]]:
    """The file, wherever it lies, decoded into tensors of the device."""

    def whole(data: Any) -> Callable[[], object]:
        return lambda: kvzip.decode(data, device=device, out=case.out)

    raw = case.raw
    with kvzip.open(case.blob) as reader:
        launch = kernels_only(device, reader)
        yield KERNELS, raw, timed(launch, runs)
        del launch
    pinned = memoryview(case.pinned.numpy())
    yield "channel: file in pinned memory", raw, timed(whole(pinned), runs)
    check_same(case.out, case.snapshot)
    yield "channel: file in pageable memory", raw, timed(whole(case.blob), runs)
    path = Path("kvzip-bench-gpu.kvz")
    path.write_bytes(case.blob)
    try:
        yield "channel: file on disk, in the page cache", raw, timed(whole(path), runs)
    finally:
        path.unlink()


def paged_rows(device: Device, case: Case, runs: int) -> Iterator[tuple[Any, ...]]:
    """The file decoded into an engine's pages, in any order."""
    import torch

    page = 16
    used = -(-case.snapshot.tokens // page)
    pages = torch.randperm(used + 64)[:used].tolist()
    shape = (used + 64, 2, page, HEADS, DIM)
    caches = [torch.empty(shape, dtype=case.out[0][0].dtype, device="cuda") for _ in range(LAYERS)]
    views = [(cache[:, 0], cache[:, 1]) for cache in caches]
    pinned = memoryview(case.pinned.numpy())
    seconds = timed(lambda: kvzip.decode(pinned, device=device, out=views, pages=pages), runs)
    name = f"channel: pinned, into pages of {page} tokens, K and V side by side"
    yield name, case.raw, seconds


def host_rows(case: Case) -> Iterator[tuple[Any, ...]]:
    """The CPU, on the host's memory."""
    layers = case.snapshot.layers
    on_cpu = [tuple(np.empty(part.shape, part.dtype) for part in layer) for layer in layers]
    decoding = timed(lambda: kvzip.decode(case.blob, out=on_cpu), 3)
    yield "channel: by the CPU into host memory", case.raw, decoding
    encoding = timed(lambda: kvzip.encode(case.snapshot), 3)
    yield "channel: encode by the CPU from host memory", case.raw, encoding


def encoding_rows(
    device: Device, there: kvzip.Snapshot, here: kvzip.Snapshot, blob: bytes, runs: int
) -> Iterator[tuple[Any, ...]]:
    """The same numbers `there`, on the device, and `here`; `blob`: the file that they make without
    a profile."""
    raw = there.raw_bytes
    profile = kvzip.Profile.fit([here], codec="channel")
    for which, known, expected in (
        ("tables of its own", None, blob),
        ("a profile's tables", profile, kvzip.encode(here, profile=profile)),
    ):

        def run(known: kvzip.Profile | None = known) -> bytes:
            return kvzip.encode(there, profile=known, device=device)

        if run() != expected:
            raise AssertionError("the device writes another file than the CPU")
        yield f"channel: encode from the GPU's memory, {which}", raw, timed(run, runs)
    seconds = encoding_kernels(there, profile, device, runs)
    yield "channel: kernels and checksums of encoding alone", raw, seconds


def encoding_kernels(
    there: kvzip.Snapshot, profile: kvzip.Profile, device: Device, runs: int
) -> list[float]:
    """Seconds that all kernels take that encode a snapshot, parts together as they are then; they
    may run again on what they were given."""
    from kvzip.codecs.native.cuda import work as works
    from kvzip.codecs.native.cuda.work import Work

    seconds = [0.0] * runs

    class Timed(Work):
        def launch(self, run: Any) -> None:
            super().launch(run)
            device.synchronize(device.record(run))
            for n in range(runs):
                begin = time.perf_counter()
                super().launch(run)
                device.synchronize(device.record(run))
                seconds[n] += time.perf_counter() - begin

    changed = vars(works)
    changed["Work"] = Timed
    try:
        kvzip.encode(there, "channel:keys=cached", profile, threads=1, device=device)
    finally:
        changed["Work"] = Work
    return seconds


def _copy(torch: Any, size: int) -> Callable[[], object]:
    """A copy within the device's memory."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _uploads(snap: kvzip.Snapshot, out: Any) -> Callable[[], None]:
    """Copies of all layers from pinned memory."""
    pinned = [tuple(t.pin_memory() for t in pair) for pair in snap.tensors()]

    def run() -> None:
        for pair, source in zip(out, pinned, strict=True):
            for mine, theirs in zip(pair, source, strict=True):
                mine.copy_(theirs, non_blocking=True)

    return run


def predictive_rows(device: Device, tokens: int, runs: int) -> Iterator[tuple[Any, ...]]:
    """`predictive` on a document of the shape that its profile predicts; bf16. Every number is
    compared."""
    import torch

    snap, profile = predictable(LAYERS, HEADS, DIM, tokens)
    raw, blob = snap.raw_bytes, kvzip.encode(snap, "predictive", profile)
    ratio = f"ratio {raw / len(blob):.3f}"
    with kvzip.open(blob, profile) as reader:
        launch = kernels_only(device, reader)
        yield f"predictive: kernels and checksums alone, {ratio}", raw, timed(launch, runs)
        del launch
    pinned = torch.empty(len(blob), dtype=torch.uint8, pin_memory=True)
    pinned.numpy()[:] = np.frombuffer(blob, np.uint8)
    out = [tuple(torch.empty_like(t, device="cuda") for t in pair) for pair in snap.tensors()]
    file = memoryview(pinned.numpy())
    yield (
        f"predictive: file in pinned memory, {ratio}", raw,
        timed(lambda: kvzip.decode(file, profile, device=device, out=out), runs),
    )  # fmt: skip
    check_same(out, snap)


def nvcomp_rows(tokens: int, dtype: str, runs: int) -> Iterator[tuple[Any, ...]]:
    """nvCOMP's own coders on the same numbers in chunks, where its Python package is installed
    (nvidia-nvcomp-cu13); on the device alone."""
    try:
        from nvidia import nvcomp as theirs
    except ImportError:
        return
    import torch

    snap = snapshot(torch, tokens, dtype)
    data = np.concatenate(
        [np.asarray(a).reshape(-1).view(np.uint8) for la in snap.layers for a in la]
    )
    there = theirs.as_array(torch.from_numpy(data).cuda())
    kinds: list[tuple[str, dict[str, str]]] = [("ANS", {}), ("LZ4", {}), ("Zstd", {})]
    if dtypes.get(dtype).itemsize == 2:
        kinds.append(("ANS", {"data_type": "<f2"}))  # of all formats of 16 bits, by its headers
    for algorithm, options in kinds:
        codec = theirs.Codec(algorithm=algorithm, **options)
        coded = codec.encode(there)
        if not np.array_equal(np.asarray(codec.decode(coded).cpu()).view(np.uint8), data):
            raise AssertionError(f"nvCOMP's {algorithm} gives other bytes than it was given")

        def run(codec: Any = codec, coded: Any = coded) -> None:
            codec.decode(coded)
            torch.cuda.synchronize()

        what = "numbers of 16 bits" if options else "bytes as they lie"
        ratio = data.nbytes / coded.buffer_size
        name = f"nvCOMP {theirs.__version__} {algorithm}, {what}: ratio {ratio:.3f}"
        yield name, data.nbytes, timed(run, runs)


def library_rows(device: Device, tokens: int, dtype: str, runs: int) -> Iterator[tuple[Any, ...]]:
    """Files that nvCOMP decodes, where it is installed (kvzip[nvcomp]): in blocks as they are by
    default, and of as many bytes as nvCOMP likes best."""
    import torch

    codecs = [
        codec
        for codec, coder in (("lz4", "lz4"), ("zstd", "zstd"), ("planes", "zstd"))
        if nvcomp.decoder_of(device, coder) is not None
    ]
    best = max(1, (64 << 10) // (HEADS * DIM * dtypes.get(dtype).itemsize))
    for codec, block_tokens in itertools.product(codecs, (None, best)):
        snap = snapshot(torch, tokens, dtype)
        blob = kvzip.encode(snap, codec, block_tokens=block_tokens)
        pinned = torch.empty(len(blob), dtype=torch.uint8, pin_memory=True)
        pinned.numpy()[:] = np.frombuffer(blob, np.uint8)
        out = [tuple(torch.empty_like(t, device="cuda") for t in pair) for pair in snap.tensors()]
        file = memoryview(pinned.numpy())

        def run(file: memoryview = file, out: Any = out) -> None:
            kvzip.decode(file, device=device, out=out)

        blocks = f", blocks of {block_tokens} tokens" if block_tokens else ""
        ratio = snap.raw_bytes / len(blob)
        name = f"{codec} by nvCOMP: file in pinned memory{blocks}, ratio {ratio:.3f}"
        yield name, snap.raw_bytes, timed(run, runs)
        check_same(out, snap)


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast a GPU decodes.")
    parser.add_argument("--tokens", default="1024,4096")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("-o", "--out", type=Path)
    given = parser.parse_args()
    os.environ.setdefault(nvcomp.ENVIRONMENT, nvcomp.TRUSTED)  # its files are its own
    try:
        device = get_device(given.device)
        import torch
    except (UnsupportedError, ImportError) as error:
        sys.exit(f"bench-gpu: {error}")
    rows: list[GpuRow] = []
    ratio: dict[str, float] = {}
    for tokens in map(int, given.tokens.split(",")):
        for kind in (
            measured(device, tokens, given.dtype, given.runs),
            predictive_rows(device, tokens, given.runs),
            nvcomp_rows(tokens, given.dtype, given.runs),
            library_rows(device, tokens, given.dtype, given.runs),
        ):
            for name, size, seconds in kind:
                if seconds is None:
                    ratio[str(tokens)] = size
                    print(f"{tokens} tokens: ratio {size:.4f}", flush=True)
                    continue
                median = statistics.median(seconds)
                row = GpuRow(
                    name=name,
                    tokens=tokens,
                    seconds=median,
                    least_seconds=min(seconds),
                    gbps=size / median / 1e9,
                    runs=len(seconds),
                )
                rows.append(row)
                print(f"{row.gbps:9.1f} GB/s  {1e3 * median:8.3f} ms  {name}", flush=True)
    made = made_by("python -m kvzip.benchmarks.gpu " + shlex.join(sys.argv[1:]))
    made["versions"]["cuda"] = str(torch.version.cuda)
    result = GpuResult(
        **made,
        gpu=torch.cuda.get_device_name(),
        dtype=given.dtype,
        shape={"layers": LAYERS, "heads": HEADS, "dim": DIM},
        ratio=ratio,
        rows=rows,
    )
    if given.out is not None:
        stored.save(result, given.out)


if __name__ == "__main__":
    main()
