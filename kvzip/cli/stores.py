"""kvzip put, get, ls, rm, prune: documents in a store."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import msgspec
from cyclopts import Parameter

from kvzip import api
from kvzip.cli.app import app
from kvzip.cli.arguments import (
    Json,
    KeyFile,
    ProfilePath,
    Threads,
    codec_for,
    kind_of,
    read_key,
    read_profile,
)
from kvzip.cli.failures import CheckFailed, each, emit_with
from kvzip.cli.terminal import bar, counted, emit, say, sizes
from kvzip.errors import CorruptError, FormatError, NotStoredError, UsageError
from kvzip.files import is_standard_output
from kvzip.parsing import from_json
from kvzip.profile import Profile
from kvzip.reading import contents

if TYPE_CHECKING:
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
    key_file: KeyFile = None,
    codec: str | None = None,
    profile: ProfilePath = None,
    limit_bytes: int | None = None,
    block_tokens: int | None = None,
    replace: bool = False,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Put documents' caches into a store, where they are found by model and first tokens, with the
    profile that they need. If one fails, the others are stored all the same.

    Parameters
    ----------
    documents
        Snapshots, which are encoded, .kvz files, which are stored as they are, and profiles.
    codec
        What snapshots are encoded with. Default: what the profile is of, or channel.
    limit_bytes
        Evict the documents used longest ago when all together take more.
    block_tokens
        For a new store: prefixes are found at multiples of so many tokens. Default: 256. A store
        that has others is an error.
    replace
        Write anew what the store has already, because it is damaged.
    """
    from kvzip.store import Store

    target = Store(
        store, limit_bytes=limit_bytes, block_tokens=block_tokens, key=read_key(key_file)
    )
    known, began = read_profile(profile), time.perf_counter()
    chosen = codec_for(codec, known)
    new_profiles: dict[str, bool] = {}
    with bar("put", len(documents), in_bytes=False) as advance:

        def one(path: Path) -> Entry | Profile:
            if kind_of(path) == "a profile":
                own = Profile.load(path)
                new_profiles[own.id] = target.put_profile(own, replace)
                advance(1)
                return own
            entry = target.put(path, codec=chosen, profile=known, threads=threads, replace=replace)
            advance(1)
            return entry

        # Profiles first: the documents may be those that need them.
        stored, failed = each(sorted(documents, key=lambda p: kind_of(p) != "a profile"), one)
    entries = [(path, each) for path, each in stored if not isinstance(each, Profile)]
    profiles = [
        {"file": str(path)} | _profile_entry(each, new_profiles[each.id])
        for path, each in stored
        if isinstance(each, Profile)
    ]
    result = {
        "documents": [{"file": str(path)} | msgspec.to_builtins(entry) for path, entry in entries],
        "profiles": profiles,
        "seconds": time.perf_counter() - began,
    }

    def show() -> None:
        for path, entry in entries:
            state = "stored" if entry.new else "was there already"
            say(
                f"{path}: {state}, {entry.tokens} tokens, {entry.encoded_bytes:,} bytes, "
                f"key {entry.key}",
            )
        for p in profiles:
            state = "stored" if p["new"] else "was there already"
            say(f"{p['file']}: a profile, {state}, {p['encoded_bytes']:,} bytes, key {p['key']}")

    emit_with(result, failed, "file", len(documents), as_json, show)


def _profile_entry(profile: Profile, new: bool) -> dict[str, Any]:
    """What is told of a profile that is in the store now."""
    return {"key": f"profiles/{profile.id}", "encoded_bytes": profile.nbytes, "new": new}


