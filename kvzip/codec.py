"""What a codec is, and how codecs are found by name.

A codec turns one block into bytes and back. A block is one part of a layer (keys, values) for a
range of tokens: an integer array of raw bits, shape [batch, heads, tokens, dim]; of a part that has
no tokens, such as a state, it is all of it, with rows in the place of tokens. The shape of this
interface follows numcodecs (`codec_id`, `get_config`, `from_config`, `encode`, `decode`), with a
context beside the data, because keys and values have layers and tokens and can be predicted.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar

import msgspec
from numpy.typing import NDArray

from kvzip import checksum
from kvzip.codec_spec import format_spec, parse_spec
from kvzip.dtypes import Bits, DType
from kvzip.errors import UnsupportedError, UsageError, first_line
from kvzip.layout import Origin, PartLayout
from kvzip.options import json_value, text

GROUP = "kvzip.codecs"
"""Entry-point group under which a distribution offers codecs: name = "module:CodecClass"."""


# A file has many of these: a dataclass would take as long to make as a small block to decode, and
# the collector need not look at them, which no codec puts into what they hold.
class Context(msgspec.Struct, frozen=True, gc=False):
    """What writer and reader both know of a block besides its bytes."""

    dtype: DType
    layer: int
    part: str
    start: int
    """Position in the sequence of the block's first token; 0 of a part without tokens."""
    origin: Origin
    token_ids: NDArray[Any] | None = None
    """Ids of the block's tokens, uint32 [batch, tokens]; None when the file has none, and for parts
    without tokens of the sequence."""
    profile: Any = None
    rope: int | None = None
    """Which of the origin's RoPE parameters turned the layer's keys; None where none did."""
    tables: Any = None
    """What :meth:`Codec.load_tables` made of this layer and part's tables, or None."""
    earlier: Mapping[tuple[int, str], Bits] = {}
    """The same tokens of the blocks that :meth:`Codec.needs` names, as far as the file holds them,
    shaped as blocks are."""
    scratch: dict[str, Any] = {}
    """What a codec keeps for itself from block to block of the same tokens, layer after layer; when
    it writes blocks that need no other, from a part's tables to its blocks."""


class Coded(msgspec.Struct, gc=False):
    """A block as it is stored, and where its numbers go: [batch, heads, tokens, dim], any
    strides."""

    data: memoryview
    out: Bits
    context: Context


