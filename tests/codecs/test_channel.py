"""The channel codec against its spec, against itself on other instructions, and against theory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import channel_reference
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import CHANNEL_DTYPES, cache_like, examples, make_snapshot, random_bits

import kvzip
from kvzip import dtypes
from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.channel import codec as channel_codec
from kvzip.codecs.channel.blocks import largest_tables
from kvzip.codecs.channel.codec import ChannelCodec
from kvzip.selftest import instructions

CODEC = ChannelCodec()


@pytest.fixture(params=CHANNEL_DTYPES)
def dtype(request):
    return request.param


def context(dtype, **more):
    return Context(dtypes.get(dtype), 0, "k", 0, kvzip.Origin(), **more)


def tables_of(numbers, dtype):
    """Stored tables of [batch, heads, tokens, dim] numbers, and what the codec loads from them."""
    made = CODEC.make_tables(numbers, context(dtype))
    return made, CODEC.load_tables(memoryview(made), numbers.shape, context(dtype))


def encode(numbers, dtype, tables):
    return CODEC.encode(numbers, context(dtype, tables=tables))


def decode(data, shape, dtype, tables):
    out = np.zeros(shape, dtypes.get(dtype).uint)
    CODEC.decode(memoryview(data), out, context(dtype, tables=tables))
    return out


# --- a decoder from spec.md alone --------------------------------------------------------------


def samples(dtype):
    """Blocks that take every path: partial groups and strips, constants, escapes, raw; one stream
    and several, which begin with a whole group or a shorter one."""
    rng = np.random.default_rng(1)
    for shape in [(1, 2, 150, 5), (2, 1, 8, 70), (1, 1, 1, 64), (1, 1, 260, 3), (1, 1, 130, 65)]:
        yield cache_like(rng, dtype, shape)
    for shape in [(1, 17, 140, 2), (2, 5, 300, 3), (1, 16, 131, 1), (2, 27, 20, 65)]:
        yield cache_like(rng, dtype, shape)
    mixed = cache_like(rng, dtype, (1, 2, 137, 66))
    mixed[..., [0, 3, 65]] = 7
    yield mixed
    mixed = cache_like(rng, dtype, (1, 1, 700, 4))
    rare = rng.random(mixed.shape) < 0.004
    mixed[rare] = random_bits(rng, dtype, mixed.shape)[rare]
    yield mixed
    yield random_bits(rng, dtype, (1, 1, 40, 6))
    yield np.zeros((1, 1, 300, 2), dtypes.get(dtype).uint)


@pytest.mark.drawn(2)
def test_a_decoder_written_from_the_spec_reads_real_blocks(dtype):
    form = dtypes.get(dtype)
    coded = 0
    for numbers in samples(dtype):
        _, heads, _, dim = numbers.shape
        # Tables from a longer text, so that short blocks are coded, too.
        part = np.concatenate([numbers] * 12, axis=2)
        made, tables = tables_of(part, dtype)
        channels = made and channel_reference.tables(made, heads, dim, form)
        data = encode(numbers, dtype, tables)
        coded += data[0]
        assert np.array_equal(
            channel_reference.decode(data, channels, numbers.shape, form), numbers
        )
    assert coded >= 6


def test_what_is_kept_of_few_tokens_is_for_the_part_that_it_is_of(dtype):
    rng = np.random.default_rng(2)
    part, other = (cache_like(rng, dtype, (1, 2, 100, 16)) for _ in range(2))
    scratch = {}
    made = CODEC.make_tables(part, context(dtype, scratch=scratch))
    assert made and scratch
    tables = CODEC.load_tables(memoryview(made), part.shape, context(dtype))
    for numbers in (part, other, part[:, :, :50], part.copy()):
        told = context(dtype, tables=tables, scratch=scratch)
        data = CODEC.encode(numbers, told)
        assert data == encode(numbers, dtype, tables)
        assert np.array_equal(decode(data, numbers.shape, dtype, tables), numbers)


@pytest.mark.parametrize("tokens", [100, 300])
def test_tables_that_are_long_for_their_part_are_left_out(dtype, tokens, monkeypatch):
    """So that files have a bound near the raw bytes, by which memory for them is taken."""
    numbers = cache_like(np.random.default_rng(3), dtype, (1, 2, tokens, 16))
    made, _ = tables_of(numbers, dtype)
    assert 0 < len(made) <= CODEC.max_tables_size(numbers.shape, dtypes.get(dtype))
    for most in (len(made), len(made) - 1):
        monkeypatch.setattr(channel_codec, "most_tables", lambda part_bytes, most=most: most)
        kept, tables = tables_of(numbers, dtype)
        assert kept == (made if most == len(made) else b"")
        assert CODEC.max_tables_size(numbers.shape, dtypes.get(dtype)) == most
        data = encode(numbers, dtype, tables)
        assert np.array_equal(decode(data, numbers.shape, dtype, tables), numbers)


def test_the_bound_of_a_file_is_near_its_raw_bytes(dtype):
    snapshot = make_snapshot(cache_like, 1, dtype, heads=4, tokens=256, dim=64)
    assert kvzip.max_encoded_size(snapshot, "channel") < 1.4 * snapshot.raw_bytes


# --- one result on any processor -----------------------------------------------------------------


def test_the_processor_has_more_than_one_path():
    assert instructions()[0] == "scalar"
    assert _native.simd() in instructions()
    with pytest.raises(ValueError, match="avx1024"):
        _native.set_simd("avx1024")


def test_all_instructions_give_the_same_bytes_and_numbers(dtype):
    for numbers in samples(dtype):
        made, tables = tables_of(numbers, dtype)
        found = set()
        for level in instructions():
            _native.set_simd(level)
            found.add(encode(numbers, dtype, tables))
            assert tables_of(numbers, dtype)[0] == made
        assert len(found) == 1
        data = found.pop()
        for level in instructions():
            _native.set_simd(level)
            assert np.array_equal(decode(data, numbers.shape, dtype, tables), numbers), level


@given(data=st.data())
def test_all_instructions_refuse_the_same_damage(dtype, data):
    numbers = cache_like(np.random.default_rng(2), dtype, (1, 1, 200, 9))
    _, tables = tables_of(numbers, dtype)
    damaged = bytearray(encode(numbers, dtype, tables))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(1, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    results = []
    for level in instructions():
        _native.set_simd(level)
        try:
            results.append(decode(damaged, numbers.shape, dtype, tables).tobytes())
        except kvzip.CorruptError:
            results.append(None)
    assert len(set(results)) == 1


def test_the_environment_chooses():
    code = "from kvzip.codecs import _native; print(_native.simd())"
    for level in instructions():
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "KVZIP_SIMD": level},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.split() == [level]


@pytest.mark.parametrize("level", ["fastest", "neon"])
def test_an_environment_that_names_none_of_this_processor_is_no_bug(tmp_path, level):
    if level in instructions():
        pytest.skip("this processor has it")
    path = tmp_path / "a.kvz"
    snapshot = make_snapshot(cache_like, 1, "bf16")
    kvzip.write(path, snapshot, "channel")
    snapshot.save(tmp_path / "s")
    for command in (["verify", path], ["encode", tmp_path / "s", "-o", tmp_path / "b.kvz"]):
        run = subprocess.run(
            [sys.executable, "-m", "kvzip", *command, "--json"],
            env={**os.environ, "KVZIP_SIMD": level},
            capture_output=True,
            text=True,
        )
        told = json.loads(run.stdout)
        assert (run.returncode, told["kind"]) == (2, "unsupported")
        assert f"KVZIP_SIMD is '{level}'" in told["error"] and "Traceback" not in run.stderr


# --- how good it is ------------------------------------------------------------------------------


def shape_counts(numbers, form, channels):
    """Each channel's shape and the numbers' symbols under it; the last is the escape."""
    dim = numbers.shape[-1]
    for c, (table, base) in enumerate(channels):
        values = dtypes.sign_exponent(numbers[:, c // dim, :, c % dim], form.name).reshape(-1)
        relative = (values.astype(int) - base) % (2 << form.exponent_bits)
        place = {value: i for i, value in enumerate(table.values)}
        escape = place.get(None)
        yield table, np.array([place.get(int(v), escape) for v in relative], np.int32)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp8_e4m3fn"])
def test_the_coded_size_is_that_of_a_trusted_coder_and_of_theory(dtype):
    constriction = pytest.importorskip("constriction")
    form = dtypes.get(dtype)
    numbers = cache_like(np.random.default_rng(3), dtype, (1, 2, 1024, 16))
    made, tables = tables_of(numbers, dtype)
    channels = channel_reference.tables(made, 2, 16, form)
    coder = constriction.stream.stack.AnsCoder()
    ideal = best = 0.0
    for table, symbols in shape_counts(numbers, form, channels):
        p = np.array(table.frequencies) / 1024
        ideal -= np.log2(p[symbols]).sum()
        model = constriction.stream.model.Categorical(p, perfect=False)
        counts = np.bincount(symbols)
        counts = counts[counts > 0]
        best -= (counts * np.log2(counts / counts.sum())).sum()
        if len(p) > 1:
            coder.encode_reverse(symbols[::-1].copy(), model)
    data = encode(numbers, dtype, tables)
    ((*_, words, escapes),) = tables.streams(data, 1, 1024)
    # States carry 16 bits each of mantissas; the other 16 are the stream's.
    bits = 16 * words + 16 * 128
    assert ideal < bits < ideal * 1.002 + 16 * 128
    assert abs(bits - coder.num_bits()) < 0.002 * ideal + 16 * 128
    assert ideal < best * 1.03
    assert escapes < numbers.size / 500


def handmade(levels, escape, base=40):
    """Tables of one shape for bf16 with one head of two channels."""
    form = dtypes.get("bf16")
    made = channel_reference.write([(levels, escape)], [(0, base), (0, base + 256)], 2, form)
    return made, _native.ChannelTables(made, 1, 2, 8, 7)


@pytest.mark.parametrize("gap", [1, 3, 5])
@pytest.mark.parametrize("escape", [0, 3])
@pytest.mark.parametrize("symbols", [1, 2, 31, 32])
def test_shapes_of_any_number_of_symbols(symbols, escape, gap):
    """Also wider than 32 exponents, or 128, which our encoder does not make but a file may hold."""
    rng = np.random.default_rng(symbols)
    levels = np.zeros(2 * gap * symbols, int)
    places = gap * np.arange(symbols)
    levels[places] = rng.integers(1, 40, symbols)
    made, tables = handmade(levels.tolist(), escape)
    if symbols + bool(escape) > 32:
        for _ in range(2):
            with pytest.raises(ValueError, match="makes no sense"):
                tables.encode(np.zeros((1, 1, 1, 2), np.uint16))
        return
    chosen = rng.choice(places, (1, 1, 1280, 2))
    values = (chosen % 2 * 256 + chosen // 2 + [40, 296]) % 512
    if escape:
        values[rng.random(values.shape) < 0.05] = 511
    numbers = (values << 7 | rng.integers(0, 128, values.shape)).astype(np.uint16)
    blocks = set()
    for level in instructions():
        _native.set_simd(level)
        data = tables.encode(numbers)
        blocks.add(data)
        assert np.array_equal(decode(data, numbers.shape, "bf16", tables), numbers)
    assert len(blocks) == 1
    channels = channel_reference.tables(made, 1, 2, dtypes.get("bf16"))
    assert np.array_equal(
        channel_reference.decode(data, channels, numbers.shape, dtypes.get("bf16")), numbers
    )
    if symbols == 1 and not escape:
        # Nothing but mantissas, of which the last strip's, 112 words, end in the states.
        assert len(data) == 16 + 128 * 3 + 16 - 112 * 2 + numbers.size * 7 // 8
        numbers[0, 0, 5, 1] ^= 1 << 14
        assert tables.encode(numbers) is None


@examples(15)
@given(st.integers(0, 2**32))
def test_any_levels_make_the_same_table_everywhere(seed):
    """Flat ones and steep ones, with symbols that hold many buckets and many that hold a slot."""
    rng = np.random.default_rng(seed)
    dim, tokens = 100, 150
    shapes, numbers = [], np.zeros((1, 1, tokens, dim), np.uint16)
    for c in range(dim):
        width, escape = int(rng.integers(1, 33)), int(rng.integers(0, 2) * rng.integers(1, 256))
        count = int(rng.integers(1, min(2 * width, 32 - bool(escape)) + 1))
        high = int(rng.choice([2, 5, 32, 256]))
        places = rng.permutation(2 * width)[:count]
        row = np.zeros(2 * width, np.uint8)
        row[places] = rng.integers(1, high, count)
        if rng.random() < 0.3:
            row[places[0]] = 255
        shapes.append((row.tolist(), escape))
        drawn = rng.choice(places, tokens)
        numbers[0, 0, :, c] = (drawn % 2 * 256 + drawn // 2) << 7
    made = channel_reference.write(shapes, [(c, 0) for c in range(dim)], dim, dtypes.get("bf16"))
    blocks = set()
    for level in instructions():
        _native.set_simd(level)
        tables = _native.ChannelTables(made, 1, dim, 8, 7)
        data = tables.encode(numbers)
        blocks.add(data)
        assert np.array_equal(decode(data, numbers.shape, "bf16", tables), numbers)
    assert len(blocks) == 1
    channels = channel_reference.tables(made, 1, dim, dtypes.get("bf16"))
    assert np.array_equal(
        channel_reference.decode(data, channels, numbers.shape, dtypes.get("bf16")), numbers
    )


@st.composite
def any_tables(draw, form):
    """Shapes in the order of their first use, and channels of every kind."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dim, heads = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    shapes, channels = [], []
    for _ in range(heads * dim):
        if rng.random() < draw(st.sampled_from([0, 0.2])):
            channels.append(int(rng.integers(0, 2**form.bits, dtype=np.uint64)))
        elif not shapes or rng.random() < 0.4:
            most = min(draw(st.sampled_from([2, 20, 256])), 2**form.exponent_bits)
            width = int(rng.integers(1, most + 1))
            escape = int(rng.choice([0, 1, 2, 33, 34, 255]))
            levels = np.zeros(2 * width, int)
            used = int(rng.integers(1, min(2 * width, 31) + 1))
            high = int(rng.choice([2, 20, 256]))
            levels[rng.permutation(2 * width)[:used]] = rng.integers(1, high, used)
            channels.append((len(shapes), int(rng.integers(0, 2**form.exponent_bits))))
            shapes.append((levels.tolist(), escape))
        else:
            base = int(rng.integers(0, 2 << form.exponent_bits))
            channels.append((int(rng.integers(0, len(shapes))), base))
    far, k = draw(st.integers(0, 1)), draw(st.integers(0, 7))
    return heads, dim, shapes, channels, far, k


