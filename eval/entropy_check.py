"""Holds code lengths and files to account: the same numbers, coded by constriction, another coder,
under the same models.

What an entropy coder can do, given a model, is known; whether ours does it, and whether figures of
the ladder are code lengths at all, a coder of somebody else's tells. It gets the ladder's table
for each channel, and a file's tables or the predicted densities that the file itself was coded
with, quantised as there. The densities come from `kvzip.entropy.integer_model`, and not from the
native code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvzip import api, dtypes
from kvzip.codec import get_codec
from kvzip.codecs import _native
from kvzip.codecs.channel import blocks as channel_blocks
from kvzip.codecs.channel.rotation import coded_at
from kvzip.codecs.common.rotation import ROUNDINGS, is_wide
from kvzip.codecs.predictive import codec as predictive
from kvzip.container import Reader
from kvzip.dtypes import DType
from kvzip.entropy.integer_model import (
    CDF,
    ESCAPE,
    HALF,
    Density,
    IntegerModel,
    Ints,
    Known,
    Rotation,
    angles,
)
from kvzip.entropy.profiled import ESCAPED_BITS, table_frequencies
from kvzip.entropy.residual import held_layers
from kvzip.entropy.tables import LEVELS, Frequencies, counted_mantissas
from kvzip.errors import KVZipError, UsageError
from kvzip.eval.results.entropy import CheckRow
from kvzip.layout import KV
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.statistics.rope import frequencies

Progress = Callable[[str, int, int], None]
Key = tuple[int, str]

MOST = 0.001
"""The share by which ours may take more than constriction's."""
_CODED = {
    "channel": (channel_blocks.CODED, channel_blocks.UNTURNED),
    "predictive": (predictive.CODED, predictive.UNTURNED),
}
"""The first bytes of blocks that the codec has coded."""
BEFORE_ROPE = "channel:keys=before_rope"
_CONSTANT = 0xFFFFFFFF


def check_installed() -> None:
    """Raise UsageError, which says what to install, where the other coder is missing."""
    if find_spec("constriction") is None:
        raise UsageError("--check needs the coder constriction: pip install 'kvzip[bench]'")


def check(
    paths: Sequence[Path], profile: Profile | None = None, progress: Progress | None = None
) -> list[CheckRow]:
    """The rows of all snapshots: the ladder's tables by channel, a file by `channel`, and, with a
    profile, one by its codec; by `channel` another one of keys before RoPE, where it stores any so.
    `progress`: as of :func:`kvzip.entropy.measure`.

    Raises UsageError without constriction or for layers that hold unequal tokens, with a profile
    that predicts; KVZipError if constriction does not give back what it got.
    """
    check_installed()
    rows = []
    for path in paths:
        snapshot, file = Snapshot.load(path), str(path)
        ways = _ways(snapshot, profile)
        tell = _Told(progress, snapshot, 1 + len(ways), len(paths))
        rows.append(_by_channel(file, snapshot, tell))
        rows += [_of_file(file, snapshot, *way, tell) for way in ways]
    return rows


def _ways(snapshot: Snapshot, profile: Profile | None) -> list[tuple[str, Profile | None]]:
    """The codecs of the files that are looked at, with their profiles."""
    channel = ["channel:keys=cached"]
    blob = api.encode(snapshot, BEFORE_ROPE)
    if any(part.before_rope for part in api.info(blob).parts):
        channel.append(BEFORE_ROPE)
    ways: list[tuple[str, Profile | None]] = [(codec, None) for codec in channel]
    if profile is not None:
        codecs = channel if profile.codec == "channel" else [profile.codec]
        ways += [(codec, profile) for codec in codecs]
    return ways


class _Told:
    """Progress over the layers of all models of a snapshot."""

    def __init__(self, progress: Progress | None, snapshot: Snapshot, models: int, files: int):
        self._progress, self._done = progress, 0
        self._total = models * len(snapshot.layers)
        self._what = "coded by constriction" + (f", {snapshot.origin.text}" if files > 1 else "")

    def layer(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._what, self._done, self._total)


# --- the other coder ---------------------------------------------------------------------------


