"""The manifests of docker/k8s: strictly valid, restricted, and their commands are the program's."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from prefect.utilities.templating import apply_values
from torch.distributed.run import parse_args as torchrun_options

from flows import cli
from model import torchrun
from model.recipes import train_recipe
from pipeline.recipes import recipe_named

K8S = Path(__file__).parents[1] / "docker" / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
VERSION = "1.32"
OWN = ("v1", "apps/v1", "batch/v1", "policy/v1")
CUSTOM = ("RayCluster", "RayJob")


def base() -> list[dict[str, Any]]:
    """The objects of the base."""
    files = yaml.safe_load((K8S / "base" / "kustomization.yaml").read_text())["resources"]
    return [found for name in files for found in yaml.safe_load_all((K8S / "base" / name).read_text())]


def built(overlay: str) -> list[dict[str, Any]]:
    """The objects of an overlay, as kustomize builds them."""
    program = shutil.which("kubectl")
    command = [program, "kustomize"] if program else [shutil.which("kustomize") or "", "build"]
    if not command[0]:
        pytest.skip("neither kubectl nor kustomize is here to build the overlays")
    run = subprocess.run([*command, str(K8S / "overlays" / overlay)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return list(yaml.safe_load_all(run.stdout))


def job(**chosen: Any) -> dict[str, Any]:
    """The job of a flow run, as Prefect renders our template."""
    template = json.loads((K8S / "base" / "job-template.json").read_text())
    properties = template["variables"]["properties"]
    values = {name: field["default"] for name, field in properties.items() if "default" in field}
    own = {"command": ["prefect", "flow-run", "execute"], "name": "run", "labels": {"a": "b"}, "env": []}
    rendered = apply_values(template["job_configuration"], {**values, **own, **chosen})
    return dict(rendered["job_manifest"])


def pods(value: Any) -> Iterator[dict[str, Any]]:
    """Everything in an object that describes a pod."""
    if isinstance(value, dict):
        if isinstance(value.get("containers"), list):
            yield value
        for inner in value.values():
            yield from pods(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from pods(inner)


def check(thing: dict[str, Any]) -> None:
    """Valid, and no pod that the standard `restricted` would refuse or that could write into its image."""
    if thing["kind"] not in CUSTOM:
        named = {**thing, "metadata": {"name": "run", **thing["metadata"]}}
        kubernetes_validate.validate(named, VERSION, strict=True)
    for pod in pods(thing):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["enableServiceLinks"] is False, "PREFECT_SERVER_PORT of the service would be taken for a setting"
        assert all(volume["emptyDir"].get("sizeLimit") for volume in pod["volumes"] if "emptyDir" in volume)
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])


@pytest.mark.parametrize("thing", base(), ids=lambda thing: f"{thing['kind']}-{thing['metadata']['name']}")
def test_every_object_of_the_base(thing: dict[str, Any]) -> None:
    check(thing)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_overlays_are_built_and_valid(overlay: str) -> None:
    things = built(overlay)
    assert {thing["kind"] for thing in things} >= {*CUSTOM, "Job", "Deployment", "StatefulSet", "NetworkPolicy"}
    for thing in things:
        check(thing)
        assert thing["metadata"].get("namespace", "vlfm") == "vlfm"
        for pod in pods(thing):
            assert all(":" in container["image"] for container in pod["containers"])


@pytest.mark.parametrize("gpus", [0, 8])
def test_the_job_of_a_flow_run(gpus: int) -> None:
    made = job(gpus=gpus, node_selector={"pool": "gpu"})
    made["metadata"].pop("generateName")
    check(made)
    pod = made["spec"]["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == gpus
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert "tolerations" in pod
    assert pod["automountServiceAccountToken"] is False
    assert made["spec"]["ttlSecondsAfterFinished"] == 86400


def test_a_stopped_trainer_is_no_failure() -> None:
    (trainer,) = [thing for thing in base() if thing["kind"] == "Job"]
    rules = trainer["spec"]["podFailurePolicy"]["rules"]
    assert {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]} in rules
    assert [rule["action"] for rule in rules if 75 in rule.get("onExitCodes", {}).get("values", [])] == ["Ignore"]
    assert trainer["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] >= 120
    assert trainer["spec"]["template"]["spec"]["subdomain"] == "trainer", "pods find the first by this service's name"


def test_a_checkpoint_fits_the_grace_period() -> None:
    """Whoever starts the processes in a pod waits for them less long than Kubernetes waits for the pod."""
    (trainer,) = [thing for thing in base() if thing["kind"] == "Job"]
    assert int(torchrun.SECONDS) < trainer["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]


def test_kuberay_takes_the_clusters() -> None:
    """What its operator asks beyond the schemas: a version for tokens; its own way in; budgets for pods of its own."""
    things = base()
    specs = [thing["spec"].get("rayClusterSpec", thing["spec"]) for thing in things if thing["kind"] in CUSTOM]
    assert [spec["rayVersion"] for spec in specs] == [version("ray")] * 2
    shared = {"sizeLimit": "1Gi", "medium": "Memory"}
    for spec in specs:
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert int(group["rayStartParams"]["object-store-memory"]) < 2**30
            assert shared in [volume.get("emptyDir") for volume in group["template"]["spec"]["volumes"]]
    (way_in,) = [thing["spec"] for thing in things if thing["metadata"]["name"] == "ray-operator"]
    assert way_in["ingress"][0]["ports"] == [{"port": 8265}]
    budgets = {thing["metadata"]["name"]: thing["spec"] for thing in things if thing["kind"] == "PodDisruptionBudget"}
    heads = {spec["headGroupSpec"]["template"]["metadata"]["labels"]["app"] for spec in specs}
    assert {name for name, budget in budgets.items() if "minAvailable" in budget} == heads


def test_only_the_worker_may_do_anything() -> None:
    bound = [thing for thing in base() if thing["kind"] == "RoleBinding"]
    assert [subject["name"] for binding in bound for subject in binding["subjects"]] == ["prefect-worker"]
    (role,) = [thing for thing in base() if thing["kind"] == "Role"]
    assert all("*" not in {*rule["verbs"], *rule["resources"], *rule["apiGroups"]} for rule in role["rules"])
    assert not any("secrets" in rule["resources"] for rule in role["rules"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_commands_are_the_programs(overlay: str) -> None:
    things = {(thing["kind"], thing["metadata"]["name"]): thing for thing in built(overlay)}
    words = things["RayJob", "ingest"]["spec"]["entrypoint"].split()
    options = cli.parser("ingest").parse_args(words[1:])
    assert recipe_named(options.recipe)
    container = things["Job", "trainer"]["spec"]["template"]["spec"]["containers"][0]
    words = [*container["command"], *container["args"]]
    if "model.torchrun" in words:
        own = words[words.index("model.torchrun") + 1 :]
        given = torchrun_options([word.replace("$(JOB_COMPLETION_INDEX)", "3") for word in own])
        assert (given.training_script, given.node_rank) == ("model.train", 3)
        assert int(given.nnodes) == things["Job", "trainer"]["spec"]["completions"]
        words = ["vlfm", "train", *given.training_script_args]
    assert words[:2] == ["vlfm", "train"]
    assert train_recipe(cli.parser("train").parse_args(words[1:]).recipe)
