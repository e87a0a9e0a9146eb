"""The documentation says what the code says."""

import re
from pathlib import Path

from nr_serve.config import ServeConfig, settings_table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_settings_page_holds_the_settings():
    assert settings_table() in (DOCS / "settings.md").read_text(encoding="utf-8"), (
        "docs/settings.md is out of date: paste what nr_serve.config.settings_table() returns"
    )


def test_a_list_in_the_environment_has_commas_as_the_page_says(monkeypatch):
    (example,) = re.findall(r"`NR_ADAPTER=(.+)`", (DOCS / "settings.md").read_text(encoding="utf-8"))
    monkeypatch.setenv("NR_ADAPTER", example)
    assert ServeConfig().adapter == ["hu.safetensors", "da=x.safetensors"]
    monkeypatch.setenv("NR_ADAPTER", "hu.safetensors")
    monkeypatch.setenv("NR_ADAPTER_DIR", "/a, b/c,")
    assert (ServeConfig().adapter, ServeConfig().adapter_dir) == (["hu.safetensors"], [Path("/a"), Path("b/c")])
    monkeypatch.setenv("NR_ADAPTER", "")
    assert ServeConfig().adapter == []
