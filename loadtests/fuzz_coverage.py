"""Coverage-guided fuzzing of the adapter file's reader and of request bodies, by atheris.

    pip install atheris
    python loadtests/fuzz_coverage.py reader -max_total_time=300
    python loadtests/fuzz_coverage.py bodies -max_total_time=300

Half of the mutations are libFuzzer's, of bytes, and half change the JSON in the input. What follows the target are
libFuzzer's flags. It stops at the first crash, which is an exception that is no refusal, and leaves the input in a
file.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import atheris
from pydantic import ValidationError

with atheris.instrument_imports(include=["nr_serve"]):
    from loadtests.fuzz_inputs import GOOD, mutated_json
    from nr_serve.api.body_route import parse_json
    from nr_serve.api.errors import error_body, invalid_request
    from nr_serve.api.schemas import (
        ChatBody,
        CompletionBody,
        DetokenizeBody,
        LoadBody,
        LoadLoraBody,
        PatchBody,
        TokenizeBody,
        UnloadLoraBody,
    )
    from nr_serve.api.structured import form_of
    from nr_serve.api.tools import toolbox
    from nr_serve.errors import NrError
    from nr_serve.neutral.format import Base, read_adapter, write_adapter
    from tests import tiny

BODIES = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, LoadBody, PatchBody, LoadLoraBody, UnloadLoraBody)
Target = Callable[[bytes], None]


def reader(folder: Path) -> tuple[Target, list[bytes]]:
    """Reads inputs as files; those that begin with H are a header alone, its length and the tensors put to it."""
    model = tiny.model()
    made = tiny.adapter(model, 1)
    path = folder / "fuzzed.safetensors"
    write_adapter(path, made.info, made.blocks)
    good = path.read_bytes()
    length = int.from_bytes(good[:8], "little")
    header, tensors = good[8 : 8 + length], good[8 + length :]
    base = Base("tiny", made.info.base_fingerprint, made.info.layers, made.info.d)

    def read(data: bytes) -> None:
        if data[:1] == b"H":
            data = (len(data) - 1).to_bytes(8, "little") + data[1:] + tensors
        path.write_bytes(data)
        try:
            adapter = read_adapter(path, base)
        except NrError:
            return
        write_adapter(path, adapter.info, adapter.blocks)  # what was read can be written

    return read, [good, b"H" + header]


def bodies(folder: Path) -> tuple[Target, list[bytes]]:
    """Reads inputs as JSON bodies; the first byte says of which route."""

    def read(data: bytes) -> None:
        kind = BODIES[data[0] % len(BODIES)] if data else CompletionBody
        try:
            body = kind.model_validate(parse_json(data[1:]))
            if isinstance(body, CompletionBody | ChatBody):
                form_of(body)
            if isinstance(body, ChatBody):
                tools = toolbox(body.tools or (), body.tool_choice, body.parallel_tool_calls)
                json.dumps(
                    [[message.plain() for message in body.messages], tools.plain()], allow_nan=False
                ).encode()
        except ValidationError as error:
            faults = error.errors(include_url=False, include_context=False, include_input=False)
            refusal: NrError = invalid_request([{**fault, "loc": ("body", *fault["loc"])} for fault in faults])
        except json.JSONDecodeError:
            return
        except NrError as error:
            refusal = error
        else:
            return
        assert refusal.message
        json.dumps(error_body(refusal), ensure_ascii=False).encode()  # as Starlette sends it

    kinds = {kind: bytes([i]) for i, kind in enumerate(BODIES)}
    routes = {
        "/v1/completions": CompletionBody,
        "/v1/chat/completions": ChatBody,
        "/tokenize": TokenizeBody,
        "/detokenize": DetokenizeBody,
        "/v1/adapters": LoadBody,
        "/v1/adapters/x": PatchBody,
        "/v1/load_lora_adapter": LoadLoraBody,
        "/v1/unload_lora_adapter": UnloadLoraBody,
    }
    return read, [kinds[routes[path]] + json.dumps(body).encode() for _, path, body in GOOD if body is not None]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """The input changed: as bytes, or as the JSON after its first byte."""
    chance = random.Random(seed)
    if chance.random() < 0.5:
        try:
            return (data[:1] + mutated_json(chance, json.loads(data[1:]), 1))[:max_size]
        except (ValueError, RecursionError):
            pass  # no JSON: as bytes
    return bytes(atheris.Mutate(data, max_size))


def main(argv: list[str]) -> None:
    """Fuzz the target named first; ends the process."""
    target, *flags = argv[1:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = folder / "corpus"
        corpus.mkdir()
        read, seeds = {"reader": reader, "bodies": bodies}[target](folder)
        for i, seed in enumerate(seeds):
            (corpus / str(i)).write_bytes(seed)
        atheris.Setup([argv[0], *flags, str(corpus)], read, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv)