class Codec(ABC):
    """Base of all codecs. A codec holds its settings and no state: one object serves all threads.

    Settings are the keyword arguments of ``__init__``, kept as attributes of the same names.
    """

    codec_id: ClassVar[str]
    block_bytes: ClassVar[int] = 1 << 20
    """Raw bytes of a block that suit the codec: enough to spread what a block starts with, and few
    enough that a document has work for several threads."""
    fallback: ClassVar[str | None] = "planes"
    """The codec that stores the parts that this one does not take; None: it takes every part."""

    def takes(self, part: PartLayout, kind: str, name: str) -> bool:
        """Whether the codec stores a layer's part of this format and shape, with any number of
        tokens.

        `kind`: of the layer: "full", "sliding", "latent", "state" or "cross". `name`: of the part,
        such as "k". What it does not take, `fallback` stores. Default: numbers of up to 32 bits.
        """
        return part.form.itemsize <= 4 and part.form.kind != "bytes"

    # --- settings --------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """The settings as JSON values, with the codec's name under "id"."""
        return {"id": self.codec_id} | {n: getattr(self, n) for n in _settings(type(self))}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Codec:
        """A codec with these settings. Raises UnsupportedError for a setting it does not have."""
        settings = {k: v for k, v in config.items() if k != "id"}
        if not settings:
            return cls()
        known = _settings(cls)
        if unknown := sorted(set(settings) - set(known)):
            raise UnsupportedError(
                f"codec {cls.codec_id!r} has no setting {unknown[0]!r}; it has: "
                + (", ".join(known) or "none")
            )
        return cls(**settings)

    @property
    def spec(self) -> str:
        """The name, and the settings that are not the defaults, as :func:`get_codec` reads them."""
        config, default = self.get_config(), type(self)().get_config()
        return format_spec({k: v for k, v in config.items() if k == "id" or v != default.get(k)})

    def __repr__(self) -> str:
        settings = (f"{k}={v!r}" for k, v in self.get_config().items() if k != "id")
        return f"{type(self).__name__}({', '.join(settings)})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash(repr(self))

    # --- blocks ----------------------------------------------------------------------------

    @abstractmethod
    def encode(self, block: Bits, context: Context) -> bytes:
        """The bytes of one block, [batch, heads, tokens, dim] with any strides."""

    @abstractmethod
    def decode(self, data: memoryview, out: Bits, context: Context) -> None:
        """Fill `out`, [batch, heads, tokens, dim] with any strides, from what `encode` gave.

        Raises CorruptError, whatever the bytes are, or UnsupportedError for bytes of a kind that
        only a later version of the codec knows; never reads or writes out of bounds.
        """

    verbatim: ClassVar[bool] = False
    """Whether `encode` gives a block's numbers as they are, in C order: a writer then takes them
    from where they are, and has one checksum for both. A class with an `encode` of its own has to
    say so anew."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "encode" in vars(cls):  # an `encode` of its own may do anything
            cls.verbatim = vars(cls).get("verbatim", False)

    threaded: ClassVar[bool] = False
    """Whether `decode_many` uses the threads that it is given. If not, the caller makes some that
    call it."""

    def decode_many(self, blocks: Iterable[Coded], threads: int = 1) -> list[int]:
        """Decode blocks that do not need each other; the XXH3-64 of the raw bytes of each.

        By default one after the other. A codec whose code is compiled can do them without Python's
        lock, begin while `blocks` still come, and take checksums while numbers are in the caches.
        Raises CorruptError if any block is damaged; the caller then finds out which.
        """
        checksums = []
        for block in blocks:
            self.decode(block.data, block.out, block.context)
            checksums.append(checksum.of_numbers(block.out))
        return checksums

    on_device: bool = False
    """Whether there is a `decode_on_device`. If not, blocks are decoded on the CPU and copied."""

    def decodes_on(self, device: Any) -> bool:
        """Whether `decode_on_device` may be called for a device, a `device.Device` of
        `kvzip.codecs.native.cuda`: where it takes more than kernels. Default: `on_device`."""
        return self.on_device

    def needs_sound_bytes(self, device: Any) -> bool:
        """Whether `decode_on_device` is given only bytes that match the checksums of what was
        stored, since what it calls was not written for others. Where they do not, the CPU decodes
        all that was asked for. Default: no, kernels take any bytes."""
        return False

    def decode_on_device(
        self, work: Any, blocks: NDArray[Any], contexts: Mapping[int, Context]
    ) -> None:
        """Have a GPU decode blocks: put jobs into `work`, a `kvzip.codecs.native.cuda.work.Work`,
        for kernels that fill parts and set the flags of damaged blocks, whatever the bytes are.

        `blocks`: records of the dtype BLOCK there, with the blocks' bytes on the host at `host`,
        not to be kept. `contexts`: of each part, its blocks' but for `start` and `token_ids`.
        Where blocks need others (`needs`), these come before them, here or in an earlier call, and
        `contexts` are of each block, by its `row`, with one `scratch` for all; a call may come
        again with the same blocks and what `scratch` held before.
        Raises CorruptError when a block shows already that it is damaged, and
        `kvzip.codecs.native.cuda.device.LeftToCPU` where the CPU is to decode all after all.
        """
        raise UnsupportedError(f"codec {self.codec_id!r} has no kernels for a GPU")

    encodes_on_device: bool = False
    """Whether there is an `encode_on_device`. If not, parts are copied, and the CPU encodes."""

    def encode_on_device(self, device: Any, parts: Sequence[Any]) -> list[Any]:
        """Encode parts of one format where they lie, on a GPU: `device` is a `device.Device` of
        `kvzip.codecs.native.cuda`, each part an `encoding.Numbers` of it.

        An `encoding.EncodedNumbers` for each, with the bytes that `make_tables` and `encode` give;
        or None for a part that the CPU is to encode.
        """
        raise UnsupportedError(f"codec {self.codec_id!r} has no kernels for a GPU")

    @abstractmethod
    def max_encoded_size(self, raw_bytes: int) -> int:
        """An upper bound of the bytes that `encode` gives for a block of so many raw bytes."""

    @abstractmethod
    def max_decoded_size(self, encoded_bytes: int, dtype: DType) -> int:
        """An upper bound of the raw bytes that so many encoded bytes can stand for; more of them
        never for less.

        A reader allocates for a block only after this has told that the block can be true.
        """

    def is_before_rope(self, part: str, first: Callable[[], Any]) -> bool:
        """Whether a block of a part that RoPE may have turned is stored as it was before. `first`
        reads the first byte of what `encode` gave, if there is any. Default: no."""
        return False

    # --- tables of a layer's keys or values, shared by its blocks; optional ----------------------

    def make_tables(self, part: Bits, context: Context) -> bytes:
        """What all blocks of one layer's keys or values share; stored once. Default: nothing."""
        return b""

    def load_tables(self, data: memoryview, shape: tuple[int, ...], context: Context) -> Any:
        """The object that blocks find as ``context.tables``; `shape` is that of a whole part.

        Raises CorruptError.
        """
        return None

    def max_tables_size(self, shape: tuple[int, ...], dtype: DType) -> int:
        """An upper bound of the bytes that `make_tables` gives."""
        return 0

    @property
    def has_tables(self) -> bool:
        """Whether parts may have tables: where none is made or read, nobody is asked for them."""
        own = type(self)
        return own.make_tables is not Codec.make_tables or own.load_tables is not Codec.load_tables

    # --- dependence; optional --------------------------------------------------------------

    def encode_chain(self, blocks: Sequence[tuple[Bits, Context]]) -> list[bytes]:
        """The bytes of blocks of the same tokens, layer after layer, as they are decoded.

        By default one after the other. A codec whose first bytes depend on its last numbers needs
        them all at once.
        """
        return [self.encode(block, context) for block, context in blocks]

    def needs(self, layer: int, part: str) -> tuple[tuple[int, str], ...]:
        """The earlier layers' parts whose same tokens must be decoded first. Default: none."""
        return ()

    @property
    def independent(self) -> bool:
        """Whether no block ever needs another."""
        return type(self).needs is Codec.needs

    # --- profiles; optional -----------------------------------------------------------------

    needs_profile: ClassVar[bool] = False
    """Whether the codec can do nothing without one."""

    def uses(self, profile: Any) -> bool:
        """Whether blocks may be coded by a profile, which it then takes to read them. Default: by
        one that was learned for this codec, or that names none."""
        return profile.description.get("codec") in (None, self.codec_id)

    @classmethod
    def fit(
        cls,
        snapshots: Sequence[Any],
        progress: Callable[[str, int, int], None] | None = None,
        **settings: Any,
    ) -> Any:
        """What :meth:`kvzip.Profile.fit` gives for this codec. Default: UnsupportedError."""
        raise UnsupportedError(f"codec {cls.codec_id!r} learns nothing: it has no profiles")


