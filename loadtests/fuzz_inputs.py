"""Adapter files and requests, good ones and mutations of them, chosen by a random generator."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_USER = {"role": "user", "content": "hi"}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
_SCHEMA = {"type": "object", "properties": {"a": {"enum": [1, "b"]}}, "required": ["a"]}
GOOD: tuple[tuple[str, str, dict[str, Any] | None], ...] = (
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2, "seed": 1}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": [[1, 2], [3]], "n": 2, "max_tokens": 1, "echo": True}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 2, "stream": True, "logprobs": 2}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 3, "guided_json": _SCHEMA}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 3, "guided_regex": "[ab]+c?"}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 3, "guided_choice": ["a", "bc"]}),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "a", "max_tokens": 3, "guided_grammar": 'start: "a"+'}),
    (
        "POST",
        "/v1/completions",
        {"model": "tiny", "prompt": "ab", "max_tokens": 0, "prompt_logprobs": 1, "gates": True},
    ),
    (
        "POST",
        "/v1/completions",
        {
            "model": "tiny",
            "prompt": "a",
            "max_tokens": 2,
            "stop": ["x"],
            "logit_bias": {"5": 1.5},
            "top_k": 4,
            "min_p": 0.1,
        },
    ),
    ("POST", "/v1/chat/completions", {"model": "tiny", "messages": [_USER], "max_tokens": 2}),
    ("POST", "/v1/chat/completions", {"model": "tiny", "messages": [_USER], "max_tokens": 2, "tools": [_TOOL]}),
    (
        "POST",
        "/v1/chat/completions",
        {
            "model": "tiny",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
            "max_completion_tokens": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 1,
        },
    ),
    ("POST", "/tokenize", {"prompt": "abc", "return_token_strs": True}),
    ("POST", "/tokenize", {"messages": [_USER]}),
    ("POST", "/detokenize", {"tokens": [1, 2, 3]}),
    ("POST", "/v1/adapters", {"name": "x", "path": "x.safetensors", "replace": True, "threshold": 0.5}),
    ("PATCH", "/v1/adapters/x", {"pinned": True, "threshold": 0.5}),
    ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "x.safetensors", "load_inplace": True}),
    ("POST", "/v1/unload_lora_adapter", {"lora_name": "x"}),
    ("DELETE", "/v1/adapters/x", None),
    ("GET", "/v1/adapters/x", None),
    ("GET", "/v1/models/tiny", None),
)
ODD: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        2**31,
        2**63,
        -(2**63) - 1,
        10**40,
        0.5,
        -0.0,
        1e308,
        float("nan"),
        float("inf"),
    ),
    *(
        "",
        " ",
        "a",
        "x" * 5000,
        "\0",
        "\ud800",
        "\udc00x",
        "🙂" * 9,
        "../../etc/passwd",
        "/dev/zero",
        "@none",
        "tiny@none",
    ),
    *(
        "%s{0}",
        "\r\nX: y",
        "(" * 200,
        "[a-",
        "start: s\ns: s s | /[a-z ]/",
        "system",
        "a\u202eb",
        "٣",
        "${x}",
        "{{ 7 * 7 }}",
    ),
    *([], {}, [[]], [None], [{}], {"": ""}, [1] * 300, ["a"] * 300, {str(i): i for i in range(300)}),
)


def mutated_bytes(chance: random.Random, data: bytes) -> bytes:
    """The data with some bytes changed, removed, doubled or cut off."""
    changed = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        at = chance.randrange(len(changed) + 1)
        length = chance.choice((1, 1, 2, 8, 64))
        match chance.randrange(5):
            case 0:
                changed[at : at + length] = chance.randbytes(min(length, len(changed) - at))
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length]
            case 3:
                changed[at:at] = chance.choice(
                    (b"\0", b"{", b"[" * 300, b'"', b"\xff", b"-", b"9" * 30, b"\\ud800")
                )
            case 4:
                del changed[at:]
    return bytes(changed)


def mutated_json(chance: random.Random, value: Any, times: int) -> bytes:
    """The JSON value with `times` things in it changed."""
    changed = {"top": copy.deepcopy(value)}
    try:
        for _ in range(times):
            _change(chance, changed)
        return json.dumps(changed.get("top")).encode()
    except RecursionError:
        return b'{"a":' * 2000


def _change(chance: random.Random, changed: dict[str, Any]) -> None:
    places = list(_places(changed))
    if not places:
        return
    holder, name = chance.choice(places)
    match chance.randrange(6):
        case 0 if isinstance(holder, dict) and len(places) > 1:
            del holder[name]
        case 1:
            holder[name] = [holder[name]]
        case 2:
            for _ in range(chance.choice((2, 60, 900))):
                holder[name] = chance.choice(([holder[name]], {"a": holder[name]}))
        case 3:
            target = holder[name]
            if isinstance(target, dict):
                target[str(chance.choice(ODD))[:99]] = chance.choice(ODD)
            elif isinstance(target, list):
                target.append(copy.deepcopy(chance.choice(ODD)))
        case _:
            holder[name] = copy.deepcopy(chance.choice(ODD))


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a JSON value: what holds it, and under which name."""
    for name in value if isinstance(value, dict) else range(len(value)):
        yield value, name
        if isinstance(value[name], dict | list):
            yield from _places(value[name])


def mutated_request(chance: random.Random, good_file: bytes) -> dict[str, Any]:
    """One request, mostly wrong: method, path, query, headers and body."""
    if chance.random() < 0.03:
        headers = {"content-type": "application/octet-stream"}
        return plain_request("PUT", "/v1/adapters/x", b"replace=true", headers, mutated_bytes(chance, good_file))
    method, path, body = chance.choice(GOOD)
    data = b"" if body is None else mutated_json(chance, body, chance.choice((0, 1, 1, 1, 2, 3)))
    if data and chance.random() < 0.25:
        data = mutated_bytes(chance, data)
    if chance.random() < 0.05:
        path = "/" + mutated_bytes(chance, path[1:].encode()).decode("latin-1")
    headers = {"content-type": chance.choices(("application/json", "text/plain", "application/;"), (97, 2, 1))[0]}
    if chance.random() < 0.05:
        headers |= {"x-request-id": "\xff" * 9, "authorization": "Bearer \xff", "x-request-timeout": "9" * 400}
    return plain_request(method, path, b"a=%ff&a" if chance.random() < 0.02 else b"", headers, data)


def plain_request(method: str, path: str, query: bytes, headers: dict[str, str], body: bytes) -> dict[str, Any]:
    """A request as it is."""
    return {"method": method, "path": path, "query": query, "headers": headers, "body": body}


def mutated_file(chance: random.Random, good: bytes) -> bytes:
    """Bytes changed anywhere, bytes of the header changed, or the header as JSON."""
    length = int.from_bytes(good[:8], "little")
    kind = chance.randrange(3)
    if kind == 0:
        return mutated_bytes(chance, good)
    header = good[8 : 8 + length]
    header = mutated_bytes(chance, header) if kind == 1 else mutated_json(chance, json.loads(header), 1)
    return len(header).to_bytes(8, "little") + header + good[8 + length :]
