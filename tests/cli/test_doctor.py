"""`kvzip doctor`: what is there, what is missing, and what does not work."""

from __future__ import annotations

import importlib
import sys
from importlib import metadata

from command import run, run_json

import kvzip
from kvzip import selftest
from kvzip.cli import extras
from kvzip.codec import codec_names, register_codec
from kvzip.codecs import _native
from kvzip.codecs.native.cuda import nvcomp
from kvzip.codecs.raw.codec import RawCodec


def test_all_is_well(capsys):
    before = _native.simd()
    code, told = run_json(capsys, "doctor")
    assert code == 0 and _native.simd() == before
    assert [check["name"] for check in told["self_test"]] == codec_names()
    assert not any(check["error"] for check in told["self_test"])
    assert told["instructions"]["used"] in told["instructions"]["available"]
    assert told["engines"]["transformers"] == metadata.version("transformers")
    assert bool(told["gpus"]) != bool(told["no_gpu"])
    assert bool(told["nvcomp"]) != bool(told["no_nvcomp"])
    code, out, _ = run(capsys, "doctor")
    assert code == 0 and f"instructions: {before}" in out
    for name in codec_names():
        assert f"self-test of {name}: good" in out


def lack(monkeypatch, *packages):
    """Have these packages look as if they were not installed."""
    real = metadata.version

    def version(package):
        if package in packages:
            raise metadata.PackageNotFoundError(package)
        return real(package)

    monkeypatch.setattr(metadata, "version", version)


def test_a_missing_package_is_named_with_its_extra(capsys, monkeypatch):
    lack(monkeypatch, "obstore", "sglang")
    code, told = run_json(capsys, "doctor")
    assert code == 0  # it is no fault
    assert told["engines"]["SGLang"] is None
    [lacking] = told["missing_packages"]["store"]
    assert lacking.startswith("obstore")
    _, out, _ = run(capsys, "doctor")
    assert "pip install 'kvzip[store]'" in out
    assert not told["missing_packages"]["testing"]


def test_nvcomp_is_told_and_why_it_is_not_used(capsys, monkeypatch):
    class Library:
        version = "6.0.1"

    there, other = (Library, ""), (None, "nvCOMP is 5.3.0, and kvzip knows 6.0")
    for chosen, found, version, words in (
        ("", there, "6.0.1", "nvCOMP: 6.0.1, by which a GPU decodes lz4 ("),
        ("trusted", there, "6.0.1", "nvCOMP: 6.0.1, by which a GPU decodes lz4 and zstd ("),
        ("", other, None, "nvCOMP: not used (nvCOMP is 5.3.0, and"),
        ("off", there, None, "nvCOMP: not used (KVZIP_NVCOMP is off)"),
        ("yes", there, None, 'nvCOMP: not used (KVZIP_NVCOMP is "off" or'),
    ):
        monkeypatch.setenv(nvcomp.ENVIRONMENT, chosen)
        monkeypatch.setattr(nvcomp, "installed", lambda found=found: found)
        code, told = run_json(capsys, "doctor")
        assert (code, told["nvcomp"], bool(told["no_nvcomp"])) == (0, version, not version)
        assert words in run(capsys, "doctor")[1]


def test_every_extra_for_users_is_told():
    ours = set(metadata.metadata("kvzip").get_all("Provides-Extra"))
    assert set(extras.PURPOSE) == ours - {"all", "test", "docs", "dev"}


def test_a_module_that_is_missing_is_named_with_its_extra(capsys, monkeypatch):
    for module, extra in (
        ("torch.nn", "hf"),
        ("prometheus_client", "metrics"),
        ("jinja2", "demo"),
        ("nobody", "all"),
    ):
        assert extras.extra_with(module) == extra
    monkeypatch.setattr(selftest, "self_test", lambda: importlib.import_module("duckdb"))
    monkeypatch.setitem(sys.modules, "duckdb", None)
    code, _, err = run(capsys, "doctor")
    assert code == 2 and "pip install 'kvzip[eval]'" in err


def test_the_demo_names_what_is_missing_before_it_starts(capsys, monkeypatch, tmp_path):
    lack(monkeypatch, "jinja2", "torch")
    code, _, err = run(capsys, "demo", "--out", str(tmp_path / "demo"))
    assert code == 2 and "pip install 'kvzip[demo]'" in err
    assert "torch" in err and "jinja2" in err
    assert not (tmp_path / "demo").exists()


def broken(decode):
    """A codec that is `raw` but for how it decodes."""

    class Broken(RawCodec):
        codec_id = "broken"

    Broken.decode = decode
    Broken.decode_many = kvzip.Codec.decode_many
    register_codec(Broken)


def test_a_codec_that_does_not_do_what_it_must(capsys, monkeypatch):
    def wrong(self, data, out, context):
        out[...] = 0

    def slips(self, data, out, context):
        raise ZeroDivisionError("a slip")

    for decode, words in ((wrong, "broken"), (slips, "ZeroDivisionError: a slip")):
        with monkeypatch.context() as patch:
            patch.setattr(kvzip.codec, "_registered", dict(kvzip.codec._registered))
            broken(decode)
            code, told = run_json(capsys, "doctor")
            assert code == 1
            failed = {c["name"]: c["error"] for c in told["self_test"] if c["error"]}
            assert list(failed) == ["broken"] and failed["broken"]
            code, out, err = run(capsys, "doctor")
            assert code == 1 and words in out and "the self-test failed: broken" in err


def test_what_only_one_set_of_instructions_does_wrong_is_found(monkeypatch):
    """Bytes that depend on the processor."""
    if len(selftest.instructions()) < 2:
        return
    encode = RawCodec.encode

    def by_processor(self, block, context):
        made = bytearray(encode(self, block, context))
        if _native.simd() != "scalar":
            made += b"\0"
        return bytes(made)

    monkeypatch.setattr(RawCodec, "encode", by_processor)
    monkeypatch.setattr(RawCodec, "verbatim", False)
    [raw] = [check for check in selftest.self_test() if check.name == "raw"]
    assert raw.error
