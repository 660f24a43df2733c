"""Golden files: what released versions wrote, which every later one must read to the same numbers.

`tests/golden/` has a folder for each version of the format. Its `manifest.json` has a line for each
file: the SHA-256 of its bytes and of its numbers, and what a reader needs beside it.
`python tests/golden_files.py` writes the files, and their lines, that the newest version lacks.
Files that are there stay as they are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

import kvzip
from kvzip import Layer, LayerLayout, PartLayout, dtypes
from kvzip.codecs import _native
from kvzip.codecs.common.rotation import ROUNDINGS, is_side_by_side
from kvzip.container.format import VERSION
from kvzip.container.grids import GridCodec
from kvzip.container.sealed import seal

FOLDER = Path(__file__).parent / "golden"
NOW = FOLDER / f"v{VERSION}"
"""The files of the format that is written today."""
MANIFEST = "manifest.json"
KEY = kvzip.Key(bytes(range(32)), "golden")
"""Opens the sealed files."""
BLOCK_TOKENS = 48
"""Each part has two blocks, of which the second is smaller."""
PAGE_TOKENS = 16
CHANNEL_DTYPES = [
    d for d in dtypes.NAMES if kvzip.get_codec("channel").takes(PartLayout(d, (1, 1), "td"), "", "")
]
PREDICTIVE_DTYPES = ("bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2")
GOLDEN = kvzip.Origin(model="golden")


# --- numbers, from integer arithmetic alone, so that they are the same for ever ------------------


def bits(dtype: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Numbers whose exponents are unlike, each as likely as half of the next; small integers."""
    form = dtypes.get(dtype)
    n = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed)
    n = n * np.uint64(0x9E3779B97F4A7C15)
    if form.is_float:
        exponent = np.uint64((1 << (form.exponent_bits - 1)) - 2) - (n >> np.uint64(62))
        found = (n >> np.uint64(61) & np.uint64(1)) << np.uint64(form.bits - 1)
        found |= exponent << np.uint64(form.mantissa_bits)
        found |= n >> np.uint64(20) & np.uint64((1 << form.mantissa_bits) - 1)
    else:
        found = n >> np.uint64(60)
    return found.reshape(shape).astype(form.uint)


def plain(dtype: str, heads: int = 2, ids: bool = True) -> kvzip.Snapshot:
    """Two layers of keys and values."""
    layers = [
        tuple(bits(dtype, (heads, 70, 5), 1000 * layer + 100 * part) for part in range(2))
        for layer in range(2)
    ]
    return kvzip.Snapshot.from_arrays(layers, dtype, np.arange(70) if ids else None, GOLDEN)


def batch() -> kvzip.Snapshot:
    """Three rows, whose ids need three bytes each."""
    layers = [
        tuple(bits("fp16", (3, 2, 70, 5), 1000 * layer + 100 * part) for part in range(2))
        for layer in range(2)
    ]
    ids = (np.arange(3 * 70) * 7919 % 151_936).reshape(3, 70)
    return kvzip.Snapshot.from_arrays(layers, "fp16", ids, GOLDEN)