@dataclass
class _Symbols:
    """Symbols and what their model says of them: probabilities that all share, [symbols], or each
    symbol's own, [count, symbols]."""

    values: NDArray[np.int32]
    shares: NDArray[np.float64]

    def bits(self) -> float:
        """The ideal code length."""
        if self.shares.ndim == 1:
            return -float(np.log2(self.shares[self.values]).sum())
        return -float(np.log2(self.shares[np.arange(len(self.values)), self.values]).sum())


def _coded_bits(pieces: Sequence[_Symbols]) -> float:
    """Bits that constriction takes for all of them, one after the other on one stack. Raises
    KVZipError if it does not give back what it got."""
    import constriction

    family = constriction.stream.model.Categorical(perfect=False)
    coder = constriction.stream.stack.AnsCoder()

    def models(piece: _Symbols) -> tuple[Any, ...]:
        if piece.shares.ndim == 1:
            return (constriction.stream.model.Categorical(piece.shares, perfect=False),)
        return family, piece.shares

    pieces = [piece for piece in pieces if len(piece.values) and piece.shares.shape[-1] > 1]
    for piece in pieces:
        coder.encode_reverse(piece.values, *models(piece))
    bits = float(coder.num_bits())
    for piece in reversed(pieces):
        given = models(piece)
        more = (len(piece.values),) if len(given) == 1 else ()
        if not np.array_equal(coder.decode(*given, *more), piece.values):
            raise KVZipError("constriction did not give back what it was given")
    return bits


def _categorical(values: Ints, counts: NDArray[Any]) -> _Symbols:
    """Values with a table of how often each occurs, by its number; none that occurs is missing."""
    there = np.nonzero(counts)[0]
    place = np.zeros(len(counts), np.int32)
    place[there] = np.arange(len(there))
    return _Symbols(place[values], counts[there] / counts.sum())


# --- the ladder's tables -----------------------------------------------------------------------


def _by_channel(file: str, snapshot: Snapshot, tell: _Told) -> CheckRow:
    """The ladder's rung: a table for each channel, which knows how often each value occurs there
    and is not counted; of mantissas one table for all parts of a name and format."""
    frequencies, layers = Frequencies(), held_layers(snapshot)
    frequencies.add(layers)
    lengths = frequencies.code_lengths()[LEVELS[-1]]
    fine: dict[tuple[str, DType], Any] = {}
    for key, counts in frequencies.mantissas.items():
        kind = key[1], frequencies.forms[key]
        fine[kind] = fine.get(kind, 0) + counts
    ideal = coded = 0.0
    numbers = 0
    for i, layer in enumerate(layers):
        for name, part in layer.layout.parts.items():
            block = layer.block(name)
            ideal += float(lengths[i, name].sum()) * block.shape[0] * block.shape[2]
            pieces, unseen = _table_symbols(block, part.form, fine[name, part.form])
            coded += _coded_bits(pieces) + unseen * block.size
            numbers += block.size
        tell.layer()
    return CheckRow(file, LEVELS[-1], "", numbers, ideal, coded, ideal, 0)


def _table_symbols(
    block: NDArray[Any], form: DType, fine: NDArray[Any]
) -> tuple[list[_Symbols], int]:
    """A part's values channel by channel, and its mantissas, whose table is given; and the bits of
    each number that no table has."""
    if form.bits == 8:
        values, pieces, unseen = block.astype(np.int64), [], 0
    else:
        values = dtypes.sign_exponent(block, form.name).astype(np.int64)
        mantissas, unseen = counted_mantissas(block, form.name)
        pieces = [_categorical(mantissas, fine)]
    for h, d in np.ndindex(block.shape[1], block.shape[3]):
        own = values[:, h, :, d].reshape(-1)
        pieces.append(_categorical(own, np.bincount(own)))
    return pieces, unseen


# --- files -------------------------------------------------------------------------------------


