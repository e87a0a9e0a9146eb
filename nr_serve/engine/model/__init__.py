"""The base with its adapters on the device: what a step runs."""
