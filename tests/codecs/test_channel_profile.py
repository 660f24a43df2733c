"""Tables of the channel codec in a profile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import CHANNEL_DTYPES, assert_same, cache_like, make_snapshot, random_bits, rotated

import kvzip
from kvzip import dtypes
from kvzip.codecs import _native
from kvzip.codecs.channel.profile import fields, own_bits
from kvzip.errors import ProfileError, UnsupportedError, UsageError


def document(seed, dtype="bf16", maker=cache_like, **more):
    """One of a model's: documents are of tokens that follow each other."""
    sizes = {"layers": 2, "heads": 3, "tokens": 300, "dim": 24} | more
    tokens = sizes.pop("tokens")
    whole = make_snapshot(maker, 1, dtype, tokens=10 * tokens + 10, **sizes)
    begin = seed * tokens
    layers = [tuple(np.array(x[..., begin : begin + tokens, :]) for x in y) for y in whole.layers]
    return kvzip.Snapshot.from_arrays(layers, dtype, origin=whole.origin)


def fitted(*documents):
    return kvzip.Profile.fit(documents, codec="channel")


@pytest.fixture(params=CHANNEL_DTYPES)
def dtype(request):
    return request.param


@pytest.fixture(scope="module")
def known():
    """Documents, and the profile of all but the last."""
    documents = [document(seed) for seed in range(4)]
    return documents, fitted(*documents[:-1])


def tables_in(blob, profile=None):
    index = kvzip.open(blob, profile).index
    return [index.length[rows.start] for rows in index.rows.values()]


def test_files_hold_no_tables_where_the_profile_has_them(known):
    documents, profile = known
    alone, blob = kvzip.encode(documents[-1]), kvzip.encode(documents[-1], "channel", profile)
    assert all(tables_in(alone)) and not any(tables_in(blob))
    assert len(blob) < len(alone)
    assert_same(kvzip.decode(blob, profile), documents[-1])
    with pytest.raises(ProfileError):
        kvzip.decode(blob)
    assert kvzip.verify(blob, profile).header.profile == profile.id


def test_a_profile_that_a_file_does_not_name_is_left_alone(known):
    """Also where a part has no tables, as of few tokens, or where they would bring nothing."""
    for maker, tokens in ((random_bits, 200), (cache_like, 3)):
        other = make_snapshot(maker, 1, "bf16", layers=2, heads=2, tokens=tokens, dim=16)
        blob = kvzip.encode(other)
        assert not any(tables_in(blob))
        assert_same(kvzip.decode(blob, known[1]), other)


def test_a_profile_is_the_same_on_disk(known, tmp_path):
    documents, profile = known
    profile.save(tmp_path / "m.kvprofile")
    again = kvzip.Profile.load(tmp_path / "m.kvprofile")
    assert again.id == profile.id == fitted(*documents[:-1]).id
    assert again.codec == "channel"
    blob = kvzip.encode(documents[-1], "channel", profile)
    assert kvzip.encode(documents[-1], "channel", again) == blob
    assert_same(kvzip.decode(blob, again), documents[-1])


def test_any_numbers_come_back(dtype):
    """Whatever a profile was learned from: all of its channels constant, or few tokens."""
    rng = np.random.default_rng(0)
    form = dtypes.get(dtype)
    shape = (3, 300, 24)
    constant = np.broadcast_to(rng.integers(0, 9, (3, 1, 24)).astype(form.uint), shape)
    learned = [
        document(1, dtype),
        document(2, dtype, tokens=1),
        kvzip.Snapshot.from_arrays([(constant, constant)] * 2, dtype),
        document(3, dtype, random_bits),
    ]
    for profile in map(fitted, learned):
        for other in [document(4, dtype), document(5, dtype, random_bits, batch=2), *learned]:
            blob = kvzip.encode(other, "channel", profile, block_tokens=64)
            assert_same(kvzip.decode(blob, profile), other)
            assert len(blob) <= kvzip.max_encoded_size(other, "channel", block_tokens=64)


