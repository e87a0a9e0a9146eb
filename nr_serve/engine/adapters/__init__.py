"""The adapters as the engine has them: versions in slots, changes between steps, their measured leak."""
