"""How long `predictive` takes on one thread, next to the products of int8 numbers that its
prediction needs, as torch makes them: python -m kvzip.benchmarks.products PROFILE SNAPSHOT."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import kvzip


def shapes(profile: kvzip.Profile) -> Iterator[tuple[int, int]]:
    """Rows and columns of the weights that a token meets: in each layer those from other layers,
    those within it (half of the square, since a channel looks only at those before it), and the
    regions' centres. torch wants multiples of 8."""
    for i, layer in enumerate(profile.description["layers"]):
        regions, width = profile.tensors[f"{i}.bias"].shape
        inputs = sum(profile.tensors[f"{a}.bias"].shape[1] for a in layer["inputs"])
        columns = [(inputs, width), (width // 2, width), (inputs if regions > 1 else 0, regions)]
        yield from ((a + -a % 8, b + -b % 8) for a, b in columns if a and b)


def seconds(runs: int, work: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The least processor time that each of the `work` took in so many runs, by turns."""
    best = dict.fromkeys(work, float("inf"))
    for _ in range(runs):
        for name, call in work.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], time.process_time() - start)
    return best


def measure(profile: kvzip.Profile, path: str, runs: int) -> dict[str, float]:
    """Processor seconds of products, decoding and encoding of a snapshot's whole file."""
    import torch

    torch.set_num_threads(1)
    snapshot = kvzip.Snapshot.load(path)
    blob = kvzip.encode(snapshot, codec="predictive", profile=profile, threads=1)

    def numbers(*shape: int) -> Any:
        return torch.randint(-127, 128, shape, dtype=torch.int8)

    work: dict[str, Callable[[], Any]] = {
        f"product {n}": partial(
            torch._int_mm, numbers(snapshot.tokens, rows), numbers(rows, columns)
        )
        for n, (rows, columns) in enumerate(shapes(profile))
    }
    work["decode"] = lambda: kvzip.decode(blob, profile=profile, threads=1)
    work["encode"] = lambda: kvzip.encode(snapshot, codec="predictive", profile=profile, threads=1)
    best = seconds(runs, work)
    return {
        "products": sum(s for name, s in best.items() if name.startswith("product")),
        "decode": best["decode"],
        "encode": best["encode"],
    }


def main(profile: str, snapshot: str, runs: str = "20") -> None:
    """Print them, with what each takes of the products' time."""
    found = measure(kvzip.Profile.load(profile), snapshot, int(runs))
    for name, spent in found.items():
        print(f"{name:9} {spent * 1e3:7.1f} ms {spent / found['products']:6.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
