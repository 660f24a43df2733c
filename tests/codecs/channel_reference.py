"""The channel codec in plain Python, from codecs/channel/spec.md: tables both ways, blocks decoded.

Stored tables are a list of shapes, (levels, escape level), and one of channels: (shape, base), or
the number of a constant one.
"""

from __future__ import annotations

import math
import re
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np

SPEC = Path(__file__).parents[2] / "codecs" / "channel" / "spec.md"
WIDTH, ESCAPE, TOP = 21, 22, 23
OTHER = 256


@cache
def codes():
    """The symbol of each code, by its bits as they are read."""
    block = re.search(r"```\n((?:[0-8]+\n)+)```", SPEC.read_text())[1]
    found = []
    for line in block.split():
        lengths = {s: int(c) for s, c in enumerate(line[:-1]) if c != "0"} | {OTHER: int(line[-1])}
        code, at = {}, 0
        for length in range(1, 9):
            for s in sorted(lengths):
                if lengths[s] == length:
                    code[f"{at:0{length}b}"] = s
                    at += 1
            at *= 2
        assert sum(2.0 ** -len(c) for c in code) == 1, "a code of which some bits mean nothing"
        found.append(code)
    assert len(found) == 24
    return found


def level_code(r, a):
    if r < 64:
        return min(a, 6)
    return 7 + a if a < 2 else 9 + min(11, (r // 64 + a - 3) // 2)


def foreseen(tops, c, far, dim, exponent_bits):
    d = max(1, dim // 2) if far else 1
    if c == 0:
        return 1 << (exponent_bits - 1)
    return tops[c - d] if c >= d else tops[c - 1]


class Bits:
    def __init__(self, data):
        self.bits, self.at = "".join(f"{byte:08b}"[::-1] for byte in data), 0

    def raw(self, n):
        self.at += n
        assert self.at <= len(self.bits)
        return self.bits[self.at - n : self.at]

    def end(self):
        """Bytes that were read."""
        assert "1" not in self.raw(-self.at % 8)
        return self.at // 8

    def number(self, n):
        return int("0" + self.raw(n)[::-1], 2)

    def symbol(self, code):
        bits = ""
        while bits not in codes()[code]:
            bits += self.raw(1)
        s = codes()[code][bits]
        return self.number(8) if s == OTHER else s

    def golomb(self, k):
        z = 0
        while self.raw(1) == "0":
            z += 1
        return 2 ** (z + k) + self.number(z + k) - 2**k

    def below(self, n):
        b = n.bit_length() - 1
        x = self.number(b)
        return x if x < 2 ** (b + 1) - n else 2 * x + n - 2 ** (b + 1) + self.number(1)


def read(data, channels, dim, form):
    e, bits = form.exponent_bits, Bits(data)
    any_constant, far, k = bits.number(1), bits.number(1), bits.number(3)
    widths, escapes, found, tops, run = [], [], [], [], 0
    for c in range(channels):
        seen = foreseen(tops, c, far, dim, e)
        if any_constant and bits.number(1):
            found.append(bits.number(form.bits))
            tops.append(seen)
            continue
        sign = 0
        if run:
            run -= 1
            shape, sign = bits.below(len(widths)), bits.number(1)
        else:
            shape = len(widths)
            widths.append(bits.symbol(WIDTH) + 1)
            escapes.append(bits.symbol(ESCAPE))
            run = bits.golomb(k)
        by = bits.symbol(TOP)
        tops.append((seen + (-(by + 1) // 2 if by % 2 else by // 2)) % 2**e)
        found.append((shape, (sign << e) + (tops[-1] - widths[shape]) % 2**e))
    assert not run
    odd, shapes = Bits(data[::-1]), []
    for i, (width, escape) in enumerate(zip(widths, escapes, strict=True)):
        levels, r = [0, 0], 1024 - escape**2
        for _ in range(width):
            new = [(odd if i % 2 else bits).symbol(level_code(r, a)) for a in levels[:2]]
            levels, r = new + levels, r - sum(x * x for x in new)
        shapes.append((levels[:-2], escape))
    assert bits.end() + odd.end() == len(data)
    return shapes, found


def write(shapes, channels, dim, form, far=0, k=1):
    """Tables whose shapes are numbered by first use, with a base that is not negative there."""
    e, out, odd = form.exponent_bits, [], []

    def number(x, n, to=out):
        to.append(f"{x:0{n}b}"[::-1] if n else "")

    def symbol(code, s, to=out):
        of = {s: bits for bits, s in codes()[code].items()}
        to.append(of.get(s, of[OTHER]))
        if s not in of:
            number(s, 8, to)

    def golomb(x):
        x += 2**k
        n = x.bit_length() - 1
        out.append("0" * (n - k) + "1")
        number(x - 2**n, n)

    def below(x, n):
        b = n.bit_length() - 1
        short = x < 2 ** (b + 1) - n
        x += 0 if short else 2 ** (b + 1) - n
        number(x if short else x // 2, b)
        number(x % 2, 0 if short else 1)

    coded = [c for c in channels if isinstance(c, tuple)]
    first = {s: i for i, (s, _) in reversed(list(enumerate(coded)))}
    new = [first[s] for s in range(len(shapes))]
    runs = iter([b - a - 1 for a, b in zip(new, [*new[1:], len(coded)], strict=False)])
    any_constant = len(coded) < len(channels)
    number(any_constant, 1)
    number(far, 1)
    number(k, 3)
    tops, run, known = [], 0, 0
    widths = [len(levels) // 2 for levels, _ in shapes]
    for c, channel in enumerate(channels):
        seen = foreseen(tops, c, far, dim, e)
        if any_constant:
            number(not isinstance(channel, tuple), 1)
        if not isinstance(channel, tuple):
            number(channel, form.bits)
            tops.append(seen)
            continue
        shape, base = channel
        if run:
            run -= 1
            below(shape, known)
            number(base >> e, 1)
        else:
            assert (shape, base >> e) == (known, 0)
            known += 1
            symbol(WIDTH, widths[shape] - 1)
            symbol(ESCAPE, shapes[shape][1])
            run = next(runs)
            golomb(run)
        tops.append((base + widths[shape]) % 2**e)
        by = (tops[-1] - seen + 2 ** (e - 1)) % 2**e - 2 ** (e - 1)
        symbol(TOP, -2 * by - 1 if by < 0 else 2 * by)
    for i, (levels, escape) in enumerate(shapes):
        above, r = [0, 0], 1024 - escape**2
        for exponent in reversed(range(widths[i])):
            new = levels[2 * exponent : 2 * exponent + 2]
            for level, a in zip(new, above, strict=True):
                symbol(level_code(r, a), level, odd if i % 2 else out)
            above, r = new, r - sum(x * x for x in new)
    return in_bytes(out) + in_bytes(odd)[::-1]


def in_bytes(pieces):
    bits = "".join(pieces)
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8][::-1], 2) for i in range(0, len(bits), 8))


# --- blocks -----------------------------------------------------------------------------------


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


def tables(data, heads, dim, form):
    shapes, channels = read(data, heads * dim, dim, form)
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


class Fields:
    """Numbers one after the other, each section of them up to a multiple of 16 bytes."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, count, dtype="u1"):
        size = count * np.dtype(dtype).itemsize
        assert self.at + size <= len(self.data)
        found = np.frombuffer(self.data[self.at : self.at + size], f"<{dtype}")
        self.at += size
        return [int(x) for x in found]

    def align(self):
        assert not any(self.take(-self.at % 16))


class Strip:
    """Up to 128 tokens of up to 64 channels of one head."""

    def __init__(self, start, row, head, first, shape, channels, form):
        _, _, tokens, dim = shape
        self.start, self.row, self.head = start, row, head
        self.tokens = min(128, tokens - start)
        self.channels = range(first, min(first + 64, dim))
        self.of = {c: channels[head * dim + c] for c in self.channels}
        self.live = [c for c in self.channels if isinstance(self.of[c], tuple)]
        whole, rest = divmod(form.mantissa_bits, 8)
        self.octet_rows = 8 * whole + rest
        self.mantissa_bytes = -(-self.tokens // 8) * self.octet_rows * len(self.live)

    def values(self, states, words, escapes, form):
        """Sign and exponent of every number, [channel, lane]."""
        found = {}
        for c in self.live:
            table, base = self.of[c]
            for j in range(self.tokens):
                symbol, rank = table.slots[states[j] % 1024]
                x = table.frequencies[symbol] * (states[j] // 1024) + rank
                states[j] = x if x >= 1 << 16 else (x << 16) + next(words)
                value = table.values[symbol]
                found[c, j] = (
                    next(escapes) if value is None else (value + base) % (2 << form.exponent_bits)
                )
        return found

    def put(self, values, mantissas, form, out):
        """Put its numbers into `out`, [batch, heads, tokens, dim]."""
        m, n = form.mantissa_bits, len(self.live)
        for c in self.channels:
            if c not in self.live:
                out[self.row, self.head, self.start : self.start + self.tokens, c] = self.of[c]
        for o in range(0, self.tokens, 8):
            at = o // 8 * self.octet_rows * n
            rows = [mantissas[at + k * n : at + (k + 1) * n] for k in range(self.octet_rows)]
            for k, c in enumerate(self.live):
                top = unpack([row[k] for row in rows[8 * (m // 8) :]], m % 8)
                for j in range(min(8, self.tokens - o)):
                    low = sum(rows[8 * q + j][k] << (8 * q) for q in range(m // 8))
                    number = values[c, o + j] << m | top[j] << (8 * (m // 8)) | low
                    out[self.row, self.head, self.start + o + j, c] = number


def streams(shape, channels, form):
    """Lists of the strips that are coded together."""
    batch, heads, tokens, dim = shape
    strips = [
        Strip(t, b, h, c, shape, channels, form)
        for t in range(0, tokens, 128)
        for b in range(batch)
        for h in range(heads)
        for c in range(0, dim, 64)
    ]
    per = (3072 if form.bits == 8 else 2048) // min(128, tokens)
    n = len(strips)
    count = max(1, (2 * n + per) // (2 * per)) if n else 0
    return [strips[s * n // count : (s + 1) * n // count] for s in range(count)]


def bf16(x):
    """A float32 to the nearest number of bf16, of two as near ones to the even one: its bits. -0
    becomes 0."""
    if x == 0:
        return 0
    bits = int(np.float32(x).view(np.uint32))
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def of_bf16(bits):
    """The float32 that has these bits of bf16."""
    return np.uint32(int(bits) << 16).view(np.float32)


def angles(position, frequency, scale=1.0, wide=False):
    """Cosine and sine of a position, as numbers of bf16, or where they are `wide` of float32."""
    angle = float(np.float32(position) * np.float32(frequency))
    found = [np.float32(f(angle)) * np.float32(scale) for f in (math.cos, math.sin)]
    found = [x if abs(x) >= 2.0**-40 else np.float32(0) for x in found]
    return found if wide else [of_bf16(bf16(x)) for x in found]


def turn(keys, first, frequencies, rounding, scale=1.0):
    """Keys before RoPE, [batch, heads, tokens, dim], of which the first token stands at the
    position `first`, as the model cached them."""
    out = keys.copy()
    each = (lambda x: of_bf16(bf16(x))) if rounding in (1, 4) else (lambda x: x)
    for b, h, t in np.ndindex(keys.shape[:3]):
        for i, frequency in enumerate(frequencies):
            cos, sin = angles(first + t, frequency, scale, rounding in (3, 6))
            one, other = places(i, len(frequencies), rounding)
            x, y = (of_bf16(keys[b, h, t, j]) for j in (one, other))
            out[b, h, t, one] = bf16(each(x * cos) - each(y * sin))
            out[b, h, t, other] = bf16(each(y * cos) + each(x * sin))
    return out


def places(pair, pairs, rounding):
    """Which numbers of a head are a pair."""
    return (pair, pair + pairs) if rounding <= 3 else (2 * pair, 2 * pair + 1)


def unturned(data):
    """A block of keys before RoPE taken apart: the coded block within, how its keys are turned, and
    the pairs that are not, with their numbers."""
    fields = Fields(data)
    mode, rounding, *zeros = fields.take(4)
    assert mode == 3
    assert 1 <= rounding <= 6
    (count,) = fields.take(1, "u4")
    assert not any(zeros + fields.take(8))
    exceptions = [(*fields.take(1, "u4"), *fields.take(2, "u2")) for _ in range(count)]
    fields.align()
    return data[fields.at :], rounding, exceptions


def decode_keys(data, channels, shape, form, first, frequencies, scale=1.0):
    """The numbers of a block of keys."""
    if data[0] != 3:
        return decode(data, channels, shape, form)
    coded, rounding, exceptions = unturned(data)
    assert coded[0] == 2
    out = turn(decode(coded, channels, shape, form), first, frequencies, rounding, scale)
    for place, x, y in exceptions:
        row, pair = divmod(place, len(frequencies))
        at = np.unravel_index(row, shape[:3])
        one, other = places(pair, len(frequencies), rounding)
        out[(*at, one)], out[(*at, other)] = x, y
    return out


def decode(data, channels, shape, form):
    """A block's numbers. `channels` are those of :func:`tables`."""
    fields, out = Fields(data), np.zeros(shape, form.uint)
    (mode,) = fields.take(1)
    assert mode in (0, 2)
    if mode == 0:
        fields.align()
        assert len(data) == 16 + out.nbytes
        return np.frombuffer(data[16:], form.uint).reshape(shape)
    assert not any(fields.take(7))
    found = streams(shape, channels, form)
    counts = [fields.take(2, "u4") for _ in found]
    fields.align()
    for strips, (word_count, escape_count) in zip(found, counts, strict=True):
        lanes = strips[0].tokens
        low = np.array(fields.take(3 * lanes)).reshape(lanes, 3) @ [1, 1 << 8, 1 << 16]
        bits = [byte >> i & 1 for byte in fields.take(-(-lanes // 8)) for i in range(8)]
        assert not any(bits[lanes:])
        fields.align()
        carried = min(lanes, strips[-1].mantissa_bytes // 2)
        mantissas = fields.take(sum(s.mantissa_bytes for s in strips) - 2 * carried)
        fields.align()
        words = iter(fields.take(word_count, "u2"))
        escapes = iter(fields.take(escape_count, "u2"))
        tops = iter(fields.take(sum(bits)))
        fields.align()
        bits = bits[:lanes]
        states = [int(x) + (next(tops) << 24 if b else 0) for x, b in zip(low, bits, strict=True)]
        assert all(x >= 1 << (24 if b else 16) for x, b in zip(states, bits, strict=True))
        values = [strip.values(states, words, escapes, form) for strip in strips]
        assert next(words, None) is None
        assert next(escapes, None) is None
        assert all(x >> 16 == 1 for x in states)
        assert not any(x & 0xFFFF for x in states[carried:])
        mantissas += [byte for x in states[:carried] for byte in (x & 255, x >> 8 & 255)]
        for strip, numbers in zip(strips, values, strict=True):
            strip.put(numbers, mantissas, form, out)
            mantissas = mantissas[strip.mantissa_bytes :]
        assert not mantissas
    least = out.nbytes // 1024
    assert fields.at == len(data) or len(data) == least + -least % 16
    assert not any(fields.take(len(data) - fields.at))
    return out
