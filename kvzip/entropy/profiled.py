"""What a profile's own integer model says: the one place that asks the predictive codec."""

from __future__ import annotations

from kvzip import dtypes
from kvzip.codecs.predictive.codec import measure, native_model
from kvzip.errors import ProfileError
from kvzip.profile import Profile
from kvzip.snapshot import Snapshot


def code_lengths(snapshot: Snapshot, profile: Profile) -> list[tuple[float, float]]:
    """Ideal bits of each layer's keys and values, all numbers together, for the tokens that every
    layer holds. Raises ProfileError when the profile is of another model.
    """
    found = [[0.0, 0.0] for _ in snapshot.layers]
    # Of fp32 the lower half is stored as it is.
    raw = 16 if dtypes.get(snapshot.dtype).bits == 32 else 0
    try:
        for i, part, _, bits, count in measure(native_model(profile), profile.tensors, snapshot):
            found[i][part] = bits + raw * count
    except (ValueError, IndexError) as error:
        raise ProfileError(f"the profile is of another model: {error}") from None
    return [(k, v) for k, v in found]
