"""The exactness check says yes to what is equal, and can say no."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import msgspec  # noqa: E402

import kvzip  # noqa: E402
from kvzip.eval.exactness.check import Exactness, Reference, check, layer_hashes  # noqa: E402
from kvzip.load.hf import cache_argument  # noqa: E402

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()


def make(dtype: str, **changes: Any) -> tuple[Any, kvzip.Snapshot]:
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        **{"sliding_window": None, **changes},
    )
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, dtype)).eval()
    ids = torch.randint(3, 64, (1, 40))
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        model(ids, **cache_argument(cache))
    return model, kvzip.Snapshot.from_cache(cache, ids, model)


@pytest.fixture(scope="module")
def full() -> tuple[Any, kvzip.Snapshot]:
    return make("bfloat16")


def encoded(snapshot: kvzip.Snapshot, codec: str = "planes") -> bytes:
    return kvzip.encode(snapshot, codec=codec, threads=1)


def changed(snapshot: kvzip.Snapshot, layer: int, mask: int) -> kvzip.Snapshot:
    """The snapshot with some bits of one layer's values flipped."""
    layers = [kvzip.Layer(x.parts, x.layout) for x in snapshot.layers]
    layers[layer].v = layers[layer].v ^ snapshot.layers[layer].v.dtype.type(mask)
    return kvzip.Snapshot(layers, snapshot.dtype, snapshot.token_ids, snapshot.origin)


def test_hashes_are_of_the_raw_bytes(full: Any) -> None:
    _, snapshot = full
    found = layer_hashes(snapshot)
    assert [entry["layer"] for entry in found] == [0, 1, 2]
    for entry, layer in zip(found, snapshot.layers, strict=True):
        assert entry["k"] == hashlib.sha256(layer.k.tobytes()).hexdigest()
        assert entry["v"] == hashlib.sha256(np.ascontiguousarray(layer.v).tobytes()).hexdigest()


def test_every_codec_is_exact_against_one_reference(full: Any, tmp_path: Path) -> None:
    model, snapshot = full
    reference = Reference(model, snapshot)
    path = tmp_path / "doc.kvz"
    path.write_bytes(encoded(snapshot, "raw"))
    with kvzip.open(path) as reader:
        for source in (path, reader, encoded(snapshot), encoded(snapshot, "zstd")):
            found = reference.check(source)
            assert found.exact and found.bytes_equal and all(x.equal for x in found.layers)
            assert (found.tokens_equal, found.new_tokens) == (24, 24)
            assert found.max_logit_difference == 0
            assert found.fresh is not None and found.fresh.tokens_equal == 24
            assert found.prompt_tokens == 40
            assert found.prefill_seconds and found.prefill_seconds > 0
            assert found.first_token_seconds > 0
    again = msgspec.json.decode(msgspec.json.encode(found), type=Exactness)
    assert again == found


def test_one_flipped_bit_is_seen(full: Any) -> None:
    model, snapshot = full
    one = changed(snapshot, 1, 0)
    one.layers[1].v[0, 3, 5] ^= 1
    found = check(model, snapshot, encoded(one), new_tokens=2, fresh=False)
    assert not found.exact and not found.bytes_equal and found.fresh is None
    assert [layer.equal for layer in found.layers] == [True, False, True]
    assert found.layers[1].k_before == found.layers[1].k_after
    assert found.layers[1].v_before != found.layers[1].v_after


def test_a_wrong_cache_gives_other_logits_and_tokens(full: Any) -> None:
    model, snapshot = full
    found = check(model, snapshot, encoded(changed(snapshot, 0, 0x8000)), new_tokens=12)
    assert found.tokens_equal < 12 and found.max_logit_difference > 0.1
    assert found.fresh is not None and found.fresh.tokens_equal < 12


def test_an_end_of_text_token_ends_nothing(full: Any) -> None:
    model, snapshot = full
    before = Reference(model, snapshot, new_tokens=3, fresh=False).uncompressed
    old = model.generation_config.eos_token_id
    try:
        model.generation_config.eos_token_id = int(before.tokens[0, 0])
        found = check(model, snapshot, encoded(snapshot), new_tokens=5)
        assert found.exact and found.tokens_equal == 5
        assert found.fresh is not None and found.fresh.tokens_equal == 5
    finally:
        model.generation_config.eos_token_id = old


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sliding_layers_that_hold_only_the_cache(dtype: str) -> None:
    model, snapshot = make(dtype, sliding_window=16)
    found = check(model, snapshot, encoded(snapshot), new_tokens=8)
    assert found.exact and found.prompt_tokens == 41
    assert found.fresh is not None and found.fresh.tokens_equal == 8


def test_what_cannot_be_checked(full: Any) -> None:
    model, snapshot = full
    bare = kvzip.Snapshot(snapshot.layers, snapshot.dtype)
    with pytest.raises(kvzip.KVZipError, match="no token ids"):
        check(model, bare, encoded(snapshot))
    with pytest.raises(ValueError, match="new_tokens is 0: it must be from 1"):
        check(model, snapshot, encoded(snapshot), new_tokens=0)
    damaged = bytearray(encoded(snapshot))
    damaged[-1] ^= 1
    with pytest.raises(kvzip.CorruptError):
        check(model, snapshot, bytes(damaged), new_tokens=1, fresh=False)
