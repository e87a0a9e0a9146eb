"""What deploy/ ships fits the server: its metrics, its settings, its routes."""

import re
import shlex
import shutil
import subprocess
import tomllib
from argparse import ArgumentParser

import kubernetes_validate
import pytest
import yaml

from nr_serve.config import ServeConfig
from tests.deploy import (
    ALERTS,
    DASHBOARD,
    DEPLOY,
    FROM_PROMETHEUS,
    alerts,
    dashboard_queries,
    metrics_in,
    panels,
    sample_names,
)
from tests.fakes import serving
from tests.waiting import PATIENCE

COMPOSE = DEPLOY / "compose.yaml"
KUBERNETES = DEPLOY / "kubernetes"
KUBERNETES_VERSION = "1.32"
ROOT = DEPLOY.parent
LINTED_AWAY = {"nr_slots_total", "nr_pages_total"}
"""Gauges that are called a total."""


def needs(*programs: str):
    missing = [program for program in programs if shutil.which(program) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} is not installed")


def run(*command: str, given: str | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, input=given)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def exposition() -> str:
    with serving() as server:
        server.complete(max_tokens=2)
        return server.http.get("/metrics").text


# Prometheus and Grafana


@pytest.mark.parametrize(
    ("query", "names"),
    [
        ('sum by (le, x) (rate(a_bucket{b=~"c_d"}[5m])) / rate(e_total[1m] offset 1d)', {"a_bucket", "e_total"}),
        ("a_b > 0 and time() - c:d > 60 or vector(0)", {"a_b", "c:d"}),
    ],
)
def test_the_names_in_a_query_are_found(query, names):
    assert metrics_in(query) == names


@pytest.mark.parametrize(("title", "query"), list(dashboard_queries()))
def test_every_query_of_the_dashboard_names_metrics_that_exist(title, query, exposition):
    named = metrics_in(query)
    assert named
    assert named <= sample_names(exposition)


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_every_alert_names_metrics_that_exist_and_says_what_is_wrong(rule, exposition):
    assert metrics_in(rule["expr"]) <= sample_names(exposition) | FROM_PROMETHEUS
    assert rule["labels"]["severity"] in ("warning", "critical")
    assert rule["annotations"]["summary"]


def test_the_panels_can_be_told_apart_and_do_not_overlap():
    assert len({panel["id"] for panel in panels()}) == len({panel["title"] for panel in panels()}) == len(panels())
    taken = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert {panel["datasource"]["uid"]} | {t["datasource"]["uid"] for t in panel["targets"]} == {
            "${datasource}"
        }


@needs("promtool")
def test_prometheus_takes_the_configuration_and_each_alert_fires_as_its_example_says():
    run("promtool", "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml"))
    run("promtool", "check", "rules", str(ALERTS))
    run("promtool", "test", "rules", str(ALERTS.with_name("alerts_test.yml")))
    examples = ALERTS.with_name("alerts_test.yml").read_text(encoding="utf-8")
    firing = re.findall(r"alertname: (\w+)\n +exp_alerts:", examples)
    assert set(firing) == {rule["alert"] for rule in alerts()}


@needs("promtool")
def test_the_metrics_are_named_as_prometheus_advises(exposition):
    done = subprocess.run(["promtool", "check", "metrics"], input=exposition, capture_output=True, text=True)
    complaints = {line.split(" ")[0] for line in (done.stdout + done.stderr).splitlines()}
    assert complaints <= LINTED_AWAY


def assert_settings(environment) -> None:
    settings = {f"NR_{name.upper()}" for name in ServeConfig.model_fields}
    assert {name for name in environment if name.startswith("NR_")} <= settings


# Compose


def services() -> dict[str, dict]:
    return yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]


@pytest.mark.parametrize("name", services())
def test_every_service_is_unprivileged_and_reachable_from_this_machine_only(name):
    service = services()[name]
    assert int(service["user"]) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service["ports"])
    assert "latest" not in service["image"]


@pytest.mark.parametrize("name", services())
def test_what_a_service_mounts_is_there(name):
    volumes = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["volumes"]
    for mount in services()[name]["volumes"]:
        source = re.sub(r"\$\{\w+:-(.+?)\}", r"\1", mount).split(":")[0]
        if source.startswith("."):
            assert (DEPLOY / source).is_dir()
            assert mount.endswith(":ro")
        else:
            assert source in volumes


