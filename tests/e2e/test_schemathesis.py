"""schemathesis asks what /openapi.json allows and what it forbids: every answer is one that is announced there."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from nr_serve.default_model import fetch_model
from nr_serve.server_process import local_server

load_all_checks()
EXAMPLES = 20  # of each kind, an operation
WHOLE = {
    "/v1/completions": {"prompt": "Hello", "max_tokens": 2},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [40]},
}
"""Bodies that are answered, once `model` is added."""
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="session")
def small():
    """A server whose answers are short, however long a one is asked for."""
    fetch_model()
    with local_server("--max-model-len", "24", "--max-waiting", "16", "--max-batch-tokens", "64") as client:
        yield client


def test_every_answer_is_announced(small):
    document = schemathesis.openapi.from_url(f"{small.url}/openapi.json")
    operations = [result.ok() for result in document.get_all_operations()]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/adapters"} <= {
        operation.path for operation in operations
    }
    found = [
        f"{operation.label}, {mode.value} examples: {failure}"
        for operation in operations
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        if (failure := _failure(operation, mode, small.models()[0]["id"])) is not None
    ]
    assert not found, "\n\n".join(found)
    assert small.adapters() == []


def _failure(operation, mode: GenerationMode, model: str) -> str | None:
    """What the first answer was that the document does not announce."""

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), data=st.data())
    def ask(case, data):
        if mode is GenerationMode.POSITIVE and operation.path in WHOLE:
            # All fields at random are hardly ever a request that makes sense; one at a time is.
            one = data.draw(st.sampled_from(["model", *case.body]))
            case.body = WHOLE[operation.path] | {one: case.body.get(one)} | {"model": model}
        case.validate_response(case.call(timeout=120), checks=CHECKS)

    try:
        ask()
    except Unsatisfiable:  # there is nothing wrong to ask of a route that takes nothing
        return None
    except FailureGroup as failures:
        return "; ".join(f"{each.title}: {each.message}" for each in failures.exceptions)
    return None
