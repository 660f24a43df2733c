"""The channel codec against its spec, against itself on other instructions, and against theory."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import channel_reference
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import cache_like, make_snapshot, random_bits

import kvzip
from kvzip import dtypes
from kvzip.codec import Context
from kvzip.codecs import _native
from kvzip.codecs.channel.codec import ChannelCodec

LEVELS = ["scalar", "avx2", "avx512", "neon"]
CODEC = ChannelCodec()


@pytest.fixture(autouse=True)
def restore_simd():
    before = _native.simd()
    yield
    _native.set_simd(before)


def available():
    before = _native.simd()
    found = [level for level in LEVELS if _native.set_simd(level)]
    _native.set_simd(before)
    return found


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


class Fields:
    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count, dtype="u1"):
        size = count * np.dtype(dtype).itemsize
        found = np.frombuffer(self.data[self.at : self.at + size], f"<{dtype}")
        self.at += size
        return [int(x) for x in found]


class Shape:
    """A shape's slots: which symbol, and which of its ranks."""

    def __init__(self, levels, escape_level, exponent_bits):
        symbols = [
            (level, (i % 2 << exponent_bits) | i // 2) for i, level in enumerate(levels) if level
        ]
        if escape_level:
            symbols.append((escape_level, None))
        assert 1 <= len(symbols) <= 32
        self.values = [value for _, value in symbols]
        w = [level**2 for level, _ in symbols]
        f = [max(1, (2048 * x + sum(w)) // (2 * sum(w))) for x in w]
        f[f.index(max(f))] += 1024 - sum(f)
        self.frequencies = f
        f = f + [0] * (32 - len(f))
        divide, other, add = [32] * 32, [0] * 32, [0] * 32
        left = list(f)
        large = [i for i in range(32) if f[i] >= 32]

        def fill(bucket, by):
            divide[bucket], other[bucket] = left[bucket], by
            left[by] -= 32 - left[bucket]
            add[bucket] = left[by] - divide[bucket]

        for s in range(32):
            if f[s] < 32:
                fill(s, large[0])
                while left[large[0]] < 32 and len(large) > 1:
                    fill(large.pop(0), large[0])
        self.slots = [
            (bucket, place) if place < divide[bucket] else (other[bucket], place + add[bucket])
            for bucket, place in product(range(32), range(32))
        ]


def read_tables(data, heads, dim, form):
    shapes, channels = channel_reference.read(data, heads * dim, dim, form)
    shapes = [Shape(levels, escape, form.exponent_bits) for levels, escape in shapes]
    return [(shapes[c[0]], c[1]) if isinstance(c, tuple) else c for c in channels]


def unpack(rows, bits):
    """Fields of eight tokens from one channel's packed rows."""
    if bits == 7:
        last = sum((row >> 7) << j for j, row in enumerate(rows))
        return [row & 127 for row in rows] + [last]
    if bits == 3:
        rest = sum((row >> 6) << (2 * j) for j, row in enumerate(rows))
        return [row >> shift & 7 for row in rows for shift in (0, 3)] + [rest & 7, rest >> 3]
    return [row >> shift & 3 for row in rows for shift in (0, 2, 4, 6)]


def spec_decode(data, channels, shape, form):
    batch, heads, tokens, dim = shape
    if data[0] == 0:
        return np.frombuffer(data[1:], form.uint).reshape(shape)
    assert data[0] == 1
    value_bits, m = form.exponent_bits + 1, form.mantissa_bits
    lanes = min(128, tokens)
    fields = Fields(data[1:])
    escape_count, word_count = fields.take(2, "u4")
    states = fields.take(lanes, "u4")
    escapes = iter(fields.take(escape_count, "u2"))
    octet_rows = 8 * (m // 8) + m % 8
    strips = [
        (t, b, h, c)
        for t in range(0, tokens, 128)
        for b in range(batch)
        for h in range(heads)
        for c in range(0, dim, 64)
    ]

    def live(h, c):
        row = range(c, min(c + 64, dim))
        return [i for i in row if isinstance(channels[h * dim + i], tuple)]

    def mantissa_size(t, b, h, c):
        return -(-min(128, tokens - t) // 8) * octet_rows * len(live(h, c))

    carried = min(lanes, mantissa_size(*strips[-1]) // 2)
    mantissas = fields.take(sum(mantissa_size(*s) for s in strips) - 2 * carried)
    words = iter(fields.take(word_count, "u2"))
    values = {}
    for t, b, h, c in strips:
        for i in live(h, c):
            table, base = channels[h * dim + i]
            for j in range(min(128, tokens - t)):
                symbol, rank = table.slots[states[j] % 1024]
                x = table.frequencies[symbol] * (states[j] // 1024) + rank
                states[j] = x if x >= 1 << 16 else (x << 16) + next(words)
                value = table.values[symbol]
                values[b, h, t + j, i] = (
                    next(escapes) if value is None else (value + base) % (1 << value_bits)
                )
    assert next(words, None) is None
    assert next(escapes, None) is None
    assert all(x >> 16 == 1 for x in states)
    assert not any(x & 0xFFFF for x in states[carried:])
    mantissas += [byte for x in states[:carried] for byte in (x & 255, x >> 8 & 255)]

    out = np.zeros(shape, form.uint)
    at = 0
    for t, b, h, c in strips:
        found = live(h, c)
        for i in set(range(c, min(c + 64, dim))) - set(found):
            out[b, h, :, i] = channels[h * dim + i]
        for o in range(t, min(t + 128, tokens), 8):
            rows = [
                mantissas[at + k * len(found) : at + (k + 1) * len(found)]
                for k in range(octet_rows)
            ]
            at += octet_rows * len(found)
            for k, i in enumerate(found):
                top = unpack([row[k] for row in rows[8 * (m // 8) :]], m % 8)
                for j in range(min(8, tokens - o)):
                    low = sum(rows[8 * q + j][k] << (8 * q) for q in range(m // 8))
                    number = values[b, h, o + j, i] << m | top[j] << (8 * (m // 8)) | low
                    out[b, h, o + j, i] = number
    assert at == len(mantissas)
    padding = data[1 + fields.at :]
    assert not any(padding)
    return out


def samples(dtype):
    """Blocks that take every path: partial groups and strips, constants, escapes, raw."""
    rng = np.random.default_rng(1)
    for shape in [(1, 2, 150, 5), (2, 1, 8, 70), (1, 1, 1, 64), (1, 1, 260, 3), (1, 1, 130, 65)]:
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


def test_a_decoder_written_from_the_spec_reads_real_blocks(dtype):
    form = dtypes.get(dtype)
    coded = 0
    for numbers in samples(dtype):
        _, heads, _, dim = numbers.shape
        # Tables from a longer text, so that short blocks are coded, too.
        part = np.concatenate([numbers] * 12, axis=2)
        made, tables = tables_of(part, dtype)
        channels = made and read_tables(made, heads, dim, form)
        data = encode(numbers, dtype, tables)
        coded += data[0]
        assert np.array_equal(spec_decode(data, channels, numbers.shape, form), numbers)
    assert coded >= 6


# --- one result on any processor -----------------------------------------------------------------


def test_the_processor_has_more_than_one_path():
    assert available()[0] == "scalar"
    assert _native.simd() in available()
    with pytest.raises(ValueError, match="avx1024"):
        _native.set_simd("avx1024")


def test_all_instructions_give_the_same_bytes_and_numbers(dtype):
    for numbers in samples(dtype):
        made, tables = tables_of(numbers, dtype)
        found = set()
        for level in available():
            _native.set_simd(level)
            found.add(encode(numbers, dtype, tables))
            assert tables_of(numbers, dtype)[0] == made
        assert len(found) == 1
        data = found.pop()
        for level in available():
            _native.set_simd(level)
            assert np.array_equal(decode(data, numbers.shape, dtype, tables), numbers), level


@given(data=st.data())
@settings(max_examples=60)
def test_all_instructions_refuse_the_same_damage(dtype, data):
    numbers = cache_like(np.random.default_rng(2), dtype, (1, 1, 200, 9))
    _, tables = tables_of(numbers, dtype)
    damaged = bytearray(encode(numbers, dtype, tables))
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(1, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    results = []
    for level in available():
        _native.set_simd(level)
        try:
            results.append(decode(damaged, numbers.shape, dtype, tables).tobytes())
        except kvzip.CorruptError:
            results.append(None)
    assert len(set(results)) == 1


def test_the_environment_chooses():
    code = "from kvzip.codecs import _native; print(_native.simd())"
    for level in available():
        run = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "KVZIP_SIMD": level},
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.split() == [level]


# --- how good it is ------------------------------------------------------------------------------


def shape_counts(numbers, form, channels):
    """Of each channel, its shape and the numbers' symbols under it; the last is the escape."""
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
    channels = read_tables(made, 2, 16, form)
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
    escapes, words = Fields(data[1:]).take(2, "u4")
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
    for level in available():
        _native.set_simd(level)
        data = tables.encode(numbers)
        blocks.add(data)
        assert np.array_equal(decode(data, numbers.shape, "bf16", tables), numbers)
    assert len(blocks) == 1
    channels = read_tables(made, 1, 2, dtypes.get("bf16"))
    assert np.array_equal(spec_decode(data, channels, numbers.shape, dtypes.get("bf16")), numbers)
    if symbols == 1 and not escape:
        # Nothing but mantissas, of which the last strip's, 112 words, end in the states.
        assert len(data) == 9 + 128 * 4 - 112 * 2 + numbers.size * 7 // 8
        numbers[0, 0, 5, 1] ^= 1 << 14
        assert tables.encode(numbers) is None


@settings(max_examples=15)
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
    for level in available():
        _native.set_simd(level)
        tables = _native.ChannelTables(made, 1, dim, 8, 7)
        data = tables.encode(numbers)
        blocks.add(data)
        assert np.array_equal(decode(data, numbers.shape, "bf16", tables), numbers)
    assert len(blocks) == 1
    channels = read_tables(made, 1, dim, dtypes.get("bf16"))
    assert np.array_equal(spec_decode(data, channels, numbers.shape, dtypes.get("bf16")), numbers)


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


@settings(max_examples=40)
@given(data=st.data())
def test_any_tables_are_read(dtype, data):
    form = dtypes.get(dtype)
    heads, dim, shapes, channels, far, k = data.draw(any_tables(form))
    made = channel_reference.write(shapes, channels, dim, form, far, k)
    assert channel_reference.read(made, heads * dim, dim, form) == (shapes, channels)
    assert len(made) <= CODEC.max_tables_size((1, heads, 9, dim), form)
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
        read = read_tables(made, heads, dim, form)
        assert np.array_equal(spec_decode(coded, read, numbers.shape, form), numbers)
        assert np.array_equal(decode(coded, numbers.shape, dtype, tables), numbers)


def load(made, shape, dtype):
    return CODEC.load_tables(memoryview(made), shape, context(dtype))


def needed(made, numbers, dtype):
    """Decodes a block with tables that are not its own: what fails is that they cannot be read."""
    tables = load(made, numbers.shape, dtype)
    for _ in range(2):  # as often as they are asked for
        with pytest.raises(kvzip.CorruptError, match="bad tables"):
            decode(b"\x01" + bytes(2000), numbers.shape, dtype, tables)
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
@settings(max_examples=60)
def test_tables_with_other_bits_are_refused_or_are_other_tables(dtype, data):
    numbers = cache_like(np.random.default_rng(9), dtype, (1, 1, 300, 9))
    made, _ = tables_of(numbers, dtype)
    damaged = bytearray(made)
    at = data.draw(st.integers(0, 8 * len(made) - 1))
    damaged[at // 8] ^= 1 << at % 8
    assert not readable(damaged, numbers, dtype) or legal(damaged, 9, 9, dtype)


def test_tables_larger_than_any_are_refused_unread():
    most = CODEC.max_tables_size((1, 1, 1, 4), dtypes.get("bf16"))
    assert load(bytes(most), (1, 1, 1, 4), "bf16") is not None
    with pytest.raises(kvzip.CorruptError, match="impossible size"):
        load(bytes(most + 1), (1, 1, 1, 4), "bf16")


def test_few_bytes_cannot_claim_many_channels():
    """Of memory, what they earn: a bit for each at the least."""
    tables = _native.ChannelTables(b"\0" * 1000, 1000, 1000, 8, 7)
    with pytest.raises(ValueError, match="cut short"):
        tables.encode(np.zeros((1, 1000, 1, 1000), np.uint16))


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
    for level in available():
        _native.set_simd(level)
        files.add(kvzip.encode(snapshot, "channel", block_tokens=128))
    assert len(files) == 1
