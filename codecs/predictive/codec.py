"""Predicts every number from the layers and channels before it, and codes what is left.

Integer arithmetic throughout, so that a file written on one machine decodes on every other.
spec.md has the method; fit.py learns the profile.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec import structs
from numpy.typing import NDArray

from kvzip import dtypes
from kvzip.codec import Codec, Context
from kvzip.codecs import _native
from kvzip.codecs.channel.codec import ChannelCodec
from kvzip.codecs.common.rotation import ROUNDINGS, is_wide
from kvzip.codecs.predictive.rotation import Rotations, pairs_of
from kvzip.dtypes import Bits, DType
from kvzip.errors import CorruptError, ProfileError, UnsupportedError
from kvzip.layout import KV, PartLayout
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.version import newer

RAW, CHANNEL, CODED, UNTURNED = 0, 2, 3, 4
"""The first byte of a block: numbers as they are, what `channel` codes, what is predicted, and what
is so with some pairs as they were before RoPE."""
_KINDS = frozenset((RAW, CHANNEL, CODED, UNTURNED))
HEADER = 16
"""Bytes that a block begins with."""
_RAW_HEAD, _CHANNEL_HEAD = (bytes([kind]) + bytes(HEADER - 1) for kind in (RAW, CHANNEL))
_TABLES = struct.Struct("<16sI12x")
_LAYER_TENSORS = (
    "order",
    "step",
    "unit",
    "mean",
    "input_scale",
    "bias",
    "weight",
    "weight_scale",
    "within",
    "within_scale",
    "density",
    "inverse",
    "pair_inverse",
    "pair_slope",
)
_FORMATS = ("bf16", "fp16", "fp32", "fp8_e4m3fn", "fp8_e5m2")
MOST_TOKENS = 1 << 30
"""The most tokens of a token range, in all its rows, that is predicted (kernels.hpp)."""
# A block counts the words of its streams, and numbers cost little but never nothing.
_MAX_EXPANSION = 1 << 16


@dataclass
class _Range:
    """A token range whose layers are coded one after the other."""

    chain: _native.PredictiveChain | None
    """None when a part did not follow the one before it: no more can be predicted."""
    tokens: tuple[int, int]
    next_part: int = 0
    """The number of the part that comes next; each layer has two."""
    rotations: Rotations = field(default_factory=Rotations)


def check_known(header: bytes) -> None:
    """Raise UnsupportedError if a block begins as only a later version's do."""
    if header and header[0] not in _KINDS:
        raise UnsupportedError(newer(f"a block of kind {header[0]} of predictive"))
    if len(header) > 2 and header[0] == UNTURNED and header[2] not in ROUNDINGS:
        raise UnsupportedError(newer(f"pairs before RoPE of rounding {header[2]}"))