def test_parts_without_numbers_need_no_tables():
    v = np.random.default_rng(0).integers(0x3F00, 0x4000, (2, 200, 16)).astype(np.uint16)
    for k in (np.zeros((2, 200, 0), np.uint16), np.zeros((0, 200, 16), np.uint16)):
        snapshot = kvzip.Snapshot.from_arrays([(k, v)], "bf16")
        profile = kvzip.Profile.fit([snapshot], codec="channel")
        blob = kvzip.encode(snapshot, profile=profile)
        assert kvzip.decode(blob, profile) == snapshot


def test_where_a_profile_does_not_fit_a_file_has_its_own_tables(known):
    """Keys 2^40 times as large are escapes, all of them."""
    _, profile = known
    for layer in (large := document(9)).layers:
        layer.k[...] += np.uint16(40 << 7)
    blob = kvzip.encode(large, "channel", profile)
    lengths = tables_in(blob, profile)
    assert all(lengths[::2]) and not any(lengths[1::2])
    assert_same(kvzip.decode(blob, profile), large)
    assert len(blob) <= len(kvzip.encode(large))


def test_profiles_of_other_models_are_refused(known):
    documents, profile = known
    others = [
        document(1, "fp16"),
        document(1, heads=4),
        document(1, dim=23),
        document(1, layers=3),
    ]
    for other in others:
        with pytest.raises(ProfileError):
            kvzip.encode(other, "channel", profile)
        with pytest.raises(ProfileError):
            fitted(documents[0], other)
        # Codecs that take nothing from it do not care.
        assert_same(kvzip.decode(kvzip.encode(other, "planes", profile), profile), other)


def test_what_cannot_be_learned_is_an_error(known):
    with pytest.raises(ProfileError, match="at least one"):
        fitted()
    with pytest.raises(ProfileError, match="no tokens"):
        fitted(document(1, tokens=0))
    with pytest.raises(UnsupportedError, match="learns nothing"):
        kvzip.Profile.fit(known[0], codec="zstd")
    with pytest.raises(UsageError, match="regions"):
        kvzip.Profile.fit(known[0], codec="channel", regions=3)


# --- keys before RoPE ----------------------------------------------------------------------------

BEFORE = kvzip.get_codec("channel:keys=before_rope")


@pytest.fixture(scope="module")
def of_rotated():
    """A profile of documents with RoPE."""
    return fitted(*(rotated(seed) for seed in range(1, 4)))


def without_before(profile):
    """The profile as an earlier version made it."""
    tensors = {n: x for n, x in profile.tensors.items() if not n.endswith(".before_rope")}
    return kvzip.Profile(tensors, profile.description)


def test_a_profile_has_tables_of_keys_before_rope(of_rotated, known):
    names = [f"channel.{i}.{part}" for i in range(2) for part in "kv"]
    before = [f"channel.{i}.k.before_rope" for i in range(2)]
    assert sorted(of_rotated.tensors) == sorted(names + before)
    older = without_before(of_rotated)
    assert not any("before" in name for name in known[1].tensors)  # whose origin has no RoPE
    one = rotated(9)
    blob = kvzip.encode(one, BEFORE, of_rotated)
    assert tables_in(blob, of_rotated) == [1, 0] * 2
    assert_same(kvzip.decode(blob, of_rotated), one)
    # The others take the tables that they have always had.
    for profile in (of_rotated, older):
        cached = kvzip.encode(one, "channel:keys=cached", profile)
        assert not any(tables_in(cached, profile))
        assert len(blob) < len(cached)
        assert_same(kvzip.decode(cached, profile), one)
    # Without tables of them in the profile, keys before RoPE have their own.
    own = kvzip.encode(one, BEFORE, older)
    assert [length > 1 for length in tables_in(own, older)] == [True, False] * 2
    assert_same(kvzip.decode(own, older), one)