@examples(40)
@given(data=st.data())
def test_any_tables_are_read(dtype, data):
    form = dtypes.get(dtype)
    heads, dim, shapes, channels, far, k = data.draw(any_tables(form))
    made = channel_reference.write(shapes, channels, dim, form, far, k)
    assert channel_reference.read(made, heads * dim, dim, form) == (shapes, channels)
    assert len(made) <= largest_tables(heads * dim)
    # Numbers that they hold: where all channels are constant, there is nothing to code.
    rng = np.random.default_rng(1)
    numbers = random_bits(rng, dtype, (1, heads, 9, dim))
    for c, channel in enumerate(channels):
        if isinstance(channel, tuple):
            levels, base = np.array(shapes[channel[0]][0]), channel[1]
            place = rng.choice(np.flatnonzero(levels), 9)
            value = (place % 2 * 2**form.exponent_bits + place // 2 + base) % (
                2 << form.exponent_bits
            )
            mantissas = numbers[0, c // dim, :, c % dim] & ((1 << form.mantissa_bits) - 1)
            channel = (value << form.mantissa_bits).astype(form.uint) | mantissas
        numbers[0, c // dim, :, c % dim] = channel
    tables = load(made, numbers.shape, dtype)
    coded = tables.encode(numbers)
    if coded is not None:
        read = channel_reference.tables(made, heads, dim, form)
        assert np.array_equal(channel_reference.decode(coded, read, numbers.shape, form), numbers)
        assert np.array_equal(decode(coded, numbers.shape, dtype, tables), numbers)


def load(made, shape, dtype):
    return CODEC.load_tables(memoryview(made), shape, context(dtype))


def needed(made, numbers, dtype):
    """Decodes a block with tables that are not its own: what fails is that they cannot be read."""
    tables = load(made, numbers.shape, dtype)
    for _ in range(2):  # as often as they are asked for
        with pytest.raises(kvzip.CorruptError, match="bad tables"):
            decode(b"\x02" + bytes(2000), numbers.shape, dtype, tables)
    return True


def legal(made, channels, dim, dtype):
    """Whether the spec has such tables."""
    try:
        shapes, _ = channel_reference.read(made, channels, dim, dtypes.get(dtype))
    except (AssertionError, IndexError, KeyError):
        return False
    return all(1 <= np.count_nonzero([*levels, e]) <= 32 for levels, e in shapes)


def readable(made, numbers, dtype):
    try:
        load(made, numbers.shape, dtype).encode(numbers)
    except ValueError as error:
        assert "bad tables" in str(error)
        return False
    return True


def test_tables_that_are_cut_lengthened_or_padded_are_refused(dtype):
    """What is left of them can be tables, too, once in hundreds of times."""
    numbers = cache_like(np.random.default_rng(8), dtype, (1, 2, 900, 7))
    numbers[..., 3] = 5
    made, _ = tables_of(numbers, dtype)
    left = [n for n in range(1, len(made)) if readable(made[:n], numbers, dtype)]
    assert len(left) < len(made) / 20
    assert all(legal(made[:n], 14, 7, dtype) for n in left)
    assert needed(made + b"\0", numbers, dtype)
    form, unused = dtypes.get(dtype), 0
    for width in range(1, 9):
        made = channel_reference.write([([1] * 2 * width, 0)], [(0, 0)], 1, form)
        padded = made[:-1] + bytes([made[-1] | 128])
        try:
            channel_reference.read(padded, 1, 1, form)
        except AssertionError:
            unused += needed(padded, np.zeros((1, 1, 1, 1), form.uint), dtype)
    assert unused >= 3


@given(data=st.data())
def test_tables_with_other_bits_are_refused_or_are_other_tables(dtype, data):
    numbers = cache_like(np.random.default_rng(9), dtype, (1, 1, 300, 9))
    made, _ = tables_of(numbers, dtype)
    damaged = bytearray(made)
    at = data.draw(st.integers(0, 8 * len(made) - 1))
    damaged[at // 8] ^= 1 << at % 8
    assert not readable(damaged, numbers, dtype) or legal(damaged, 9, 9, dtype)


def test_tables_larger_than_any_are_refused_unread():
    most = largest_tables(4)
    assert load(bytes(most), (1, 1, 1, 4), "bf16") is not None
    with pytest.raises(kvzip.CorruptError, match="impossible size"):
        load(bytes(most + 1), (1, 1, 1, 4), "bf16")


def test_few_bytes_cannot_claim_many_channels():
    """They get the memory that they earn: a bit for each at the least."""
    tables = _native.ChannelTables(b"\0" * 1000, 65, 1000, 8, 7)
    with pytest.raises(ValueError, match="cut short"):
        tables.encode(np.zeros((1, 65, 1, 1000), np.uint16))


@pytest.mark.parametrize(
    ("heads", "dim"), [(1, 65536), (65536, 1), (257, 256), (1 << 32, 1 << 32), (1 << 33, 1 << 31)]
)
def test_there_are_no_more_channels_than_tables_can_have(heads, dim):
    """Nor where their number, counted in 64 bits, comes out small again."""
    with pytest.raises(ValueError, match="more than 65,535"):
        _native.ChannelTables(b"\0", heads, dim, 8, 7)
    with pytest.raises(ValueError, match="more than 65,535"):
        _native.ChannelCounts(heads, dim, 8, 7)
    for none in (0, 1 << 40), (1 << 40, 0):
        _native.ChannelTables(b"\0", *none, 8, 7)


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_block_that_cannot_be_coded_leaves_no_memory_behind():
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    rng = np.random.default_rng(12)
    numbers = rng.integers(0, 1 << 16, (1, 8, 98304, 64), np.uint16)
    counts = _native.ChannelCounts(8, 64, 8, 7)
    counts.add(numbers[:, :, :1000])
    tables = _native.ChannelTables(counts.tables(), 8, 64, 8, 7)
    tables.encode(numbers[:, :, :1000])
    before = resident()
    assert tables.encode(numbers) is None
    assert resident() - before < 24 << 20


def test_tables_of_as_many_channels_as_there_may_be():
    form = dtypes.get("fp8_e5m2")
    channels = [(c, c % 32) if c < 300 else (c % 300, c % 64) for c in range(65535)]
    shapes = [([1 + c % 40, c // 40], c % 3) for c in range(300)]
    made = channel_reference.write(shapes, channels, 65535, form)
    values = np.array([base for _, base in channels])
    numbers = (values << 2).astype(np.uint8).reshape(1, 1, 1, -1).repeat(3, axis=2)
    tables = load(made, numbers.shape, form.name)
    coded = tables.encode(numbers)
    assert np.array_equal(decode(coded, numbers.shape, form.name, tables), numbers)


def test_threads_that_need_the_same_tables_at_once():
    rng = np.random.default_rng(10)
    numbers = cache_like(rng, "bf16", (1, 4, 500, 64))
    made, tables = tables_of(numbers, "bf16")
    coded = encode(numbers, "bf16", tables)
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            fresh, bad = (load(m, numbers.shape, "bf16") for m in (made, made[:-1]))

            def one(_, fresh=fresh, bad=bad):
                with pytest.raises(kvzip.CorruptError, match="bad tables"):
                    decode(coded, numbers.shape, "bf16", bad)
                return decode(coded, numbers.shape, "bf16", fresh)

            assert all(np.array_equal(x, numbers) for x in pool.map(one, range(8)))


def test_numbers_that_tables_do_not_hold_are_escaped_or_stored_raw():
    rng = np.random.default_rng(4)
    usual = cache_like(rng, "bf16", (1, 1, 2000, 8))
    _, tables = tables_of(usual, "bf16")
    other = random_bits(rng, "bf16", (1, 1, 300, 8))
    data = encode(other, "bf16", tables)
    assert data[0] == 0
    assert np.array_equal(decode(data, other.shape, "bf16", tables), other)


def test_tables_and_states_are_a_small_part(dtype):
    """Tables are at most 1 % of a file of 2,048 tokens, 2 % at 512."""
    for tokens, share in [(2048, 0.01), (512, 0.02)]:
        numbers = cache_like(np.random.default_rng(5), dtype, (1, 8, tokens, 64))
        made, tables = tables_of(numbers, dtype)
        # A format of half the size spends twice the share.
        allowed = share * max(1, 2 / dtypes.get(dtype).itemsize)
        assert len(made) < allowed * len(encode(numbers, dtype, tables))


def test_a_snapshot_in_any_form_is_the_same_whatever_the_instructions(dtype):
    snapshot = make_snapshot(cache_like, 6, dtype, tokens=400, dim=72)
    files = set()
    for level in instructions():
        _native.set_simd(level)
        files.add(kvzip.encode(snapshot, "channel", block_tokens=128))
    assert len(files) == 1


# --- what a GPU's kernels are told ----------------------------------------------------------------


def slots_of(entry):
    """What an entry of 64 numbers says of each slot: value (None: an escape), frequency, rank."""
    for bucket, place in product(range(32), range(32)):
        own = (place << 27 | 0x7FFFFFF) < entry[bucket]
        e = int(entry[bucket] if own else entry[32 + bucket])
        rank = place if own else place + (e >> 21)
        yield (None if e >> 11 & 1 else e >> 12 & 511), e & 2047, rank


@examples(20)
@given(data=st.data())
def test_entries_and_channels_say_what_the_tables_do(dtype, data):
    form = dtypes.get(dtype)
    heads, dim, shapes, channels, far, k = data.draw(any_tables(form))
    made = channel_reference.write(shapes, channels, dim, form, far, k)
    tables = load(made, (1, heads, 1, dim), dtype)
    found = set()
    for level in instructions():
        _native.set_simd(level)
        entries = tables.entries()
        assert (entries.shape, entries.dtype) == ((len(shapes), 64), np.uint32)
        found.add(entries.tobytes())
    assert len(found) == 1
    for entry, (levels, escape) in zip(entries, shapes, strict=True):
        shape = channel_reference.Shape(levels, escape, form.exponent_bits)
        expected = [(shape.values[s], shape.frequencies[s], rank) for s, rank in shape.slots]
        assert list(slots_of(entry)) == expected
    rows = [c if isinstance(c, tuple) else (0xFFFFFFFF, c) for c in channels]
    assert tables.channels().dtype == np.uint32
    assert tables.channels().tolist() == [list(row) for row in rows]


@pytest.mark.drawn(2)
def test_streams_are_where_the_spec_has_them(dtype):
    form = dtypes.get(dtype)
    several = 0
    many = cache_like(np.random.default_rng(3), dtype, (1, 31, 140, 2))
    for numbers in [*samples(dtype), many]:
        batch, heads, tokens, dim = numbers.shape
        made, tables = tables_of(np.concatenate([numbers] * 12, axis=2), dtype)
        if not made:
            continue
        data = encode(numbers, dtype, tables)
        if data[0] == 0:
            with pytest.raises(ValueError, match="not a coded block"):
                tables.streams(data, batch, tokens)
            continue
        channels = channel_reference.tables(made, heads, dim, form)
        strips = channel_reference.streams(numbers.shape, channels, form)
        found = tables.streams(data, batch, tokens)
        assert (found.shape, found.dtype) == ((len(strips), 7), np.int64)
        several += len(found) > 1
        first, at = 0, 8 + 8 * len(strips)
        at += -at % 16
        for i, (row, expected) in enumerate(zip(found.tolist(), strips, strict=True)):
            offset, first_strip, count, lanes, mantissas, words, escapes = row
            assert (offset, first_strip, count) == (at, first, len(expected))
            assert lanes == expected[0].tokens
            whole = sum(strip.mantissa_bytes for strip in expected)
            carried = min(lanes, expected[-1].mantissa_bytes // 2)
            assert mantissas == whole - 2 * carried
            assert data[8 + 8 * i : 16 + 8 * i] == np.array([words, escapes], "<u4").tobytes()
            first += count
            states = 3 * lanes + -(-lanes // 8)
            bits = np.unpackbits(np.frombuffer(data[at + 3 * lanes : at + states], np.uint8))
            tops = int(bits.sum())
            for section in (states, mantissas, 2 * (words + escapes) + tops):
                at += section + -section % 16
        assert at <= len(data)
    assert several


@given(data=st.data())
def test_streams_refuses_what_decoding_does_before_it_looks_into_them(dtype, data):
    """Sections that do not fit, and padding that is not zeros: with the same words."""
    numbers = cache_like(np.random.default_rng(2), dtype, (1, 17, 140, 2))
    _, tables = tables_of(np.concatenate([numbers] * 12, axis=2), dtype)
    whole = encode(numbers, dtype, tables)
    damaged = bytearray(whole)
    kind = data.draw(st.sampled_from(["cut", "longer", "header", "anywhere"]))
    if kind == "cut":
        del damaged[data.draw(st.integers(0, len(whole) - 1)) :]
    elif kind == "longer":
        damaged += data.draw(st.binary(min_size=1, max_size=40))
    else:
        at = data.draw(st.integers(1, 31 if kind == "header" else len(whole) - 1))
        damaged[at] ^= data.draw(st.integers(1, 255))

    def refusal(use):
        try:
            use()
        except (ValueError, kvzip.CorruptError) as error:
            return str(error)
        return None

    seen = refusal(lambda: tables.streams(damaged, 1, 140))
    decoded = refusal(lambda: decode(damaged, numbers.shape, dtype, tables))
    if seen is not None:
        assert decoded == seen
    else:
        assert decoded in (None, "its streams do not fit each other")
    if kind in ("cut", "longer"):
        assert seen is not None
    # What is in no section is padding.
    sections = np.zeros(len(damaged), bool)
    sections[:1] = sections[8 : 8 + 8 * 3] = True
    for offset, *_, lanes, mantissas, words, escapes in tables.streams(whole, 1, 140).tolist():
        states = 3 * lanes + -(-lanes // 8)
        bits = np.unpackbits(np.frombuffer(whole[offset + 3 * lanes : offset + states], np.uint8))
        for section in (states, mantissas, 2 * (words + escapes) + int(bits.sum())):
            sections[offset : offset + section] = True
            offset += section + -section % 16
    if kind == "anywhere" and not sections[at]:
        assert seen == "its padding is not zeros"


def test_states_that_make_no_sense(dtype):
    """Whatever the instructions: a state below 2^16, a fourth byte of 0, and the fourth byte of a
    lane that there is not."""
    numbers = cache_like(np.random.default_rng(2), dtype, (1, 2, 77, 64))
    _, tables = tables_of(np.concatenate([numbers] * 12, axis=2), dtype)
    whole = encode(numbers, dtype, tables)
    ((start, _, _, lanes, mantissas, words, escapes),) = tables.streams(whole, 1, 77).tolist()
    bits = start + 3 * lanes
    with_top = np.unpackbits(
        np.frombuffer(whole[bits : bits + 10], np.uint8), bitorder="little"
    ).astype(bool)
    assert lanes == 77 and with_top.any() and not with_top[:lanes].all()
    behind = start + 3 * lanes + 10
    behind += -behind % 16 + mantissas
    behind += -behind % 16 + 2 * (words + escapes)
    low = int(np.flatnonzero(~with_top)[0])
    for level in instructions():
        _native.set_simd(level)
        for at, value, error in [
            (start + 3 * low + 2, 0, "its streams do not fit each other"),
            (behind, 0, "its streams do not fit each other"),
            (bits + 9, whole[bits + 9] | 0x80, "states of no token"),
        ]:
            damaged = bytearray(whole)
            damaged[at] = value
            with pytest.raises(kvzip.CorruptError, match=error):
                decode(damaged, numbers.shape, dtype, tables)


@pytest.mark.parametrize("size", [(1, 2**40), (2**40, 2**40), (2**63, 2**63), (0, 5), (5, 0)])
def test_streams_of_blocks_that_nothing_stands_for(size):
    tables = handmade([5, 5], 0)[1]
    with pytest.raises(ValueError, match=r"cut short|too long"):
        tables.streams(b"\x02" + bytes(31 if 0 in size else 1000), *size)
