"""Neutral-residue adapters: the definition, the file, the slots. Knows nothing of the engine that hosts it."""

MAX_THRESHOLD = 1e6
"""Largest threshold a gate may have: far above any logit, far below float32's maximum."""


def block_width(capacity: float, *, parameters: int, d: int, layers: int) -> int:
    """Block width h, a multiple of 16, at which the blocks add `capacity` times the base's parameters.

    h = capacity N / (3 d L): three matrices [h, d] in each of L layers (gates not counted).
    """
    return max(16, 16 * round(capacity * parameters / (3 * d * layers) / 16))
