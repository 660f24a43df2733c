"""Files, pages and sealed files read from docs/format.md and the codecs' pages alone, with no code
of kvzip but formats' names. Slow and plain."""

from __future__ import annotations

import itertools
import json
import struct

import channel_reference
import lz4.block
import numpy as np
import xxhash
import zstandard
from grids.reference import widened
from predictive_reference import Chain

from kvzip import dtypes


def xxh3(*pieces):
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def rounded_up(n, step):
    return n + -n % step


class Profile:
    """A profile's tensors and description, as kvzip reads them: its format is another page's."""

    def __init__(self, profile):
        self.tensors, self.description = profile.tensors, profile.description

    def tables(self, layer, part, before_rope, heads, dim, form):
        name = f"channel.{layer}.{part}" + (".before_rope" if before_rope else "")
        return channel_reference.tables(self.tensors[name].tobytes(), heads, dim, form)


class File:
    """A .kvz file."""

    def __init__(self, data, profile=None):
        magic, version, flags, header, count, ids, length = struct.unpack_from("<8sHHIIIQ", data)
        assert (magic, version, flags) == (b"\x89KVZ\r\n\x1a\n", 1, 0)
        assert length == len(data)
        at = 40 + header
        end = at + ids + 48 * count
        self.data, self.profile, self.chains = data, profile, {}
        begin = rounded_up(end, 64)
        assert xxh3(data[:32], data[40:begin]) == struct.unpack_from("<Q", data, 32)[0]
        assert not any(data[end:begin])
        self.header = json.loads(data[40:at])
        layout = self.header["layout"]
        self.layers = [layout["distinct"][i] for i in layout["layers"]]
        self.tokens = max(
            (x["cumulative_length"] for x in self.layers if x.get("kind") != "cross"), default=0
        )
        self.ids = self.token_ids(data[at : at + ids])
        self.others = self.by_part("other_codecs")
        self.grids = self.by_part("grids")
        self.parts = self.read(data[at + ids : end], begin)

    def by_part(self, name):
        return {tuple(part): one for one in self.header.get(name, ()) for part in one["parts"]}

    def token_ids(self, data):
        if not self.header.get("token_ids"):
            assert not data
            return None
        batch = next((p["shape"][0] for x in self.layers for p in x["parts"].values()
                      if p["axes"].startswith("b")), None)  # fmt: skip
        rows = 1 if batch is None else batch
        width = len(data) // (rows * self.tokens)
        found = [int.from_bytes(data[i : i + width], "little") for i in range(0, len(data), width)]
        ids = np.array(found, np.uint32).reshape(rows, self.tokens)
        return ids if batch is not None else ids[0]

    def read(self, index, at):
        """Every part's numbers, in its own shape, by layer and name."""
        records = iter([index[i : i + 48] for i in range(0, len(index), 48)])
        found, tables, blocks = {}, {}, {}
        for i, layer in enumerate(self.layers):
            for number, (name, part) in enumerate(layer["parts"].items()):
                size = dict(zip(part["axes"], part["shape"], strict=True))
                lines = size.get("t", size.get("r", 1))
                shape = size.get("b", 1), size.get("h", 1), lines, size.get("d", 1)
                form = dtypes.get(part["dtype"])
                found[i, name] = np.zeros(shape, form.uint)
                start = layer["cumulative_length"] - lines if "t" in size else 0
                step = self.header["block_tokens"] if "t" in size else max(lines, 1)
                cuts = [p for p in range(start + 1, start + lines) if p % step == 0]
                cuts = [start, *cuts, start + lines] if lines else []
                ranges = [(0, 0), *((a - start, b - a) for a, b in itertools.pairwise(cuts))]
                for n, (first, tokens) in enumerate(ranges):
                    record = struct.unpack("<IBBHIIQQQQ", next(records))
                    *place, offset, length, stored, raw = record
                    assert place == [i, number, int(n == 0), 0, first, tokens]
                    assert offset == at
                    data = self.data[at : at + length]
                    at = rounded_up(at + length, 64)
                    assert not any(self.data[offset + length : at])
                    assert xxh3(data) == stored
                    if n == 0:
                        assert raw == stored
                        tables[i, name] = data
                    else:
                        where = found[i, name][:, :, first : first + tokens]
                        blocks[i, name, start + first] = data, where, raw
        assert at == len(self.data) and next(records, None) is None
        # Those of one range of tokens follow each other, layer after layer.
        for (i, name, position), (data, where, raw) in sorted(blocks.items(), key=self.order):
            part = self.layers[i]["parts"][name]
            context = i, name, position, dtypes.get(part["dtype"])
            where[...] = self.block(data, tables[i, name], where.shape, found[i, name], context)
            assert xxh3(np.ascontiguousarray(where).tobytes()) == raw
        return {key: self.in_its_shape(array, *key) for key, array in found.items()}

    def order(self, item):
        (i, name, position), _ = item
        return position, i, list(self.layers[i]["parts"]).index(name)

    def in_its_shape(self, array, i, name):
        axes = self.layers[i]["parts"][name]["axes"]
        lines = "r" if "r" in axes else "t"
        letters = ["b", "h", lines, "d"]
        rest = [letter for letter in letters if letter not in axes]
        array = array.transpose([letters.index(letter) for letter in [*axes, *rest]])
        return array.reshape(array.shape[: len(axes)])

    # --- blocks ------------------------------------------------------------------------------

    def block(self, data, tables, shape, whole, context):
        i, name, position, _ = context
        codec = self.others.get((i, name), self.header)["codec"]
        grid = self.grids.get((i, name))
        if grid is None:
            return self.by(codec, data, tables, shape, context)
        first = self.layers[i]["cumulative_length"] - whole.shape[2]
        return self.on_grid(grid, codec, data, tables, shape, position - first, context)

    def by(self, codec, data, tables, shape, context):
        """A block's numbers, by a codec with its settings."""
        form, size = context[3], int(np.prod(shape)) * context[3].itemsize
        kind = codec["id"]
        if kind in ("raw", "zstd", "lz4"):
            if kind == "zstd":
                data = zstandard.ZstdDecompressor().decompress(data, max_output_size=size)
            if kind == "lz4":
                data = lz4.block.decompress(data, uncompressed_size=size)
            assert len(data) == size
            return np.frombuffer(data, form.uint).reshape(shape)
        if kind == "planes":
            return self.planes(codec, data, shape, form)
        if kind == "channel":
            return self.channel(data, tables, shape, context)
        assert kind == "predictive"
        return self.predictive(data, shape, context)

    def planes(self, codec, data, shape, form):
        numbers, width = int(np.prod(shape)), form.itemsize
        by_bit = codec["mode"] == "bit"
        count, size = (8 * width, -(-numbers // 8)) if by_bit else (width, numbers)
        at, planes = 5 * count, []
        for i in range(count):
            kind, length = struct.unpack_from("<BI", data, 5 * i)
            piece = data[at : at + length]
            at += length
            if kind == 1 and codec["coder"] == "zstd":
                piece = zstandard.ZstdDecompressor().decompress(piece, max_output_size=size)
            elif kind == 1:
                piece = lz4.block.decompress(piece, uncompressed_size=size)
            assert kind in (0, 1) and len(piece) == size
            plane = np.frombuffer(piece, np.uint8)
            planes.append(np.unpackbits(plane, bitorder="little")[:numbers] if by_bit else plane)
        assert at == len(data)
        flat = np.zeros(numbers, np.uint64)
        for plane in planes:  # the most significant first
            flat = flat << np.uint64(1 if by_bit else 8) | plane
        flat = flat.astype(form.uint)
        batch, heads, tokens, dim = shape
        if codec["order"] == "token":
            return flat.reshape(shape)
        return flat.reshape(batch, heads, dim, tokens).swapaxes(2, 3)

    def frequencies(self, layer):
        """What the file notes of the layer's RoPE: frequencies, and what scales cosine and sine."""
        rope = self.header["origin"]["rope"][self.layers[layer]["rope"]]
        return rope["inv_freq"], rope.get("attention_scaling", 1.0)

    def channel(self, data, tables, shape, context):
        i, name, position, form = context
        channels = None
        if len(tables) and tables != b"\3":
            channels = channel_reference.tables(tables, shape[1], shape[3], form)
        elif data[0]:
            channels = self.profile.tables(i, name, tables == b"\3", shape[1], shape[3], form)
        if data[0] == 3:
            frequencies = self.frequencies(i)
            return channel_reference.decode_keys(
                data, channels, shape, form, position, *frequencies
            )
        return channel_reference.decode(data, channels, shape, form)

    def predictive(self, data, shape, context):
        i, name, position, form = context
        part = "kv".index(name)
        if i == part == 0:
            ids = self.ids
            if ids is not None:
                ids = np.atleast_2d(ids)[:, position : position + shape[2]]
            self.chains[position] = Chain(
                self.profile.tensors, self.profile.description, shape[0], shape[2], position,
                form, ids,
            )  # fmt: skip
        chain, kind = self.chains[position], data[0]
        if kind in (0, 2):
            assert not any(data[1:16])
            body = data[16:]
            if kind == 0:
                found = np.frombuffer(body, form.uint).reshape(shape)
            else:
                (length,) = struct.unpack_from("<I", body)
                after = 16 + rounded_up(length, 16)
                found = self.channel(body[after:], body[16 : 16 + length], shape, context)
            high = (found >> 16).astype(np.uint16) if form.bits == 32 else found
            chain.model(i, part, high)
            return found
        low = b""
        if form.bits == 32:
            size = 2 * int(np.prod(shape))
            low, data = data[16 : 16 + size], data[:16] + data[16 + rounded_up(size, 16) :]
        angles = None
        if kind == 4:
            (frequencies, scale), wide = self.frequencies(i), data[2] in (3, 6)
            each = [
                [channel_reference.angles(p, f, scale, wide) for f in frequencies]
                for p in range(position, position + shape[2])
            ]
            angles = np.array(each, np.float32).transpose(0, 2, 1)
        found = chain.decode(i, part, data, angles)
        if low:
            low = np.frombuffer(low, "<u2").reshape(shape)
            found = found.astype(np.uint32) << np.uint32(16) | low
        return found

    # --- grids -------------------------------------------------------------------------------

    def on_grid(self, entry, codec, data, tables, shape, begin, context):
        """A block of a part on a grid; `begin`: its first token, counted from the part's first."""
        grid, form = entry["grid"], context[3]
        (length,) = struct.unpack_from("<Q", tables)
        if length == 2**64 - 1:
            return self.by(codec, data, tables[8:], shape, context)
        if data[0] == 0:
            return np.frombuffer(data[1:], form.uint).reshape(shape)
        kind, scale, *lengths, count = struct.unpack_from("<BB4Q", data)
        assert kind == 1
        pieces, at = [], 34
        for size in lengths:
            pieces.append(data[at : at + size])
            at += size
        batch, heads, tokens, dim = shape
        start, stop = grid["channels"]
        height, width = grid["group"]
        inside = batch, heads, tokens, stop - start
        narrow = "uint8" if grid["narrow"] in ("fp4_e2m1", "int4") else grid["narrow"]
        stored = *context[:3], dtypes.get(narrow)
        codes = self.by(entry["codec"], pieces[0], tables[8 : 8 + length], inside, stored)
        out = np.zeros(shape, form.uint)
        if scale == 0:
            assert grid["narrow"] == "bf16"  # which the golden files have
            wide = codes.astype(np.uint32) << 16
        else:
            kept = dtypes.get([None, "e8m0", "bf16", "fp32"][scale])
            groups = -(-(begin + tokens) // height) - begin // height
            of = batch, heads, groups, -(-(stop - start) // width)
            settings = {"id": "planes", "mode": "byte", "order": "channel", "coder": "zstd"}
            scales = self.by(settings, pieces[1], b"", of, (*context[:3], kept))
            skipped = begin % height
            padded = np.zeros((batch, heads, skipped + tokens, stop - start), np.uint8)
            padded[:, :, skipped:] = codes
            numbers = {
                "e8m0": lambda x: np.ldexp(1.0, x.astype(int) - 127),
                "bf16": lambda x: (x.astype(np.uint32) << 16).view(np.float32).astype(float),
                "fp32": lambda x: np.ascontiguousarray(x).view(np.float32).astype(float),
            }[kept.name](scales)
            wide = widened(
                padded, grid["narrow"], numbers, (height, width), grid["wide"], grid["rounding"]
            )[:, :, skipped:]
        wide = np.ascontiguousarray(wide)
        places = struct.unpack_from(f"<{count}I", data, at)
        bits = np.frombuffer(data[at + 4 * count :], form.uint)
        assert len(bits) == count
        turned = np.ascontiguousarray(wide.transpose(2, 0, 1, 3))
        turned.reshape(-1)[list(places)] = bits
        out[..., start:stop] = turned.transpose(1, 2, 0, 3)
        beside = np.r_[0:start, stop:dim]
        if len(beside):
            of = batch, heads, tokens, len(beside)
            out[..., beside] = self.by(codec, pieces[2], tables[8 + length :], of, context)
        return out


def page(data, profile):
    """A page's keys and values, layer after layer."""
    magic, version, zero, first, layers, tokens, zeros, made_with, stated = struct.unpack_from(
        "<4sHHIIII8sQ", data
    )
    assert (magic, version, zero, zeros) == (b"KVZP", 1, 0, 0)
    assert made_with == bytes.fromhex(profile.id)[:8]
    known, about = Profile(profile), profile.description["channel"]
    form = dtypes.get(about["dtype"])
    end = 40 + 8 * layers
    lengths = struct.unpack_from(f"<{2 * layers}I", data, 40)
    at, digests, found = rounded_up(end, 16), [], []
    assert not any(data[end:at])
    for n, length in enumerate(lengths):
        i, name = first + n // 2, "kv"[n % 2]
        heads, dim = about["layers"][i][name]
        channels = known.tables(i, name, False, heads, dim, form)
        block = data[at : at + length]
        array = channel_reference.decode(block, channels, (1, heads, tokens, dim), form)[0]
        digests.append(xxh3(np.ascontiguousarray(array).tobytes()))
        found.append(array)
        after = rounded_up(at + length, 16)
        assert not any(data[at + length : after])
        at = after
    assert at == len(data)
    assert xxh3(data[:32], data[40:end], struct.pack(f"<{len(digests)}Q", *digests)) == stated
    return found


def unsealed(data, secret, place=""):
    """The bytes in a sealed file."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    assert data[:8] == b"\x89KVS\r\n\x1a\n" and data[8:16] == bytes([1, 0, 0, 0, 0, 0, 0, 0])
    assert xxh3(data[:120]) == struct.unpack_from("<Q", data, 120)[0]
    info = b"kvzip sealed file\0" + data[:16] + data[80:120] + place.encode()
    made = HKDF(SHA256(), 64, data[16:48], info).derive(secret)
    assert made[32:] == data[48:80]
    cipher, out = AESGCM(made[:32]), []
    chunks = [data[i : i + 65552] for i in range(128, len(data), 65552)]
    for i, chunk in enumerate(chunks):
        nonce = struct.pack(">IQ", i == len(chunks) - 1, i)
        out.append(cipher.decrypt(nonce, chunk, None))
    return b"".join(out)
