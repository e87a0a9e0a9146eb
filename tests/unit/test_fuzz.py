"""Wrong files and wrong requests, a few thousand of them: loadtests/fuzz.py in short."""

import asyncio
import json

from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.fuzz import fuzz
from nr_serve.api.errors import invalid_request
from nr_serve.api.schemas import ChatBody, CompletionBody, DetokenizeBody, LoadBody, PatchBody, TokenizeBody

BODIES = (CompletionBody, ChatBody, TokenizeBody, DetokenizeBody, LoadBody, PatchBody)
FIELDS = sorted({name for body in BODIES for name in body.model_fields})
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=3),
)


def test_no_input_crashes_the_server_or_changes_a_stream_beside_it():
    found = asyncio.run(fuzz(2000, seed=1))
    assert (found["files"], found["requests"]) == (1000, 1000)
    assert found["crashes"] == found["server_errors"] == []
    assert found["streams"] > 1
    assert found["streams_changed"] == 0
    assert found["pages"] == [0, 0]
    assert found["descriptors"][0] == found["descriptors"][1]
    assert found["status"] == "ready"
    assert {200, 201, 400, 404} <= set(found["statuses"]), "some of it is good"


@settings(max_examples=1000, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(BODIES), st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=6))
def test_any_json_is_a_body_or_refused_with_a_message(body, data):
    try:
        body.model_validate(data)
    except ValueError as error:
        refusal = invalid_request([{**each, "loc": ("body", *each["loc"])} for each in error.errors()])
        assert json.dumps(refusal.message)
        assert refusal.message
