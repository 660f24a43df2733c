"""The suite that others run notices what it should, and works as docs/testing.md says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest

import kvzip
from kvzip import dtypes
from kvzip.testing import (
    CodecContract,
    assert_bit_exact,
    assert_same,
    cache_like,
    make_snapshot,
    nearest_bits,
)

ROOT = Path(__file__).parent.parent
STRANGERS = '''
import numpy as np
from kvzip.codec import Codec
from kvzip.errors import CorruptError

class Good(Codec):
    """Every bit turned over."""
    codec_id = "good"
    def takes(self, part, kind, name):
        return True
    def encode(self, block, context):
        return (~block).tobytes()
    def decode(self, data, out, context):
        if len(data) != out.nbytes:
            raise CorruptError("another length")
        out[...] = ~np.frombuffer(data, out.dtype).reshape(out.shape)
    def max_encoded_size(self, raw_bytes):
        return raw_bytes
    def max_decoded_size(self, encoded_bytes, dtype):
        return encoded_bytes

class Lossy(Good):
    """Without the sign of numbers next to zero."""
    codec_id = "lossy"
    def encode(self, block, context):
        next_to_zero = block >> 8 * (block.itemsize - 1) == 0x80
        return super().encode(np.where(next_to_zero, 0, block).astype(block.dtype), context)

class Careless(Good):
    """Bytes of another length are another kind of error."""
    codec_id = "careless"
    def decode(self, data, out, context):
        out[...] = ~np.frombuffer(data, out.dtype).reshape(out.shape)

class Trusting(Good):
    """What comes out of a damaged block is no error of kvzip's."""
    codec_id = "trusting"
    def encode(self, block, context):
        data = super().encode(block, context)
        return data + bytes([sum(data) % 251])
    def decode(self, data, out, context):
        if len(data) != out.nbytes + 1:
            raise CorruptError("another length")
        1 // (sum(data[:-1]) % 251 == data[-1])
        super().decode(data[:-1], out, context)
    def max_encoded_size(self, raw_bytes):
        return raw_bytes + 1

class Stateful(Good):
    """The second cache is not stored as the first."""
    codec_id = "stateful"
    seen = 0
    def make_tables(self, part, context):
        self.seen += 1
        return bytes([self.seen % 256])
    def max_tables_size(self, shape, dtype):
        return 1

class Unchecked(Good):
    """A setting that makes no sense is found out when numbers are coded."""
    codec_id = "unchecked"
    def __init__(self, more=1):
        self.more = more
    def encode(self, block, context):
        return super().encode(block, context) + bytes(self.more)
    def decode(self, data, out, context):
        if len(data) != out.nbytes + self.more:
            raise CorruptError("another length")
        super().decode(data[:out.nbytes], out, context)
    def max_encoded_size(self, raw_bytes):
        return raw_bytes + 1000
'''
UNSHRUNK = """
from hypothesis import Phase, settings
settings.register_profile("quick", phases=[Phase.generate])
settings.load_profile("quick")
"""
"""The smallest example that fails takes a while to find, and is not asked for here."""


OWN = """
def test_ours(bit_exact):
    bit_exact("doc.safetensors", ["zstd", "channel"])

def test_lossy(bit_exact):
    bit_exact("doc.safetensors", "lossy")
"""
ADAPTERS = '''
import hashlib, json, threading
import numpy as np
import kvzip
from kvzip.testing import AdapterContract

class Plain:
    """Numbers as they are, without a checksum."""
    told_apart = ("model", "revision")
    def __init__(self, folder):
        self.folder = folder
    def save(self, snapshot):
        about = {name: getattr(snapshot.origin, name) for name in self.told_apart}
        about |= {"ids": snapshot.token_ids.tolist(), "dtype": snapshot.dtype}
        about["shape"] = [len(snapshot.layers), 2, *snapshot.layers[0].k.shape]
        numbers = np.stack([[layer.k, layer.v] for layer in snapshot.layers]).tobytes()
        head = json.dumps(about).encode()
        name = hashlib.sha256(head).hexdigest()
        part = self.folder.with_name(f"{name}-{threading.get_ident()}")
        part.write_bytes(head + b"\\n" + numbers)
        part.replace(self.folder / name)
    def load(self, token_ids, origin, dtype):
        for path in self.folder.iterdir():
            head, _, numbers = path.read_bytes().partition(b"\\n")
            about = json.loads(head)
            if any(about[name] != getattr(origin, name) for name in self.told_apart):
                continue
            ids = np.array(about["ids"], np.uint32)
            shared = min(len(ids), len(token_ids))
            shared = int(np.append(ids[:shared] == token_ids[:shared], False).argmin())
            if about["dtype"] != dtype or not shared:
                continue
            whole = np.frombuffer(numbers, kvzip.dtypes.get(dtype).uint).reshape(about["shape"])
            pairs = [(k[:, :shared], v[:, :shared]) for k, v in whole]
            return kvzip.Snapshot.from_arrays(pairs, dtype, ids[:shared])