@app.command
def get(
    *,
    store: StoreUrl,
    key_file: KeyFile = None,
    like: Path | None = None,
    ids: Path | None = None,
    model: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
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
        A file with the prompt's token ids, as a JSON list; with --model, --revision (default:
        none), --dtype (default: bf16).
    key
        A document by its key, instead of by its tokens; or a profile by its own, as `kvzip ls`
        shows it.
    profile
        Default: the one that the document needs, which the store has.
    output
        FILE.kvz, or -: the document as it is stored. FILE.safetensors: what is shared, decoded. Of
        a profile, FILE.kvprofile, or -.
    """
    from kvzip.store import Store
    from kvzip.store.profiles import is_profile_key

    if sum(given is not None for given in (like, ids, key)) != 1:
        raise UsageError("give one of --like, --ids and --key")
    told = {"--model": model, "--revision": revision, "--dtype": dtype}
    extra = [option for option, value in told.items() if value is not None]
    if ids is None and extra:
        raise UsageError(f"{extra[0]} is for --ids: what --like or --key names says it itself")
    if key is not None and is_profile_key(key):
        _get_profile(Store(store, make=False, key=read_key(key_file)), key, output, as_json)
        return
    as_stored = output is not None and (is_standard_output(output) or output.suffix == ".kvz")
    if output is not None and not as_stored and output.suffix != ".safetensors":
        raise UsageError(f"-o {output}: end it in .kvz or .safetensors")
    source, known = Store(store, make=False, key=read_key(key_file)), read_profile(profile)
    began = time.perf_counter()
    if key is not None:
        match = _by_key(source, key, known, threads)
    else:
        prompt = _prompt(like, ids, model, revision or "", dtype or "bf16")
        found = source.find(
            prompt.token_ids,
            model=prompt.model,
            revision=prompt.revision,
            dtype=prompt.dtype,
            profile=known,
            threads=threads,
        )
        if found is None:
            raise NotStoredError("no document in the store begins as the prompt does")
        match = found
    with match:
        if output is not None and as_stored:
            with bar("get", match.reader.encoded_bytes) as progress:
                source.fetch(match.key, output, progress)
        elif output is not None:
            match.snapshot().save(output)
        result = sizes(match.reader.layout, match.reader.encoded_bytes) | {
            "key": match.key,
            "tokens": match.tokens,
            "document_tokens": match.reader.layout.tokens,
            "codec": match.reader.header.codec,
            "profile": match.reader.header.profile,
            "output": None if output is None else str(output),
            "seconds": time.perf_counter() - began,
        }
    said = f"{result['key']}: {result['tokens']} of {result['document_tokens']} tokens are shared"

    def show() -> None:
        say(said + (f", in {output}" if output else ""))
        if as_stored and result["profile"]:
            from kvzip.store.urls import store_option

            where = f"{store_option(source.bucket.url)} -o FILE.kvprofile"
            say(f"it needs a profile: kvzip get --key profiles/{result['profile']} {where}")

    emit(result, as_json, show)


def _get_profile(source: Store, key: str, output: Path | None, as_json: bool) -> None:
    """Write a profile as it is stored, or say what it is."""
    if output is not None and not is_standard_output(output) and output.suffix != ".kvprofile":
        raise UsageError(f"-o {output}: end it in .kvprofile")
    began = time.perf_counter()
    if output is not None:
        source.fetch(key, output)
    found = source.get_profile(key)
    result = {
        "key": f"profiles/{found.id}",
        "encoded_bytes": found.nbytes,
        "codec": found.codec,
        "model": found.description.get("model"),
        "output": None if output is None else str(output),
        "seconds": time.perf_counter() - began,
    }
    said = f"{result['key']}: {found!r}" + (f", in {output}" if output else "")
    emit(result, as_json, lambda: say(said))


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
def ls(
    *, store: StoreUrl, key_file: KeyFile = None, model: str | None = None, as_json: Json = False
) -> None:
    """List the documents of a store, the one that was used longest ago first, and its profiles.

    Parameters
    ----------
    model
        Only documents of this model, and the profiles that they need.
    """
    from kvzip.store import Store

    source = Store(store, make=False, key=read_key(key_file))
    abouts = source.abouts()
    documents = []
    for found in source.documents():
        about = abouts.get(found.key.partition("/")[0])
        if model is None or (about is not None and model in (about.model, about.called)):
            named = {} if about is None else msgspec.to_builtins(about.identity)
            if about is not None:
                named["model"] = about.model or about.called
            documents.append({"key": found.key, **msgspec.to_builtins(found), **named})
    needed = {d.get("profile") for d in documents}
    profiles = [
        msgspec.to_builtins(p)
        for p in source.profiles()
        if model is None or p.key.removeprefix("profiles/") in needed
    ]
    total = sum(d["encoded_bytes"] for d in documents)
    beside = sum(p["encoded_bytes"] for p in profiles)

    def show() -> None:
        for d in documents:
            of = ", ".join(filter(None, (d.get("model"), d.get("revision"), d.get("dtype"))))
            if d.get("profile"):
                of += f", profile {d['profile'][:12]}"
            say(f"{d['key']}  {d['encoded_bytes']:,} bytes, used {d['used'][:19]}Z, {of}")
        for p in profiles:
            say(f"{p['key']}  {p['encoded_bytes']:,} bytes, {_needed_by(p['documents'])}")
        say(f"{counted(len(documents), 'document')}, {total:,} bytes")
        if profiles:
            say(f"{counted(len(profiles), 'profile')}, {beside:,} bytes")

    result = {"documents": documents, "encoded_bytes": total}
    emit(result | {"profiles": profiles, "profile_bytes": beside}, as_json, show)


def _needed_by(documents: int) -> str:
    if not documents:
        return "no document here needs it"
    return f"{documents} document{'s need' if documents > 1 else ' needs'} it"


@app.command
def rm(
    keys: list[str], *, store: StoreUrl, key_file: KeyFile = None, as_json: Json = False
) -> None:
    """Remove documents, and profiles that no document needs, from a store, by their keys; exit code
    1 if one is not there, 2 if a profile is needed. If one fails, the others are removed all the
    same; if one is no key at all, none is.

    Parameters
    ----------
    keys
        As `kvzip ls` and `kvzip put` show them.
    """
    from kvzip.store import Store
    from kvzip.store.keys import document_path
    from kvzip.store.profiles import id_in, is_profile_key

    for key in keys:  # that all are keys, before one of them goes
        (id_in if is_profile_key(key) else document_path)(key)
    keys = sorted(keys, key=is_profile_key)  # documents first: they may be those that need it
    target = Store(store, make=False, key=read_key(key_file))
    there, failed = each(list(dict.fromkeys(keys)), target.remove)
    removed = [key for key, was in there if was]
    missing = [key for key, was in there if not was]
    result = {"removed": removed, "missing": missing}
    words = f"{_counted_keys(removed)} removed"
    emit_with(result, failed, "key", len(keys), as_json, lambda: say(words))
    if missing:
        raise CheckFailed(f"the store does not have {', '.join(missing)}")


def _counted_keys(keys: Sequence[str]) -> str:
    """How many documents, and profiles if there are any, these are the keys of."""
    from kvzip.store.profiles import is_profile_key

    profiles = sum(map(is_profile_key, keys))
    said = counted(len(keys) - profiles, "document")
    return f"{said} and {counted(profiles, 'profile')}" if profiles else said


@app.command
def prune(
    *,
    store: StoreUrl,
    key_file: KeyFile = None,
    limit_bytes: int | None = None,
    profiles: Annotated[bool, Parameter(negative=())] = False,
    as_json: Json = False,
) -> None:
    """Clear away what ended writers left in a store, and evict documents until it is small enough.
    A profile that a document needs always stays.

    Parameters
    ----------
    limit_bytes
        Evict the documents used longest ago when all together, profiles too, take more. Default:
        evict none.
    profiles
        Remove profiles that have been there for an hour and that no document needs, whatever the
        size. Over the limit these go first in any case.
    """
    from kvzip.store import Store

    target = Store(store, limit_bytes=limit_bytes, make=False, key=read_key(key_file))
    evicted = target.prune(target.limit_bytes, profiles=profiles)
    left, kept = target.documents(), target.profiles()
    total, beside = (sum(each.encoded_bytes for each in some) for some in (left, kept))
    result = {
        "evicted": evicted,
        "documents": len(left),
        "encoded_bytes": total,
        "profiles": len(kept),
        "profile_bytes": beside,
    }

    def show() -> None:
        say(f"{_counted_keys(evicted)} evicted; {len(left)} left, {total:,} bytes")
        if kept:
            unneeded = sum(not p.documents for p in kept)
            more = f"; no document needs {unneeded} of them (--profiles)" if unneeded else ""
            say(f"{counted(len(kept), 'profile')} left, {beside:,} bytes{more}")

    emit(result, as_json, show)
