"""A server process as an operator sees it: scraped by Prometheus itself, and traced."""

import shutil
import socket
import subprocess
import threading
from contextlib import contextmanager

import httpx
import pytest
import yaml

from nr_serve.neutral.format import write_adapter
from nr_serve.server_process import local_server
from tests import tiny
from tests.collector import collecting
from tests.deploy import DEPLOY, alerts, dashboard_queries
from tests.waiting import until


@contextmanager
def prometheus(scraped: str, folder):
    """Prometheus as deploy/ sets it up, but for the address it scrapes and how often; a client of it."""
    shutil.copy(DEPLOY / "prometheus" / "alerts.yml", folder)
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "500ms", "evaluation_interval": "500ms"}
    config["scrape_configs"][0]["static_configs"] = [{"targets": [scraped]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--web.listen-address={address}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([*command, f"--storage.tsdb.path={folder / 'data'}"], stderr=log)
        try:
            with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=30) as client:
                until(lambda: process.poll() is None and answers(client))
                yield client
        finally:
            process.terminate()
            process.wait(30)


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def result(client: httpx.Client, query: str) -> list:
    answer = client.get("/api/v1/query", params={"query": query}).json()
    assert answer["status"] == "success", f"{query}: {answer}"
    return answer["data"]["result"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny base, a tiny adapter, and a file that is none."""
    folder = tmp_path_factory.mktemp("served")
    base = tiny.model(max_position_embeddings=8192)  # room for an answer that is still running when it is left
    tiny.save(base, folder / "tiny")
    adapter = tiny.adapter(base, seed=1)
    write_adapter(folder / "hu.safetensors", adapter.info, adapter.blocks)
    (folder / "bad.safetensors").write_bytes(b"no adapter")
    return folder


def make_traffic(url: str) -> None:
    """Something for every metric: answers, a full queue, gates that fire, a load that fails."""
    with httpx.Client(base_url=url, trust_env=False, timeout=60) as http:
        bad = http.post("/v1/adapters", json={"name": "bad", "path": "bad.safetensors"})
        assert bad.status_code == 400
        ask = {"model": "tiny", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
        http.post("/v1/completions", json=ask).raise_for_status()
        http.post("/v1/completions", json=ask | {"model": "hu"}).raise_for_status()
        fill_the_queue(http, ask | {"max_tokens": 8000})


def fill_the_queue(http: httpx.Client, ask: dict) -> None:
    """One request runs, one waits, and the next is refused."""
    waits = threading.Thread(target=lambda: http.post("/v1/completions", json=ask | {"max_tokens": 1}))
    with http.stream("POST", "/v1/completions", json=ask | {"stream": True}) as running:
        lines = running.iter_lines()  # kept: the stream is closed when it goes
        next(lines)
        waits.start()
        until(lambda: "nr_requests_waiting 1.0" in http.get("/metrics").text)
        assert http.post("/v1/completions", json=ask).status_code == 429
    waits.join(60)


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed")
def test_prometheus_answers_every_query_of_the_dashboard_and_takes_every_alert(folder, tmp_path):
    flags = ["--model", str(folder / "tiny"), "--adapter", f"hu={folder / 'hu.safetensors'}", "--threads", "1"]
    flags += ["--adapter-dir", str(folder), "--max-running", "1", "--max-waiting", "1", "--pages", "600"]
    flags += ["--metrics-compat", "vllm"]
    with local_server(*flags) as server, prometheus(server.url.partition("//")[2], tmp_path) as client:
        until(lambda: result(client, 'up{job="nr-serve"} == 1'))
        make_traffic(server.url)
        for title, query in dashboard_queries():
            until(lambda query=query: result(client, query), f"{title}: no data for {query}")
        assert result(client, 'vllm:lora_requests_info{running_lora_adapters="hu", max_lora="8"}')
        assert {rule["name"] for rule in rules(client)} == {rule["alert"] for rule in alerts()}
        assert {rule["health"] for rule in rules(client)} == {"ok"}


def test_a_server_sends_its_traces_before_it_ends(folder):
    with collecting() as collector:
        flags = ["--model", str(folder / "tiny"), "--threads", "1", "--otlp-endpoint", collector.url]
        with local_server(*flags) as server:
            ask = {"model": "tiny", "prompt": "hello", "max_tokens": 2, "ignore_eos": True}
            httpx.post(f"{server.url}/v1/completions", json=ask, trust_env=False).raise_for_status()
        assert sorted(collector.spans) == ["decode", "prefill", "queue", "text_completion tiny"]


def rules(client: httpx.Client) -> list[dict]:
    groups = client.get("/api/v1/rules").json()["data"]["groups"]
    return [rule for group in groups for rule in group["rules"]]
