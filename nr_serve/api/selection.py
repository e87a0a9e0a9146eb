"""Which adapters a model name stands for, and the models list."""

from __future__ import annotations

from collections.abc import Sequence

from nr_serve.api.context import Context
from nr_serve.api.responses import Model
from nr_serve.engine.messages import AdapterView
from nr_serve.errors import BadRequest, NotFound
from nr_serve.names import check_adapter_name

NONE = "@none"


def select(context: Context, model: str, adapters: Sequence[str] | None = None) -> tuple[str, ...] | None:
    """The adapters to use: None for every attached one, () for none. Raises NotFound for an unknown name.

    `adapters`, if given, overrides what `model` stands for.
    """
    implied = _implied(context, model)
    if adapters is None:
        return implied
    for i, name in enumerate(adapters):
        if name not in context.engine.adapters:
            raise NotFound(f"The adapter `{name}` does not exist", param=f"adapters[{i}]")
    if len(set(adapters)) < len(adapters):
        raise BadRequest("adapters: a name is given twice", param="adapters")
    return tuple(adapters)


def selection_name(context: Context, adapters: Sequence[str] | None) -> str:
    """Name of a selection in the metrics' labels; the same however the selection was asked for."""
    base = context.engine.info.model.replace("+", "-")  # "+" joins the names of adapters
    if adapters is None:
        return base
    return "+".join(sorted(adapters)) or base + NONE


def check_model(context: Context, model: str | None) -> None:
    """Raise NotFound unless `model` is None or the name of a served model."""
    if model is not None:
        _implied(context, model)


def check_name(context: Context, name: str, param: str | None = "name") -> None:
    """Raise BadRequest unless an adapter may have this name."""
    check_adapter_name(name, context.engine.info.model, param=param)


def model_cards(context: Context) -> list[Model]:
    """Everything that `model` may be, as /v1/models lists it."""
    base = context.engine.info.model
    bare: Model = {**_card(context, base + NONE), "parent": base}
    adapters = [_adapter_card(context, view) for view in context.engine.adapters.values()]
    return [_card(context, base), bare, *adapters]


def model_card(context: Context, model: str) -> Model:
    """One model's card. Raises NotFound for an unknown name."""
    for card in model_cards(context):
        if card["id"] == model:
            return card
    raise _unknown(model)


def _implied(context: Context, model: str) -> tuple[str, ...] | None:
    base = context.engine.info.model
    if model == base:
        return None
    if model == base + NONE:
        return ()
    if model in context.engine.adapters:
        return (model,)
    raise _unknown(model)


def _unknown(model: str) -> NotFound:
    return NotFound(f"The model `{model}` does not exist; GET /v1/models lists those that do", param="model")


def _card(context: Context, name: str) -> Model:
    info = context.engine.info
    return {
        "id": name,
        "object": "model",
        "created": context.started,
        "owned_by": "nr-serve",
        "root": info.model,
        "parent": None,
        "max_model_len": info.max_model_len,
        "fingerprint": info.fingerprint,
    }


def _adapter_card(context: Context, view: AdapterView) -> Model:
    return {
        **_card(context, view.name),
        "created": int(view.loaded_at),
        "parent": context.engine.info.model,
        "version": view.version,
        "language": view.domain,
        "state": view.state,
    }
