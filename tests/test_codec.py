from __future__ import annotations

import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from support import CODECS, cache_like, make_snapshot, random_bits

import kvzip
from kvzip import LayerLayout, PartLayout, dtypes
from kvzip.errors import UnsupportedError


def test_names_settings_and_configs_are_the_same_codec():
    a = kvzip.get_codec("planes:mode=bit,level=3")
    assert a == kvzip.get_codec("planes", mode="bit", level=3)
    assert a == kvzip.get_codec(a.get_config())
    assert a == kvzip.get_codec(a)
    assert a != kvzip.get_codec("planes")
    assert repr(a) == "PlanesCodec(mode='bit', order='channel', coder='zstd', level=3)"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("nothing", "there are: channel, lz4"),
        ("zstd:levle=3", "no setting 'levle'; it has: level"),
        ("zstd:level=99", "from 1 to 22"),
        ("zstd:level", "write name=value"),
        ("planes:mode=nibble", "byte or bit"),
        ({"level": 3}, "no codec"),
    ],
)
def test_a_wrong_name_or_setting_says_what_there_is(spec, says):
    with pytest.raises(UnsupportedError, match=says):
        kvzip.get_codec(spec)


def test_only_codecs_register():
    with pytest.raises(UnsupportedError, match=r"not a kvzip\.Codec"):
        kvzip.register_codec(dict)


@pytest.mark.parametrize("kind", ["full", "sliding", "latent", "state", "cross"])
@pytest.mark.parametrize("part", ["k", "v", "latent", "recurrent", "k_scale"])
def test_every_part_is_taken_by_a_codec_or_what_it_falls_back_to(codec, kind, part):
    for name, shape in itertools.product(dtypes.NAMES, SHAPES):
        layout, made, seen = PartLayout(name, *shape), kvzip.get_codec(codec), []
        while not made.takes(layout, kind, part):
            assert made.fallback is not None and made.fallback not in seen
            seen.append(made.fallback)
            made = kvzip.get_codec(made.fallback)


def test_what_each_codec_takes():
    def taken(codec, kind="full", part="k"):
        made = kvzip.get_codec(codec)
        return {
            name
            for name in dtypes.NAMES
            if made.takes(PartLayout(name, (2, 9, 64), "htd"), kind, part)
        }

    for codec in ("raw", "zstd", "lz4", "planes"):
        assert taken(codec) == taken(codec, "state", "conv") == {*dtypes.NAMES}
    others = {"fp64", "int8", "uint8", "e8m0", "bytes"}
    assert taken("channel") == taken("channel", "state", "conv") == {*dtypes.NAMES} - others
    assert taken("predictive") == taken("channel") - {"fp8_e4m3fnuz", "fp8_e5m2fnuz"}
    for kind, part in [
        ("latent", "k"),
        ("state", "recurrent"),
        ("cross", "k"),
        ("full", "k_scale"),
    ]:
        assert not taken("predictive", kind, part)


WIDE = [
    ((1, 3, 65_536), "htd"),
    ((5, 1, 70_000), "htd"),
    ((257, 2, 256), "htd"),
    ((0, 70_000, 2, 1), "bhtd"),
    ((1, 300, 3, 300), "bhtd"),
    ((1, 0, 65_536), "htd"),
    ((2**31 - 1, 0, 2**31 - 1), "htd"),
    ((65_536, 0), "ht"),
    ((1, 65_536), "bd"),
]
"""Shapes of parts that have more channels than `channel` has tables for."""
SHAPES = [
    *WIDE,
    ((1, 3, 65_535), "htd"),
    ((70_000, 1, 3, 1), "bhtd"),
    ((1, 70_000, 1), "htd"),
    ((1, 70_000, 0), "htd"),
    ((0, 2, 70_000), "htd"),
    ((), ""),
]


def of_shape(shape, axes, dtype):
    """A snapshot with a part of that shape: as keys and values, or as a state."""
    numbers = np.random.default_rng(1).integers(0, 99, math.prod(shape))
    array = numbers.astype(dtypes.get(dtype).uint).reshape(shape)
    if "t" in axes and "d" in axes:
        return kvzip.Snapshot.from_arrays([(array, array)], dtype)
    layout = PartLayout(dtype, shape, axes)
    small = np.zeros((1, shape[axes.index("t")] if "t" in axes else 5, 4), layout.form.uint)
    layer = LayerLayout(
        {"k": PartLayout(dtype, small.shape, "htd"), "scale": layout}, small.shape[1]
    )
    return kvzip.Snapshot([kvzip.Layer({"k": small, "scale": array}, layer)], dtype)


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [*((codec, "bf16") for codec in [*CODECS, "auto"]), ("channel", "fp8_e4m3fn")],
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.drawn(3)
def test_a_part_of_any_shape_is_stored(codec, shape, dtype):
    """As many channels as there are: what a codec has no tables for, another stores."""
    snapshot = of_shape(*shape, dtype)
    blob = kvzip.encode(snapshot, codec)
    assert kvzip.decode(blob) == snapshot
    if codec != "auto":
        assert len(blob) <= kvzip.max_encoded_size(snapshot, codec)
    if codec == "channel" and shape in WIDE:
        assert kvzip.info(blob).header.other_codecs[0].codec["id"] == "planes"


