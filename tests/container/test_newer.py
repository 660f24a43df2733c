"""Files of other versions: those from before the first release, and what a later one may add.

Each is refused by an error that names what is not known, and says that a newer kvzip may know it.
"""

from __future__ import annotations

import json
import struct

import golden_files
import numpy as np
import pytest
from predictive_profiles import SHAPES, random_profile
from support import cache_like
from test_container import layer_of, part_of, with_header, with_records

import kvzip
from kvzip import checksum
from kvzip.container.sealed import seal
from kvzip.errors import CorruptError, FormatError, ProfileError, UnsupportedError
from kvzip.pages import page_info
from kvzip.testing import make_snapshot, reseal

NEWER = "a newer kvzip may"
BEFORE = "before the first release of kvzip.* anew"


@pytest.fixture(scope="module")
def file():
    return kvzip.encode(make_snapshot(cache_like, 1, "bf16", layers=1, tokens=40), "raw")


# --- the container ---------------------------------------------------------------------------


def changed(blob, form, at, value):
    data = bytearray(blob)
    struct.pack_into(form, data, at, value)
    return bytes(data)


@pytest.mark.parametrize("version, words", [(0, BEFORE), (2, NEWER), (9, "version 9.*" + NEWER)])
def test_a_file_of_another_version(file, version, words):
    other = reseal(changed(file, "<H", 8, version))
    for read in (kvzip.open, kvzip.decode, kvzip.info, kvzip.verify):
        with pytest.raises(FormatError, match=words):
            read(other)


def test_flags(file):
    for bit in range(16):
        with pytest.raises(FormatError, match=NEWER):
            kvzip.open(reseal(changed(file, "<H", 10, 1 << bit)))


def by_a_newer(header, change):
    header["writer"] = "kvzip 7.5.0"
    change(header)


def on_a_new_grid(header, **fields):
    grid = {"wide": "bf16", "narrow": "fp8_e4m3fn", "channels": [0, 8], "scale": "bf16"}
    grid |= {"group": [1, 8]} | fields
    header["grids"] = [{"grid": grid, "codec": {"id": "raw"}, "parts": [[0, "k"]]}]


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda h: h.update(future=1), "future"),
        (lambda h: h["layout"].update(future=1), "future"),
        (lambda h: layer_of(h).update(future=1), "future"),
        (lambda h: part_of(h, future=1), "future"),
        (lambda h: h["origin"].update(future=1), "future"),
        (lambda h: layer_of(h).update(kind="spiral"), "spiral"),
        (lambda h: part_of(h, dtype="fp6_e3m2"), "fp6_e3m2"),
        (lambda h: part_of(h, axes="xtd"), "xtd"),
        (lambda h: h.update(codec={"id": "predictive2"}), "predictive2"),
        (lambda h: h.update(codec={"id": "raw", "future": 1}), "future"),
        (lambda h: on_a_new_grid(h, narrow="fp6_e3m2"), "fp6_e3m2"),
        (lambda h: on_a_new_grid(h, rounding="up"), "up"),
        (lambda h: on_a_new_grid(h, future=1), "future"),
        (lambda h: h.update(other_codecs=[{"codec": {"id": "new"}, "parts": [[0, "k"]]}]), "new"),
    ],
)
def test_what_a_header_may_say_later(file, change, named):
    def both(header):
        by_a_newer(header, change)

    with pytest.raises((FormatError, UnsupportedError)) as told:
        kvzip.open(with_header(file, both))
    words = str(told.value)
    assert named in words and "kvzip 7.5.0" in words and NEWER in words
    assert "\n" not in words and len(words) < 500


def test_a_part_name_of_the_future_is_read(file):
    """Names of parts are free: codecs take by format and shape what they do not know by name."""

    def renamed(header):
        parts = layer_of(header)["parts"]
        layer_of(header)["parts"] = {"k": parts["k"], "phase_3": parts["v"]}

    found = kvzip.decode(with_header(file, renamed)).layers[0].parts
    assert np.array_equal(found["phase_3"], kvzip.decode(file).layers[0].v)


