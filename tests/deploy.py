"""What deploy/ holds, as its tests read it: the dashboard's queries, the alerts, the metrics that a query names."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "nr-serve.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
FROM_PROMETHEUS = {"up"}
"""Metrics that Prometheus makes itself."""

_WORDS = {"and", "or", "unless", "by", "without", "on", "ignoring", "group_left", "group_right", "bool", "offset"}
_NOT_NAMES = re.compile(
    r'"[^"]*"'  # texts
    r"|\{[^}]*\}|\[[^\]]*\]"  # label matchers, ranges
    r"|\b(?:by|without|on|ignoring)\s*\([^)]*\)"  # lists of labels
)


def panels() -> list[dict]:
    return [
        panel for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"] if panel["type"] != "row"
    ]


def dashboard_queries() -> Iterator[tuple[str, str]]:
    """(panel's title, query), with Grafana's variables filled in."""
    for panel in panels():
        for target in panel["targets"]:
            query = target["expr"].replace("$__rate_interval", "1m").replace('"$instance"', '".*"')
            assert "$" not in query, f"{panel['title']}: a variable that the tests do not know"
            yield panel["title"], query


def alerts() -> list[dict]:
    groups = yaml.safe_load(ALERTS.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def metrics_in(query: str) -> set[str]:
    """Names of the metrics in a query: what is neither a function, a word of the language nor a label."""
    names = re.finditer(r"(?<![\w:])[a-zA-Z_:][a-zA-Z0-9_:]*(?!\w)(?!\s*\()", _NOT_NAMES.sub(" ", query))
    return {name.group() for name in names} - _WORDS


def sample_names(exposition: str) -> set[str]:
    """Every name a query may use, of metrics that have no sample yet too."""
    ends: dict[str, Iterable[str]] = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}
    families = text_string_to_metric_families(exposition)
    return {family.name + end for family in families for end in ends.get(family.type, [""])}