def test_prometheus_and_grafana_find_what_they_ask_for():
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())["scrape_configs"]
    [target] = scraped[0]["static_configs"][0]["targets"]
    assert target.partition(":")[0] in services()
    [source] = yaml.safe_load(next(DEPLOY.glob("grafana/provisioning/datasources/*")).read_text())["datasources"]
    assert source["url"].partition("//")[2].partition(":")[0] in services()
    [provider] = yaml.safe_load(next(DEPLOY.glob("grafana/provisioning/dashboards/*")).read_text())["providers"]
    mounted = [mount.split(":") for mount in services()["grafana"]["volumes"]]
    [host] = [source for source, target, *_ in mounted if target == provider["options"]["path"]]
    assert (DEPLOY / host).resolve() == DASHBOARD.parent
    assert scraped[0]["job_name"] == "nr-serve", "an alert names it"


def test_the_servers_environment_is_made_of_its_settings():
    assert_settings(services()["nr-serve"]["environment"])


@needs("docker")
def test_docker_understands_the_compose_files():
    if subprocess.run(["docker", "compose", "version"], capture_output=True).returncode != 0:
        pytest.skip("docker has no compose here")
    files = ["-f", str(COMPOSE), "-f", str(DEPLOY / "compose.gpu.yaml")]
    keys = ["env", "NR_API_KEY=a", "NR_ADMIN_KEY=b", "GRAFANA_PASSWORD=c"]
    run(*keys, "docker", "compose", *files, "config", "--quiet")


# The image


def test_the_image_has_what_every_setting_of_the_server_needs():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    [extras] = re.findall(r"pip install .*'\.\[(.+)\]'", dockerfile)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert "otel" in extras.split(","), "--otlp-endpoint needs it"
    assert set(extras.split(",")) <= set(known)


def test_all_that_the_image_fetches_goes_to_its_volume():
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    kept = dict(re.findall(r"(NR_CACHE|HF_HOME|TRITON_CACHE_DIR)=(\S+)", dockerfile))
    assert len(kept) == 3
    assert all(folder == "/cache" or folder.startswith("/cache/") for folder in kept.values())


@pytest.mark.parametrize("page", ["README.md", "docs/deploy.md", "deploy/compose.yaml"])
def test_an_image_for_a_cpu_can_be_told_where_its_torch_is(page):
    dockerfile, text = ((ROOT / name).read_text(encoding="utf-8") for name in ("Dockerfile", page))
    for argument in ("TORCH", "PIP_EXTRA_INDEX_URL"):
        assert re.search(rf"^ARG {argument}\b", dockerfile, re.M)
        assert re.search(rf"\b{argument}\b", text)


# Kubernetes


def built(folder) -> dict[str, dict]:
    """The manifests that a folder gives, the last of each kind."""
    if shutil.which("kustomize"):
        command = ["kustomize", "build"]
    elif shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    else:
        pytest.skip("neither kustomize nor kubectl is installed")
    return {each["kind"]: each for each in yaml.safe_load_all(run(*command, str(folder)))}


@pytest.fixture
def whole(tmp_path):
    """The manifests with every component."""
    shutil.copytree(KUBERNETES, tmp_path, dirs_exist_ok=True)
    chosen = tmp_path / "kustomization.yaml"
    chosen.write_text(chosen.read_text(encoding="utf-8").replace("  # - ", "  - "), encoding="utf-8")
    return tmp_path


def pod(folder) -> dict:
    return built(folder)["Deployment"]["spec"]["template"]["spec"]


def environment(folder) -> dict[str, str | None]:
    [server] = pod(folder)["containers"]
    return {each["name"]: each.get("value") for each in server["env"]}


def test_the_manifests_need_nothing_that_a_plain_cluster_lacks():
    manifests = built(KUBERNETES)
    for manifest in manifests.values():
        kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    assert set(manifests) == {"Deployment", "Service", "PersistentVolumeClaim"}


def test_with_every_component_the_manifests_are_valid_too(whole):
    manifests = built(whole)
    for manifest in manifests.values():
        if "." not in manifest["apiVersion"].partition("/")[0]:  # the others are custom resources
            kubernetes_validate.validate(manifest, KUBERNETES_VERSION, strict=True)
    assert set(manifests) >= {"Deployment", "PodMonitor", "InferencePool", "HTTPRoute"}


def test_the_pod_for_copying_writes_as_the_server_reads():
    copying = yaml.safe_load((KUBERNETES / "copy-adapters.yaml").read_text(encoding="utf-8"))
    kubernetes_validate.validate(copying, KUBERNETES_VERSION, strict=True)
    spec, server = copying["spec"], pod(KUBERNETES)
    [mine], [theirs] = spec["containers"], server["containers"]
    assert spec["volumes"][0] in server["volumes"]
    assert mine["volumeMounts"][0] | {"readOnly": True} in theirs["volumeMounts"]
    assert spec["securityContext"].items() <= server["securityContext"].items()
    assert mine["securityContext"] == theirs["securityContext"]


