"""docker or podman for checks: containers that run as a careful pod would, and end with the block that started them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")
SCRATCH = ("/tmp", "/home/vlfm")
"""What a container can write to without a volume: folders in memory."""
RESTRICTED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")


@dataclass(frozen=True)
class Container:
    """What to run, and how."""

    image: str
    """Name of the image."""
    command: Sequence[str]
    """The program and its arguments, or the arguments of the image's own program."""
    own_entrypoint: bool = False
    """Whether the image's own program is run, and `command` holds its arguments."""
    data: Path | None = None
    """Folder that is /data inside."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """Further files and folders, read-only, by their path inside."""
    scratch: Sequence[str] = SCRATCH
    """Folders that can be written to, in memory."""
    network: str = "none"
    """Name of the network."""
    names: Sequence[str] = ()
    """The container's names in it."""
    shared: str = "1g"
    """Size of /dev/shm."""


class Running:
    """A container that was started."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name

    def logs(self) -> str:
        """Everything that it printed so far."""
        return self.engine.output("logs", self.name, both=True)

    def running(self) -> bool:
        """Whether it is still there."""
        return self.engine.output("inspect", "--format={{.State.Running}}", self.name).strip() == "true"

    def status(self) -> int:
        """Its exit status, when it has ended."""
        return int(self.engine.output("wait", self.name).split()[0])

    def stop(self, seconds: int) -> None:
        """Ask it to stop, and wait so long."""
        self.engine.output("stop", f"--time={seconds}", self.name)

    def run(self, *command: str) -> str:
        """What a command in it prints. Raises RuntimeError where it fails."""
        return self.engine.output("exec", self.name, *command)

    def wait(self, seconds: float) -> None:
        """Wait for its end. Raises TimeoutError after `seconds`."""
        until = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > until:
                raise TimeoutError(f"it has not ended after {seconds:.0f} s: {self.logs()}")
            time.sleep(0.5)

    def finish(self, seconds: float = 600) -> str:
        """What it printed when it has ended with 0.

        Raises:
            RuntimeError: another status.
            TimeoutError: it has not ended after `seconds`.
        """
        self.wait(seconds)
        if (status := self.status()) != 0:
            raise RuntimeError(f"ended with status {status}: {self.logs()}")
        return self.logs()

    def wait_for_file(self, folder: Path, seconds: float = 240) -> None:
        """Wait until there is something in a folder outside."""
        self.wait_until(lambda: any(folder.glob("*")) or None, seconds)

    def wait_until(self, found: Callable[[], Found | None], seconds: float = 120) -> Found:
        """What `found` returns as soon as it is something; its failures are waited out.

        Raises:
            RuntimeError: the container ended before.
            TimeoutError: nothing after `seconds`.
        """
        until, error = time.monotonic() + seconds, None
        while time.monotonic() < until:
            alive = self.running()
            try:
                if (value := found()) is not None:
                    return value
            except RuntimeError as failed:
                error = failed
            if not alive:
                raise RuntimeError(f"ended with status {self.status()}: {self.logs()}")
            time.sleep(0.5)
        raise TimeoutError(f"nothing after {seconds:.0f} s ({error}): {self.logs()}")

    def answers(self, address: str, seconds: float = 180) -> str:
        """What an address answers inside the container, waited for."""
        ask = f"from urllib.request import urlopen; print(urlopen({address!r}, timeout=5).read().decode())"
        return self.wait_until(lambda: self.run("python3", "-c", ask), seconds)


class Engine:
    """docker or podman.

    Args:
        program: path of the program.
    """

    def __init__(self, program: str) -> None:
        self.program = program
        podman = Path(program).name.startswith("podman")
        # podman makes /run and others writable of its own, and asks for the time to stop what it removes.
        self._restricted = [*RESTRICTED, *(["--read-only-tmpfs=false"] if podman else [])]
        self._remove = ["rm", "--force", "--volumes", *(["--time=0"] if podman else [])]

    def output(self, *words: str, both: bool = False) -> str:
        """What a command of the engine prints. Raises RuntimeError where it fails."""
        done = subprocess.run([self.program, *words], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)[:200]}: {done.stderr.strip() or done.stdout.strip()}"[-2000:])
        return done.stdout + (done.stderr if both else "")

    def size(self, image: str) -> int:
        """Bytes of an image."""
        return int(self.output("image", "inspect", "--format={{.Size}}", image))

    def environment(self, image: str) -> list[str]:
        """The variables that an image sets."""
        found: list[str] = json.loads(self.output("image", "inspect", "--format={{json .Config.Env}}", image))
        return found

    @contextmanager
    def network(self, name: str) -> Iterator[str]:
        """A network in which containers find each other by their names."""
        self.output("network", "create", name)
        try:
            yield name
        finally:
            self.output("network", "rm", name)

    @contextmanager
    def owned(self, folder: Path) -> Iterator[None]:
        """A folder that belongs to the containers' user within the block."""
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 1000, 1000)
        folder.chmod(0o755)
        yield

    @contextmanager
    def started(self, container: Container) -> Iterator[Running]:
        """A container, removed at the end of the block."""
        words = [*self._restricted, f"--network={container.network}", f"--shm-size={container.shared}"]
        words += [f"--network-alias={name}" for name in container.names]
        words += [f"--hostname={name.partition('.')[0]}" for name in container.names[:1]]
        words += [f"--tmpfs={path}:mode=1777,exec" for path in container.scratch]
        words += [f"--env={name}={value}" for name, value in container.environment.items()]
        words += [f"--volume={path}:{inside}:ro" for inside, path in container.files.items()]
        words += [f"--volume={container.data}:/data"] if container.data else []
        command = list(container.command)
        if not container.own_entrypoint:
            words += [f"--entrypoint={command.pop(0)}"]
        name = self.output("run", "--detach", *words, container.image, *command).split()[-1]
        running = Running(self, name)
        try:
            yield running
        finally:
            self.output(*self._remove, name)
