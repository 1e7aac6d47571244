"""The containers of docker/k8s run from the built images, as Kubernetes and KubeRay would start them.

Each has its manifest's command, arguments, environment and volumes, out of the overlay `cpu-dev` (the training of
several pods: `gpu-pool`, with two pods of one process each). What a cluster alone can do is not tried: scheduling, the
autoscaler, the jobs that Prefect's worker makes there.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.bench.containers import SCRATCH, Container, Engine, Running
from tests.test_kubernetes import K8S, built, job

NETWORK = "vlfm-images-check"
HEAD = "ray-head-svc"
Manifests = dict[tuple[str, str], dict[str, Any]]


def manifests(overlay: str) -> Manifests:
    """The objects of an overlay, by kind and name."""
    return {(thing["kind"], thing["metadata"]["name"]): thing for thing in built(overlay)}


def container(found: Manifests, pod: dict[str, Any], spec: dict[str, Any], data: Path, **secret: str) -> Container:
    """A container of a pod as the engine runs it; `secret` holds the variables that come from secrets."""
    environment = dict(found["ConfigMap", "settings"]["data"]) | secret
    environment |= {each["name"]: each["value"] for each in spec.get("env", []) if "value" in each}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in spec["volumeMounts"]}
    return Container(
        spec["image"].partition(":")[0],
        [*spec.get("command", []), *spec.get("args", [])],
        own_entrypoint="command" not in spec,
        data=data if "/data" in mounts else None,
        environment=environment,
        scratch=[path for path, volume in mounts.items() if "emptyDir" in volume and path != "/dev/shm"],
        files={path: K8S / "base" for path, volume in mounts.items() if "configMap" in volume},
        network=NETWORK,
    )


def ray_start(group: dict[str, Any], role: str) -> list[str]:
    """The command that KubeRay makes of a group's rayStartParams, in the shell that it takes."""
    # A value of true is a flag; include-dashboard is the one of ours that takes it.
    flags = {name for name, value in group["rayStartParams"].items() if value == "true" and name != "include-dashboard"}
    given = group["rayStartParams"].items()
    options = " ".join(f"--{name}" if name in flags else f"--{name}={value}" for name, value in given)
    start = f"ray start {role} {options} --block --dashboard-agent-listen-port=52365"
    return ["/bin/bash", "-c", "--", f"ulimit -n 10000; {start}"]


