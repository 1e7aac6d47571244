"""`make images-check`: what the four images hold, and the commands of compose.yaml and docker/k8s run from them.

Needs the images of `make images` in docker or podman, and `kubectl` or `kustomize` for the manifests. Every container
runs as its manifest says: as user 1000, with a read-only root, no capability and no new privileges, and writes to its
volumes alone. Prints a Markdown table of the images and a line for each thing tried; ends with 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.bench import pods
from tests.bench.containers import SCRATCH, Container, Engine
from tests.model.tiny_lake import make_lake

TARGETS = ("base", "train", "worker", "orchestrator")
ABSENT = {
    "base": ("torch", "ray", "prefect", "zarr", "imageio_ffmpeg", "boto3"),
    "train": ("ray", "prefect", "zarr", "icechunk", "imageio_ffmpeg", "ffmpeg"),
    "worker": ("prefect", "kubernetes_asyncio"),
    "orchestrator": (),
}
"""What an image must not hold, by the names that Python imports."""
PRESENT = {
    "base": (),
    "train": ("torch", "diffusers", "transformers", "tensorboard", "boto3"),
    "worker": ("torch", "boto3", "ray", "aiohttp", "zarr", "icechunk", "imageio_ffmpeg"),
    "orchestrator": ("torch", "boto3", "ray", "zarr", "imageio_ffmpeg", "prefect", "prefect_kubernetes", "asyncpg"),
}
"""What it must hold."""
LIMITS = {"base": 0.35, "train": 2.1, "worker": 2.6, "orchestrator": 3.0}
"""Most GB that an image of CPU builds may take; CUDA's libraries add 3.4."""
LOOK = """
import importlib.metadata, importlib.util, json, os, pathlib, platform, sys
names = json.loads(sys.argv[1])
site = pathlib.Path(sys.prefix, "lib", f"python3.{sys.version_info.minor}", "site-packages")
secret = ("pip.conf", ".netrc", ".pypirc", "credentials", "id_rsa", "auth.json", ".git")
outside = ("/proc", "/sys", "/dev")
walk = [(folder, files, folders) for folder, folders, files in os.walk("/") if not folder.startswith(outside)]
print(json.dumps({
    "python": platform.python_version(), "user": os.getuid(), "packages": len(list(importlib.metadata.distributions())),
    "found": [name for name in names if importlib.util.find_spec(name)],
    "nvidia": sorted(path.name for path in site.glob("nvidia*")),
    "secrets": [os.path.join(folder, name) for folder, files, folders in walk for name in (*files, *folders)
                if name in secret and not folder.startswith(str(site))],
    "writable": sorted(folder for folder, _, _ in walk if os.access(folder, os.W_OK) and folder.count("/") < 4),
    "environment": sorted(os.environ),
}))
"""
FILM = """
import subprocess, sys
from pathlib import Path
from imageio_ffmpeg import get_ffmpeg_exe
for name, source in {"pattern": "testsrc", "colours": "smptebars"}.items():
    film = Path(sys.argv[1], f"{name}.mp4")
    film.parent.mkdir(parents=True, exist_ok=True)
    made = ["-f", "lavfi", "-i", f"{source}=size=128x128:rate=8:duration=4", "-pix_fmt", "yuv420p"]
    subprocess.run([get_ffmpeg_exe(), "-y", "-loglevel", "error", *made, str(film)], check=True)
    film.with_suffix(".txt").write_text(f"a {name} on a screen")
"""
STEPS = {"steps": 400, "checkpoint_every": 100, "validate_every": 200, "loader_workers": 1}


def look(engine: Engine, target: str) -> dict[str, object]:
    """What is in an image, seen from inside as its own user."""
    names = sorted({name for names in (*ABSENT.values(), *PRESENT.values()) for name in names})
    with engine.started(Container(f"vlfm-{target}", ["python3", "-c", LOOK, json.dumps(names)])) as running:
        seen: dict[str, object] = json.loads(running.finish().splitlines()[-1])
    return seen