def test_settings_that_are_left_out_have_their_defaults():
    blob = kvzip.encode(golden_files.plain("bf16"), "planes")
    bare = with_header(blob, lambda header: header.update(codec={"id": "planes"}))
    assert bare != blob and kvzip.decode(bare) == kvzip.decode(blob)


@pytest.mark.parametrize("writer", [None, 7, "x\ny" * 1000, "kvzip \N{SNOWMAN}"])
def test_writers_that_say_anything(file, writer):
    def change(header):
        header.update(writer=writer, future=1)

    with pytest.raises(FormatError, match="makes no sense") as told:
        kvzip.open(with_header(file, change))
    assert "\n" not in str(told.value) and len(str(told.value)) < 500


@pytest.mark.parametrize("field, value", [("kind", 2), ("reserved", 1), ("reserved", 1 << 15)])
def test_an_index_with_more_in_it(file, field, value):
    def change(records):
        records[field][1] = value

    with pytest.raises(FormatError, match="of the index is not"):
        kvzip.open(with_records(file, change))


# --- blocks ----------------------------------------------------------------------------------


def first_block(blob, profile=None, part="k"):
    """Where the first block of a part begins."""
    with kvzip.open(blob, profile) as reader:
        return reader.index.offset[reader.index.rows[0, part].start + 1]


def refused(blob, profile, at, value, named):
    """A kind that nobody knows: the file is whole, so it is a newer one's; or it is damaged."""
    other = changed(blob, "<B", at, value)
    for read in (kvzip.decode, kvzip.verify):
        with pytest.raises(UnsupportedError, match=f"(?s)^layer 0 k.*{named}.*{NEWER}"):
            read(reseal(other), profile)
        with pytest.raises(CorruptError):
            read(other, profile)
    with kvzip.open(reseal(other), profile) as reader, pytest.raises(UnsupportedError, match=NEWER):
        reader.layer(0)


@pytest.mark.parametrize("mode", [1, 4, 255])
def test_a_mode_of_channel(mode):
    blob = kvzip.encode(golden_files.plain("bf16"), "channel", block_tokens=48)
    refused(blob, None, first_block(blob), mode, f"mode {mode}")


@pytest.mark.parametrize("kind", [1, 5, 255])
def test_a_kind_of_predictive(kind):
    profile = random_profile(3, SHAPES)
    shapes = [tuple(profile.description["layers"][0][part]) for part in "kv"]
    rng = np.random.default_rng(1)
    layers = [tuple(cache_like(rng, "bf16", (h, 20, d)) for h, d in shapes)]
    blob = kvzip.encode(kvzip.Snapshot.from_arrays(layers, "bf16"), "predictive", profile)
    refused(blob, profile, first_block(blob, profile), kind, f"kind {kind}")


def test_a_rounding_before_rope():
    blob = kvzip.encode(golden_files.before_rope(), "channel", block_tokens=48)
    assert blob[first_block(blob)] == 3
    for rounding in (0, 7, 255):
        refused(blob, None, first_block(blob) + 1, rounding, f"rounding {rounding}")
    name = "predictive-before-rope"
    profile = kvzip.Profile.load(golden_files.NOW / f"{name}.kvprofile")
    blob = (golden_files.NOW / f"{name}-bf16.kvz").read_bytes()
    assert blob[first_block(blob, profile)] == 4
    refused(blob, profile, first_block(blob, profile) + 2, 7, "rounding 7")


@pytest.mark.parametrize("codec", ["planes", "planes:mode=bit,coder=lz4"])
def test_a_kind_of_plane(codec):
    blob = kvzip.encode(golden_files.plain("bf16"), codec)
    refused(blob, None, first_block(blob) + 5, 2, "plane of kind 2")


