"""Stored tables of the channel codec in plain Python, from codecs/channel/spec.md and its codes.

Tables are a list of shapes, (levels, escape level), and one of channels: (shape, base), or the
number of a constant one.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

SPEC = Path(__file__).parents[2] / "codecs" / "channel" / "spec.md"
WIDTH, ESCAPE, TOP = 21, 22, 23
OTHER = 256


@cache
def codes():
    """Of each code, from bits as they are read to a symbol."""
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