@pytest.mark.parametrize("learn", ["channel", "predictive"])
def test_no_profile_is_learned_of_more_channels_than_there_can_be_tables_for(learn):
    with pytest.raises(UnsupportedError, match=r"65,535|'channel' does not take"):
        kvzip.Profile.fit([make_snapshot(random_bits, 1, "bf16", heads=3, dim=30_000)], codec=learn)


def test_tables_of_the_parts_that_have_few_enough_channels():
    arrays = [[np.full((1, 9, dim), 7, np.uint16)] * 2 for dim in (70_000, 8)]
    snapshot = kvzip.Snapshot.from_arrays(arrays, "bf16")
    profile = kvzip.Profile.fit([snapshot], codec="channel")
    assert kvzip.decode(kvzip.encode(snapshot, "channel", profile), profile) == snapshot
    with pytest.raises(kvzip.errors.ProfileError, match="layer 0 k"):
        kvzip.pages.max_page_size(profile, 9)


def test_a_file_whose_codec_cannot_have_stored_its_parts(monkeypatch):
    codec = kvzip.get_codec("channel")
    monkeypatch.setattr(type(codec), "takes", lambda *_: True)
    blob = kvzip.encode(kvzip.Snapshot.from_arrays([(np.zeros((1, 0, 70_000)),) * 2]), codec)
    monkeypatch.undo()
    with pytest.raises(kvzip.FormatError, match="does not take layer 0 k"):
        kvzip.open(blob)


@pytest.mark.parametrize("dtype", ["fp64", "int8", "uint8", "e8m0", "bytes"])
@pytest.mark.parametrize("learn", ["channel", "predictive"])
def test_no_profile_is_learned_of_what_a_codec_does_not_take(dtype, learn):
    with pytest.raises(UnsupportedError, match=f"takes no {dtype}"):
        kvzip.Profile.fit([make_snapshot(cache_like, 1, dtype)], codec=learn)


PLUGIN = '''
from kvzip.codec import Codec

class Inverted(Codec):
    """A stranger's codec: every bit turned over."""
    codec_id = "inverted"
    def encode(self, block, context):
        return (~block).tobytes()
    def decode(self, data, out, context):
        import numpy as np
        out[...] = ~np.frombuffer(data, out.dtype).reshape(out.shape)
    def max_encoded_size(self, raw_bytes):
        return raw_bytes
    def max_decoded_size(self, encoded_bytes, dtype):
        return encoded_bytes
'''
USE = """
import numpy as np, kvzip
snapshot = kvzip.Snapshot.from_arrays([(np.arange(24, dtype=np.float16).reshape(2, 3, 4),) * 2])
blob = kvzip.encode(snapshot, codec="inverted")
assert b"inverted" in blob and "inverted" in kvzip.codec_names()
assert (kvzip.decode(blob).layers[0].k == snapshot.layers[0].k).all()
print("ok")
"""


def test_a_plugin_of_another_distribution_is_found(tmp_path):
    (tmp_path / "stranger.py").write_text(PLUGIN)
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvzip.codecs]\ninverted = stranger:Inverted\n")
    run = [sys.executable, "-c", USE]
    done = subprocess.run(run, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout == "ok\n", done.stderr


def test_a_plugin_that_does_not_import_is_named(tmp_path):
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvzip.codecs]\nbroken = no_such_module:Codec\n")
    code = "import kvzip; kvzip.get_codec('broken')"
    run = [sys.executable, "-c", code]
    done = subprocess.run(run, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert "UnsupportedError: codec 'broken' cannot be imported" in done.stderr


def test_import_is_light():
    code = (
        "import sys, time; t = time.thread_time(); import kvzip; "
        "print(time.thread_time() - t, *{'torch', 'transformers', 'vllm'} & set(sys.modules))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    seconds, *frameworks = min((r.stdout.split() for r in runs), key=lambda f: float(f[0]))
    assert frameworks == []
    assert float(seconds) < 0.3
