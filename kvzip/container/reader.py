"""Reading a .kvz file: what is asked for is decoded, into a snapshot or where a caller wants it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kvzip import metrics
from kvzip.codec import Codec
from kvzip.codecs.native.cuda.device import is_cpu
from kvzip.container import plan
from kvzip.container.blocks import Blocks, beginning
from kvzip.container.decoding import Chain, Decoding
from kvzip.container.format import Info
from kvzip.container.index import Index
from kvzip.container.plan import Request
from kvzip.container.sealed import AnyKey, check_key, unsealed
from kvzip.container.source import Closable, Source, name_in, naming
from kvzip.errors import KVZipError, UsageError
from kvzip.kept import cached_property
from kvzip.options import callback, items
from kvzip.profile import Profile, check_profile
from kvzip.snapshot import Layer, Snapshot
from kvzip.workers import after, in_order, thread_count

if TYPE_CHECKING:
    from kvzip.container.on_device import DeviceSnapshot, Groups


class Reader:
    """An open .kvz file; reads and decodes what is asked for, and nothing else.

    Threads may use it at once, but for one generator of :meth:`in_turn`.

    `threads`: 0 for all cores. `key`: of a sealed file. Raises SealError for a sealed file without
    its key, FormatError or CorruptError when the header or the index is
    not as it should be; a file that the source has opened is then closed.
    """

    def __init__(
        self,
        source: Source,
        profile: Profile | None = None,
        threads: int = 0,
        key: AnyKey | None = None,
    ):
        self._source = source
        try:
            check_profile(profile)
            self._threads = thread_count(threads)
            with naming(source):
                first = beginning(source)
                self._source = unsealed(source, check_key(key), first)
                if self._source is not source:
                    first = beginning(self._source)
                self._blocks = Blocks(self._source, profile, first)
        except BaseException:
            self.close()
            raise
        self._chains: dict[int, Chain] = {}
        self._device_groups: Groups = {}
        self.header = self._blocks.header
        self.layout = self._blocks.layout
        self.origin = self.header.origin
        self.token_ids = self._blocks.token_ids
        """The ids of all tokens, uint32 [tokens] or [batch, tokens], or None."""

    def look_for_profile(self, find: Callable[[str], Profile]) -> None:
        """Have the file's profile looked for when it is first needed, if none was given: `find`
        gives the one with a SHA-256, or raises ProfileError."""
        self._blocks.find_profile = find

    # --- what it is ------------------------------------------------------------------------

    @cached_property
    def info(self) -> Info:
        """What is known of the file before a block is decoded."""
        layout = self.layout
        parts = self._blocks.part_infos()
        return Info(self.header, self._source.size, layout.raw_bytes, layout.numbers, parts)

    @property
    def encoded_bytes(self) -> int:
        """Bytes of the whole file."""
        return self._source.size

    @property
    def codec(self) -> Codec:
        """The codec of the file's blocks."""
        return self._blocks.codec

    @property
    def index(self) -> Index:
        """Where each block lies."""
        return self._blocks.index

    def __len__(self) -> int:
        """How many layers there are."""
        return len(self.layout.layers)

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file that `open` opened, not one that a caller opened; from a server nothing
        more is fetched ahead."""
        if isinstance(self._source, Closable):
            self._source.close()

    def cancel(self) -> None:
        """End all that is being decoded, in whatever thread, and decode nothing more: who waits for
        it, and who asks again, gets a CancelledError, within the time that one block takes. A
        request to a server that is under way is not waited for, and ends by itself, within its
        `timeout`. Any thread may call it, and as often as it wants; the file stays open."""
        self._blocks.cancelled = True
        end = getattr(self._source, "cancel", None)
        if end is not None:
            end()

    def __reduce__(self) -> tuple[Any, ...]:
        """An open file is not pickled, nor copied: raise UsageError."""
        raise UsageError(
            "an open .kvz file cannot be pickled or copied: send its path, URL or bytes, and open "
            "it there with kvzip.open; or what it holds, as Reader.decode gives it"
        )

    def read_ahead(self, spans: Sequence[tuple[int, int]]) -> None:
        """Tell the source what decoding positions ``spans[i]`` of layer i, layer after layer,
        will read, if it is one that can fetch ahead (`announce`)."""
        announce = getattr(self._source, "announce", None)
        if announce is None:
            return
        rows: set[int] = set()
        for i, span in enumerate(spans):
            request = Request([i], {i: self.layout.layers[i].cut(*span)})
            rows |= self._blocks.entries_read(request)
        announce([self.index.span(row) for row in sorted(rows)])

    # --- checking --------------------------------------------------------------------------

    def check_stored(self) -> None:
        """Read the whole file and compare the checksums of its bytes, without decoding. Raises
        CorruptError."""
        with naming(self._source):
            for row in range(len(self.index)):
                self._blocks.stored(row, checked=True)

    def verify(self, progress: Callable[[int], None] | None = None) -> None:
        """Check every checksum and decode everything, one layer in memory at a time. `progress` is
        called with raw bytes as they are done. Raises CorruptError, ProfileError."""
        callback("progress", progress)
        for i in range(len(self)):
            decoding = Decoding(
                self._blocks, self._request([i], None), None, self._chains, thorough=True
            )
            self._run(decoding, self._threads, progress)

    # --- decoding --------------------------------------------------------------------------

    def layer(self, i: int) -> Layer:
        """All parts of layer i, every token it holds."""
        found: Snapshot = self.decode(layers=[i])
        return found.layers[0]

    def tokens(self, start: int, stop: int) -> Snapshot:
        """All layers, with what they hold of positions start to stop."""
        found: Snapshot = self.decode(tokens=(start, stop))
        return found

    def decode(
        self,
        out: Sequence[Any] | None = None,
        layers: Sequence[int] | None = None,
        tokens: tuple[int, int] | None = None,
        threads: int | None = None,
        progress: Callable[[int], None] | None = None,
        *,
        device: Any = None,
        stream: Any = None,
        pages: Any = None,
    ) -> Any:
        """Layers (default: all) and positions (default: all) of the file, bit-exact; a Snapshot.

        `out`: for each layer asked for a (K, V) pair of writable arrays or CPU tensors, or one of
        each of its parts (in their order, or a mapping by their names), of the parts' shapes (with
        `tokens`, of the cut shapes), any strides, apart in memory; filled and used instead of new
        memory. Layers of the result are in the order asked for. `progress` is called with raw bytes
        as they are done.

        `device`: "cuda", "cuda:1" or a torch device, to decode there, into new tensors or into
        `out`, tensors of that device; the result is a DeviceSnapshot (docs/gpu.md). It is there
        when this returns. `stream`: the stream whose earlier work comes first (default: torch's
        current one). `pages`: of a paged cache, which page has each run of positions, [pages] or
        [batch, pages]; `out` is then K and V of each layer, [pages, tokens of a page, heads, dim],
        in any strides but that the numbers of a head lie side by side.

        Raises CorruptError when any block read is damaged, ProfileError when the file needs a
        profile and has not got it, UnsupportedError without such a device, or for `tokens` at whose
        end a layer has no state.
        """
        callback("progress", progress)
        out = None if out is None else items("out", out, "one pair of arrays a layer")
        if not is_cpu(device):
            return self._decode_on_device(
                device, out, layers, tokens, threads, progress, stream, pages
            )
        if pages is not None:
            raise UsageError("pages: only with device=")
        decoding = Decoding(self._blocks, self._request(layers, tokens), out, self._chains)
        self._run(decoding, self._workers(threads), progress)
        return decoding.snapshot()

    def in_turn(
        self,
        requests: Iterable[tuple[Sequence[int], tuple[int, int]]],
        threads: int | None = None,
    ) -> Generator[Snapshot, None, None]:
        """For each (layers, positions) in turn what :meth:`decode` gives. The next one's is begun
        while one is waited for or used, so that threads do not wait for each other in between:
        tokens whose layers are done go on to the next layers. What is closed before its end leaves
        the rest, and does not wait for what is begun."""
        workers = self._workers(threads)
        pool, wait = ThreadPoolExecutor(self._jobs_at_once(workers)), True
        last: dict[int | None, Future[Any]] = {}
        begun: deque[tuple[Decoding, list[Future[Any]], metrics.Timer]] = deque()

        def finished() -> Snapshot:
            decoding, futures, timer = begun.popleft()
            with naming(self._source):
                for future in futures:
                    future.result()
            self._count(timer, decoding.request)
            return decoding.snapshot()

        try:
            for layers, tokens in requests:
                timer = metrics.Timer()
                request = self._request(layers, tokens)
                decoding = Decoding(self._blocks, request, None, self._chains)
                futures = []
                for chain, job in decoding.jobs(workers):
                    future = after(last.get(chain), job, pool)
                    if chain is not None:
                        last[chain] = future
                    futures.append(future)
                begun.append((decoding, futures, timer))
                if len(begun) > 1:
                    yield finished()
            while begun:
                yield finished()
        except GeneratorExit:
            wait = False
            raise
        finally:
            pool.shutdown(wait, cancel_futures=True)

    def _request(self, layers: Sequence[int] | None, tokens: tuple[int, int] | None) -> Request:
        """What a caller asks for. Raises ProfileError, UsageError."""
        if self.header.profile is not None:
            with naming(self._source):
                self._blocks.check_profile()
        return plan.requested(self.layout, layers, tokens)

    def _workers(self, threads: int | None) -> int:
        return self._threads if threads is None else thread_count(threads)

    def _jobs_at_once(self, workers: int) -> int:
        """How many jobs there may be at a time: one, where codecs have threads of their own."""
        return 1 if self._blocks.codecs.threaded else workers

    def _run(
        self, decoding: Decoding, workers: int, progress: Callable[[int], None] | None
    ) -> None:
        """Decode all of a request."""
        timer, jobs = metrics.Timer(), [job for _, job in decoding.jobs(workers)]
        at_once = min(self._jobs_at_once(workers), len(jobs) or 1)
        try:
            for rows in in_order(jobs, at_once, 2 * workers):
                if progress is not None:
                    progress(decoding.raw_bytes(rows))
        except KVZipError as error:
            name_in(error, self._source)
            raise
        self._count(timer, decoding.request)

    def _count(self, timer: metrics.Timer, request: Request) -> None:
        """Tell who listens what was decoded, and how long it took."""
        if timer.wanted:
            codec, cuts = self.codec.codec_id, request.cuts.values()
            raw = sum(part.nbytes for cut in cuts for part in cut.parts.values())
            metrics.count("decoded_bytes", raw, codec=codec)
            timer.done("decode_seconds", codec=codec)

    def _decode_on_device(
        self,
        device: Any,
        out: Sequence[Any] | None,
        layers: Sequence[int] | None,
        tokens: tuple[int, int] | None,
        threads: int | None,
        progress: Callable[[int], None] | None,
        stream: Any,
        pages: Any,
    ) -> DeviceSnapshot:
        """Do what `decode` does, on a device."""
        if pages is not None and out is None:
            raise UsageError("pages: only with out=, the cache that they are pages of")
        # Imported here, since few need it and it takes a while.
        from kvzip.container import on_device

        request = self._request(layers, tokens)

        def decode_on_cpu(some: Sequence[int], arrays: Sequence[tuple[Any, Any]] | None) -> None:
            self.decode(arrays, some, tokens, threads)

        timer = metrics.Timer()
        with naming(self._source):
            found = on_device.decode(
                self._blocks,
                request,
                device,
                out,
                pages,
                stream,
                progress,
                decode_on_cpu,
                self._device_groups,
            )
        self._count(timer, request)
        return found
