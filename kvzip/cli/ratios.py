"""kvzip eval ratios and check: how small caches become by the protocol of published codecs, and
whether a stored result holds together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from rich.table import Table

from kvzip.cli.app import evaluate
from kvzip.cli.arguments import (
    Json,
    NativeBf16,
    ResultFile,
    Texts,
    check_folders,
    choose_products,
    command_line,
    names,
)
from kvzip.cli.failures import CheckFailed
from kvzip.cli.terminal import emit, say, show_table, working
from kvzip.codec_spec import split_specs
from kvzip.errors import KVZipError

if TYPE_CHECKING:
    from kvzip.eval.results.base import Result
    from kvzip.eval.results.ratios import RatiosResult


@evaluate.command
def ratios(
    *,
    model: str,
    work: Path,
    output: ResultFile = None,
    kinds: str = "python-docs,python-source,package-metadata,licences",
    text: Texts = None,
    tokens: int = 2048,
    train: int = 8,
    test: int = 2,
    dtype: str | None = None,
    device: str = "cpu",
    codecs: str = "planes,channel,predictive",
    seed: int = 0,
    max_bytes: int | None = None,
    like: Path | None = None,
    native_bf16: NativeBf16 = False,
    as_json: Json = False,
) -> None:
    """How small caches of one model become by the protocol of published lossless codecs: learn on
    one split of each text, measure on the other, whole files and layer by layer.

    Parameters
    ----------
    model
        As for `kvzip capture`.
    work
        Folder for what takes long: texts, captured caches, the profile. The same command goes on
        where it was ended.
    output
        File for the result as JSON; the layers go beside it as CSV.
    kinds
        Texts that are at hand, with commas between; "none" for none.
    text
        Texts of your own, each as NAME=TRAIN.txt:TEST.txt.
    tokens
        Of a document.
    train
        Documents of each text that codecs learn from.
    test
        Documents of each text that are measured.
    dtype
        Of the cache. Default: the model's.
    codecs
        Names, with commas between; settings after a colon, theirs with + between.
    seed
        Draws which files of a text are for training, and their order.
    max_bytes
        How big the profile that `predictive` learns may get. Default: 134 MB, or what the
        smallest takes.
    like
        A stored result: its documents must be the same; of another model, its texts.
    """
    check_folders(output)
    choose_products(native_bf16)
    from kvzip.eval.ratios.run import CHARACTERS, run
    from kvzip.eval.ratios.table import as_csv
    from kvzip.eval.ratios.texts import texts
    from kvzip.eval.results import stored
    from kvzip.eval.results.ratios import RatiosResult

    before = None if like is None else stored.load(like, RatiosResult)
    room = CHARACTERS * tokens * max(train, test)
    with working("starting") as step:
        found = run(
            model,
            texts(names(kinds.removesuffix("none")), text or (), seed, room),
            work,
            tokens=tokens,
            train=train,
            test=test,
            dtype=dtype,
            device=device,
            codecs=split_specs(codecs),
            seed=seed,
            max_bytes=max_bytes,
            like=before,
            command=command_line(),
            step=step,
        )
    if output is not None:
        stored.save(found, output, as_csv(found))
    emit(msgspec.to_builtins(found), as_json, lambda: _show(found))
    if not all(row.exact for row in found.rows):
        raise CheckFailed("a codec did not give back what it was given")


def _show(found: RatiosResult) -> None:
    table = Table(
        *("text", "codec", "documents", "seen", "ratio", "bits a number", "exact"),
        title=found.model,
    )
    for row in found.rows:
        share = found.seen(row.kind)
        figures = (
            *("" if share is None else f"{share:.0%}", f"{row.ratio:.3f}"),
            *(f"{row.bits_per_value:.2f}", "yes" if row.exact else "NO"),
        )
        table.add_row(row.kind, row.codec, str(row.documents), *figures)
    show_table(table)
    for profile in found.profiles:
        say(
            f"{profile.codec} learned {profile.bytes:,} bytes from {profile.documents} documents "
            f"of the training split, {profile.tokens:,} tokens"
        )
    if any(document.seen is not None for document in found.documents):
        say(
            "seen: how much of the test documents stands in passages (of 32 tokens) that the "
            "training documents have, too"
        )


@evaluate.command
def check(results: list[Path], *, as_json: Json = False) -> None:
    """Whether stored results hold together: their kind and version, every field, and the figures
    that follow from others. What you send us should pass this.

    Parameters
    ----------
    results
        JSON files that kvzip's commands wrote.
    """
    from kvzip.eval.results import stored
    from kvzip.eval.results.base import Result

    found: list[dict[str, object]] = []
    for path in results:
        try:
            result = stored.load(path, Result)
        except KVZipError as error:
            found.append({"file": str(path), "good": False, "error": str(error)})
            continue
        about = {"kind": result.kind, "version": result.version, "date": result.date}
        made = {"made_by": result.writer, "model": _model_of(result)}
        found.append({"file": str(path), "good": True} | about | made)

    def show() -> None:
        for one in found:
            if not one["good"]:
                say(str(one["error"]))
                continue
            of = f" of {one['model']}" if one["model"] else ""
            say(f"{one['file']}: good, a result of {one['made_by']}{of}, {one['date']}")

    emit({"results": found}, as_json, show)
    if bad := sum(not one["good"] for one in found):
        raise CheckFailed(f"{bad} of {len(found)} results do not hold together")


def _model_of(result: Result) -> str | None:
    """The model that a result is of; None where it is of several, or of none."""
    model = getattr(result, "model", None)
    found = model if isinstance(model, str) else getattr(model, "id", None)
    return found if isinstance(found, str) else None
