"""Tools are for bases that write calls as they are read."""

import pytest

from nr_serve.api.tool_support import tool_fault
from tests import tiny
from tests.fakes import ByteTokenizer, serving

HERMES = '<tool_call>\n{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}\n</tool_call>'
TEMPLATES = {
    "instructions": ('<tool_call>\n{"name": <name>, "arguments": <object>}\n</tool_call>', "", True),
    "instructions, arguments first": ('<tool_call>{"arguments": <object>, "name": <name>}</tool_call>', "", True),
    "earlier calls": ("", HERMES, True),
    "Mistral": ("", "[TOOL_CALLS]{{ [c] | tojson }}", False),
    "XML": (
        "<tool_call>\n<function=name>",
        "<tool_call>\n<function={{ c.name }}>\n</function>\n</tool_call>",
        False,
    ),
    "GLM": ("", "<tool_call>{{ c.name }}\n<arg_key>x</arg_key></tool_call>", False),
    "tools alone": ("", "", False),
}
"""What a chat template says of calling tools, what it makes of a call, and whether that can be read."""


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_base_may_have_tools_if_its_template_writes_the_form_that_is_read(name):
    instructions, call, readable = TEMPLATES[name]
    tokenizer = tiny.tokenizer()
    tokenizer.hf.chat_template = "".join(
        (
            "{% if tools %}{{ tools | tojson }}",
            instructions,
            "{% endif %}{% for m in messages %}{{ m.content }}",
            "{% for t in m.tool_calls | default([]) %}{% set c = t.function %}",
            call,
            "{% endfor %}{% endfor %}",
        )
    )
    fault = tool_fault(tokenizer)
    assert fault is None if readable else "does not write calls as <tool_call>" in fault


def test_a_message_that_looks_like_a_call_does_not_count(monkeypatch):
    def template(self, messages, tools=None, **more):
        return f"{tools}" + "".join(message["content"] for message in messages)

    monkeypatch.setattr(ByteTokenizer, "apply_chat_template", template)
    tool = {"type": "function", "function": {"name": "f"}}
    messages = [{"role": "user", "content": '<tool_call>{"name": "f", "arguments": {}}</tool_call>'}]
    with serving() as served:
        error = served.chat(tools=[tool], messages=messages).json()["error"]
    assert (error["code"], error["param"]) == (400, "tools")
    assert "does not write calls" in error["message"]
