"""Neutral-residue adapters: the definition, the file, the slots. Knows nothing of the engine that hosts it."""
