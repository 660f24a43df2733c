"""kvzip put, get, ls, rm, prune: documents in a store."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
from cyclopts import Parameter

from kvzip import api
from kvzip.cli.app import app
from kvzip.cli.arguments import Json, ProfilePath, Threads, read_profile
from kvzip.cli.failures import CheckFailed, each, emit_with
from kvzip.cli.terminal import bar, emit, say, sizes
from kvzip.errors import CorruptError, FormatError, StoreError, UsageError
from kvzip.files import is_standard_output
from kvzip.parsing import from_json
from kvzip.reading import contents

if TYPE_CHECKING:
    from kvzip.profile import Profile
    from kvzip.store import Match, Store
    from kvzip.store.store import Entry

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
    """Put documents' caches into a store, where they are found by model and first tokens. If one
    fails, the others are stored all the same.

    Parameters
    ----------
    documents
        Snapshots, which are encoded, and .kvz files, which are stored as they are.
    limit_bytes
        Evict the documents used longest ago when all together take more.
    block_tokens
        For a new store: prefixes are found at multiples of so many tokens. Default: 256. A store
        that has others is an error.
    replace
        Write anew what the store has already, because it is damaged.
    """
    from kvzip.store import Store

    target = Store(store, limit_bytes=limit_bytes, block_tokens=block_tokens)
    known, began = read_profile(profile), time.perf_counter()
    with bar("put", len(documents), in_bytes=False) as advance:

        def one(path: Path) -> Entry:
            entry = target.put(path, codec=codec, profile=known, threads=threads, replace=replace)
            advance(1)
            return entry

        entries, failed = each(documents, one)
    result = {
        "documents": [{"file": str(path)} | msgspec.to_builtins(entry) for path, entry in entries],
        "seconds": time.perf_counter() - began,
    }

    def show() -> None:
        for path, entry in entries:
            state = "stored" if entry.new else "was there already"
            say(
                f"{path}: {state}, {entry.tokens} tokens, {entry.encoded_bytes:,} bytes, "
                f"key {entry.key}",
            )

    emit_with(result, failed, "file", len(documents), as_json, show)


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
        FILE.kvz, or -: the document as it is stored. FILE.safetensors: what is shared, decoded.
    """
    from kvzip.store import Store

    if sum(given is not None for given in (like, ids, key)) != 1:
        raise UsageError("give one of --like, --ids and --key")
    as_stored = output is not None and (is_standard_output(output) or output.suffix == ".kvz")
    if output is not None and not as_stored and output.suffix != ".safetensors":
        raise UsageError(f"-o {output}: end it in .kvz or .safetensors")
    source, known, began = Store(store, make=False), read_profile(profile), time.perf_counter()
    if key is not None:
        match = _by_key(source, key, known, threads)
    else:
        prompt = _prompt(like, ids, model, revision, dtype)
        found = source.find(
            prompt.token_ids,
            model=prompt.model,
            revision=prompt.revision,
            dtype=prompt.dtype,
            profile=known,
            threads=threads,
        )
        if found is None:
            raise StoreError("no document in the store begins as the prompt does")
        match = found
    with match:
        if output is not None and as_stored:
            with bar("get", match.reader.info.encoded_bytes) as progress:
                source.fetch(match.key, output, progress)
        elif output is not None:
            match.snapshot().save(output)
        result = sizes(match.reader.layout, match.reader.info.encoded_bytes) | {
            "key": match.key,
            "tokens": match.tokens,
            "document_tokens": match.reader.layout.tokens,
            "codec": match.reader.header.codec,
            "output": None if output is None else str(output),
            "seconds": time.perf_counter() - began,
        }
    said = f"{result['key']}: {result['tokens']} of {result['document_tokens']} tokens are shared"
    emit(result, as_json, lambda: say(said + (f", in {output}" if output else "")))


def _by_key(source: Store, key: str, profile: Profile | None, threads: int) -> Match:
    """The whole document that a key names."""
    from kvzip.store import Match

    reader = source.open(key, profile, threads)
    return Match(key, reader.layout.tokens, reader)


class _Prompt(NamedTuple):
    """What a document is looked for by."""

    token_ids: Any
    model: str
    revision: str
    dtype: str


