"""How many bits a number of a KV cache holds, under models from the simplest up.

`tables.py`: frequencies of the numbers' fields; `before_rope.py`: of keys before RoPE. `linear.py`:
regressions from layer to layer. `residual.py`: what they leave, within a layer, and its densities.
`predicted.py`: which layers these are for. `ladder.py` puts them one on the other; `profiled.py`
asks a profile. What they have in common with the codecs' fits is in `kvzip.statistics`.

All of it is floating point and nothing here is ever coded: figures are ideal code lengths, what
an arithmetic coder with that model and no rounding would need.
"""

from kvzip.entropy.ladder import Fitted, FormatBits, Ladder, Rung, Spectrum, fit, measure
from kvzip.entropy.residual import LayerBits, PartBits
from kvzip.entropy.tables import Measure, channel_counts, entropy, planes

__all__ = [
    "Fitted",
    "FormatBits",
    "Ladder",
    "LayerBits",
    "Measure",
    "PartBits",
    "Rung",
    "Spectrum",
    "channel_counts",
    "entropy",
    "fit",
    "measure",
    "planes",
]