def _of_file(
    file: str, snapshot: Snapshot, codec: str, profile: Profile | None, tell: _Told
) -> CheckRow:
    """A whole file beside one whose blocks constriction has coded, all else being the same: header,
    ids, index, tables, and blocks that are stored in another way."""
    blob = api.encode(snapshot, codec, profile)
    with api.open(blob, profile) as reader:
        blocks = _File(reader, snapshot)
        if reader.codec.codec_id == "predictive":
            found = _predicted(blocks, profile, tell)
        else:
            found = _in_channels(blocks, tell)
        ideal = coded = 0.0
        ours = numbers = 0
        for own_bits, their_bits, length, count in found:
            ideal, coded = ideal + own_bits, coded + their_bits
            ours, numbers = ours + 8 * length, numbers + count
    rest = 8.0 * len(blob) - ours
    total = snapshot.layout.numbers
    name = get_codec(codec).codec_id
    with_profile = name + (" with the profile's tables" if name == "channel" and profile else "")
    if codec == BEFORE_ROPE:
        with_profile += ", keys before RoPE"
    return CheckRow(
        file,
        with_profile,
        "" if profile is None else profile.id,
        total,
        ideal + rest,
        coded + rest,
        8.0 * len(blob),
        total - numbers,
    )


_Part = tuple[float, float, int, int]
"""Of some blocks: the ideal bits, constriction's, bytes as stored, numbers."""


class _File:
    """A file's blocks beside the numbers that they hold."""

    def __init__(self, reader: Reader, snapshot: Snapshot):
        self.reader, self.snapshot = reader, snapshot
        self.blocks, self.index = reader._blocks, reader.index

    def coded(self, key: Key, codec_id: str) -> Iterator[tuple[int, NDArray[Any]]]:
        """The rows of a part's blocks that the codec has coded, and their numbers."""
        layer, name = key
        if self.blocks.codecs[key].codec_id != codec_id or key in self.blocks.codecs.grids:
            return
        first = self.reader.layout.layers[layer].span(name)[0]
        whole = self.snapshot.layers[layer].block(name)
        for row in self.index.rows[key][1:]:
            if self.index.length[row] and self.blocks.stored(row)[0] in _CODED[codec_id]:
                at = self.index.position[row] - first
                yield row, whole[:, :, at : at + self.index.tokens[row]]


def _in_channels(file: _File, tell: _Told) -> Iterator[_Part]:
    """Blocks of `channel`, under the tables that their parts have."""
    done = 0
    for key in file.index.rows:
        while done < key[0]:
            tell.layer()
            done += 1
        rows = list(file.coded(key, "channel"))
        if not rows:
            continue
        _, tables = file.blocks.tables(key)
        form = file.blocks.part(key).form
        frequencies, channels = table_frequencies(tables, form), np.asarray(tables.channels())
        for row, block in rows:
            stored, beside = file.blocks.stored(row), 0
            if stored[0] == channel_blocks.UNTURNED:
                beside = coded_at(stored)  # its head and exceptions stand there with either coder
                block = _decoded(stored[beside:], tables, block)
            pieces, more = _channel_symbols(block, form, frequencies, channels)
            more += 8 * beside
            ideal = sum(piece.bits() for piece in pieces) + more
            coded = _coded_bits(pieces) + more
            yield ideal, coded, file.index.length[row], block.size
    for _ in range(done, len(file.snapshot.layers)):
        tell.layer()


def _decoded(data: memoryview, tables: Any, like: NDArray[Any]) -> NDArray[Any]:
    """The numbers of a block of `channel` as its tables code them: of keys before RoPE these."""
    found = np.empty(like.shape, like.dtype)
    decoding = _native.ChannelDecoding(1)
    try:
        decoding.add(tables, data, found)
        decoding.finish()
    finally:
        decoding.stop()
    return found


