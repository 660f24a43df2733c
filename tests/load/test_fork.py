"""A cache that was begun to be loaded when its process forked."""

from __future__ import annotations

from support import in_a_fork, make_snapshot, random_bits

import kvzip
from kvzip.load.loaders import Loader


def test_a_loader_goes_on_after_a_fork(tmp_path):
    snapshot = make_snapshot(random_bits, 1, "bf16", layers=12)
    kvzip.write(tmp_path / "a.kvz", snapshot, "channel", block_tokens=16)
    with kvzip.open(tmp_path / "a.kvz", threads=1) as reader:
        loader = Loader(reader, [(0, 50)] * 12, 50, None, 1)
        loader.take(0)  # its thread is there, and has begun with the next layers

        def take():
            found = [loader.take(i).parts["k"].shape for i in (4, 1, 11)]
            return [tuple(shape) for shape in found]

        assert in_a_fork(take) == [(1, 2, 50, 16)] * 3
        assert tuple(loader.take(5).parts["v"].shape) == (1, 2, 50, 16)