@pytest.mark.parametrize(
    ("tokens", "first", "rounding"), [(1, 0, 1), (130, 0, 2), (300, 5000, 1), (300, 0, 5)]
)
def test_keys_before_rope_come_back_by_a_profile(of_rotated, tokens, first, rounding):
    one = rotated(7, tokens, first, rounding)
    blob = kvzip.encode(one, BEFORE, of_rotated, block_tokens=64)
    assert_same(kvzip.decode(blob, of_rotated), one)
    if tokens > 1:
        assert tables_in(blob, of_rotated) == [1, 0] * 2
    with kvzip.open(blob, of_rotated) as reader:
        layer, length = one.layers[1], min(tokens, 70)
        part = reader.decode(layers=[1], tokens=(first, first + length))
        np.testing.assert_array_equal(part.layers[0].k, layer.k[:, :length])


def test_a_file_names_tables_before_rope_that_a_profile_lacks(of_rotated):
    """The profile is another one, though the file says that it is this: it has no tables of keys
    before RoPE, or damaged ones."""
    blob = kvzip.encode(rotated(8), BEFORE, of_rotated)
    older = without_before(of_rotated)
    older.__dict__["id"] = of_rotated.id
    with pytest.raises(kvzip.CorruptError):
        kvzip.decode(blob, older)
    broken = kvzip.Profile(
        {n: x[:3] if n == "channel.1.k.before_rope" else x for n, x in of_rotated.tensors.items()},
        of_rotated.description,
    )
    with pytest.raises(ProfileError, match=r"channel\.1\.k\.before_rope"):
        kvzip.encode(rotated(8), BEFORE, broken)


@given(data=st.data())
def test_hostile_profiles_do_no_harm(known, of_rotated, data):
    """Damaged tables are refused, or are others, with which numbers come back."""
    choices = [(known[0][-1], known[1]), (rotated(9, tokens=140), of_rotated)]
    document_, profile = data.draw(st.sampled_from(choices))
    tensors = {name: array.copy() for name, array in profile.tensors.items()}
    name = data.draw(st.sampled_from(sorted(tensors)))
    match data.draw(st.sampled_from(["bits", "cut", "gone", "wide", "stated"])):
        case "bits":
            for _ in range(data.draw(st.integers(1, 3))):
                at = data.draw(st.integers(0, len(tensors[name]) - 1))
                tensors[name][at] ^= 1 << data.draw(st.integers(0, 7))
        case "cut":
            tensors[name] = tensors[name][: data.draw(st.integers(0, len(tensors[name]) - 1))]
        case "gone":
            del tensors[name]
        case "wide":
            tensors[name] = tensors[name].astype(np.int64)
        case "stated":
            wrong = data.draw(
                st.sampled_from(
                    [
                        None,
                        {},
                        {"dtype": "int3", "layers": []},
                        {"dtype": "bf16", "layers": 5},
                        {"dtype": "bf16", "layers": [{"k": [3, 24]}]},
                        {"dtype": "bf16", "layers": [{"k": [3], "v": [3, 24]}]},
                    ]
                )
            )
            hostile = kvzip.Profile(tensors, profile.description | {"channel": wrong})
            with pytest.raises(ProfileError):
                kvzip.encode(document_, BEFORE, hostile)
            return
    hostile = kvzip.Profile(tensors, profile.description)
    try:
        blob = kvzip.encode(document_, BEFORE, hostile)
    except ProfileError:
        return
    assert_same(kvzip.decode(blob, hostile), document_)