def every_kind() -> kvzip.Snapshot:
    """Layers of every kind, parts of other formats and axes than keys and values, states, a
    constant, and a layer that shares another's."""

    def layer(parts: dict[str, tuple[str, tuple[int, ...], str]], *args: Any, **more: Any) -> Layer:
        layout = {name: PartLayout(*part) for name, part in parts.items()}
        held = {
            name: bits(dtype, shape, 100 * len(name) + len(made))
            for name, (dtype, shape, _) in parts.items()
        }
        made.append(Layer(held, LayerLayout(layout, *args, **more)))
        return made[-1]

    made: list[Layer] = []
    kv = {"k": ("bf16", (2, 70, 5), "htd"), "v": ("bf16", (2, 70, 3), "htd")}
    window = {"k": ("bf16", (2, 19, 5), "htd"), "v": ("bf16", (2, 19, 5), "htd")}
    source = {"k": ("bf16", (2, 33, 5), "htd"), "v": ("bf16", (2, 33, 5), "htd")}
    latent = {"latent": ("bf16", (70, 24), "td"), "rope": ("bf16", (70, 4), "td")}
    state = {"conv": ("bf16", (3, 16), "rd"), "state": ("fp32", (2, 8, 8), "hrd")}
    quantised = {
        "k": ("int8", (2, 70, 8), "htd"),
        "k_scale": ("fp64", (70, 2), "th"),
        "v": ("uint8", (70, 2, 4), "thd"),
        "v_scale": ("e8m0", (2, 70), "ht"),
        "scale": ("fp32", (), ""),
    }
    layer(kv, 70, rope=0)
    layer(window, 70, "sliding", 20, rope=1)
    layer(latent, 70, "latent")
    layer({"latent": ("fp8_e4m3fn", (30, 24), "td")}, 70, "latent", 31)
    layer(state, 70, "state", state_length=70)
    layer(source, 33, "cross")
    layer({}, 70)
    layer(quantised, 70)
    layer(kv | {"state": ("bf16", (4, 6), "rd")}, 70, state_length=70)
    rope = ({"rope_theta": 1e4}, {"rope_theta": 1e6})
    origin = kvzip.Origin("golden", "r1", "Golden", rope, "none", {"kvzip": "0.2.0"})
    return kvzip.Snapshot(made, "bf16", np.arange(70) % 40, origin)


def scaled_by_powers() -> kvzip.Snapshot:
    """Keys of which 32 channels are fp8 times a power of two for each token, but for a few, and 8
    are not; and values that are on no grid."""
    layers = []
    for layer in range(2):
        n = np.arange(2 * 70 * 40, dtype=np.uint64) + np.uint64(10_000 * layer)
        n = (n * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(30)).reshape(2, 70, 40)
        some = n >> np.uint64(20) & np.uint64(7)
        noise = (n & np.uint64(0x807F)) | (some + np.uint64(118)) << np.uint64(7)
        scale = (np.arange(70, dtype=np.uint64) * np.uint64(7) % np.uint64(5))[:, None]
        k = (n & np.uint64(0x8070)) | (some + scale + np.uint64(118)) << np.uint64(7)
        k[..., 32:] = noise[..., 32:]
        k[1, 5::20, 3] |= np.uint64(1)
        layers.append((k.astype(np.uint16), noise.astype(np.uint16)))
    return kvzip.Snapshot.from_arrays(layers, "bf16", np.arange(70), GOLDEN)


