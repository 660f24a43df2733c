# What nanobind's stubgen cannot tell of kvzip.codecs._native: which objects are buffers, what is in
# a tuple, and arrays of which the C++ side decides the type when it runs. tests/native/test_stub.py
# has the command that makes _native.pyi of the module and of these.

^kvzip.codecs._native.xxh3_64$:
    \from typing_extensions import Buffer
    def xxh3_64(*args: Buffer) -> int: ...

^kvzip.codecs._native.Index.__init__$:
    def __init__(self, records: Buffer, begin: int, end: int, alignment: int, layers: list[list[tuple[str, int, int, int]]]) -> None: ...

^kvzip.codecs._native.Index.(positions|tokens|offsets|lengths|stored_checksums|raw_checksums)$:
    def \1(self) -> list[int]: ...

^kvzip.codecs._native.Index.keys$:
    def keys(self) -> tuple[list[tuple[int, str]], dict[tuple[int, str], range]]: ...

^kvzip.codecs._native.Index.stored$:
    def stored(self, data: memoryview, at: int, rows: Sequence[int], most: int) -> dict[int, memoryview]: ...

^kvzip.codecs._native.Index.runs$:
    def runs(self, rows: Sequence[int], most: int) -> list[tuple[int, int, list[int]]]: ...

^kvzip.codecs._native.json_copy$:
    \from typing import Any
    def json_copy(value: Any, levels: int) -> Any: ...

^kvzip.codecs._native.stored$:
    def stored(data: memoryview, length: int, checksum: int | None = None) -> memoryview: ...

^kvzip.codecs._native.close_to_each_other$:
    \from typing import Any
    def close_to_each_other(arrays: list[NDArray[Any]]) -> list[list[int]]: ...

^kvzip.codecs._native.Output.write$:
    def write(self, data: Buffer) -> int: ...

^kvzip.codecs._native.Rotation.unturn$:
    def unturn(self, keys: NDArray[Any], first: int, rounding: int, out: NDArray[Any], most: int) -> NDArray[numpy.uint64] | None: ...

^kvzip.codecs._native.Output.take$:
    def take(self) -> bytes: ...

^kvzip.codecs._native.grid_widen$:
    \from typing import Any
    def grid_widen(codes: NDArray[numpy.uint8], scales: NDArray[Any], scale: str, narrow: str, wide: str, through_fp32: bool, group_tokens: int, group_channels: int, first_token: int, out: NDArray[Any]) -> None: ...

^kvzip.codecs._native.grid_suspicions$:
    def grid_suspicions(numbers: NDArray[Any], wide: str) -> int: ...

^kvzip.codecs._native.grid_may_have_even_channels$:
    \from typing import Any
    def grid_may_have_even_channels(numbers: NDArray[Any], wide: str) -> bool: ...

^kvzip.codecs._native.join_bits$:
    def join_bits(planes: NDArray[numpy.uint8], n: int) -> NDArray[numpy.uint8] | NDArray[numpy.uint16] | NDArray[numpy.uint32]: ...

^kvzip.codecs._native.ChannelTables.__init__$:
    def __init__(self, data: Buffer, heads: int, dim: int, exponent_bits: int, mantissa_bits: int, lasting: bool = False) -> None: ...

^kvzip.codecs._native.ChannelTables.streams$:
    def streams(self, data: Buffer, batch: int, tokens: int) -> NDArray[numpy.int64]: ...

^kvzip.codecs._native.ChannelTables.encode$:
    \from typing import Any
    def encode(self, numbers: NDArray[Any], head: bytes = b'') -> bytes | None: ...

^kvzip.codecs._native.ChannelDecoding.add$:
    def add(self, tables: ChannelTables | None, data: Buffer, out: NDArray[Any]) -> bool: ...

^kvzip.codecs._native.channel_jobs$:
    \from collections.abc import Sequence
    def channel_jobs(tables: Sequence[ChannelTables | None], blocks: NDArray[numpy.uint8], shapes: NDArray[numpy.int64], itemsize: int) -> tuple[NDArray[numpy.uint8], list[int], NDArray[numpy.uint32], NDArray[numpy.uint8], NDArray[numpy.int64]]: ...

^kvzip.codecs._native.channel_encoders$:
    def channel_encoders(tables: ChannelTables) -> NDArray[numpy.uint32] | None: ...

^kvzip.codecs._native.PredictiveChain.measure$:
    def measure(self, layer: int, part: int, numbers: NDArray[Any], rotation: NDArray[numpy.float32] | None = None, rounding: int = 0) -> tuple[NDArray[numpy.uint32], float]: ...

^kvzip.codecs._native.predictive_jobs$:
    def predictive_jobs(blocks: NDArray[numpy.uint8], which: NDArray[numpy.int64], ranges: NDArray[numpy.uint8], number: int, shape: Sequence[int], itemsize: int, layer: int, lanes: int, regions: int, last: bool) -> tuple[NDArray[numpy.uint8], list[int], list[int], list[int], NDArray[numpy.uint32], NDArray[numpy.uint8], list[int]]: ...
