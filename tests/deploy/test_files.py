"""The files in `deploy` agree with the code: a name, a port, a path or a time that changes here is changed there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from uvicorn import Config as UvicornConfig

from tests.deploy.files import DEPLOY, ROOT, directive, load, manifest, manifests, seconds, text
from tidings.server import systemd
from tidings.server.config import FOREIGN_ENV, SETTINGS, Config, load_config
from tidings.server.gateway.endpoint import PATH
from tidings.server.gateway.http import STREAM_COMMENT_SECONDS
from tidings.server.rest.operation import BULK_BYTES_MAX
from tidings.server.rest.system import READY_SECONDS_MAX, health, ready
from tidings.wire import limits

DEFAULTS = Config()
FILES = sorted(path for path in DEPLOY.rglob("*") if path.is_file())
YAML = [path for path in FILES if path.suffix in {".yaml", ".yml"}]
# What the files in front of the server call their own.
OWN = {"TIDINGS_DOMAIN", "TIDINGS_NODES"}
KNOWN = {setting.env for setting in SETTINGS} | {f"TIDINGS_{name}" for name in FOREIGN_ENV}


def container(kind: str = "Deployment") -> dict[str, Any]:
    (found,) = manifest(kind)["spec"]["template"]["spec"]["containers"]
    return dict(found)


def service(name: str) -> dict[str, Any]:
    return dict(load("compose.yaml")["services"][name])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_setting_that_is_named_exists(path: Path) -> None:
    known = KNOWN | OWN
    named = set(re.findall(r"\bTIDINGS_[A-Z][A-Z_]*[A-Z]\b", path.read_text(encoding="utf-8")))
    assert named <= known, f"no such settings: {named - known}"


@pytest.mark.parametrize("path", YAML, ids=lambda path: str(path.relative_to(DEPLOY)))
def test_it_is_yaml_without_repeated_keys(path: Path) -> None:
    class Strict(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [key.value for key, _ in node.value if key.value != "<<"]
            assert len(keys) == len(set(keys)), f"line {node.start_mark.line + 1}: a key occurs twice"
            return super().construct_mapping(node, deep)

    assert list(yaml.load_all(path.read_text(encoding="utf-8"), Strict))


@pytest.mark.parametrize("source", ["compose", "kubernetes", "image"])
def test_the_settings_together_are_accepted(source: str, tmp_path: Path) -> None:
    """What would keep a node from starting is found here and not there."""
    image = dict(re.findall(r"^\s+(TIDINGS_\w+)=(\S+?)(?: \\)?$", text("Dockerfile"), re.MULTILINE))
    assert image["TIDINGS_HOST"] == "0.0.0.0"
    environ = dict(image)
    if source == "compose":
        environ |= {name: re.sub(r"\$\{\w+:-(\w+)\}", r"\1", value) for name, value in service_settings().items()}
    elif source == "kubernetes":
        environ |= manifest("ConfigMap")["data"]
        environ |= {one["name"]: one.get("value", "pod-1") for one in container()["env"]}
    else:
        environ["TIDINGS_BEHIND_PROXY"] = "true"
    environ["TIDINGS_DATA_DIR"] = str(tmp_path)
    config = load_config(environ=environ)
    assert config.port == 8080
    assert config.behind_proxy
    assert config.embedded == (source == "image")
    assert bool(config.bus_servers) == (source != "image")


def service_settings() -> dict[str, str]:
    return {name: value for name, value in service("tidings-1")["environment"].items() if name.startswith("TIDINGS_")}


def test_ports_and_paths_are_the_servers() -> None:
    port = DEFAULTS.port
    assert f"EXPOSE {port}\n" in text("Dockerfile")
    assert f"TIDINGS_PORT={port}" in text("Dockerfile")
    assert f"'{health.path}'" in text("Dockerfile")
    pod = container()
    assert pod["ports"] == [{"name": "http", "containerPort": port}]
    assert pod["livenessProbe"]["httpGet"]["path"] == health.path
    assert pod["startupProbe"]["httpGet"]["path"] == pod["readinessProbe"]["httpGet"]["path"] == ready.path
    assert all(pod[probe]["httpGet"]["port"] == "http" for probe in ("livenessProbe", "readinessProbe", "startupProbe"))
    assert f"health_uri {ready.path}\n" in text("Caddyfile")
    assert f"127.0.0.1:{port}" in text("Caddyfile")
    assert f"server 127.0.0.1:{port} " in text("nginx.conf")
    assert re.fullmatch(r"/v1/(ws$|realtime)".replace("$", ""), PATH)
    paths = {rule["path"] for rule in manifest("Ingress")["spec"]["rules"][0]["http"]["paths"]}
    assert paths == {"/v1", "/docs"}
    assert manifest("ServiceMonitor")["spec"]["endpoints"][0]["path"] == "/metrics"


def test_a_probe_waits_longer_than_the_answer_may_take() -> None:
    pod = container()
    assert pod["readinessProbe"]["timeoutSeconds"] > READY_SECONDS_MAX
    assert pod["startupProbe"]["timeoutSeconds"] > READY_SECONDS_MAX
    health_timeout = re.search(r"health_timeout (\w+)", text("Caddyfile"))
    assert health_timeout
    assert seconds(health_timeout[1]) > READY_SECONDS_MAX


def test_nobody_is_killed_while_draining() -> None:
    """`drain_seconds` for what is in flight, as long again for requests that run, then some to write and close."""
    drain = 2 * DEFAULTS.drain_seconds + 2
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    assert float(manifest("ConfigMap")["data"]["TIDINGS_DRAIN_SECONDS"]) == DEFAULTS.drain_seconds
    (command, wait) = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod["terminationGracePeriodSeconds"] >= drain + float(wait)
    assert seconds(service("tidings-1")["stop_grace_period"]) >= drain
    unit = dict(re.findall(r"^(\w+)=(.*)$", text("systemd/tidings.service"), re.MULTILINE))
    assert seconds(unit["TimeoutStopSec"]) >= drain
    assert "STOPSIGNAL SIGTERM" in text("Dockerfile")


def test_a_node_is_replaced_when_the_last_ones_clients_are_back() -> None:
    assert manifest("Deployment")["spec"]["minReadySeconds"] > DEFAULTS.reconnect_spread_seconds


def test_files_suffice_for_the_connections() -> None:
    unit = dict(re.findall(r"^(\w+)=(.*)$", text("systemd/tidings.service"), re.MULTILINE))
    assert int(unit["LimitNOFILE"]) > DEFAULTS.connections_max
    assert service("tidings-1")["ulimits"]["nofile"] > DEFAULTS.connections_max
    # Two for each client, in the proxy.
    assert int(directive("worker_rlimit_nofile")) >= 2 * int(directive("worker_connections"))


def test_the_image_is_built_as_the_checkout_is() -> None:
    dockerfile = text("Dockerfile")
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    python = re.search(r"^ARG PYTHON=(\S+)$", dockerfile, re.MULTILINE)
    assert python
    assert wanted == f">={python[1]}"
    assert set(re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)) == {"python:${PYTHON}-slim-bookworm"}
    uv = re.search(r"^UV_VERSION=(\S+)$", (ROOT / ".ci/setup").read_text(), re.MULTILINE)
    assert uv
    assert f"uv=={uv[1]}\n" in dockerfile
    assert dockerfile.count("uv sync --frozen") == 2
    copied = {
        name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.MULTILINE) for name in line.split()
    }
    let_in = set(re.findall(r"^!(.+)$", text("Dockerfile.dockerignore"), re.MULTILINE))
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)


def test_one_user_everywhere() -> None:
    (uid,) = set(re.findall(r"^USER (\d+):\1$", text("Dockerfile"), re.MULTILINE))
    for kind in ("Deployment", "Job"):
        context = manifest(kind)["spec"]["template"]["spec"]["securityContext"]
        assert {context["runAsUser"], context["runAsGroup"], context["fsGroup"]} == {int(uid)}
    assert any(f"uid={uid}" in mount for mount in service("tidings-1")["tmpfs"])


def test_pods_meet_the_restricted_standard() -> None:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and read-only besides."""
    for kind in ("Deployment", "Job"):
        pod = manifest(kind)["spec"]["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for one in pod["containers"] + pod["initContainers"]:
            context = one["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert one["resources"]["limits"]["memory"]


def test_every_mount_has_its_volume_and_every_name_its_object() -> None:
    for kind in ("Deployment", "Job"):
        pod = manifest(kind)["spec"]["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["name"] for one in pod["containers"] + pod["initContainers"] for mount in one["volumeMounts"]}
        assert mounted == volumes
        assert pod["serviceAccountName"] == manifest("ServiceAccount")["metadata"]["name"]
        (secret,) = [volume["secret"] for volume in pod["volumes"] if "secret" in volume]
        assert secret["secretName"] == manifest("Secret")["metadata"]["name"]
        copied = pod["initContainers"][0]["command"][2:-1]
        assert {Path(path).name for path in copied} == set(manifest("Secret")["stringData"])
        for one in container(kind)["env"]:
            if str(one.get("value", "")).startswith("/keys/"):
                assert Path(one["value"]).name in manifest("Secret")["stringData"]
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    for kind in ("Deployment", "PodDisruptionBudget"):
        assert manifest(kind)["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert manifest("Service")["spec"]["selector"].items() <= labels.items()
    assert manifest("Job")["spec"]["template"]["metadata"]["labels"] != labels, "the Service would send it traffic"
    for path, document in manifests():
        if document["kind"] == "Kustomization":
            assert all((path.parent / name).is_file() for name in document["resources"])


def test_compose_is_whole() -> None:
    compose = load("compose.yaml")
    for name, one in compose["services"].items():
        assert set(one.get("networks", [])) <= set(compose["networks"]), name
        assert set(one.get("secrets", [])) <= set(compose["secrets"]), name
        assert set(one.get("depends_on", [])) <= set(compose["services"]), name
        volumes = {str(volume).split(":")[0] for volume in one.get("volumes", [])}
        assert all(volume in compose["volumes"] or (DEPLOY / volume).exists() for volume in volumes), name
        # Only the proxy can be reached from outside, only what has to can reach the database.
        assert bool(one.get("ports")) == (name == "caddy")
    nodes = [name for name in compose["services"] if re.fullmatch(r"tidings-\d", name)]
    assert len({compose["services"][name]["environment"]["TIDINGS_NODE"] for name in nodes}) == len(nodes) == 2
    for name in nodes:
        one = compose["services"][name]
        assert one["environment"]["TIDINGS_NODE"].isalnum()
        assert one["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
        # The same key file for all: what one node writes another one reads.
        assert "root_key" in one["secrets"]
        assert one["environment"]["TIDINGS_KEY_FILE"] == "/run/secrets/root_key"
    assert compose["services"]["migrate"]["command"] == ["migrate"]
    trusted = compose["services"]["tidings-1"]["environment"]["TIDINGS_TRUSTED_PROXIES"]
    assert compose["networks"]["front"]["ipam"]["config"] == [{"subnet": trusted}]
    flags = compose["services"]["postgres"]["command"]
    assert {"--fsync=on", "--synchronous_commit=on", "--full_page_writes=on"} <= set(flags)
    assert re.fullmatch(r"postgres:18\b.*", compose["services"]["postgres"]["image"])


def test_proxies_let_through_what_the_server_takes() -> None:
    body = max(BULK_BYTES_MAX, 4 * DEFAULTS.frame_bytes_max)
    assert directive("client_max_body_size") == "1m"
    assert body <= 1 << 20
    assert "max_size 1MiB\n" in text("Caddyfile")
    buffers = re.fullmatch(r"4 (\d+)k", directive("large_client_header_buffers"))
    assert buffers
    assert int(buffers[1]) * 1024 > limits.TOKEN_BYTES_MAX + 100


def test_proxies_wait_longer_than_the_server_is_silent() -> None:
    quiet = max(2 * DEFAULTS.heartbeat_seconds, limits.POLL_WAIT_MAX, STREAM_COMMENT_SECONDS)
    annotations = manifest("Ingress")["metadata"]["annotations"]
    for value in (
        directive("proxy_read_timeout"),
        annotations["nginx.ingress.kubernetes.io/proxy-read-timeout"],
    ):
        assert seconds(value) > quiet


def test_proxies_give_up_idle_connections_before_the_server_does() -> None:
    """Otherwise a request is sent into a connection that is just being closed, and lost for those not repeated."""
    server = UvicornConfig(app="").timeout_keep_alive
    assert seconds(directive("keepalive_timeout")) < server
    caddy = re.search(r"keepalive (\w+)", text("Caddyfile"))
    assert caddy
    assert seconds(caddy[1]) < server


def test_the_unit_says_what_the_server_does() -> None:
    unit = text("systemd/tidings.service")
    assert "Type=notify\n" in unit
    watchdog = re.search(r"^WatchdogSec=(\d+)$", unit, re.MULTILINE)
    assert watchdog
    usec = {"WATCHDOG_USEC": str(int(watchdog[1]) * 1_000_000)}
    assert systemd.watchdog_seconds(usec) == int(watchdog[1]) / 2


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "tidings.service"
    program = Path(sys.executable).with_name("tidings")
    unit.write_text(text("systemd/tidings.service").replace("/opt/tidings/bin/tidings", str(program)))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("folder", ["base", "migrate"])
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kustomize_puts_it_together(folder: str) -> None:
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = list(yaml.safe_load_all(done.stdout))
    assert {document["metadata"].get("namespace", "tidings") for document in made} == {"tidings"}
    assert "image: registry.example.com/tidings:" in done.stdout
    assert "image: tidings\n" not in done.stdout


def test_kubernetes_accepts_the_manifests() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate to try this")
    for _, document in manifests():
        if document["kind"] not in {"Kustomization", "ServiceMonitor"}:
            validate.validate(document, "1.31", strict=True)