def test_tables_of_one_part_do_not_code_constants_of_another(dtype):
    """Constant channels stand in tables: a block that has others there is not theirs."""
    form = dtypes.get(dtype)
    numbers = cache_like(np.random.default_rng(1), dtype, (1, 2, 200, 5))
    numbers[:, 1, :, 3] = 7
    made = _native.channel_tables(numbers, form.exponent_bits, form.mantissa_bits)
    tables = _native.ChannelTables(made, 2, 5, form.exponent_bits, form.mantissa_bits)
    assert (0xFFFFFFFF, 7) in map(tuple, tables.channels().tolist())
    assert tables.encode(numbers) is not None
    numbers[0, 1, 150, 3] = 8
    assert tables.encode(numbers) is None
    numbers[0, 1, :, 3] = 8
    assert tables.encode(numbers) is None


def test_the_command_line(known, tmp_path, capsys):
    import json

    from kvzip import cli

    def main(arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        return end.value.code or 0

    files = [str(tmp_path / f"doc-{i}.safetensors") for i in range(4)]
    for document_, path in zip(known[0], files, strict=True):
        document_.save(path)
    profile = str(tmp_path / "m.kvprofile")
    assert main(["fit", *files, "-o", profile, "--codec", "channel", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["codec"], made["documents"], len(made["held_out"])) == ("channel", 3, 1)
    assert made["id"] == kvzip.Profile.load(profile).id
    blob = str(tmp_path / "d.kvz")
    assert main(["encode", files[0], "-o", blob, "--profile", profile]) == 0
    assert main(["verify", blob, "--profile", profile, "--against", files[0]]) == 0
    capsys.readouterr()
    assert (
        main(["eval", "pages", *files, "--profile", profile, "--tokens", "16,301", "--json"]) == 0
    )
    one, all_ = json.loads(capsys.readouterr().out)["pages"]
    assert (one["tokens"], one["layers"], one["pages"]) == (16, 1, 4 * 2 * 18)
    assert (all_["tokens"], all_["layers"], all_["pages"]) == (16, 2, 4 * 18)
    assert one["raw_bytes"] == all_["raw_bytes"] == 4 * 18 * 2 * 2 * 3 * 24 * 16 * 2
    assert main(["fit", *files, "-o", profile, "--codec", "channel", "--regions", "2"]) != 0
    assert "--regions is for predictive" in capsys.readouterr().err


@pytest.mark.parametrize("tokens", [1, 127, 255, 256, 257])
def test_what_numbers_take_by_tables_of_their_own(dtype, tokens):
    """However many there are, it is what counts that are kept apart say, also where all are one."""
    form, rng = dtypes.get(dtype), np.random.default_rng(tokens)
    for numbers in (
        cache_like(rng, dtype, (1, 2, tokens, 70)),
        np.ones((1, 2, tokens, 70), form.uint),
    ):
        counts = _native.ChannelCounts(2, 70, *fields(form))
        counts.add(numbers)
        assert own_bits(numbers, form) == counts.bits()


def repeated(value, shape):
    """So many of one fp8 number, which take no memory."""
    return np.lib.stride_tricks.as_strided(np.array([value], np.uint8), shape, (0,) * 4)


@pytest.mark.long
def test_more_numbers_than_counts_can_hold():
    """The first 2^32 - 1 are counted, and the rest change nothing."""
    counts = _native.ChannelCounts(1, 1, 4, 3)
    counts.add(repeated(0x38, (2, 1, (1 << 31) - 8, 1)))
    counts.add(repeated(0x40, (1, 1, 10, 1)))
    few = _native.ChannelCounts(1, 1, 4, 3)
    few.add(repeated(0x38, (1, 1, 1 << 20, 1)))
    tables, bits = counts.tables(), counts.bits()
    assert tables != few.tables()  # which have never seen the other number
    counts.add(repeated(0x40, (1, 1, 10, 1)))
    assert counts.bits() > bits  # the last five that there was room for
    assert counts.tables() == tables
    bits = counts.bits()
    counts.add(repeated(0x40, (3, 1, 1 << 31, 1)))
    assert (counts.bits(), counts.tables()) == (bits, tables)
