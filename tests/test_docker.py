"""What can be known about the Docker files without Docker; docker/smoke.sh builds and runs them."""

from __future__ import annotations

import json
import os
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.engine.block_manager import BlockManager
from server.engine.engine import BackendInfo
from server.metrics import Metrics, render
from server.settings import ENV_PREFIX, Settings, load_settings

ROOT = Path(__file__).parent.parent


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and their arguments, continued lines joined."""
    text = (ROOT / "docker/Dockerfile").read_text()
    lines = re.sub(r"(?m)^#.*\n", "", text).replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def image_environment() -> dict[str, str]:
    """Variables that the last stage sets."""
    instructions = dockerfile()
    last = max(i for i, (word, _) in enumerate(instructions) if word == "FROM")
    pairs = [pair for word, rest in instructions[last:] if word == "ENV" for pair in shlex.split(rest)]
    return dict(pair.split("=", 1) for pair in pairs)


def argument(word: str) -> str:
    """The last argument of an instruction."""
    return [rest for name, rest in dockerfile() if name == word][-1]


def compose() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return loaded


def default(value: str) -> str:
    """Compose's ${NAME:-default} and ${NAME-default} with nothing set."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", value)


def assert_settings(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        if name.startswith(ENV_PREFIX):
            field = name.removeprefix(ENV_PREFIX).lower()
            assert field in Settings.model_fields, f"{name} is no setting"
            if default(value):
                load_settings(**{field: default(value)})


def test_image_starts_the_server_with_flags_and_variables_that_exist() -> None:
    command, subcommand, *flags = json.loads(argument("ENTRYPOINT"))
    assert (command, subcommand) == ("lpa", "serve")
    assert all(f.removeprefix("--").replace("-", "_") in Settings.model_fields for f in flags if f.startswith("--"))
    assert not [word for word, _ in dockerfile() if word == "CMD"]
    assert_settings(image_environment())
    assert image_environment()["LPA_HOST"] == "0.0.0.0"
    assert argument("EXPOSE") == image_environment()["LPA_PORT"]
    assert argument("STOPSIGNAL") == "SIGTERM"
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", argument("USER"))


def test_health_check_is_a_program_for_the_servers_port() -> None:
    check = json.loads(argument("HEALTHCHECK").partition("CMD ")[2])
    assert check[:2] == ["python", "-c"]
    compile(check[2], "HEALTHCHECK", "exec")
    assert "/health" in check[2]
    assert "LPA_PORT" in check[2]


def test_what_the_image_copies_exists_and_is_sent_to_the_build() -> None:
    ignore = (ROOT / ".dockerignore").read_text().split("\n")
    assert "*" in ignore
    copied = [
        source
        for word, rest in dockerfile()
        if word == "COPY" and not rest.startswith("--from")
        for source in rest.split()[:-1]
    ]
    assert {"pyproject.toml", "lpa_model", "server"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore
    assert not any(fnmatch("lpa_model/checkpoints/lpa-tiny/model.safetensors", line) for line in ignore if line != "*")


def test_compose_refers_to_what_exists() -> None:
    services = compose()["services"]
    build = services["lpa"]["build"]
    assert (ROOT / build["context"] / build["dockerfile"]).is_file()
    assert set(build["args"]) <= {rest.partition("=")[0] for word, rest in dockerfile() if word == "ARG"}
    for service in services.values():
        for volume in service["volumes"]:
            source = default(volume).split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in compose()["volumes"], source
        assert set(service.get("depends_on", {})) <= set(services)
        assert service["read_only"] is True
        assert "privileged" not in service
    assert_settings(services["lpa"]["environment"])
    assert services["prometheus"]["depends_on"]["lpa"]["condition"] == "service_healthy"


def test_compose_gives_the_drain_the_time_it_needs() -> None:
    lpa = compose()["services"]["lpa"]
    grace = int(lpa["stop_grace_period"].removesuffix("s"))
    assert grace > float(lpa["environment"]["LPA_DRAIN_TIMEOUT"])
    assert grace > Settings.model_fields["drain_timeout"].default


def test_prometheus_scrapes_the_port_that_compose_gives_the_server() -> None:
    config = yaml.safe_load((ROOT / "docker/prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job.get("metrics_path", "/metrics") == "/metrics"
    (target,) = [target for group in job["static_configs"] for target in group["targets"]]
    host, port = target.split(":")
    lpa = compose()["services"][host]
    assert lpa["environment"].get("LPA_PORT", image_environment()["LPA_PORT"]) == port
    assert port in {mapping.rsplit(":", 1)[1] for mapping in lpa["ports"]}
    mounts = [volume.split(":")[0] for volume in compose()["services"]["prometheus"]["volumes"]]
    assert {
        "./docker/prometheus/prometheus.yml",
        *(f"./docker/prometheus/{name}" for name in config["rule_files"]),
    } <= set(mounts)


def dashboards() -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((ROOT / "docker/grafana/dashboards").glob("*.json"))]


def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((ROOT / "docker/prometheus/rules.yml").read_text())["groups"]
    found: list[dict[str, Any]] = group["rules"]
    return found


def test_panels_and_rules_ask_only_for_metrics_that_exist() -> None:
    metrics = Metrics("tiny")
    metrics.set_engine("1", BackendInfo(name="cpu"), BlockManager(1, 32, True))
    metrics.observe_http("/v1/completions", "POST", 200, 0.1)
    metrics.set_batches({"completed": 1}, 0)
    families = text_string_to_metric_families(render(metrics.registry)[0].decode())
    samples = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    expressions = [target["expr"] for board in dashboards() for panel in board["panels"] for target in panel["targets"]]
    expressions += [rule["expr"] for rule in rules()]
    assert len(expressions) > 40
    for expression in expressions:
        named = re.findall(r"\b(?:lpa:|process_)\w+", expression)
        assert named or "up{" in expression, expression
        assert not [name for name in named if name not in samples], expression
        # labels that come from the server, not from the scrape
        labels = set(re.findall(r"(\w+)\s*=~?\"", expression)) | set(
            re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", expression)))
        )
        assert labels <= {"instance", "job"} | set().union(*(samples[name] for name in named)), expression


def test_every_dashboard_finds_its_data_source_and_its_place() -> None:
    mounts = dict(volume.split(":")[:2] for volume in compose()["services"]["grafana"]["volumes"])
    provisioning = ROOT / "docker/grafana/provisioning"
    assert mounts["./docker/grafana/provisioning"] == "/etc/grafana/provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources/prometheus.yml").read_text())["datasources"]
    (provider,) = yaml.safe_load((provisioning / "dashboards/lpa.yml").read_text())["providers"]
    assert source["url"] == "http://prometheus:9090"
    assert mounts["./docker/grafana/dashboards"] == provider["options"]["path"]
    assert {board["uid"] for board in dashboards()} == {"lpa-serving", "lpa-scoring"}
    for board in dashboards():
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        assert {panel["datasource"]["uid"] for panel in board["panels"]} == {source["uid"]}


def test_an_alert_says_what_and_how_bad() -> None:
    assert len({rule["alert"] for rule in rules()}) == len(rules()) == 6
    for rule in rules():
        assert rule["annotations"]["summary"].startswith("{{ $labels.instance }}")
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_smoke_script_can_be_run_and_gives_the_drain_time() -> None:
    script = ROOT / "docker/smoke.sh"
    assert os.access(script, os.X_OK)
    seconds = dict(re.findall(r"(?m)^(drain_timeout|stop_timeout)=(\d+)", script.read_text()))
    assert int(seconds["stop_timeout"]) > int(seconds["drain_timeout"])