def check_contents(engine: Engine, target: str, cpu: bool) -> dict[str, object]:
    """The row of an image in the table.

    Raises:
        AssertionError: it holds what it must not, lacks what it must hold, or is too large.
    """
    seen = look(engine, target)
    size = engine.size(f"vlfm-{target}") / 1e9
    found = set(seen["found"])  # type: ignore[call-overload]
    assert not found & set(ABSENT[target]), f"holds {found & set(ABSENT[target])}"
    assert found >= set(PRESENT[target]), f"lacks {set(PRESENT[target]) - found}"
    assert seen["user"] == 1000, f"runs as user {seen['user']}"
    assert not seen["secrets"], f"secrets: {seen['secrets']}"
    told = engine.output("history", "--no-trunc", f"vlfm-{target}") + " ".join(engine.environment(f"vlfm-{target}"))
    assert "://" not in told.replace("http://127.0.0.1", ""), "an address is in its history"
    writable: list[str] = seen["writable"]  # type: ignore[assignment]
    # podman copies what an image has in a scratch folder into it
    outside = [path for path in writable if not any(Path(path).is_relative_to(folder) for folder in SCRATCH)]
    assert not outside, f"can write to {outside}"
    if cpu:
        assert not seen["nvidia"], f"holds {seen['nvidia']}"
        assert size <= LIMITS[target], f"takes {size:.2f} GB, more than {LIMITS[target]}"
    return {"size": size, **seen}


def table(rows: Mapping[str, Mapping[str, object]]) -> Iterator[str]:
    """The images as Markdown."""
    yield "| image | size | packages | holds | user |"
    yield "|---|---|---|---|---|"
    for target, row in rows.items():
        shown = ", ".join(f"`{name}`" for name in PRESENT[target]) or "Python, pip"
        yield f"| `vlfm-{target}` | {row['size']:.2f} GB | {row['packages']} | {shown} | {row['user']} |"


def check_train(engine: Engine, data: Path) -> str:
    """A training of a tiny lake from the image: stopped by the engine, gone on with, finished."""
    settings = [f"--set={name}={value}" for name, value in STEPS.items()]
    arguments = ["train", "--lake=/data/lake", "--run=/data/run", "--recipe=tiny_cpu", *settings]
    trainer = Container("vlfm-train", arguments, data=data, own_entrypoint=True)
    with engine.started(trainer) as first:
        first.wait_for_file(data / "run" / "checkpoints")
        first.stop(60)
        assert first.status() == 75, f"stopped with status {first.status()}: {first.logs()}"
    with engine.started(trainer) as second:
        second.finish()
    checkpoints = sorted(path.name for path in (data / "run" / "checkpoints").iterdir())
    assert str(STEPS["steps"]) in checkpoints[-1], checkpoints
    return "stopped by SIGTERM with status 75, went on, finished with 0"


def tried(name: str, check: Callable[[], object]) -> bool:
    """Run a check, and print what became of it."""
    begun = time.monotonic()
    try:
        told = check()
    except (AssertionError, RuntimeError, subprocess.SubprocessError, TimeoutError) as error:
        print(f"FAILED  {name}: {str(error).strip()[-3000:]}", flush=True)
        return False
    print(
        f"ok      {name} ({time.monotonic() - begun:.0f} s){': ' + told if isinstance(told, str) else ''}", flush=True
    )
    return True


def main() -> int:
    """Run the checks."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.images", description=__doc__)
    parser.add_argument("--engine", default=shutil.which("docker") or shutil.which("podman"), help="docker or podman")
    parser.add_argument("--cuda", action="store_true", help="the images hold CUDA's builds")
    parser.add_argument("--contents", action="store_true", help="only look into the images")
    options = parser.parse_args()
    if not options.engine:
        parser.error("neither docker nor podman is here")
    engine = Engine(options.engine)
    rows: dict[str, Mapping[str, object]] = {}
    good = []
    for target in TARGETS:

        def contents(target: str = target) -> None:
            rows[target] = check_contents(engine, target, not options.cuda)

        good.append(tried(f"contents of vlfm-{target}", contents))
    print("\n".join(["", *table(rows), ""]))
    if not options.contents:
        with tempfile.TemporaryDirectory(prefix="vlfm-images-") as folder:
            data = Path(folder)
            make_lake(data / "lake")
            with engine.owned(data):
                good.append(tried("a training from vlfm-train", lambda: check_train(engine, data)))
                for name, check in pods.checks(engine, data, FILM):
                    good.append(tried(name, check))
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
