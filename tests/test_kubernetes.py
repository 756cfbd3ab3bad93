"""What can be known about the Kubernetes manifests without a cluster; tests/extra has their schema."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from server.engine.block_manager import BlockManager
from server.engine.engine import BackendInfo
from server.keys import METRICS, PROBES
from server.metrics import Metrics, render
from server.serve import EXIT_TIMEOUT, FLUSH_TIMEOUT
from server.settings import ENV_PREFIX, Settings, load_settings
from tests.test_docker import argument, image_environment

FOLDER = Path(__file__).parent.parent / "docker/kubernetes"
PORT = int(image_environment()["LPA_PORT"])


def manifests() -> dict[str, dict[str, Any]]:
    """By their kind."""
    return {found["kind"]: found for found in yaml.safe_load_all((FOLDER / "lpa.yaml").read_text())}


def pod() -> dict[str, Any]:
    found: dict[str, Any] = manifests()["Deployment"]["spec"]["template"]
    return found


def container() -> dict[str, Any]:
    (found,) = pod()["spec"]["containers"]
    assert isinstance(found, dict)
    return found


def test_there_is_what_a_service_needs_and_it_finds_its_pods() -> None:
    found = manifests()
    assert set(found) == {"Deployment", "Service", "PodDisruptionBudget"}
    labels = pod()["metadata"]["labels"]
    for selector in (
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        pod()["spec"]["topologySpreadConstraints"][0]["labelSelector"]["matchLabels"],
    ):
        assert selector and selector.items() <= labels.items()
    (port,) = container()["ports"]
    assert port["containerPort"] == PORT
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert found["PodDisruptionBudget"]["spec"]["maxUnavailable"] < found["Deployment"]["spec"]["replicas"]


def test_probes_and_scrapes_ask_for_routes_that_need_no_key() -> None:
    paths = {name: container()[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/health", "livenessProbe": "/health", "readinessProbe": "/ready"}
    assert set(paths.values()) <= PROBES
    scraped = {name.split("/")[1]: value for name, value in pod()["metadata"]["annotations"].items()}
    assert scraped == {"scrape": "true", "port": str(PORT), "path": METRICS}


def test_the_environment_is_of_settings() -> None:
    entries = {entry["name"]: entry.get("value") for entry in container()["env"]}
    assert all(name.startswith(ENV_PREFIX) for name in entries)
    settings = {name.removeprefix(ENV_PREFIX).lower(): value for name, value in entries.items()}
    assert set(settings) <= set(Settings.model_fields)
    load_settings(**{name: value for name, value in settings.items() if value is not None})
    assert pod()["spec"]["enableServiceLinks"] is False  # else the Service sets LPA_PORT
    assert int(container()["resources"]["requests"]["cpu"]) >= 1  # LPA_THREADS, which is whole


def test_a_stopping_pod_has_the_time_to_drain() -> None:
    (drain,) = [float(entry["value"]) for entry in container()["env"] if entry["name"] == "LPA_DRAIN_TIMEOUT"]
    command, seconds = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    assert pod()["spec"]["terminationGracePeriodSeconds"] > int(seconds) + drain + FLUSH_TIMEOUT + EXIT_TIMEOUT


def test_the_pod_is_locked_down_as_the_image_is_made_for() -> None:
    own, shared = container()["securityContext"], pod()["spec"]["securityContext"]
    assert own["readOnlyRootFilesystem"] is True and own["allowPrivilegeEscalation"] is False
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert shared["runAsNonRoot"] is True
    assert f"{shared['runAsUser']}:{shared['runAsGroup']}" == argument("USER")
    assert [mount["mountPath"] for mount in container()["volumeMounts"]] == [image_environment()["HOME"]]


def test_the_endpoint_picker_asks_only_for_metrics_that_exist() -> None:
    values = yaml.safe_load((FOLDER / "llm-d-values.yaml").read_text())["router"]
    assert values["modelServers"]["matchLabels"].items() <= pod()["metadata"]["labels"].items()
    assert values["modelServers"]["targetPorts"] == [{"number": PORT}]
    config = yaml.safe_load(values["epp"]["pluginsCustomConfig"][values["epp"]["pluginsConfigFile"]])
    plugins = {plugin["type"]: plugin.get("parameters", {}) for plugin in config["plugins"]}
    assert plugins["metrics-data-source"]["path"] == METRICS
    extractor = plugins["core-metrics-extractor"]
    (engine,) = extractor["engineConfigs"]
    assert pod()["metadata"]["labels"][extractor["engineLabelKey"]] == engine["name"]
    for profile in config["schedulingProfiles"]:
        assert {plugin["pluginRef"] for plugin in profile["plugins"]} <= set(plugins)

    metrics = Metrics("tiny")
    metrics.set_engine("1", BackendInfo(name="cpu"), BlockManager(7, 32, True))
    samples = {
        sample.name: (family.type, sample.labels)
        for family in text_string_to_metric_families(render(metrics.registry)[0].decode())
        for sample in family.samples
    }
    specs = {name: spec for name, spec in engine.items() if name.endswith("Spec")}
    assert set(specs) == {"queuedRequestsSpec", "runningRequestsSpec", "kvUsageSpec", "cacheInfoSpec"}
    for spec in specs.values():
        assert samples[spec][0] == "gauge", spec
    cache = samples[specs["cacheInfoSpec"]][1]  # the labels that the extractor reads by itself
    assert (cache["block_size"], cache["num_gpu_blocks"]) == ("32", "7")
    named = set(re.findall(r"lpa:\w+", json.dumps(config)))
    assert named == set(specs.values())
