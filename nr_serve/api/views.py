"""Adapters as JSON."""

from __future__ import annotations

from typing import Any

from nr_serve.engine.messages import AdapterGates, AdapterView, GateStatistics, Neutrality


def adapter_body(view: AdapterView, statistics: GateStatistics) -> dict[str, Any]:
    """An adapter as clients see it; the statistics say on whose traffic it fired."""
    cross = statistics.cross.items()
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
        "requests": view.requests,
        "loaded_at": view.loaded_at,
        "load_seconds": view.load_seconds,
        "gates": gates_body(view.gates),
        "neutrality": neutrality_body(view.neutrality),
        "measuring": view.measuring,
        "fired_by_selected": {selected: count for (name, selected), count in cross if name == view.name},
    }


def gates_body(gates: AdapterGates) -> dict[str, Any]:
    """Gate totals; a rate is None until a token was seen."""
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


def neutrality_body(neutrality: Neutrality | None) -> dict[str, Any] | None:
    """The leak on each probe text, a share of its token-layers; None until it was measured."""
    if neutrality is None:
        return None
    return {name: {"leak": measured.rate, "tokens": measured.tokens} for name, measured in neutrality.items()}


def _rate(fired: int, seen: int) -> float | None:
    return fired / seen if seen else None
