"""Snapshots that tests share: random bits, hostile bits, and numbers like a real cache's."""

from __future__ import annotations

import multiprocessing
import time

import numpy as np
from hypothesis import settings

import kvzip
from kvzip.codecs import _native

# What the public suite makes, for the tests of all else.
from kvzip.testing import assert_same, cache_like, make_snapshot, random_bits, reseal  # noqa: F401

CODECS = [
    "raw",
    "zstd",
    "lz4",
    "planes",
    "planes:mode=bit,order=token,coder=lz4",
    "planes:mode=bit",
    "channel",
]
"""Every codec that needs no profile, and settings of some: what the contract suite runs for."""
CHANNEL_DTYPES = ("bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2")
"""One format for each way in which `channel` divides numbers into exponent and mantissa."""
UNLIKE_DTYPES = (*CHANNEL_DTYPES, "fp8_e5m2fnuz", "fp64", "int8")
"""Formats of which each is unlike the others for some codec: for tests that take long."""
UNLIKE_PAIRS = [
    (codec, dtype)
    for codec in CODECS
    for dtype in (UNLIKE_DTYPES if codec == "channel" else ("fp8_e5m2", "bf16", "fp32", "fp64"))
]
"""A codec and a format of each way in which it can take numbers: all but `channel` see bytes, and
tell apart the sizes of numbers only."""
NEED_PROFILE = {name for name in kvzip.codec_names() if kvzip.get_codec(name).needs_profile}
"""Codecs that have suites of their own, which learn profiles first."""


def examples(count):
    """For a property whose examples take long: it is drawn `count` times where others are drawn 50
    times, and as many times more as they are in `make test-long`."""
    return settings(max_examples=max(1, count * settings().max_examples // 50))


def rotated(seed, tokens=400, first=0, rounding=1, layers=2, heads=3, dim=32):
    """A document of a model whose keys are about a mean of each channel before RoPE."""
    half = dim // 2
    radians = 1.0 / 100 ** (np.arange(half) / half)
    rotation = _native.Rotation(radians.astype(np.float32), 1.0)
    found = []
    for i in range(layers):
        means = np.random.default_rng(i).normal(0, 4, (1, heads, 1, dim))
        rng = np.random.default_rng(100 * seed + i)
        numbers = (means + rng.normal(0, 0.5, (1, heads, tokens, dim))).astype(np.float32)
        k = (numbers.view(np.uint32) >> 16).astype(np.uint16)
        v = k[0].copy()
        rotation.turn(k, first, rounding)
        kind = ("full", None) if not first else ("sliding", tokens + 1)
        layout = kvzip.LayerLayout.of_kv(k[0].shape, v.shape, "bf16", first + tokens, *kind, rope=0)
        found.append(kvzip.Layer.of_kv(k[0], v, layout))
    origin = kvzip.Origin(rope=({"inv_freq": radians.tolist()},))
    return kvzip.Snapshot(found, "bf16", origin=origin)


def damaged(blob, layer, part):
    """A .kvz file with a bit of that layer's last block changed."""
    with kvzip.open(blob) as reader:
        row = reader.index.rows[layer, part][-1]
        end = reader.index.offset[row] + reader.index.length[row]
    out = bytearray(blob)
    out[end - 1] ^= 1
    return bytes(out)


def warnings_of(caplog):
    """What was said on the way into a model since the last call."""
    found = [r.getMessage() for r in caplog.records if r.name == "kvzip.load"]
    caplog.clear()
    return found


def wait_for(condition):
    """Whether something that another thread does is so within some seconds."""
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return bool(condition())


def tiny_documents(loaded, count, tokens=160, seed=0, **how):
    """What a model of 100 words makes of random documents."""
    from kvzip.capture import prefill

    rng = np.random.default_rng(seed)
    return [prefill(loaded, row, **how) for row in rng.integers(0, 100, (count, tokens), np.uint32)]


def readme_model(**more):
    """A model that the examples of README and guides run on."""
    sizes = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    return tiny_model("Llama", **sizes | more).model


def readme_document(model, ids):
    """What a model holds of ids, [1, tokens]."""
    import torch
    from transformers import DynamicCache

    from kvzip.load.hf import cache_argument

    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids, **cache_argument(cache))
    return kvzip.Snapshot.from_cache(cache, ids, model)


def as_installed(code):
    """An example, which is written for the newest transformers, for the one that is here."""
    from kvzip.load.hf import cache_argument

    [name] = cache_argument(None)
    return code.replace("cache=cache,", f"{name}=cache,")


def tiny_model(kind, dtype="bfloat16", **more):
    """A random model of a family of transformers as `kvzip.models` loads them.

    Tests that compare tokens of the same text, computed in other pieces, take float32: in bf16 one
    token in thirty is a near tie, which processors decide in different ways."""
    import torch
    import transformers

    from kvzip.models import LoadedModel

    torch.manual_seed(0)
    common = {
        "vocab_size": 200,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config = getattr(transformers, f"{kind}Config")(**common | more)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, dtype)
    ).eval()
    return LoadedModel(model, None, f"tiny-{kind}", "r")


def save_tiny_model(folder, letters=False):
    """A random Llama with a tokenizer of a few words, as `kvzip capture --model` takes a folder; or
    of letters, by which all texts differ."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if letters:
        words = Tokenizer(models.WordLevel({chr(i): i for i in range(128)}, unk_token="\0"))
        words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="\0" if letters else "w0"
    )
    made.save_pretrained(folder)
    tiny_model("Llama").model.save_pretrained(folder)


def in_a_fork(do):
    """What `do` gives in a forked process, or the name of its error; fails when it hangs."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()

    def child():
        try:
            answers.put(do())
        except Exception as error:
            answers.put(type(error).__name__)

    process = context.Process(target=child)
    process.start()
    process.join(60)
    hangs = process.is_alive()
    process.kill()
    assert not hangs
    return answers.get()