class Cluster:
    """The overlay's containers, started one after the other; those that serve stay until `stack` is closed.

    Args:
        engine: docker or podman.
        data: the volume `data`.
        film: a program that makes films in the folder that it is given.
    """

    def __init__(self, engine: Engine, data: Path, film: str) -> None:
        self.engine = engine
        self.data = data
        self.film = film
        self.found = manifests("cpu-dev")
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.stack = ExitStack()
        self.serving: dict[str, Running] = {}

    def serve(self, name: str, made: Container) -> Running:
        """Start a container that stays."""
        self.serving[name] = self.stack.enter_context(self.engine.started(replace(made, names=[name])))
        return self.serving[name]

    def run(self, made: Container, seconds: float = 600) -> str:
        """Run a container that ends; what it printed."""
        with self.engine.started(made) as running:
            return running.finish(seconds)

    def pod(self, kind: str, name: str) -> dict[str, Any]:
        """The pod of an object."""
        pod: dict[str, Any] = self.found[kind, name]["spec"]["template"]["spec"]
        return pod

    def prefect_server(self) -> str:
        """Its health address answers. SQLite stands in for PostgreSQL."""
        pod = self.pod("Deployment", "prefect-server")
        url = f"sqlite+aiosqlite:///{SCRATCH[0]}/prefect.db"
        made = container(self.found, pod, pod["containers"][0], self.data, PREFECT_API_DATABASE_CONNECTION_URL=url)
        # As Kubernetes would set it for the service, were it not for enableServiceLinks.
        return self.serve("prefect-server", made).answers("http://127.0.0.1:4200/api/health").strip()

    def prefect_deploy(self) -> str:
        """The first container of Prefect's worker makes pool, deployments and automation."""
        pod = self.pod("Deployment", "prefect-worker")
        self.run(container(self.found, pod, pod["initContainers"][0], self.data))
        told = self.serving["prefect-server"].run("prefect", "deployment", "ls")
        return " ".join(sorted(word for word in told.split() if "/" in word))

    def ray_head(self) -> str:
        """KubeRay's command of the head; the address of its readiness check answers."""
        group = self.found["RayCluster", "ray"]["spec"]["headGroupSpec"]
        pod = group["template"]["spec"]
        made = container(self.found, pod, pod["containers"][0], self.data, **self.token)
        head = self.serve(HEAD, replace(made, command=ray_start(group, "--head"), own_entrypoint=False))
        return head.answers("http://127.0.0.1:52365/api/healthz").strip()

    def ray_worker(self) -> str:
        """Its first container finds the head, it joins, and answers its readiness check."""
        group = self.found["RayCluster", "ray"]["spec"]["workerGroupSpecs"][0]
        pod = group["template"]["spec"]
        made = container(self.found, pod, pod["containers"][0], self.data, **self.token)
        ready = ["/bin/bash", "-lc", "--", f"ray health-check --address {HEAD}:6379"]
        self.run(replace(made, command=ready, own_entrypoint=False))
        start = ray_start(group, f"--address={HEAD}:6379 --num-cpus=2")
        worker = self.serve("ray-worker", replace(made, command=start, own_entrypoint=False))
        return worker.answers("http://127.0.0.1:52365/api/healthz").strip()

    def ray_job(self) -> str:
        """KubeRay's submitter and the job's entrypoint: an ingest on the cluster."""
        spec = self.found["RayJob", "ingest"]["spec"]
        pod = spec["submitterPodTemplate"]["spec"]
        made = container(self.found, pod, pod["containers"][0], self.data, **self.token)
        made = replace(made, own_entrypoint=False)
        self.run(
            replace(made, image="vlfm-worker", data=self.data, command=["python3", "-c", self.film, "/data/films"])
        )
        entrypoint = spec["entrypoint"].replace("/data/lake", "/data/job-lake")
        address = f"http://{HEAD}:8265"
        told = self.run(
            replace(made, command=["/bin/bash", "-ce", "--", f"ray job submit --address {address} -- {entrypoint}"])
        )
        assert "succeeded" in told, told
        return next((line.strip() for line in told.splitlines() if "clips:" in line), "")

    def flow_run(self) -> str:
        """The job of a flow run: an ingest from a pod outside the Ray cluster."""
        server = self.serving["prefect-server"]
        chosen = {"source": "/data/films", "lake": "/data/flow-lake", "ray_address": f"{HEAD}:6379", "recipe": "demo"}
        words = [word for name, value in chosen.items() for word in ("--param", f"{name}={value}")]
        told = server.run("prefect", "deployment", "run", "ingest/ingest", *words)
        identity = told.partition("UUID: ")[2].split()[0]
        pod = job(command=["prefect", "flow-run", "execute"])["spec"]["template"]["spec"]
        pod["containers"][0]["env"] = [{"name": "PREFECT__FLOW_RUN_ID", "value": identity}]
        made = container(self.found, pod, pod["containers"][0], self.data, **self.token)
        out = self.run(made)
        state = server.run("prefect", "flow-run", "inspect", identity)
        assert "Completed" in state or "COMPLETED" in state, out
        return next((line.strip() for line in out.splitlines() if "clips:" in line), "Completed")

    def trainer(self) -> str:
        """The trainer's arguments, of one pod."""
        pod = self.pod("Job", "trainer")
        made = container(self.found, pod, pod["containers"][0], self.data)
        self.run(replace(made, command=[*made.command, "--set=steps=20", "--set=loader_workers=1"]))
        return "finished"

    def trainers(self) -> str:
        """The arguments of `gpu-pool` for two pods of one process; one is told to stop, both end with 75 and go on."""
        stopped = self._pair(steps=4000, stop=True)
        finished = self._pair(steps=60, stop=False)
        assert (stopped, finished) == ([75, 75], [0, 0]), f"ended with {stopped}, started again with {finished}"
        return "one of two told to stop: both end with 75; started again, both end with 0"

    def _pair(self, steps: int, stop: bool) -> list[int]:
        """How the two pods end."""
        found = manifests("gpu-pool")
        pod = found["Job", "trainer"]["spec"]["template"]["spec"]
        made = container(found, pod, pod["containers"][0], self.data)
        smaller = {"4": "2", "8": "1", "vlfm_xl": "tiny_cpu", "/data/runs/run": "/data/runs/pods"}
        settings = ["--set=loader_workers=1", "--set=checkpoint_every=20", f"--set=steps={steps}", "--allow-mismatch"]
        with ExitStack() as stack:
            ranks = []
            for index in range(2):
                words = []
                for word in made.command:
                    name, equals, value = word.replace("$(JOB_COMPLETION_INDEX)", str(index)).partition("=")
                    words.append(name + equals + smaller.get(value, value))
                one = replace(made, command=[*words, *settings], names=[f"trainer-{index}.trainer"])
                ranks.append(stack.enter_context(self.engine.started(one)))
            if stop:
                ranks[0].wait_for_file(self.data / "runs" / "pods" / "checkpoints")
                ranks[1].stop(120)
            for rank in ranks:
                rank.wait(300)
            return [rank.status() for rank in ranks]


def checks(engine: Engine, data: Path, film: str) -> Iterator[tuple[str, Callable[[], str]]]:
    """Each container's name and its check, in order; what serves lives until the last one is done."""
    with engine.network(NETWORK):
        cluster = Cluster(engine, data, film)
        with cluster.stack:
            yield "prefect-server: server", cluster.prefect_server
            yield "prefect-worker: deploy", cluster.prefect_deploy
            yield "RayCluster: head", cluster.ray_head
            yield "RayCluster: wait-gcs-ready, worker", cluster.ray_worker
            yield "RayJob: submitter, entrypoint", cluster.ray_job
            yield "flow run that joins the Ray cluster", cluster.flow_run
            yield "trainer of one pod", cluster.trainer
            yield "trainer of two pods (gpu-pool)", cluster.trainers