class PredictiveCodec(Codec):
    """Cross-layer and within-layer prediction with a profile, and rANS over a density.

    Layers decode in their order, tokens independently of each other. A block that `channel` codes
    in fewer bytes, or that cannot be predicted since the file lacks its tokens in an earlier layer,
    is coded by `channel`.
    """

    codec_id = "predictive"
    needs_profile = True
    # Half of what is usual: only other tokens are other work, since layers need each other.
    block_bytes = 1 << 19
    fallback = "channel"

    def takes(self, part: PartLayout, kind: str, name: str) -> bool:
        # `channel` must take it, too, since it stores blocks that it stores better.
        return (
            part.form.name in _FORMATS
            and kind in ("full", "sliding")
            and name in KV
            and ChannelCodec().takes(part, kind, name)
        )

    @classmethod
    def fit(
        cls,
        snapshots: Sequence[Any],
        progress: Callable[[str, int, int], None] | None = None,
        **settings: Any,
    ) -> Profile:
        from kvzip.codecs.predictive.fit import fit  # which needs what encoding does not
        from kvzip.codecs.predictive.fit_settings import checked

        return fit(snapshots, progress, **checked(settings))

    def needs(self, layer: int, part: str) -> tuple[tuple[int, str], ...]:
        if part == "v":
            return ((layer, "k"),)
        return ((layer - 1, "v"),) if layer else ()

    def encode(self, block: Bits, context: Context) -> bytes:
        return self.encode_chain([(block, context)])[0]

    def encode_chain(self, blocks: Sequence[tuple[Bits, Context]]) -> list[bytes]:
        scratch = blocks[0][1].scratch
        begins, unpredicted = "predictive" not in scratch, set[int]()
        while True:
            found = self._coded(blocks, unpredicted)
            # Some bytes are known when all is coded, such as the states in front.
            longer = {
                n
                for n, (data, (block, _)) in enumerate(zip(found, blocks, strict=True))
                if len(data) > self.max_encoded_size(block.nbytes)
            }
            if not longer or not begins:
                return found
            unpredicted |= longer
            del scratch["predictive"]

    def _coded(
        self, blocks: Sequence[tuple[Bits, Context]], unpredicted: Container[int]
    ) -> list[bytes]:
        """Blocks as they are stored, none of those `unpredicted` by a prediction. Which way one is
        coded is settled from the first to the last, by what a code would take at least; words then
        come from the last to the first."""
        found: list[bytes | None] = []
        chain = None
        for n, (block, context) in enumerate(blocks):
            following = _next_chain(context, block.shape)
            if following is None:
                found.append(_plain(block, context))
                continue
            chain = following
            high, low = _split(block)
            part = KV.index(context.part)
            try:
                rotation, rounding = _rotations(context).found(
                    chain, high, context, pairs_of(context.profile.tensors, context.layer)
                )
                bits = chain.model(context.layer, part, high, rotation, rounding)
            except ValueError as error:
                raise ProfileError(f"the profile is of another model: {error}") from None
            size = math.inf if n in unpredicted else bits / 8 + low.nbytes + HEADER
            # Mostly it is plain, from the counts alone, that `channel` cannot do as well.
            least = min(ChannelCodec().least_bytes(block, context, size), block.nbytes)
            other = None if size <= least else _plain(block, context)
            if size * _MAX_EXPANSION < block.nbytes or (other is not None and len(other) <= size):
                found.append(_plain(block, context) if other is None else other)
                if rounding:  # a reader knows the keys as they are cached, and no others
                    chain.again()
                    chain.model(context.layer, part, high)
            else:
                chain.keep()
                found.append(None)
        coded = iter([] if chain is None else chain.encode())
        return [
            _with_low(next(coded), _split(block)[1]) if data is None else data
            for data, (block, _) in zip(found, blocks, strict=True)
        ]

    def decode(self, data: memoryview, out: Bits, context: Context) -> None:
        chain = _next_chain(context, out.shape)
        part = KV.index(context.part)
        mode, body = bytes(data[:HEADER]), data[HEADER:]
        check_known(mode)
        kind, rounding = mode[0] if mode else RAW, mode[2] if len(mode) > 2 else 0
        if kind in (CODED, UNTURNED) and chain is not None:
            rotation = None
            if kind == UNTURNED:
                rotation = _rotations(context).of(context, out.shape, is_wide(rounding))
            _decode_coded(chain, context.layer, part, mode, body, out, rotation)
            return
        if mode == _RAW_HEAD and len(body) == out.nbytes:
            out[...] = np.frombuffer(body, out.dtype).reshape(out.shape)
        elif mode == _CHANNEL_HEAD:
            _channel_decode(data, out, context)
        else:
            raise CorruptError("a block that makes no sense, or one that nothing predicts")
        if chain is not None:
            try:  # what follows is predicted from these numbers, too
                chain.model(context.layer, part, _split(out)[0])
            except ValueError as error:
                raise CorruptError(str(error)) from None

    on_device = True

    def decode_on_device(
        self, work: Any, blocks: NDArray[Any], contexts: Mapping[int, Context]
    ) -> None:
        from kvzip.codecs.predictive import gpu

        gpu.decode(work, blocks, contexts)

    def max_encoded_size(self, raw_bytes: int) -> int:
        return raw_bytes + HEADER

    def max_decoded_size(self, encoded_bytes: int, dtype: DType) -> int:
        return encoded_bytes * _MAX_EXPANSION


def _with_low(coded: bytes, low: Bits) -> bytes:
    """A block with the halves of its numbers that are stored as they are, behind its header."""
    return coded[:HEADER] + _padded(low.tobytes()) + coded[HEADER:] if low.size else coded


def _padded(data: bytes) -> bytes:
    """With zeros up to a multiple of 16 bytes."""
    return data + bytes(-len(data) % 16)


def _plain(block: Bits, context: Context) -> bytes:
    """The block as `channel` codes it, tables in front, or as it is."""
    channel = ChannelCodec()
    context = structs.replace(context, scratch={})  # this block's alone
    made = channel.make_tables(block, context)
    tables = channel.load_tables(memoryview(made), block.shape, context)
    coded = channel.encode(block, structs.replace(context, tables=tables))
    data = _TABLES.pack(_CHANNEL_HEAD, len(made)) + _padded(made) + coded
    if len(data) < len(_RAW_HEAD) + block.nbytes and len(data) * _MAX_EXPANSION > block.nbytes:
        return data
    return _RAW_HEAD + block.tobytes()