def profile_for(codec: Codec, profile: Any) -> Any:
    """The profile that a file is made with: none that says nothing to the codec, or the file could
    not be read without it, and for nothing. A codec that needs one says itself what is wrong."""
    return profile if profile is not None and (codec.needs_profile or codec.uses(profile)) else None


@cache
def _settings(cls: type[Codec]) -> tuple[str, ...]:
    """The names of a codec's settings."""
    return tuple(inspect.signature(cls).parameters)


_registered: dict[str, type[Codec]] = {}


@cache
def _installed() -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=GROUP)}


def codec_names() -> list[str]:
    """Names of all codecs that are registered or installed, in order."""
    return sorted({*_installed(), *_registered})


def register_codec(cls: type[Codec], codec_id: str | None = None) -> type[Codec]:
    """Make a codec known under `codec_id` (default: its own); usable as a decorator. Raises
    UnsupportedError for what is no codec, or has a name that no spec could hold."""
    if not (isinstance(cls, type) and issubclass(cls, Codec)):
        raise UnsupportedError(f"{cls!r} is not a kvzip.Codec")
    name = getattr(cls, "codec_id", None) if codec_id is None else codec_id
    if not (isinstance(name, str) and re.fullmatch(r"[^\s:,=+]+", name)):
        raise UnsupportedError(f"a codec's name is {name!r}: a str without spaces and :,=+")
    _registered[name] = cls
    return cls


def get_codec(spec: str | Codec | Mapping[str, Any], **settings: Any) -> Codec:
    """A codec by name ("planes"), by name and settings ("planes:mode=bit,coder=lz4"), by a
    config as :meth:`Codec.get_config` gives it, or as it is.

    Raises UnsupportedError when there is no such codec or setting.
    """
    if isinstance(spec, Codec):
        return spec
    if isinstance(spec, str):
        spec = parse_spec(spec)
    elif not isinstance(spec, Mapping):
        raise UsageError(f"a codec is named by a str, a mapping or a Codec, not {spec!r}")
    if "id" not in spec:
        raise UnsupportedError(f'no codec: {dict(spec)!r} must have its name under "id"')
    name, settings = spec["id"], {**spec, **settings}
    name = text("a codec's name", name) if isinstance(name, str) else str(name)
    found = _registered.get(name)
    if found is None:
        point = _installed().get(name)
        if point is None:
            raise UnsupportedError(f"no codec {name!r}; there are: {', '.join(codec_names())}")
        try:
            found = point.load()
        except Exception as error:
            raise UnsupportedError(f"codec {name!r} cannot be imported: {error}") from error
        register_codec(found, name)
    try:
        return found.from_config(json_value("a setting", settings))
    except UnsupportedError:
        raise
    except Exception as error:  # of a codec of others, any; a UsageError: a file may name it
        raise UnsupportedError(f"codec {name!r}: {first_line(error)}") from error


def raised_by(error: BaseException) -> str | None:
    """The codec of somebody else in whose code an error was raised, or in a library below that;
    None where kvzip's own code was nearer."""
    owners = {
        cls.__module__.partition(".")[0]: name
        for name, cls in _registered.items()
        if not cls.__module__.startswith("kvzip.")
    }
    found, at = None, error.__traceback__
    while at is not None:
        module = str(at.tb_frame.f_globals.get("__name__")).partition(".")[0]
        if module == "kvzip" or module in owners:
            found = owners.get(module)
        at = at.tb_next
    return found