def test_the_pod_is_unprivileged():
    spec = pod(KUBERNETES)
    [server] = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["automountServiceAccountToken"] is False
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(server["resources"]) == {"requests", "limits"}


def test_the_pod_is_probed_where_the_server_answers():
    [server] = pod(KUBERNETES)["containers"]
    ports = {each["name"]: each["containerPort"] for each in server["ports"]}
    with serving() as running:
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = server[probe]["httpGet"]
            assert ports[asked["port"]] == ServeConfig.model_fields["port"].default
            assert running.http.get(asked["path"]).status_code == 200


def test_running_answers_may_end_before_the_server_is_killed():
    spec = pod(KUBERNETES)
    [server] = spec["containers"]
    answers = ServeConfig.model_fields["grace_period"].default
    pause = server["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert spec["terminationGracePeriodSeconds"] > pause + answers
    assert int(services()["nr-serve"]["stop_grace_period"].removesuffix("s")) > answers


def test_service_monitor_and_pool_select_the_pods(whole):
    kinds = built(whole)
    labels = kinds["Deployment"]["spec"]["template"]["metadata"]["labels"]
    service, monitor, pool = (kinds[kind]["spec"] for kind in ("Service", "PodMonitor", "InferencePool"))
    for selected in (service["selector"], monitor["selector"]["matchLabels"], pool["selector"]["matchLabels"]):
        assert selected.items() <= labels.items()
    assert labels[monitor["jobLabel"]] == "nr-serve", "an alert names the job"
    ports = {each["name"]: each["containerPort"] for each in pod(KUBERNETES)["containers"][0]["ports"]}
    assert {service["ports"][0]["targetPort"], monitor["podMetricsEndpoints"][0]["port"]} == set(ports)
    assert [each["number"] for each in pool["targetPorts"]] == list(ports.values())
    [backend] = kinds["HTTPRoute"]["spec"]["rules"][0]["backendRefs"]
    assert (backend["kind"], backend["name"]) == ("InferencePool", kinds["InferencePool"]["metadata"]["name"])


def test_the_pods_environment_is_made_of_settings_and_gives_the_gateway_its_metrics(whole):
    assert_settings(environment(whole))
    assert environment(whole)["NR_METRICS_COMPAT"] == "vllm"
    assert "NR_METRICS_COMPAT" not in environment(KUBERNETES)


def test_a_gpu_is_asked_for_by_its_component(whole):
    limits = [pod(folder)["containers"][0]["resources"]["limits"] for folder in (whole, KUBERNETES)]
    assert [limit.get("nvidia.com/gpu") for limit in limits] == ["1", None]


# The page


def test_every_path_on_the_page_is_there():
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    paths = set(re.findall(r"\bdeploy/[\w./-]+", page))
    assert {path for path in paths if not (ROOT / path.rstrip(".")).exists()} == set()
    assert "deploy/compose.yaml" in paths


def test_the_line_on_the_page_makes_the_alerts_a_rule_of_the_operator():
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    [line] = re.findall(r"^    (\{ printf .+) \| kubectl apply -f -$", page, re.M)
    rule = yaml.safe_load(subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, check=True).stdout)
    assert (rule["kind"], rule["metadata"]) == ("PrometheusRule", {"name": "nr-serve"})
    assert rule["spec"] == yaml.safe_load(ALERTS.read_text(encoding="utf-8"))


def test_the_server_answers_the_requests_on_the_page():
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    [line] = re.findall(r"^    (curl (?:.*\\\n)*.*)$", page, re.M)
    curl = ArgumentParser()
    curl.add_argument("url")
    curl.add_argument("-H", action="append")
    curl.add_argument("-d")
    given = curl.parse_args(shlex.split(line.replace("\\\n", "").replace("$NR_ADMIN_KEY", "root"))[1:])
    # What curl says of a body unless it is told otherwise.
    headers = {"Content-Type": "application/x-www-form-urlencoded"} | dict(each.split(": ", 1) for each in given.H)
    path = given.url.removeprefix("http://127.0.0.1:8000")
    with serving(adapter_dir=[ROOT / "adapters"], admin_key="root") as server:
        server.http.delete("/v1/adapters/hu", headers=headers)
        answer = server.http.post(path, content=given.d, headers=headers)
        refusal = answer.json()["error"]
        told = (answer.status_code, refusal["message"])
        assert told == (400, "not a whole safetensors file"), "the file is found; the fake engine takes none"