def _channel_decode(data: memoryview, out: Bits, context: Context) -> None:
    """Fill `out` from what `_plain` made by `channel`. Raises CorruptError."""
    channel = ChannelCodec()
    stored, coded = by_channel(data)
    tables = channel.load_tables(stored, out.shape, context)
    channel.decode(coded, out, structs.replace(context, tables=tables))


def by_channel(data: memoryview) -> tuple[memoryview, memoryview]:
    """The tables in a block that `channel` codes, and what it coded with them. Raises
    CorruptError."""
    if len(data) < _TABLES.size or any(data[HEADER + 4 : _TABLES.size]):
        raise CorruptError("tables that end nowhere")
    size, rest = _TABLES.unpack_from(data)[1], data[_TABLES.size :]
    return rest[:size], rest[section(rest, size) :]


def section(data: memoryview, size: int) -> int:
    """How many bytes a section of `size` bytes takes up, with the zeros behind it. Raises
    CorruptError."""
    after = size + -size % 16
    if len(data) < after or any(data[size:after]):
        raise CorruptError("cut short")
    return after


def _decode_coded(
    chain: _native.PredictiveChain,
    layer: int,
    part: int,
    header: bytes,
    body: memoryview,
    out: Bits,
    rotation: NDArray[np.float32] | None,
) -> None:
    """Fill `out` from the streams of a block that was predicted. Raises CorruptError."""
    wide = out.dtype.itemsize == 4
    target = np.empty(out.shape, np.uint16) if wide else out
    size = 2 * out.size if wide else 0
    after = section(body, size)
    try:
        head, data = np.frombuffer(header, np.uint8), np.frombuffer(body[after:], np.uint8)
        chain.decode(layer, part, head, data, target, rotation)
    except ValueError as error:
        raise CorruptError(str(error)) from None
    if wide:
        low = np.frombuffer(body[:size], "<u2").reshape(out.shape)
        out[...] = target.astype(np.uint32) << np.uint32(16) | low


def _split(block: Bits) -> tuple[Bits, Bits]:
    """The half of each number that is predicted, and the rest, which is noise: of 32 bits 16."""
    if block.dtype.itemsize < 4:
        return block, np.empty(0, np.uint8)
    return (block >> np.uint32(16)).astype(np.uint16), block.astype(np.uint16)


def _next_chain(context: Context, shape: tuple[int, ...]) -> _native.PredictiveChain | None:
    """Find the chain that predicts this block, [rows, heads, tokens, dim], and move its token range
    on to the part that comes next.

    The range is kept in `context.scratch`, where the first part makes it. None where nothing can
    predict the block: without a profile, of more tokens than are predicted together, or when the
    block is not the part that was to come next or has other tokens; then nothing predicts the rest
    of the range either. Raises ProfileError.
    """
    part = 2 * context.layer + KV.index(context.part)
    found = context.scratch.get("predictive")
    if found is None:
        chain = None
        if part == 0 and context.profile is not None and shape[0] * shape[2] <= MOST_TOKENS:
            profile = context.profile
            chain = new_chain(
                native_model(profile),
                profile.tensors,
                shape[0],
                shape[2],
                context.start,
                context.dtype,
                context.token_ids,
            )
        found = context.scratch["predictive"] = _Range(chain, (shape[0], shape[2]))
    if found.next_part != part or found.tokens != (shape[0], shape[2]):
        found.chain = None
    found.next_part = part + 1
    return found.chain


def _rotations(context: Context) -> Rotations:
    found: _Range = context.scratch["predictive"]
    return found.rotations


def check_format(form: DType) -> None:
    """Raise UnsupportedError for a format whose numbers are not predicted."""
    if form.name not in _FORMATS:
        raise UnsupportedError(f"codec 'predictive' takes no {form.name}")


def native_model(profile: Profile) -> _native.PredictiveModel:
    """The compiled form of a profile, made once. Raises ProfileError."""
    if profile.description.get("codec") != "predictive":
        raise ProfileError("the profile is not one for the predictive codec")
    if "predictive" not in profile.made:
        profile.made["predictive"] = build(profile.tensors, profile.description)
    model: _native.PredictiveModel = profile.made["predictive"]
    return model