def _channel_symbols(
    block: NDArray[Any],
    form: DType,
    frequencies: Sequence[NDArray[np.int64]],
    channels: NDArray[Any],
) -> tuple[list[_Symbols], int]:
    """A block's symbols channel by channel; and the bits of what is stored as it is: mantissas, and
    values that escaped."""
    values = dtypes.sign_exponent(block, form.name).astype(np.int64)
    found, bits = [], 0
    dim = block.shape[3]
    for c, (shape, base) in enumerate(channels.tolist()):
        if shape == _CONSTANT:
            continue
        own, table = values[:, c // dim, :, c % dim].reshape(-1), frequencies[shape]
        relative = (own - base) % (len(table) - 1)
        escaped = table[relative] == 0
        found.append(_categorical(np.where(escaped, len(table) - 1, relative), table))
        bits += len(own) * form.mantissa_bits + int(escaped.sum()) * ESCAPED_BITS
    return found, bits


def _predicted(file: _File, profile: Any, tell: _Told) -> Iterator[_Part]:
    """Blocks of `predictive`, under the densities that are predicted for their numbers."""
    snapshot = file.snapshot
    layers = snapshot.layout.layers
    if len({(layer.first, layer.stored) for layer in layers}) > 1:
        raise UsageError("--check with a profile needs layers that all hold the same tokens")
    form, rows = dtypes.get(snapshot.dtype), layers[0].batch or 1
    model = IntegerModel(
        profile.tensors,
        profile.description,
        rows,
        layers[0].stored,
        layers[0].first,
        form,
        snapshot.token_ids,
    )
    low = 16 if form.bits == 32 else 0
    for i, layer in enumerate(snapshot.layers):
        for p, name in enumerate(KV):
            whole = layer.block(name)
            upper = (whole >> np.uint32(16)).astype(np.uint16) if low else whole
            first = layers[i].span(name)[0]
            tokens = np.arange(rows)[:, None] * layers[0].stored
            coded, rounding = [], np.zeros(model.total, np.uint8)
            for row, block in file.coded((i, name), "predictive"):
                at = file.index.position[row] - first
                chosen = (tokens + np.arange(at, at + block.shape[2])).reshape(-1)
                head = file.blocks.stored(row)[:3]
                rounding[chosen] = head[2] if head[0] == predictive.UNTURNED else 0
                coded.append((row, block, chosen))
            rotation = _rotation(snapshot, i, model, rounding)
            intervals = _intervals(model, i, p, upper, rotation)
            for row, block, chosen in coded:
                own = intervals[:, chosen].reshape(-1, 3)
                piece = _interval_symbols(own, model.grid.bits_each)
                more = low * block.size
                yield (
                    piece.bits() + more,
                    _coded_bits([piece]) + more,
                    file.index.length[row],
                    block.size,
                )
        tell.layer()


def _rotation(
    snapshot: Snapshot, layer: int, model: IntegerModel, rounding: NDArray[np.uint8]
) -> Rotation | None:
    """What turned a layer's keys, where pairs of some of its tokens may be coded as before."""
    held = snapshot.layout.layers[layer]
    if not rounding.any() or held.rope is None:
        return None
    parameters = snapshot.origin.rope[held.rope]
    radians = frequencies(parameters, held.part("k").size("d")).astype(np.float32)
    position = np.arange(held.first, held.first + held.stored)
    scale = float(parameters.get("attention_scaling", 1.0))
    found, wide = (angles(radians, position, scale, wide) for wide in (False, True))
    # Blocks may differ in how they round; all rows of the batch are in each.
    of_float32 = np.isin(rounding[: held.stored], [r for r in ROUNDINGS if is_wide(r)])
    return Rotation(np.where(of_float32[:, None, None], wide, found), rounding, model.total)


def _intervals(
    model: IntegerModel, layer: int, part: int, block: NDArray[Any], rotation: Rotation | None
) -> Ints:
    """Where the intervals of a part's numbers begin, how big they are, 0 for escapes, and which
    numbers these are: [channels, tokens, 3]."""
    if part == 0:
        model.begin(layer)
    numbers = Known(model.grid, model.flat(block))
    found = np.zeros((numbers.bits.shape[1], model.total, 3), np.int64)

    def code(tile: int, lane: int, channel: int, density: Density) -> Ints:
        tokens = model.tiles[tile]
        k = numbers.places(tokens, channel, density)
        start = density.below(k)
        size = np.where(density.escaped, 0, density.below(k + 1) - start)
        found[channel, tokens] = np.stack([start, size, k], axis=1)
        return k

    model.run(layer, part, code, rotation)
    return found


def _interval_symbols(each: Ints, bits_each: int) -> _Symbols:
    """Numbers in intervals as symbols of three: what lies under it, the number, what lies above. An
    escape is a number, and after it comes the one that escaped, all being alike."""
    escaped = each[:, 1] == 0
    spare = (CDF.bit_length() - 1) - bits_each
    start = np.where(escaped, 2 * HALF, each[:, 0])
    size = np.where(escaped, ESCAPE, each[:, 1])
    start = np.concatenate([start, each[escaped, 2] << spare])
    size = np.concatenate([size, np.full(int(escaped.sum()), 1 << spare)])
    shares = np.stack([start, size, CDF - start - size], axis=1) / CDF
    return _Symbols(np.ones(len(start), np.int32), shares)