def scaled_by_any() -> kvzip.Snapshot:
    """bf16 that is int8 times a scale of 16 bits for each token of each head. The products have 24
    bits, so that a float32 holds them, and are rounded once."""
    layers = []
    for layer in range(2):
        n = np.arange(2 * 70 * 64, dtype=np.uint64) + np.uint64(10_000 * layer)
        n = (n * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)).reshape(2, 70, 64)
        codes = (n % np.uint64(255)).astype(np.float32) - np.float32(127)
        token = np.arange(2 * 70, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        scales = (token >> np.uint64(48) | np.uint64(0x8001)).astype(np.float32).reshape(2, 70, 1)
        found = _bf16(codes * scales * np.float32(2.0**-24)).view(np.uint32) >> 16
        layers.append((found.astype(np.uint16), found[..., ::-1].astype(np.uint16)))
    return kvzip.Snapshot.from_arrays(layers, "bf16", np.arange(70), GOLDEN)


def widened() -> kvzip.Snapshot:
    """fp32 that holds bf16."""
    layers = [
        tuple(bits("bf16", (2, 70, 16), 90 * i + 7 * p).astype(np.uint32) << 16 for p in range(2))
        for i in range(2)
    ]
    return kvzip.Snapshot.from_arrays(layers, "fp32", np.arange(70), GOLDEN)


def partly_widened() -> kvzip.Snapshot:
    """fp32 that holds bf16, but for the last 16 of 160 tokens, which are a block."""
    layers = [[bits("bf16", (2, 160, 16), 70 * p).astype(np.uint32) << 16 for p in range(2)]]
    for part in layers[0]:
        part[:, 144:] = bits("fp32", (2, 16, 16))
    return kvzip.Snapshot.from_arrays([tuple(layers[0])], "fp32", np.arange(160), GOLDEN)


def before_rope(rounding: int = 1) -> kvzip.Snapshot:
    """Keys that RoPE turned, rounding products and sums (1), sums alone (2), or these with cosines
    and sines that are not of bf16 (3); or likewise (4, 5, 6), of pairs side by side. But for a pair
    in each layer, after the first 30 tokens, which are gone; 4 of their 12 channels are not turned.
    From single steps of IEEE 754, which are the same for ever, and of cosines and sines 8 bits, or
    24."""
    frequencies = np.float32(2) ** -np.arange(4, dtype=np.float32)
    angle = np.arange(30, 100, dtype=np.float32)[:, None] * frequencies
    cos, sin = (f(angle.astype(np.float64)).astype(np.float32) for f in (np.cos, np.sin))
    if rounding not in (3, 6):
        cos, sin = _bf16(cos), _bf16(sin)
    product = _bf16 if rounding in (1, 4) else np.float32
    one, other = (slice(0, 4), slice(4, 8)) if rounding <= 3 else (slice(0, 8, 2), slice(1, 8, 2))
    layers = []
    for layer in range(2):
        n = np.arange(2 * 70 * 12, dtype=np.uint64) + np.uint64(10_000 * layer)
        n = (n * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(30)).reshape(2, 70, 12)
        channel = np.arange(12, dtype=np.uint64)
        some = n >> np.uint64(22) & np.uint64(1)
        k = n & np.uint64(0x7F) | (some + channel + np.uint64(118)) << np.uint64(7)
        k = (k | (channel & np.uint64(1)) << np.uint64(15)).astype(np.uint16)
        wide = (k.astype(np.uint32) << 16).view(np.float32)
        a, b = wide[..., one], wide[..., other]
        turned = wide.copy()
        turned[..., one] = _bf16(product(a * cos) - product(b * sin))
        turned[..., other] = _bf16(product(b * cos) + product(a * sin))
        keys = (turned.view(np.uint32) >> 16).astype(np.uint16)
        keys[1, 60, 2] ^= 0x4003
        layers.append((keys, k))
    form = LayerLayout.of_kv((2, 70, 12), (2, 70, 12), "bf16", 100, "sliding", 70, 0)
    origin = kvzip.Origin(model="golden", rope=({"inv_freq": frequencies.tolist()},))
    return kvzip.Snapshot(
        [Layer.of_kv(*pair, form) for pair in layers], "bf16", np.arange(100), origin
    )


def _bf16(x: np.ndarray) -> np.ndarray:
    """Each float32 to the nearest number of bf16, of two as near ones to the even one."""
    given = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((given + 0x7FFF + (given >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


# --- layers that tell of each other, for predictive ----------------------------------------------

TOKENS, PREDICTIVE_BLOCK = 150, 96
PREDICTIVE_PROFILES = {"predictive": 0, "predictive-before-rope": 1, "predictive-before-rope-4": 4}
"""How keys of the documents were turned that profiles were learned from."""
PREDICTIVE_BEFORE_ROPE = {
    rounding: f"predictive-before-rope{'' if rounding == 1 else f'-{rounding}'}-bf16.kvz"
    for rounding in ROUNDINGS
}
"""The file of keys that were turned with each rounding."""
FREQUENCIES = np.array([1, 0.25, 0.0625], np.float32)


def noise(*where: np.ndarray | int) -> np.ndarray:
    """Integers of 16 bits, signed, that look random; the same for ever."""
    mixed = np.uint64(0)
    for value in np.broadcast_arrays(*where):
        mixed = (mixed ^ value.astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        mixed ^= mixed >> np.uint64(29)
    return (mixed >> np.uint64(17) & np.uint64(0xFFFF)).astype(np.int64) - 0x8000


def bits_of(values: np.ndarray, dtype: str) -> np.ndarray:
    """Numbers of a format, the greatest that are not above multiples of 2^-12."""
    form = dtypes.get(dtype)
    numbers = np.arange(1 << min(form.bits, 16)).astype(form.uint if form.bits < 32 else np.uint16)
    with np.errstate(invalid="ignore"):  # NaNs
        known = dtypes.to_float32(numbers, dtype if form.bits < 32 else "bf16").astype(np.float64)
    finite = np.isfinite(known)
    order = np.argsort(known[finite], kind="stable")
    place = np.searchsorted(known[finite][order], values / 4096.0, side="right") - 1
    found = numbers[finite][order][place]
    if form.bits < 32:
        return found
    return found.astype(np.uint32) << np.uint32(16) | (values & 0xFFFF).astype(np.uint32)


def related(dtype: str, document: int = 0, turned: int = 0) -> kvzip.Snapshot:
    """Three layers whose numbers tell of each other; `turned`: by RoPE in bf16, which is the same
    everywhere, with this rounding, as :func:`before_rope` has them. Of pairs side by side channels
    have a mean, by which they are known."""
    position = np.arange(TOKENS)
    ids = noise(position, document) % 40
    layers = []
    for layer in range(3):
        parts = []
        for part in range(2):
            channel = np.arange(2 * 6)[None, :]
            token = ids[:, None]
            values = noise(token, channel, 1) // 4 * (layer + 1)
            values += noise(token, (channel + 1) % 12, 1) // 8
            values += noise(position[:, None] + 1000 * document, channel, layer + 3 * part) // 32
            values += noise(channel, 7) // 2 * is_side_by_side(turned)
            parts.append(
                np.ascontiguousarray(bits_of(values.reshape(TOKENS, 2, 6), dtype).swapaxes(0, 1))
            )
        layers.append(tuple(parts))
    if not turned:
        origin = kvzip.Origin(model="golden", rope=({"rope_theta": 1e4},))
        return kvzip.Snapshot.from_arrays(layers, dtype, ids.astype(np.uint32), origin)
    rotation = _native.Rotation(FREQUENCIES)
    for k, _ in layers:
        rotation.turn(k[np.newaxis], 0, turned)
    origin = kvzip.Origin(model="golden", rope=({"inv_freq": FREQUENCIES.tolist()},))
    form = LayerLayout.of_kv((2, TOKENS, 6), (2, TOKENS, 6), "bf16", TOKENS, "full", None, 0)
    held = [Layer.of_kv(k, v, form) for k, v in layers]
    return kvzip.Snapshot(held, "bf16", ids.astype(np.uint32), origin)


def beside() -> kvzip.Snapshot:
    """What predictive leaves to others: values that are all one number, and keys of any bits."""
    layers = [[np.array(bits) for bits in layer.parts.values()] for layer in related("bf16").layers]
    layers[1][1][...] = 0x3F80
    token = np.arange(2 * TOKENS * 6).reshape(2, TOKENS, 6)
    layers[2][0][...] = (noise(token, 5) + 0x8000).astype(np.uint16)
    known = related("bf16")
    pairs = [tuple(pair) for pair in layers]
    return kvzip.Snapshot.from_arrays(pairs, "bf16", known.token_ids, known.origin)


def with_states() -> kvzip.Snapshot:
    """Layers that are predicted, and one of states, which another codec stores."""
    known = related("bf16")
    parts = {
        "conv": PartLayout("bf16", (3, 16), "rd"),
        "state": PartLayout("fp32", (2, 8, 8), "hrd"),
    }
    held = {name: bits(part.dtype, part.shape) for name, part in parts.items()}
    states = Layer(held, LayerLayout(parts, TOKENS, "state", state_length=TOKENS))
    layers = [*known.layers, states]
    return kvzip.Snapshot(layers, "bf16", known.token_ids, known.origin)


# --- files -------------------------------------------------------------------------------------


@cache
def _profile(path: Path) -> kvzip.Profile:
    return kvzip.Profile.load(path)


Make = Callable[[Path], bytes]
"""Makes a file's bytes; profiles that it needs are in the folder that it is given."""


def _encoded(
    held: Callable[[], kvzip.Snapshot], codec: str, profile: str | None = None, **options: Any
) -> Make:
    options = {"block_tokens": BLOCK_TOKENS} | options

    def make(folder: Path) -> bytes:
        known = None if profile is None else _profile(folder / profile)
        return kvzip.encode(held(), codec, known, **options)

    return make


def _fitted(codec: str, *args: Any, **settings: Any) -> Make:
    def make(folder: Path) -> bytes:
        learned = [related(*a) for a in args] if codec == "predictive" else [a() for a in args]
        return kvzip.Profile.fit(learned, codec=codec, **settings).file

    return make


def _page(held: kvzip.Snapshot, profile: str) -> Make:
    def make(folder: Path) -> bytes:
        pairs = [(x.k[:, 3 : 3 + PAGE_TOKENS], x.v[:, 3 : 3 + PAGE_TOKENS]) for x in held.layers]
        return kvzip.encode_page(pairs, _profile(folder / profile))

    return make


def _off_its_grid(folder: Path) -> bytes:
    """A part that a sample says is on a grid, and that takes less without, as it is taken to."""
    with patch.object(GridCodec, "_is_smaller", lambda *_: False):
        return kvzip.encode(widened(), "raw", block_tokens=BLOCK_TOKENS)


def _saved(folder: Path) -> bytes:
    path = folder / "saved.tmp"
    every_kind().save(path)
    try:
        return path.read_bytes()
    finally:
        path.unlink()


def codec_files() -> dict[str, tuple[str, str]]:
    """Of the files of each codec and each dtype that it takes, the codec and the dtype."""
    return {
        f"{codec}-{dtype}.kvz": (codec, dtype)
        for codec in kvzip.codec_names()
        for dtype in dtypes.NAMES
        if not (known := kvzip.get_codec(codec)).needs_profile
        and known.takes(PartLayout(dtype, (2, 9, 64), "htd"), "full", "k")
    }


def files() -> Iterator[tuple[str, str | None, Make]]:
    """Every file by its name, with the profile that it needs, profiles first."""
    many = 47  # heads, with which a block has more than one stream
    for name, turned in PREDICTIVE_PROFILES.items():
        documents = [("bf16", d, turned) for d in range(1, 13)]
        yield f"{name}.kvprofile", None, _fitted("predictive", *documents, regions=[1, 2, 3])
    for dtype in CHANNEL_DTYPES:
        yield f"channel-{dtype}.kvprofile", None, _fitted("channel", lambda d=dtype: plain(d))
    yield "channel-before-rope.kvprofile", None, _fitted("channel", before_rope)

    for name, (codec, dtype) in codec_files().items():
        yield name, None, _encoded(lambda d=dtype: plain(d), codec)
    by_bits = "planes:mode=bit,order=channel,coder=lz4"
    yield "planes-by-bits-bf16.kvz", None, _encoded(lambda: plain("bf16"), by_bits)
    yield (
        f"channel-of-{many}-heads-bf16.kvz",
        None,
        _encoded(lambda: plain("bf16", many), "channel", block_tokens=70),
    )
    yield "channel-of-noise-bf16.kvz", None, _encoded(beside, "channel")
    yield "channel-before-rope-bf16.kvz", None, _encoded(before_rope, "channel")
    for rounding in range(2, 7):
        yield (
            f"channel-before-rope-{rounding}-bf16.kvz",
            None,
            _encoded(lambda r=rounding: before_rope(r), "channel"),
        )
    yield "channel-on-a-grid-bf16.kvz", None, _encoded(scaled_by_powers, "channel")
    yield "planes-on-a-grid-bf16.kvz", None, _encoded(scaled_by_any, "planes")
    yield "zstd-on-a-grid-fp32.kvz", None, _encoded(widened, "zstd")
    yield "raw-partly-on-a-grid-fp32.kvz", None, _encoded(partly_widened, "raw")
    yield "raw-off-its-grid-fp32.kvz", None, _off_its_grid
    yield "every-kind-bf16.kvz", None, _encoded(every_kind, "channel")
    yield "batch-fp16.kvz", None, _encoded(batch, "channel")
    yield (
        "ids-withheld-bf16.kvz",
        None,
        _encoded(lambda: plain("bf16"), "raw", store_token_ids=False),
    )

    for dtype in CHANNEL_DTYPES:
        profile = f"channel-{dtype}.kvprofile"
        yield (
            f"channel-by-profile-{dtype}.kvz",
            profile,
            _encoded(lambda d=dtype: plain(d), "channel", profile),
        )
        yield f"page-{dtype}.kvzpage", profile, _page(plain(dtype), profile)
    profile = "channel-before-rope.kvprofile"
    yield (
        "channel-before-rope-by-profile-bf16.kvz",
        profile,
        _encoded(before_rope, "channel", profile),
    )
    profile = "predictive.kvprofile"
    for dtype in PREDICTIVE_DTYPES:
        yield (
            f"predictive-{dtype}.kvz",
            profile,
            _encoded(
                lambda d=dtype: related(d), "predictive", profile, block_tokens=PREDICTIVE_BLOCK
            ),
        )
    yield (
        "predictive-beside-bf16.kvz",
        profile,
        _encoded(beside, "predictive", profile, block_tokens=PREDICTIVE_BLOCK),
    )
    yield (
        "predictive-with-states-bf16.kvz",
        profile,
        _encoded(with_states, "predictive", profile, block_tokens=PREDICTIVE_BLOCK),
    )
    for rounding, name in PREDICTIVE_BEFORE_ROPE.items():
        profile = f"predictive-before-rope{'-4' if is_side_by_side(rounding) else ''}.kvprofile"
        yield (
            name,
            profile,
            _encoded(
                lambda r=rounding: related("bf16", turned=r),
                "predictive",
                profile,
                block_tokens=PREDICTIVE_BLOCK,
            ),
        )

    yield (
        "sealed-channel-bf16.kvz",
        None,
        lambda folder: seal(kvzip.encode(plain("bf16", many), "channel"), KEY),
    )
    yield "every-kind-bf16.safetensors", None, _saved


def written(name: str) -> kvzip.Snapshot:
    """What a file of today's, .kvz or .safetensors, holds, anew."""
    stem, _, _ = name.partition(".")
    dtype = stem.rpartition("-")[2]
    special = {
        "every-kind-bf16": every_kind,
        "channel-of-noise-bf16": beside,
        **{
            f"channel-before-rope-{rounding}-bf16": lambda r=rounding: before_rope(r)
            for rounding in range(2, 7)
        },
        "predictive-beside-bf16": beside,
        "predictive-with-states-bf16": with_states,
        "batch-fp16": batch,
        "ids-withheld-bf16": lambda: plain("bf16", ids=False),
        "channel-on-a-grid-bf16": scaled_by_powers,
        "planes-on-a-grid-bf16": scaled_by_any,
        "zstd-on-a-grid-fp32": widened,
        "raw-partly-on-a-grid-fp32": partly_widened,
        "raw-off-its-grid-fp32": widened,
    }
    if stem in special:
        return special[stem]()
    if stem.startswith("predictive"):
        turned = {of: rounding for rounding, of in PREDICTIVE_BEFORE_ROPE.items()}
        return related(dtype, turned=turned.get(f"{stem}.kvz", 0))
    if "before-rope" in stem:
        return before_rope()
    many = "heads" in stem or "sealed" in stem
    return plain(dtype, 47 if many else 2)


# --- the manifest --------------------------------------------------------------------------------


def manifest(folder: Path) -> dict[str, dict[str, str]]:
    """What a version's folder should hold, by the files' names: "file" and "numbers", SHA-256 of
    the bytes and of what :func:`numbers` takes, and "profile", the profile that is needed."""
    path = folder / MANIFEST
    return json.loads(path.read_text()) if path.exists() else {}


class _Digest:
    """SHA-256 of arrays, with what each is called, its format and its shape."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()

    def take(self, name: str, array: Any) -> None:
        array = np.ascontiguousarray(array)
        self._sha256.update(f"{name} {array.dtype.str} {list(array.shape)}\n".encode())
        self._sha256.update(array.tobytes())

    def __str__(self) -> str:
        return self._sha256.hexdigest()


def numbers_of(snapshot: kvzip.Snapshot) -> str:
    """SHA-256 of all parts, by layer, name, format and shape, and of the token ids."""
    digest = _Digest()
    for i, layer in enumerate(snapshot.layers):
        for name, array in layer.parts.items():
            digest.take(f"{i} {name} {layer.layout.parts[name].dtype}", array)
    if snapshot.token_ids is not None:
        digest.take("token ids", snapshot.token_ids)
    return str(digest)


def numbers_in(path: Path, profile: str | None = None) -> str:
    """The same of what is read from a file; of a page and a profile, of their arrays."""
    known = None if profile is None else kvzip.Profile.load(path.parent / profile)
    if path.suffix == ".safetensors":
        return numbers_of(kvzip.Snapshot.load(path))
    if path.suffix == ".kvz":
        key = KEY if path.name.startswith("sealed") else None
        return numbers_of(kvzip.decode(path, known, key=key))
    digest = _Digest()
    if path.suffix == ".kvzpage":
        for i, pair in enumerate(kvzip.decode_page(path.read_bytes(), known)):
            for name, array in zip("kv", pair, strict=True):
                digest.take(f"{i} {name}", array)
        return str(digest)
    for name, tensor in sorted(kvzip.Profile.load(path).tensors.items()):
        digest.take(name, tensor)
    return str(digest)


def wrong_in(folder: Path) -> list[str]:
    """The files of a version that are missing, changed, or not in its manifest."""
    lines = manifest(folder)
    there = {path.name for path in folder.iterdir()} - {MANIFEST}
    changed = {
        name for name in there & lines.keys() if sha256(folder / name) != lines[name]["file"]
    }
    return sorted((there ^ lines.keys()) | changed)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_missing(folder: Path = NOW) -> list[Path]:
    """Write the files that a folder lacks, and their lines in its manifest. Returns their
    paths."""
    folder.mkdir(exist_ok=True)
    lines, made = manifest(folder), []
    for name, profile, make in files():
        path = folder / name
        if not path.exists():
            path.write_bytes(make(folder))
            made.append(path)
        if name not in lines:
            line = {"file": sha256(path), "numbers": numbers_in(path, profile)}
            lines[name] = line | ({} if profile is None else {"profile": profile})
    rows = [f"  {json.dumps(name)}: {json.dumps(lines[name])}" for name in sorted(lines)]
    (folder / MANIFEST).write_text("{\n" + ",\n".join(rows) + "\n}\n")
    return made


if __name__ == "__main__":
    for path in write_missing():
        print(path)