def new_chain(
    model: _native.PredictiveModel,
    tensors: Mapping[str, NDArray[Any]],
    rows: int,
    count: int,
    start: int,
    form: DType,
    token_ids: NDArray[Any] | None,
) -> _native.PredictiveChain:
    """State for `rows` x `count` tokens from position `start` on, before the first layer. Raises
    UnsupportedError for a format that is not predicted."""
    check_format(form)
    rows_of_tables = entries(tensors, token_ids, rows * count)
    # Of fp32 the upper half is coded, which is a bf16 number.
    mantissa_bits = 7 if form.bits == 32 else form.mantissa_bits
    return _native.PredictiveChain(
        model, rows, count, start, form.exponent_bits, mantissa_bits, rows_of_tables
    )


def entries(
    tensors: Mapping[str, NDArray[Any]], token_ids: NDArray[Any] | None, count: int
) -> NDArray[np.int32]:
    """The row of each of `count` tokens in the layers' tables, or -1."""
    known = tensors.get("token_ids")
    if known is None or token_ids is None or token_ids.size != count:
        return np.full(count, -1, np.int32)
    ids, order = token_ids.reshape(-1), np.argsort(known)
    place = order[np.minimum(np.searchsorted(known, ids, sorter=order), len(known) - 1)]
    return np.where(known[place] == ids, place, -1).astype(np.int32)


def channel_on_device(
    work: Any, blocks: NDArray[Any], found: Mapping[int, tuple[memoryview, Context]]
) -> None:
    """Have blocks decoded on a device that `channel` coded; `found` has their tables and contexts
    by their rows. Raises CorruptError."""
    channel, contexts = ChannelCodec(), {}
    for block in blocks:
        data, context = found[int(block["row"])]
        batch, heads, dim = work.shape(int(block["part"]))
        shape = batch, heads, int(block["tokens"]), dim
        part = block["part"] = work.again(int(block["part"]))
        tables = channel.load_tables(data, shape, context)
        contexts[part] = structs.replace(context, tables=tables)
    channel.decode_on_device(work, blocks, contexts)


def measure(
    model: _native.PredictiveModel,
    tensors: Mapping[str, NDArray[Any]],
    snapshot: Snapshot,
    depth: int | None = None,
) -> Iterator[tuple[int, int, NDArray[np.uint32], float, int]]:
    """What a model spends on a snapshot's keys (part 0) and values (1), for the tokens that every
    layer holds; of the first `depth` layers or of all.

    Gives layer, part, how often each cell of |z| occurs [classes, channels, cells], bits, and how
    many numbers there are. The half of fp32 numbers that is stored as it is does not count.
    """
    form = dtypes.get(snapshot.dtype)
    held = min((layer.layout.stored for layer in snapshot.layers), default=0)
    chain: _native.PredictiveChain | None = None
    rotations, origin = Rotations(), snapshot.origin
    for i, layer in enumerate(snapshot.layers[:depth]):
        for p, part in enumerate(KV):
            block = layer.block(part)
            block = np.ascontiguousarray(_split(block[:, :, block.shape[2] - held :])[0])
            if chain is None:
                ids = snapshot.token_ids
                if ids is not None:
                    ids = np.atleast_2d(ids)[:, ids.shape[-1] - held :]
                start = snapshot.tokens - held
                chain = new_chain(model, tensors, len(block), held, start, form, ids)
            context = Context(form, i, part, start, origin, rope=layer.layout.rope)
            rotation = rotations.found(chain, block, context, pairs_of(tensors, i))
            counts, bits = chain.measure(i, p, block, *rotation)
            yield i, p, counts, bits, block.size


def build(
    tensors: Mapping[str, NDArray[Any]], description: Mapping[str, Any]
) -> _native.PredictiveModel:
    """The native model of a profile. Raises ProfileError when the profile makes no sense."""
    try:
        _check_ids(tensors.get("token_ids"))
        model = _native.PredictiveModel(tensors["densities"], tensors["sine"])
        for i, layer in enumerate(description["layers"]):
            table = tensors.get(f"{i}.table")
            wide = table is not None and table.dtype == np.int16
            model.add_layer(
                layer["inputs"],
                layer["k"],
                layer["v"],
                description["group"],
                description["lanes"],
                **{name: tensors[f"{i}.{name}"] for name in _LAYER_TENSORS},
                centre=tensors.get(f"{i}.centre"),
                centre_bias=tensors.get(f"{i}.centre_bias"),
                table16=table if wide else None,
                table8=None if wide else table,
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"the profile makes no sense: {error}") from None
    return model


def _check_ids(ids: NDArray[Any] | None) -> None:
    """Raise ValueError unless the tokens that tables know are as spec.md says: of an id that is
    there twice, machines would find one place or the other."""
    if ids is not None and (ids.ndim != 1 or not ids.size or len(np.unique(ids)) < len(ids)):
        raise ValueError(f"token_ids, {list(ids.shape)}, are no list of ids, each there once")
