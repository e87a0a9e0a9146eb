"""Neutral-residue adapters: the definition, the file, the slots. Knows nothing of the engine that hosts it."""

MAX_THRESHOLD = 1e6
"""Largest threshold, either way, that a gate may have: far above any logit, far below float32's end."""
