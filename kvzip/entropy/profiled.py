"""What a profile's own integer model says: the one place that asks the predictive codec."""

from __future__ import annotations

import numpy as np

from kvzip import dtypes
from kvzip.entropy.residual import held_layers
from kvzip.errors import ProfileError
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot


def code_lengths(snapshot: Snapshot, profile: Profile) -> list[tuple[float, float]]:
    """Ideal bits of each layer's keys and values, all numbers together, for the tokens that every
    layer holds. Raises ProfileError when the profile is of another model.
    """
    from kvzip.codecs.predictive.codec import native_model, new_chain

    layers = held_layers(snapshot)
    if not layers:
        return []
    k, first = layers[0].k, layers[0].layout.first
    rows, tokens = 1 if k.ndim == 3 else len(k), k.shape[-2]
    ids = snapshot.token_ids
    if ids is not None:
        ids = ids[..., first : first + tokens].reshape(rows, tokens)
    form = dtypes.get(snapshot.dtype)
    model = native_model(profile)
    chain = new_chain(model, profile.tensors, rows, tokens, first, form, ids)
    found = []
    for i, layer in enumerate(layers):
        spent = []
        for part, numbers in enumerate(layer):
            block = np.ascontiguousarray(numbers if numbers.ndim == 4 else numbers[np.newaxis])
            raw = 0
            if form.bits == 32:  # the lower half is stored as it is
                block, raw = (block >> np.uint32(16)).astype(np.uint16), 16 * block.size
            try:
                spent.append(float(chain.measure(i, part, block)[1]) + raw)
            except (ValueError, IndexError) as error:
                raise ProfileError(f"the profile is of another model: {error}") from None
        found.append((spent[0], spent[1]))
    return found
