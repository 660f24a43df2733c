"""Models that take images: their prompts of text are kept, and those with images refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import kvzip
from kvzip.capture import prefill
from kvzip.errors import UnsupportedError
from kvzip.load.hf import (
    cache_argument,
    load_batch,
    load_batch_or_prefill,
    load_cache,
    load_or_prefill,
)
from kvzip.load.placeholders import check_text_only
from kvzip.models import LoadedModel
from kvzip.store import Store

IMAGE = 199


@pytest.fixture(scope="module")
def llava():
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
    )
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


@pytest.fixture
def ids():
    return torch.arange(2, 66)[None]


@pytest.fixture
def with_image(ids):
    return torch.cat([ids[:, :20], torch.full((1, 4), IMAGE), ids[:, 20:]], 1)


def filled(model, ids, **more):
    cache = transformers.DynamicCache(config=model.config.get_text_config())
    with torch.inference_mode():
        model(input_ids=ids, **more, **cache_argument(cache))
    return cache


def test_prompts_of_text_are_kept(llava, ids, tmp_path):
    store = Store(tmp_path, block_tokens=16)
    store.put(kvzip.Snapshot.from_cache(filled(llava, ids), ids, llava))
    longer = torch.cat([ids, ids[:, :8]], 1)
    assert load_or_prefill(store, llava, longer).get_seq_length() == 63
    assert prefill(LoadedModel(llava, None, "llava", ""), ids[0].numpy()).tokens == 64


def test_prompts_with_images_are_refused(llava, with_image, tmp_path):
    cache = filled(llava, with_image, pixel_values=torch.randn(1, 3, 28, 28))
    refused = pytest.raises(UnsupportedError, match=r"LlavaFor.* hold 199 \(image_token_")
    with refused:
        kvzip.Snapshot.from_cache(cache, with_image, llava)
    with refused:
        prefill(LoadedModel(llava, None, "llava", ""), with_image[0].numpy())
    store = Store(tmp_path, block_tokens=16)
    # Who gives no more than a name is not seen; nothing is loaded all the same.
    named = kvzip.Snapshot.from_cache(cache, with_image, "llava")
    store.put(named)
    with refused:
        load_or_prefill(store, llava, with_image, name="llava", revision="")
    with refused:
        load_batch_or_prefill(store, llava, [with_image[0]], name="llava", revision="")
    for prompt in (with_image, None):
        with pytest.raises(UnsupportedError, match=r"LlavaConfig .* hold 199"):
            load_cache(named, llava.config, prompt=prompt)
    with pytest.raises(UnsupportedError, match=r"prompts\[0\]: .*LlavaConfig"):
        load_batch([named], llava.config, [with_image[0]])


def test_a_config_that_names_no_placeholder_is_refused(llava, ids):
    class Unnamed(transformers.LlavaConfig):
        def to_dict(self):
            return {k: v for k, v in super().to_dict().items() if "image_token" not in k}

    config = Unnamed(text_config=llava.config.text_config, vision_config=llava.config.vision_config)
    with pytest.raises(UnsupportedError, match="does not say which token ids"):
        check_text_only(config, ids.numpy(), "Unnamed")


@pytest.mark.parametrize(
    "name",
    [
        "Qwen2VL",
        "Qwen2_5_VL",
        "Qwen3VL",
        "Gemma3",
        "Gemma3n",
        "Idefics3",
        "InternVL",
        "Mistral3",
        "Phi4Multimodal",
        "Qwen2Audio",
        "Llama4",
    ],
)
def test_well_known_configs_name_their_placeholders(name):
    config = getattr(transformers, f"{name}Config")()
    check_text_only(config, np.arange(100, 200), name)
    with pytest.raises(UnsupportedError, match=f"{name} .* which stands for any"):
        tokens = [
            v for k, v in _flat(config.to_dict()) if str(k).endswith(("token_id", "token_index"))
        ]
        check_text_only(config, np.array([t for t in tokens if isinstance(t, int)]), name)


def _flat(described):
    for key, value in described.items():
        yield key, value
        if isinstance(value, dict):
            yield from _flat(value)
