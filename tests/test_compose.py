"""docker/compose.yaml: containers without rights, of the images of docker/Dockerfile, with commands that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows import cli
from model.recipes import train_recipe

DOCKER = Path(__file__).parents[1] / "docker"
SERVICES: dict[str, dict[str, Any]] = yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"].startswith("vlfm-")}
TARGETS = set(re.findall(r"^FROM \S+ AS (\S+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", OURS)
def test_a_container_has_no_rights(name: str) -> None:
    service = OURS[name]
    assert service["image"].removeprefix("vlfm-") in TARGETS
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), "reachable from elsewhere"


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_waits_for_is_there(name: str) -> None:
    """A service that others wait for to be healthy says how it is, here or in its image."""
    for other, how in SERVICES[name].get("depends_on", {}).items():
        if how["condition"] == "service_healthy":
            target = SERVICES[other]["image"].removeprefix("vlfm-")
            assert "healthcheck" in SERVICES[other] or target in ("worker", "orchestrator")


def test_every_image_but_the_trainers_says_how_it_is() -> None:
    stages = re.split(r"^FROM \S+ AS ", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)[1:]
    healthy = {stage.split()[0] for stage in stages if "HEALTHCHECK" in stage}
    assert healthy == {"worker", "orchestrator"}


def test_all_of_a_cluster_have_its_token() -> None:
    for name in ("worker", "ray-head", "ray-worker"):
        assert SERVICES[name]["environment"]["RAY_AUTH_MODE"] == "token"
        assert SERVICES[name]["environment"]["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?"), "no token of ours"


def test_the_trainings_command_is_the_programs() -> None:
    words = [word.replace("${VLFM_LAKE:-/data/lake}", "/data/lake") for word in SERVICES["train"]["command"]]
    assert train_recipe(cli.parser("train").parse_args(words).recipe)


def test_the_ingest_is_a_deployment() -> None:
    words = SERVICES["ingest"]["command"]
    project = yaml.safe_load((DOCKER.parent / "prefect.yaml").read_text())
    flow, _, name = words[3].partition("/")
    assert (flow, name) in {("ingest", deployment["name"]) for deployment in project["deployments"]}
