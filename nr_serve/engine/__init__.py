"""The engine: schedule, run, apply. Knows nothing of HTTP."""
