"""Learns the predictive codec's profile: floating point here, integers in what comes out.

spec.md says what the tensors mean. One layer after the other (`layers.py`): which layers predict it
(`input_layers.py`), its sums of products over all documents, then its predictors (`regression.py`),
their integers (`integers.py`) and what single tokens have of their own (`token_tables.py`). Last,
over documents kept apart from these, the scales and shapes of what is left, measured by the codec
itself (`calibrate.py`).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from kvzip.codecs.predictive import blas
from kvzip.codecs.predictive.allotment import Allotment, allot, check_bytes, least_bytes
from kvzip.codecs.predictive.calibrate import calibrate
from kvzip.codecs.predictive.density import densities, sine_table
from kvzip.codecs.predictive.documents import Documents, Vocabulary
from kvzip.codecs.predictive.finished_layers import FinishedLayers
from kvzip.codecs.predictive.groups import MOST, default_group, default_lanes
from kvzip.codecs.predictive.input_layers import INPUT_LAYERS, InputLayers
from kvzip.codecs.predictive.layer_inputs import Known
from kvzip.codecs.predictive.layers import fit_layer
from kvzip.errors import ProfileError
from kvzip.layout import KV
from kvzip.profile import SIDE_BY_SIDE, VERSION, Profile
from kvzip.statistics.documents import Item, Progress, hold_out
from kvzip.statistics.rope import heads_and_dim
from kvzip.version import __version__

DEFAULT_BYTES = 134_000_000
"""How big a profile may get where nothing is said; of a wide model the smallest is bigger."""
Regions = int | Sequence[int] | Literal["auto"]
Tensors = dict[str, NDArray[Any]]


def multiplications(profile: Profile) -> list[int]:
    """Products of a weight and a number, for each token and layer, that prediction takes."""
    found = []
    for i, layer in enumerate(profile.description["layers"]):
        regions, n = profile.tensors[f"{i}.bias"].shape
        columns = sum(profile.tensors[f"{a}.bias"].shape[1] for a in layer["inputs"])
        found.append(n * columns + n * (n - 1) // 2 + columns * (regions if regions > 1 else 0))
    return found


def fit(
    snapshots: Sequence[Item],
    progress: Progress | None = None,
    *,
    regions: Regions = "auto",
    max_bytes: int | None = None,
    token_table: bool = True,
    group: int | None = None,
    calibration: int | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> Profile:
    """A profile for the predictive codec; see :meth:`kvzip.Profile.fit`.

    `regions`: how many predictors a layer has, of which each token takes one: for all layers, for
    each, or as many as the documents and `max_bytes`, the size of the profile's file, allow (by
    default 134 MB, or what the smallest takes). Where that has no room for one of each layer,
    tables know fewer tokens and weights are coarser. `token_table`: keep what the first layers make
    of each token seen. `group`: how many channels do not look at each other, so that they can be
    decoded at the same time; by default 8, of wide models 16. `calibration`: how many documents no
    predictor is learned from, so that scales and densities are set over them; default: one in
    sixteen, at most 24, and none of fewer than 8. If it is 0, scales and densities are set over the
    documents that the predictors are learned from. The profile's description then has no
    `calibration_bits`: the mean bits of each layer's numbers in the calibration documents. They are
    what calibration made least, so no measure of documents that the profile has not seen. `resume`:
    a folder in which finished layers are kept, so that the same call goes on where an earlier one
    ended. Raises ProfileError when the snapshots are not of one model, or a setting makes no sense,
    and UsageError when `max_bytes` are fewer than the smallest profile of the model takes, or stand
    beside `regions`, which take what they take.
    """
    if not snapshots:
        raise ProfileError("a profile needs at least one snapshot to learn from")
    tell = progress or (lambda what, done, total: None)
    count = documents_apart(len(snapshots)) if calibration is None else calibration
    if not 0 <= count < len(snapshots):
        raise ProfileError(f"{count} of {len(snapshots)} documents cannot be kept apart")
    learned_from, apart = hold_out(snapshots, count)
    learned = Documents(learned_from)
    group = default_group(max(learned.widths)) if group is None else group
    if not (2 <= group <= MOST and group % 2 == 0):
        raise ProfileError(f"group={group}: want an even number of channels, 2 to {MOST}")
    _check_regions(regions, len(learned.widths))
    vocabulary = Vocabulary(learned) if token_table else None
    if max_bytes is None:
        max_bytes = max(DEFAULT_BYTES, least_bytes(learned))
    allotted = allot(learned, regions, max_bytes, vocabulary)
    settings = {
        "version": __version__,
        "regions": regions if isinstance(regions, int | str) else list(regions),
        "max_bytes": max_bytes,
        "token_table": token_table,
        "rows": allotted.rows,
        "rounding": allotted.rounding,
        "group": group,
        "calibration": count,
        "input_layers": INPUT_LAYERS,
    }
    finished = None
    if resume is not None:
        finished = FinishedLayers(Path(resume), settings, snapshots, tell)
    if vocabulary is not None:
        vocabulary.keep(allotted.rows)
    with blas.for_width(max(learned.widths)):
        tensors, inputs = _layers(learned, allotted, vocabulary, group, finished, tell)
        description = _description(learned, inputs, group)
        spent = calibrate(tensors, description, apart or list(snapshots), tell)
    if apart:
        description["calibration_bits"] = spent.bits_per_number
    return Profile(tensors, description)


def check_one(item: Item, max_bytes: int | None = None) -> None:
    """Raise what :func:`fit` would, as far as one document of many that are like it shows: for
    whoever has the others still to make."""
    documents = Documents([item])
    if max_bytes is not None:
        check_bytes(documents, max_bytes)


def documents_apart(documents: int) -> int:
    """How many of so many documents are kept apart for calibration by default."""
    return 0 if documents < 8 else min(max(documents // 16, 1), 24)


def _check_regions(regions: int | Sequence[int] | str, layers: int) -> None:
    """Raise ProfileError unless each of the layers gets a number of regions that can be."""
    given = [regions] if isinstance(regions, int) else regions
    if regions == "auto":
        return
    if isinstance(given, str) or not all(1 <= r <= 256 for r in given):
        raise ProfileError(f'regions={regions!r}: want "auto", or 1 to 256')
    if not isinstance(regions, int) and len(given) != layers:
        raise ProfileError(f"regions for {len(given)} layers are given, the model has {layers}")


def _layers(
    documents: Documents,
    allotted: Allotment,
    vocabulary: Vocabulary | None,
    group: int,
    finished: FinishedLayers | None,
    tell: Progress,
) -> tuple[Tensors, list[list[int]]]:
    """The profile's tensors, before they are calibrated, and the layers that predict each layer;
    finished layers are taken as they are."""
    tensors: Tensors = {"sine": sine_table(), "densities": densities()[0]}
    known: list[Known] = []
    inputs: list[list[int]] = []
    choice = InputLayers(documents)
    layers = len(documents.widths)
    for i in range(layers):
        made = None if finished is None else finished.layer(i)
        if made is None:
            made = fit_layer(documents, i, allotted, known, choice, vocabulary, group, tell)
            if finished is not None:
                finished.keep(i, made)
        inputs.append(made.pop("fit.inputs").tolist())
        known.append(Known(*(made.pop(f"fit.{name}") for name in Known._fields)))
        tensors |= {f"{i}.{name}": array for name, array in made.items()}
        tell("layers", i + 1, layers)
    if vocabulary is not None and len(vocabulary.ids):
        tensors["token_ids"] = vocabulary.ids
    return tensors, inputs


def _description(
    documents: Documents, inputs: Sequence[Sequence[int]], group: int
) -> dict[str, Any]:
    """What a profile says of itself beside its tensors."""
    first = documents.first
    return {
        "version": SIDE_BY_SIDE if documents.side_by_side else VERSION,
        "codec": "predictive",
        "model": first.origin.model,
        "revision": first.origin.revision,
        "architecture": first.origin.architecture,
        "dtype": first.dtype,
        "tokens": documents.tokens,
        "documents": len(documents),
        "group": group,
        "lanes": default_lanes(documents.widths, group),
        "layers": [
            {"inputs": list(inputs[i])} | {part: list(heads_and_dim(layer, part)) for part in KV}
            for i, layer in enumerate(first.layout.layers)
        ],
    }
