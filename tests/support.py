"""Snapshots that tests share: random bits, hostile bits, and numbers like a real cache's."""

from __future__ import annotations

import multiprocessing
import struct
import time

import numpy as np
import xxhash

import kvzip
from kvzip import dtypes

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


def examples(count, codec, dtype):
    """How many examples a test tries of a codec with a format, where it tries `count` of the pairs
    that are unlike, and all pairs."""
    return count if (codec, dtype) in UNLIKE_PAIRS else count // 10


def random_bits(rng, dtype, shape):
    """Every bit pattern alike: NaN payloads, infinities, subnormals, negative zeros."""
    uint = dtypes.get(dtype).uint
    return rng.integers(0, 2 ** (8 * uint.itemsize), shape, dtype=np.uint64).astype(uint)


def cache_like(rng, dtype, shape):
    """Numbers with a scale and a mean for each channel, as keys and values have them."""
    import torch

    scale = 2.0 ** rng.uniform(-6, 3, (shape[-3], 1, shape[-1]))
    mean = rng.normal(0, 1, scale.shape) * (rng.random(scale.shape) < 0.3)
    numbers = (rng.normal(size=shape) + mean) * scale
    form = dtypes.get(dtype)
    if form.kind in ("fn", "fnuz"):  # which have no infinities
        most = dtypes.to_float32(np.arange(128, dtype=np.uint8), dtype)
        numbers = numbers.clip(-np.nanmax(most), np.nanmax(most))
    elif form.kind == "scale":
        numbers = np.abs(numbers)
    elif not form.is_float:
        numbers = np.rint(4 * numbers).clip(-128, 127).astype(np.int8)
    return dtypes.as_bits(torch.from_numpy(numbers).to(getattr(torch, form.torch)), dtype)[0]


def make_snapshot(maker, seed, dtype, layers=2, heads=2, tokens=50, dim=16, batch=None, ids=True):
    rng = np.random.default_rng(seed)
    front = () if batch is None else (batch,)
    shape = (*front, heads, tokens, dim)
    return kvzip.Snapshot.from_arrays(
        [(maker(rng, dtype, shape), maker(rng, dtype, shape)) for _ in range(layers)],
        dtype,
        rng.integers(0, 50000, (*front, tokens)) if ids else None,
        kvzip.Origin(model="test/model", revision="r1", rope=({"rope_theta": 1e4},)),
    )


def reseal(blob: bytes) -> bytes:
    """Make the file's checksums of stored bytes true again, as an attacker would."""
    blob = bytearray(blob)
    header_length, count, ids_length = struct.unpack_from("<III", blob, 12)
    at = 40 + header_length + ids_length
    for row in range(at, min(at + 48 * count, len(blob) - 47), 48):
        offset, length = struct.unpack_from("<QQ", blob, row + 16)
        stored = blob[offset : offset + length] if offset < len(blob) else b""
        struct.pack_into("<Q", blob, row + 32, xxhash.xxh3_64_intdigest(bytes(stored)))
    end = at + 48 * count
    end += -end % 64
    digest = xxhash.xxh3_64_intdigest(bytes(blob[:32]) + bytes(blob[40:end]))
    struct.pack_into("<Q", blob, 32, digest)
    return bytes(blob)


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


def assert_same(a, b):
    assert a.layout == b.layout
    for i, (x, y) in enumerate(zip(a.layers, b.layers, strict=True)):
        assert np.array_equal(x.k, y.k), f"layer {i}: keys differ"
        assert np.array_equal(x.v, y.v), f"layer {i}: values differ"


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


def tiny_model(kind, **more):
    """A random model of a family of transformers, bf16, as `kvzip.models` loads them."""
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
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return LoadedModel(model, None, f"tiny-{kind}", "r")


def save_tiny_model(folder):
    """A random Llama with a tokenizer of a few words, as `kvzip capture --model` takes a folder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(200)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
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
