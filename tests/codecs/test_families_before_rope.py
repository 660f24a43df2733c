"""Keys of transformers' families before RoPE: for which they are found (docs/models.md)."""

from __future__ import annotations

import families
import numpy as np
import pytest
import torch
import transformers
from support import assert_same, tiny_model

import kvzip
from kvzip.capture import prefill
from kvzip.codec import Context
from kvzip.codecs.common.rotation import ROUNDINGS, rotation_of
from kvzip.load.config import rope_of_config, rope_of_model
from kvzip.load.matching import origin_of_model
from kvzip.models import LoadedModel

FOUND = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3", "mimo_v2_flash"), 1),
    # A part of a head; two kinds of RoPE in turn; frequencies that are no powers, and scaled.
    **dict.fromkeys(("phi", "stablelm", "gpt_neox", "glm4_moe", "qwen3_next"), 1),
    **dict.fromkeys(("gemma2", "gemma3", "gemma4_text", "exaone4"), 1),
    **dict.fromkeys(("cwm", "apertus", "ministral3", "gpt_oss"), 1),
    "modernbert-decoder": 2,
    **dict.fromkeys(("olmo2", "flex_olmo", "beam", "lfm3"), 3),
    # Pairs side by side; of the first, half of a head.
    **dict.fromkeys(("glm", "helium"), 4),
    **dict.fromkeys(("cohere", "cohere2"), 5),
    "ernie4_5": 6,
}
"""How they are rounded: 1, products and sums; 2, sums only; 3, sums only, by cosines of float32; 4,
5 and 6, likewise, of pairs side by side."""
NOT_FOUND = {
    "llama4_text": "norms behind RoPE",
    "hunyuan_v1_dense": "norms behind RoPE",
    "nanochat": "norms behind RoPE",
}


def captured(name):
    torch.set_num_threads(1)
    model = families.tiny_model(families.Family(name), torch.bfloat16)
    ids = np.random.default_rng(0).integers(1, 100, 60, np.uint32)
    return model, prefill(LoadedModel(model, None, name, "r"), ids)


def shares_missing(snapshot):
    """Of each layer with RoPE, the share of pairs for which nothing is found, by rounding."""
    found = []
    for i, layer in enumerate(snapshot.layers):
        if layer.layout.rope is None or "k" not in layer.layout.parts:
            continue
        keys, first = np.ascontiguousarray(layer.block("k")), layer.layout.first
        form = layer.layout.parts["k"].form
        context = Context(form, i, "k", first, snapshot.origin, rope=layer.layout.rope)
        rotation = rotation_of(context, keys.shape[3])
        pairs = keys.size // keys.shape[3] * rotation.pairs
        room = keys.copy()
        found.append(
            {how: len(rotation.unturn(keys, first, how, room, pairs)) / pairs for how in ROUNDINGS}
        )
    return found


@pytest.mark.parametrize("name", [*FOUND, *NOT_FOUND])
@pytest.mark.drawn(2)
def test_where_keys_before_rope_are_found(name):
    _, snapshot = captured(name)
    blob = kvzip.encode(snapshot, "channel:keys=before_rope", block_tokens=32)
    assert_same(kvzip.decode(blob), snapshot)
    shares = shares_missing(snapshot)
    assert shares
    for share in shares:
        if name in FOUND:
            assert share[FOUND[name]] < 0.005
            assert FOUND[name] <= 3 or min(share[how] for how in (1, 2, 3)) > 0.05
        else:
            assert min(share.values()) > 0.05
    if name in NOT_FOUND:
        assert not any(part.before_rope for part in kvzip.info(blob).parts)


def test_llama4_without_its_norms(monkeypatch):
    """As the larger of its models is."""
    model, _ = captured("llama4_text")
    for layer in model.model.layers:
        monkeypatch.delattr(layer.self_attn, "qk_norm", raising=False)
    shares = shares_missing(captured("llama4_text")[1])
    assert shares and all(share[6] < 0.005 for share in shares)


def test_what_a_model_turns_by_is_noted():
    """Frequencies, and where it is not 1, what cosines are multiplied by."""
    model, snapshot = captured("gpt_oss")
    noted = snapshot.origin.rope[0]
    rotary = model.model.rotary_emb
    assert noted["attention_scaling"] == rotary.attention_scaling > 1
    assert noted["inv_freq"] == rotary.inv_freq.tolist()
    assert all("attention_scaling" not in rope for rope in captured("gemma3")[1].origin.rope)


def test_scales_of_two_kinds_of_layers():
    """Each kind's own: without it, keys before RoPE are not found."""
    kinds = ["sliding_attention", "full_attention"]
    yarn = {"factor": 4.0, "original_max_position_embeddings": 64}
    ropes = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        "full_attention": {"rope_type": "yarn", "rope_theta": 10000.0, **yarn},
    }
    model = tiny_model("Gemma3Text", layer_types=2 * kinds, rope_parameters=ropes)
    snapshot = prefill(model, np.random.default_rng(0).integers(1, 100, 60, np.uint32))
    scales = [rope.get("attention_scaling") for rope in snapshot.origin.rope]
    assert [scale is None for scale in scales] == [True, False]
    assert all(share[1] < 0.005 for share in shares_missing(snapshot))


def test_what_a_store_keeps_of_a_model_says_it_too():
    """Not a capture's origin alone: that of what `load_or_prefill` stores."""
    model, snapshot = captured("gpt_oss")
    assert origin_of_model(model).rope == snapshot.origin.rope


@pytest.mark.parametrize("name", [*FOUND, *NOT_FOUND])
def test_a_config_alone_tells_what_its_model_turns_by(name):
    """So that what another engine computed says it, too."""
    model = families.tiny_model(families.Family(name), torch.float32)
    found = rope_of_config(model.config)
    assert found == rope_of_model(model)
    assert found and all(rope["inv_freq"] for rope in found)


def test_frequencies_are_the_decoders_own():
    """And not those of an encoder of sound, which stands behind it."""
    [family] = [family for family in families.families() if family.name == "musicflamingo"]
    model = families.tiny_model(family, torch.float32)
    own = model.model.language_model.rotary_emb.inv_freq.tolist()
    assert len(model.model.pos_emb.inv_freq) != len(own)
    for [rope] in (rope_of_model(model), rope_of_config(model.config)):
        assert rope["inv_freq"] == own


def test_a_config_that_transformers_has_no_module_for():
    config = transformers.LlamaConfig()
    config.rope_parameters = {"rope_type": "of another engine", "rope_theta": 1e4}
    assert rope_of_config(config) == (config.rope_parameters,)
