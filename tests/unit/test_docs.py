"""The documentation says what the code says."""

from pathlib import Path

from nr_serve.config import ServeConfig, settings_table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_settings_page_holds_the_settings():
    assert settings_table() in (DOCS / "settings.md").read_text(encoding="utf-8"), (
        "docs/settings.md is out of date: paste what nr_serve.config.settings_table() returns"
    )


def test_a_list_in_the_environment_is_json_as_the_page_says(monkeypatch):
    monkeypatch.setenv("NR_ADAPTER", '["hu=hu.safetensors"]')
    assert ServeConfig().adapter == ["hu=hu.safetensors"]
