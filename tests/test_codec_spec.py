"""Specs, configs and file names of codecs stand for one another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvzip
from kvzip.codec_spec import file_stem, format_spec, parse_spec, split_specs
from kvzip.errors import UnsupportedError

words = st.from_regex(r"[a-z][a-z0-9_.]{0,8}", fullmatch=True).filter(lambda w: w != "id")
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
texts |= st.text("0123456789-,+%=/: ", max_size=4) | st.text("0123456789", max_size=24)
numbers = st.integers(-(2**63), 2**64 - 1)
settings = st.dictionaries(words, words | texts | numbers, max_size=4)


@given(words, settings)
def test_a_spec_and_its_config_are_each_others_inverse(name, given):
    config = {"id": name} | given
    spec = format_spec(config)
    assert parse_spec(spec) == config
    assert format_spec(parse_spec(spec)) == spec
    assert split_specs(f"raw,{spec.replace(',', '+')}") == ["raw", spec]


@pytest.mark.parametrize("spec", ["raw", "zstd:level=9", "planes:mode=bit,coder=lz4"])
def test_a_codec_tells_the_spec_that_it_was_made_from(spec):
    codec = kvzip.get_codec(spec)
    assert codec.spec == spec
    assert kvzip.get_codec(codec.get_config()).spec == spec


def test_a_spec_leaves_out_the_defaults():
    assert kvzip.get_codec("planes:mode=byte,level=2").spec == "planes:level=2"


@pytest.mark.parametrize("spec", ["zstd:level", "zstd:id=lz4", "zstd:level=3,fast"])
def test_what_is_no_setting_is_refused(spec):
    with pytest.raises(UnsupportedError, match="write name=value"):
        parse_spec(spec)


@pytest.mark.parametrize("codec", ["zstd", "lz4", "planes", "planes:mode=bit,coder=lz4"])
@pytest.mark.parametrize("power", [18, 19, 20, 21, 5000])
def test_a_long_number_is_no_level(codec, power):
    """In a spec and in a config: that it is too large is said, in few words."""
    spec = f"{codec}{',' if ':' in codec else ':'}level=1{'0' * power}"
    wanted = r"must be from 1 to \d+|JSON files do not keep|a number has at most 20"
    with pytest.raises(UnsupportedError, match=wanted) as said:
        kvzip.get_codec(spec)
    assert len(str(said.value)) < 200
    with pytest.raises(UnsupportedError, match=wanted) as said:
        kvzip.get_codec(kvzip.get_codec(codec).get_config() | {"level": 10**power})
    assert len(str(said.value)) < 200


def test_a_list_of_specs_has_plus_for_the_comma_within_one():
    assert split_specs("raw,planes:mode=bit+coder=lz4") == ["raw", "planes:mode=bit,coder=lz4"]


@given(words, settings)
def test_a_file_name_has_nothing_that_shells_and_file_systems_mind(name, given):
    assert not set(file_stem(format_spec({"id": name} | given))) & set(":=/ ")
