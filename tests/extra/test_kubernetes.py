"""The Kubernetes manifests against Kubernetes' own JSON schemas, which the package kubernetes-validate brings along."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

MANIFESTS = list(yaml.safe_load_all((Path(__file__).parent.parent.parent / "docker/kubernetes/lpa.yaml").read_text()))
VERSIONS = ["1.29", "1.32", kubernetes_validate.latest_version()]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: manifest["kind"])
def test_a_manifest_follows_the_schema(manifest: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(manifest, version, strict=True)


def test_a_wrong_manifest_does_not() -> None:
    deployment = copy.deepcopy(next(manifest for manifest in MANIFESTS if manifest["kind"] == "Deployment"))
    deployment["spec"]["template"]["spec"]["containers"][0]["readyProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readyProbe"):
        kubernetes_validate.validate(deployment, VERSIONS[-1], strict=True)
