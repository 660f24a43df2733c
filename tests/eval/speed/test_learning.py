"""A profile learned from documents that are captured for it."""

from __future__ import annotations

import numpy as np
import pytest
from support import tiny_model

from kvzip import capture
from kvzip.errors import KVZipError
from kvzip.eval.speed.learning import learn


@pytest.mark.parametrize("kept", [False, True], ids=["in memory", "in a folder"])
def test_what_cannot_be_learned_is_said_after_one_capture(tmp_path, kept):
    ids = np.random.default_rng(0).integers(0, 200, (3, 16))
    documents = [
        capture.Document(n, numbers.astype(np.uint32), "text") for n, numbers in enumerate(ids)
    ]
    told = []
    with pytest.raises(KVZipError, match="takes no fp64"):
        learn(
            tiny_model("Llama", dtype="float64"),
            documents,
            snapshots=tmp_path if kept else None,
            capturing=told.append,
            learning=told.append,
        )
    assert told == ["capturing documents to learn from: 1 of 3"]
