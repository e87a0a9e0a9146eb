"""Adapters as JSON."""

from __future__ import annotations

from nr_serve.api.responses import Adapter, AdapterGates, ProbeLeak
from nr_serve.engine.messages import AdapterView


def adapter_body(view: AdapterView) -> Adapter:
    """An adapter as clients see it."""
    return {
        "name": view.name,
        "object": "adapter",
        "version": view.version,
        "domain": view.domain,
        "state": view.state,
        "slot": view.slot,
        "bytes": view.nbytes,
        "h": view.h,
        "carry": view.carry,
        "threshold": view.threshold,
        "pinned": view.pinned,
        "routed": view.routed,
        "requests": view.requests,
        "loaded_at": view.loaded_at,
        "load_seconds": view.load_seconds,
        "gates": _gates(view),
        "neutrality": _neutrality(view),
        "measuring": view.measuring,
        "fired_by_selected": dict(view.gates.fired_by_selected),
    }


def _gates(view: AdapterView) -> AdapterGates:
    gates = view.gates
    return {
        "fired": sum(gates.fired),
        "seen": sum(gates.seen),
        "fired_rate": _rate(sum(gates.fired), sum(gates.seen)),
        "mass": gates.mass,
        "layer_groups": [
            {"layers": group, "fired": fired, "seen": seen, "fired_rate": _rate(fired, seen)}
            for group, fired, seen in zip(gates.layer_groups, gates.fired, gates.seen, strict=True)
        ],
    }


def _neutrality(view: AdapterView) -> dict[str, ProbeLeak] | None:
    if view.neutrality is None:
        return None
    return {name: {"leak": leak.rate, "tokens": leak.tokens} for name, leak in view.neutrality.items()}


def _rate(fired: int, seen: int) -> float | None:
    return fired / seen if seen else None
