"""Models that draw lots as they compute: in training mode, with dropout or the like.

What such a call computes of the same ids is another cache each time, and none that the model
computes when it generates.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from kvzip.errors import UnsupportedError

_DRAWS = ("drop", "jitter")
"""What is in the names of the rates that modules keep, such as `attention_dropout`."""


def check_draws_no_lots(model: object) -> None:
    """Raise UnsupportedError for a model some of whose modules are in training mode and leave out
    numbers, layers or experts at random."""
    for name, rate in _rates(model):
        raise UnsupportedError(
            f"the {type(model).__name__} is in training mode, where {name} is {rate:g}, so it "
            "computes other keys and values of the same tokens each time: call model.eval()"
        )


def _rates(model: object) -> Iterator[tuple[str, float]]:
    """The rates above 0 that apply, and what they are called."""
    for path, module in model.named_modules() if isinstance(model, torch.nn.Module) else ():
        if not module.training:
            continue
        held = vars(module)
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            held = {"p": module.p}
        for name, value in held.items():
            draws = name == "p" or any(part in name for part in _DRAWS)
            if draws and isinstance(value, float) and value > 0:
                yield f"{path}.{name}", value