class Deaf(Plain):
    """Takes one model for another."""
    told_apart = ()

class Rounding(Plain):
    """Without the last bit."""
    def load(self, *wanted):
        found = super().load(*wanted)
        if found is not None:
            for layer in found.layers:
                layer.held()["k"] = layer.k & ~layer.k.dtype.type(1)
        return found

class TestPlain(AdapterContract):
    damages = 20
    def adapter(self, folder):
        return Plain(folder)

class TestDeaf(AdapterContract):
    def adapter(self, folder):
        return Deaf(folder)

class TestRounding(AdapterContract):
    def adapter(self, folder):
        return Rounding(folder)
'''
NAMES = ("good", "lossy", "careless", "trusting", "stateful", "unchecked")


def on_page(page: str, language: str, word: str) -> str:
    """The example of a page that has a word in it."""
    found = re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    [example] = [code for code in found if word in code]
    return example


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """What pytest says, in one run, of the suite with another distribution's codecs, of a test with
    the fixture, and of a snapshot file that the command line names."""
    folder = tmp_path_factory.mktemp("stranger")
    (folder / "pytest_kvzip").symlink_to(ROOT / "pytest_kvzip")
    (folder / "stranger.py").write_text(STRANGERS)
    (folder / "conftest.py").write_text(UNSHRUNK)
    (folder / "test_own.py").write_text(OWN)
    (folder / "test_adapters.py").write_text(ADAPTERS)
    (folder / "my_package.py").write_text(on_page("codecs/README.md", "python", "MyCodec"))
    (folder / "test_mine.py").write_text(on_page("docs/testing.md", "python", "TestMine"))
    snapshot = make_snapshot(cache_like, 1, "bf16", tokens=200)
    snapshot.layers[1].v[1, 7, 3] = 0x8000
    snapshot.save(folder / "doc.safetensors")
    info = folder / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    points = "".join(f"{name} = stranger:{name.title()}\n" for name in NAMES)
    project = tomllib.loads(on_page("codecs/README.md", "toml", "mine"))["project"]
    points += "".join(f"{n} = {at}\n" for n, at in project["entry-points"]["kvzip.codecs"].items())
    (info / "entry_points.txt").write_text(f"[kvzip.codecs]\n{points}")
    command = [sys.executable, "-m", "pytest", "-p", "pytest_kvzip", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, "--rootdir", folder, "-rA", "--tb=short"]
    command += [
        "--pyargs",
        "test_own.py",
        "test_mine.py",
        "test_adapters.py",
        "kvzip.testing.suite",
    ]
    command += [f"--kvzip-codec={name}" for name in NAMES] + ["--kvzip-snapshot=doc.safetensors"]
    few = "bf16 and any_bits or many_blocks and bf16-axes0-1 or one_object"
    few += " or hostile and trusting or settings"
    command += ["-k", f"{few} or test_own or test_adapters or in_a_file"]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_a_strangers_codecs_are_held_to_the_contract(said):
    failed = re.findall(r"^FAILED \S+::(test_\w+)\[(\w+)", said, re.MULTILINE)
    by = {codec: {test for test, name in failed if name == codec} for codec in NAMES}
    assert not by["good"], said
    assert "test_round_trip_of_any_bits" in by["lossy"]
    assert by["careless"] == {"test_many_blocks_at_once_are_each_alone"}
    assert "test_hostile_blocks_never_give_wrong_numbers" in by["trusting"]
    assert by["stateful"] == {"test_one_object_serves_all_threads"}
    assert by["unchecked"] == {"test_settings_that_make_no_sense_are_told"}
    assert re.search(r"PASSED \S+::test_round_trip_of_any_bits\[good-bf16\]", said)


def test_the_guides_codec_keeps_the_contract(said):
    assert not re.findall(r"^(?:FAILED|ERROR) test_mine.*", said, re.MULTILINE)
    assert re.search(r"^PASSED test_mine\S+any_bits\[mine:level=9-bf16\]", said, re.MULTILINE)
    assert re.search(r"^PASSED test_mine\S+no_sense_are_told\[mine\]", said, re.MULTILINE)


def test_a_strangers_adapters_are_held_to_the_contract(said):
    failed = re.findall(r"^FAILED test_adapters.py::Test(\w+)::(\w+)", said, re.MULTILINE)
    by = {
        name: {test for of, test in failed if of == name} for name in ("Plain", "Deaf", "Rounding")
    }
    damaged = {"a_changed_byte", "what_is_cut_short_or_gone"}
    never = {f"test_{what}_never_gives_other_numbers" for what in damaged}
    assert by["Plain"] == never
    assert by["Deaf"] == never | {"test_what_another_model_computed_is_not_found"}
    assert {"test_what_is_kept_comes_back_bit_for_bit", *never} < by["Rounding"]


def test_a_cache_of_ones_own_in_ones_own_tests(said):
    failed = re.findall(r"^FAILED \S*(test_own\S+|in_a_file\S+)", said, re.MULTILINE)
    assert failed == [
        "test_own.py::test_lossy",
        "in_a_file_comes_back_bit_for_bit[doc.safetensors]",
    ]
    assert "CorruptError: layer 1 v" in said
    assert re.search(r"test_ours: channel 1\.\d\dx, 51,200 bytes as [34]\d,\d{3}", said)


def test_what_differs_is_named():
    one, other = (make_snapshot(cache_like, 1, "bf16") for _ in range(2))
    one.layers[1].v[1, 7, 3], other.layers[1].v[1, 7, 3] = 0x8000, 0
    with pytest.raises(AssertionError, match=r"layer 1 v .* at \(1, 7, 3\) .* 0x8000 and 0x0"):
        assert_same(one, other)


def test_what_a_cache_can_be(tmp_path):
    arrays = [(np.ones((2, 9, 4), np.float16),) * 2]
    [found] = assert_bit_exact(arrays, "raw")
    assert found.codec == "raw" and found.raw_bytes == 288 and 0.1 < found.ratio < 1
    kvzip.Snapshot.from_arrays(arrays).save(tmp_path / "a.safetensors")
    names = [one.codec for one in assert_bit_exact(tmp_path / "a.safetensors")]
    assert names == sorted({*kvzip.codec_names()} - {"predictive"})


def test_a_profile_can_be_a_file(tmp_path):
    snapshot = make_snapshot(cache_like, 1, "bf16", tokens=200)
    profile = kvzip.Profile.fit([snapshot], codec="channel")
    profile.save(tmp_path / "c.kvprofile")
    without, learned = (assert_bit_exact(snapshot, "channel", p) for p in (None, profile))
    for path in (tmp_path / "c.kvprofile", str(tmp_path / "c.kvprofile")):
        assert assert_bit_exact(snapshot, "channel", path) == learned != without
    with pytest.raises(kvzip.KVZipError, match="and no profile"):
        snapshot.save(tmp_path / "a.safetensors")
        assert_bit_exact(snapshot, "channel", tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", dtypes.NAMES)
def test_the_nearest_bits_are_the_nearest(dtype):
    """No neighbour in the format is nearer; and what is in it already stays."""
    form, rng = dtypes.get(dtype), np.random.default_rng(2)
    bits = rng.integers(0, 2 ** min(63, form.bits), 2000).astype(form.uint)
    bits = bits[dtypes.finite(bits, dtype)]
    exact = dtypes.to_float64(bits, dtype)
    assert np.array_equal(nearest_bits(exact, dtype), bits)
    if not form.is_float or form.bits == 64:
        return
    numbers = rng.normal(size=2000)
    near = nearest_bits(numbers, dtype)
    error = np.abs(dtypes.to_float64(near, dtype) - numbers)
    for step in (1, -1):
        beside = (dtypes.to_ordered(near, dtype).astype(np.int64) + step).astype(form.uint)
        other = dtypes.to_float64(dtypes.from_ordered(beside, dtype), dtype)
        assert (error <= np.abs(other - numbers))[np.isfinite(other)].all()


def test_a_codec_that_is_not_there_is_said_once():
    """Not by hundreds of tests that fail."""
    with pytest.raises(pytest.Collector.CollectError, match="TestMine: no codec 'mine'"):
        type("TestMine", (CodecContract,), {"codecs": ["raw", "mine:level=9"]})