@pytest.mark.parametrize("at, value, named", [(0, 2, "kind 2"), (1, 4, "format 4")])
def test_a_block_on_a_grid(at, value, named):
    blob = kvzip.encode(golden_files.scaled_by_powers(), "channel", block_tokens=48)
    refused(blob, None, first_block(blob) + at, value, named)


# --- pages -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page():
    snapshot = make_snapshot(cache_like, 1, "bf16", layers=2, tokens=40)
    profile = kvzip.Profile.fit([snapshot], codec="channel")
    return kvzip.encode_page([tuple(layer.parts.values()) for layer in snapshot.layers], profile), (
        profile
    )


@pytest.mark.parametrize(
    "form, at, value, words",
    [("<H", 4, 0, BEFORE), ("<H", 4, 2, NEWER), ("<H", 6, 1, NEWER), ("<I", 20, 1 << 31, NEWER)],
)
def test_a_page_of_another_version(page, form, at, value, words):
    data, profile = page
    other = changed(data, form, at, value)
    for read in (kvzip.decode_page, page_info):
        with pytest.raises(FormatError, match=words):
            read(memoryview(other), profile)


def test_a_mode_in_a_page(page):
    data, profile = page
    begin = 40 + 4 * 4
    begin += -begin % 16
    assert data[begin] == 2
    with pytest.raises(UnsupportedError, match=f"mode 9.*{NEWER}, or the page is damaged"):
        kvzip.decode_page(changed(data, "<B", begin, 9), profile)


# --- sealed files, snapshots, profiles ---------------------------------------------------------


@pytest.mark.parametrize(
    "form, at, value, words",
    [("<H", 8, 0, BEFORE), ("<H", 8, 2, NEWER), ("<H", 10, 1, NEWER), ("<B", 15, 128, NEWER)],
)
def test_a_sealed_file_of_another_version(file, form, at, value, words):
    pytest.importorskip("cryptography")
    key = bytes(range(32))
    other = bytearray(changed(seal(file, key), form, at, value))
    with pytest.raises(CorruptError, match="damaged"):
        kvzip.open(bytes(other), key=key)
    struct.pack_into("<Q", other, 120, checksum.of_bytes(memoryview(other)[:120]))
    for given in (key, bytes(32), None):  # which key it is does not matter
        with pytest.raises(FormatError, match=words):
            kvzip.open(bytes(other), key=given)


def rewritten(path, key, change):
    """Change what a safetensors file says under a key of its metadata."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    about = json.loads(header["__metadata__"][key])
    change(about)
    header["__metadata__"][key] = json.dumps(about)
    packed = json.dumps(header).encode()
    packed += b" " * (-len(packed) % 8)
    path.write_bytes(len(packed).to_bytes(8, "little") + packed + data[end:])


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d.update(version=2), BEFORE),
        (lambda d: d.pop("version"), BEFORE),
        (lambda d: d.update(version=4, future=1), NEWER),
        (lambda d: d.update(future=1), "future"),
        (lambda d: d.update(version="new"), "makes no sense"),
    ],
)
def test_a_snapshot_of_another_version(tmp_path, change, words):
    path = tmp_path / "doc.safetensors"
    golden_files.plain("bf16").save(path)
    rewritten(path, "kvzip", change)
    with pytest.raises(FormatError, match=words):
        kvzip.Snapshot.load(path)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda d: d.update(version=3), NEWER),
        (lambda d: d.update(version=0), "not a profile of version 1 or 2"),
        (lambda d: d.pop("version"), "not a profile of version 1 or 2"),
        (lambda d: d.update(version=True), "not a profile of version 1 or 2"),
        (lambda d: d.update(version=[2]), "not a profile of version 1 or 2"),
    ],
)
def test_a_profile_of_another_version(tmp_path, change, words):
    path = tmp_path / "model.kvprofile"
    random_profile(3, SHAPES).save(path)
    rewritten(path, "kvprofile", change)
    with pytest.raises(ProfileError, match=words):
        kvzip.Profile.load(path)
