"""Caches that quanto and HQQ have quantised: their raw parts go through a file and back."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families import Family  # noqa: E402
from family_checks import Checks  # noqa: E402
from support import CODECS  # noqa: E402

import kvzip  # noqa: E402
from kvzip.layout import PartLayout  # noqa: E402
from kvzip.load.hf import load_cache, load_or_prefill  # noqa: E402
from kvzip.snapshot import Layer, Snapshot  # noqa: E402

PACKAGES = {"quanto": "optimum.quanto", "hqq": "hqq"}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("quanto", {}),
    ("quanto", {"nbits": 2, "axis_key": -1, "axis_value": -1}),
    ("hqq", {}),
    ("hqq", {"nbits": 3}),
    ("hqq", {"nbits": 8, "axis_key": 1}),
]


def quantised(checks: Checks, backend: str, **settings: Any) -> Any:
    """A cache of the checks' ids: 32 tokens quantised together, and 8 in full precision."""
    pytest.importorskip(PACKAGES[backend])
    cache = transformers.QuantizedCache(
        backend, config=checks.model.config, q_group_size=16, residual_length=16, **settings
    )
    with torch.no_grad():
        checks.model(checks.ids[:, :32], cache=cache)
        checks.model(checks.ids[:, 32:], cache=cache)
    return cache


@pytest.fixture(scope="module")
def checks() -> Checks:
    return Checks(Family("llama"))


@pytest.mark.parametrize(("backend", "settings"), CASES)
def test_a_cache_that_was_quantised_in_groups(
    checks: Checks, backend: str, settings: dict[str, Any]
) -> None:
    cache = quantised(checks, backend, **settings)
    prompt = checks.longer(checks.ids, 16)  # so that all is quantised anew, twice
    found = Snapshot.from_cache(cache, checks.ids, checks.model)
    assert [layer.kind for layer in found.layers] == ["state"] * 2
    parts = found.layers[0].parts
    assert parts["k_residual"].shape == (2, 8, 8)
    held = cache.layers[0]._quantized_keys
    packed, scale = (
        (held._data._data, held._scale) if backend == "quanto" else (held[0], held[1]["scale"])
    )
    assert np.array_equal(parts["k_packed"], packed.contiguous().view(torch.uint8).numpy())
    assert np.array_equal(parts["k_scale"].view("f4"), scale.numpy())
    right = checks.says(prompt, quantised(checks, backend, **settings))
    for codec in CODECS:
        blob = kvzip.encode(found, codec, threads=1)
        assert kvzip.decode(blob, threads=1) == found
    loaded = load_cache(blob, checks.model.config, prompt=prompt)
    assert type(loaded.layers[0]) is type(cache.layers[0])
    assert Snapshot.from_cache(loaded, checks.ids, checks.model) == found
    with pytest.raises(kvzip.UnsupportedError, match="is quantised"):
        loaded.crop(-1)
    assert torch.equal(checks.says(prompt, loaded), right)
    with pytest.raises(kvzip.KVZipError, match="a state after 40 of 40 tokens"):
        load_cache(blob, checks.model.config, prompt=checks.ids)


def test_the_model_itself_does_not_find_it(checks: Checks) -> None:
    """It computes other numbers."""
    found = Snapshot.from_cache(quantised(checks, "quanto"), checks.ids, checks.model)
    prompt = checks.longer(checks.ids, 13)
    cache = load_or_prefill(found, checks.model, prompt)
    assert cache.get_seq_length() == 0
    assert torch.equal(checks.says(prompt, cache), checks.says(prompt))


def test_rows_that_share_groups_are_refused(checks: Checks) -> None:
    pytest.importorskip("optimum.quanto")
    cache = transformers.QuantizedCache("quanto", config=checks.model.config, q_group_size=16)
    ids = checks.ids.expand(2, -1)
    with torch.no_grad():
        checks.model(ids, cache=cache)
    with pytest.raises(kvzip.UnsupportedError, match="groups that all 2 rows"):
        Snapshot.from_cache(cache, ids, checks.model)


WRONG = {
    "nothing": b"",
    "a list": b"[1]",
    "deep": b"[" * 9000,
    "another back end": {"backend": "other"},
    "bits": {"nbits": 5},
    "groups": {"q_group_size": 0},
    "other groups": {"q_group_size": 7},
    "an axis": {"axis_key": 3},
    "text": {"nbits": "4"},
}


@pytest.mark.parametrize("backend", PACKAGES)
@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_settings_that_make_no_sense(checks: Checks, backend: str, wrong: Any) -> None:
    found = Snapshot.from_cache(quantised(checks, backend), checks.ids, checks.model)
    layers = []
    for layer in found.layers:
        parts, layouts = dict(layer.parts), dict(layer.layout.parts)
        told = wrong
        if isinstance(wrong, dict):
            told = json.dumps(json.loads(parts["settings"].tobytes()) | wrong).encode()
        parts["settings"] = np.frombuffer(told, np.uint8)
        layouts["settings"] = PartLayout("bytes", (len(told),), "d")
        layout = kvzip.LayerLayout(layouts, 40, "state", state_length=40)
        layers.append(Layer(parts, layout))
    changed = Snapshot(layers, found.dtype, found.token_ids, found.origin)
    with pytest.raises(kvzip.KVZipError, match="quantised layer"):
        load_cache(changed, checks.model.config, prompt=checks.longer(checks.ids, 3))
