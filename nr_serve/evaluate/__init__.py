"""Evaluation: held-out loss and who fires on what."""