def _prompt(
    like: Path | None, ids: Path | None, model: str | None, revision: str, dtype: str
) -> _Prompt:
    """The prompt that the options name."""
    if like is not None:
        return _prompt_of(like)
    if ids is not None and model is not None:
        return _Prompt(_read_ids(ids), model, revision, dtype)
    raise UsageError("--ids needs --model, and --revision and --dtype as they were stored")


def _prompt_of(path: Path) -> _Prompt:
    """The prompt of a snapshot or a .kvz file."""
    from kvzip.store.given import open_either

    with open_either(path) as (file, snapshot):
        if snapshot is None:
            with api.open(file) as reader:
                origin, token_ids = reader.header.origin, reader.token_ids
                dtype = reader.layout.dtype
        else:
            origin, token_ids, dtype = snapshot.origin, snapshot.token_ids, snapshot.dtype
    if token_ids is None:
        raise UsageError(f"{path} has no token ids to look for")
    return _Prompt(token_ids, origin.model, origin.revision, dtype)


def _read_ids(path: Path) -> list[int]:
    try:
        return from_json(contents(path, 256 << 20), list[int])
    except (CorruptError, FormatError) as error:
        raise UsageError(f"{path} is not a JSON list of token ids: {error}") from None


@app.command
def ls(*, store: StoreUrl, model: str | None = None, as_json: Json = False) -> None:
    """List the documents of a store, the one that was used longest ago first.

    Parameters
    ----------
    model
        Only documents of this model.
    """
    from kvzip.store import Store

    source = Store(store, make=False)
    abouts = source.abouts()
    documents = []
    for found in source.documents():
        about = abouts.get(found.key.partition("/")[0])
        if model is None or (about is not None and model in (about.model, about.called)):
            named = {} if about is None else msgspec.to_builtins(about.identity)
            if about is not None:
                named["model"] = about.model or about.called
            documents.append({"key": found.key, **msgspec.to_builtins(found), **named})
    total = sum(d["encoded_bytes"] for d in documents)

    def show() -> None:
        for d in documents:
            of = ", ".join(filter(None, (d.get("model"), d.get("revision"), d.get("dtype"))))
            say(f"{d['key']}  {d['encoded_bytes']:,} bytes, used {d['used'][:19]}Z, {of}")
        say(f"{len(documents)} documents, {total:,} bytes")

    emit({"documents": documents, "encoded_bytes": total}, as_json, show)


@app.command
def rm(keys: list[str], *, store: StoreUrl, as_json: Json = False) -> None:
    """Remove documents from a store, by their keys; exit code 1 if one is not there. If one fails,
    the others are removed all the same.

    Parameters
    ----------
    keys
        As `kvzip ls` and `kvzip put` show them.
    """
    from kvzip.store import Store
    from kvzip.store.keys import document_path

    for key in keys:
        document_path(key)  # that all are keys, before one of them goes
    target = Store(store, make=False)
    there, failed = each(list(dict.fromkeys(keys)), target.remove)
    removed = [key for key, was in there if was]
    missing = [key for key, was in there if not was]
    result = {"removed": removed, "missing": missing}
    words = f"{len(removed)} documents removed"
    emit_with(result, failed, "key", len(keys), as_json, lambda: say(words))
    if missing:
        raise CheckFailed(f"the store has no document {', '.join(missing)}")


@app.command
def prune(*, store: StoreUrl, limit_bytes: int | None = None, as_json: Json = False) -> None:
    """Clear away what ended writers left in a store, and evict documents until it is small enough.

    Parameters
    ----------
    limit_bytes
        Evict the documents used longest ago when all together take more. Default: evict none.
    """
    from kvzip.store import Store

    target = Store(store, limit_bytes=limit_bytes, make=False)
    evicted = target.prune(target.limit_bytes)
    left = target.documents()
    total = sum(d.encoded_bytes for d in left)
    emit(
        {"evicted": evicted, "documents": len(left), "encoded_bytes": total},
        as_json,
        lambda: say(f"{len(evicted)} documents evicted; {len(left)} left, {total:,} bytes"),
    )
