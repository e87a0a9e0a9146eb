"""The adapters in the engine: versions in slots, changes between steps, their measured leak."""
