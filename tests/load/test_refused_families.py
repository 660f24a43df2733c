"""Families whose caches cannot be kept: whoever is asked says which it is, and why."""

from __future__ import annotations

import families
import numpy as np
import pytest
import torch
from support import make_snapshot, random_bits

import kvzip
from kvzip.capture import prefill
from kvzip.errors import UnsupportedError
from kvzip.load.config import UNHANDLED
from kvzip.load.hf import load_cache, load_or_prefill
from kvzip.models.models import LoadedModel

FAMILIES = [one for one in families.families() if one.name in UNHANDLED]


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_a_cache_that_cannot_be_kept_is_refused_by_name(family):
    model = families.tiny_model(family)
    ids = torch.from_numpy(np.random.default_rng(0).integers(1, 60, (1, 48)))
    blob = kvzip.encode(make_snapshot(random_bits, 1, "bf16", tokens=48), "raw")
    words = f"a {family.name} model's cache cannot be kept: {UNHANDLED[family.name]}"
    given = dict.fromkeys(LoadedModel.__annotations__) | {"model": model}
    for refused in (
        lambda: prefill(LoadedModel(**given), ids.numpy()[0]),
        lambda: load_cache(blob, model.config),
        lambda: kvzip.Snapshot.from_cache([torch.zeros(2)], ids, model=model),
    ):
        with pytest.raises(UnsupportedError) as error:
            refused()
        assert words in str(error.value)
    if family.name == "openai-gpt":  # its `generate` takes none
        return
    # With nothing loaded the model says what it says anyway.
    own = model.generate(ids, max_new_tokens=3, do_sample=False)
    cache = load_or_prefill(blob, model, ids)
    assert torch.equal(model.generate(ids, cache=cache, max_new_tokens=3, do_sample=False), own)
