"""A Ray session for its own processes only: started here with a token of its own, or joined with the cluster's token.

Ray listens on all interfaces, and who can connect runs code. So a session that we start has a random token, which is
in the environment of its processes and nowhere else; Ray refuses every call without it (RAY_AUTH_MODE=token).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.sessions import SessionFolder, end_dead_sessions
from pipeline.stage import one_line
from storage.errors import Kind, VlfmError

PACKAGES = ("storage", "model", "pipeline")
UNSENT = ["__pycache__", "*.pyc"]
OBJECT_STORE_BYTES = 256 * 1024**2  # blocks travel as files; Ray would take 30 % of the memory
ANSWER_SECONDS = 10.0  # longest wait for a cluster's port
MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

REFUSALS = ("Unauthenticated", "authentication token", "token authentication")
"""What Ray says, in one place or another, of a missing or wrong token."""


class RunnerError(VlfmError, RuntimeError):
    """The work cannot be done at all; the message is one line that says the remedy."""

    kind = Kind.ENVIRONMENT


class RaySession:
    """A Ray session of this process.

    Args:
        address: host:port of a cluster (or `auto`); None starts one on this machine. A machine that is no node of
            the cluster, such as a flow run's pod, is one without CPUs while the session is open.
        send_code: whether the nodes of a cluster get this project's code from here, in place of their own.
    """

    def __init__(self, address: str | None = None, send_code: bool = False) -> None:
        self.address, self.send_code = address, send_code
        self._before: dict[str, str | None] = {}
        self._open = False
        self._folder: SessionFolder | None = None

    def open(self) -> None:
        """Starts or joins Ray, quietly; nothing where this process is in a session already.

        Raises:
            RunnerError: Ray does not start, the cluster does not answer, or it refuses the token.
        """
        # Both are read when Ray is imported.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if self.address:
            _check_answers(self.address)
        import ray

        if ray.is_initialized():
            return
        self._before = _set(_joining() if self.address else _own())
        try:
            if self.address:
                self._join(self.address)
            else:
                cores = len(os.sched_getaffinity(0))
                end_dead_sessions()
                self._folder = SessionFolder()
                # "local" keeps RAY_ADDRESS of the environment from being joined unasked.
                local: dict[str, Any] = {"address": "local", "include_dashboard": False}
                local["_temp_dir"] = str(self._folder.path)
                _init(**local, num_cpus=cores, object_store_memory=OBJECT_STORE_BYTES)
        except BaseException:
            _set(self._before)
            self._remove_folder()
            raise
        self._open = True

    def close(self) -> None:
        """Ends what `open` began; the environment is as it was before."""
        if self._open:
            import ray

            ray.shutdown()
            _set(self._before)
            self._open = False
            self._remove_folder()

    def _remove_folder(self) -> None:
        if self._folder is not None:
            self._folder.remove()
            self._folder = None

    def _join(self, address: str) -> None:
        with _heard() as words:
            try:
                if not _node_here(address):
                    end_dead_sessions()
                    self._folder = SessionFolder()
                    _start_node(address, self._folder.path)
                _init(address=address, **({"runtime_env": _code()} if self.send_code else {}))
            except RunnerError as error:
                if not any(word in words() + str(error) for word in REFUSALS):
                    raise
                given = f"the token of {' or '.join(_given())}" if _given() else "this process: it has no token"
                remedy = f"set {TOKEN} (or {TOKEN_PATH}) to the token that the cluster was started with"
                raise RunnerError(f"the cluster at {address} refused {given}; {remedy}") from None


def _init(**options: Any) -> None:
    import ray

    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        where = options["address"] if options["address"] != "local" else "on this machine"
        raise RunnerError(f"Ray cannot start ({where}): {one_line(error)}") from error
    # Ray's own handler of SIGTERM ends the process on the spot; Prefect's, or the program's, was there before.
    with contextlib.suppress(ValueError):  # outside the main thread
        signal.signal(signal.SIGTERM, before)


def _node_here(address: str) -> bool:
    """Whether a node of the cluster runs on this machine or in this container, as the driver of a session needs."""
    from ray._private.services import canonicalize_bootstrap_address, find_gcs_addresses

    host, _, port = address.rpartition(":")
    if not port.isdigit() or address.startswith("ray://"):
        return True  # Ray's to find
    hosts = {str(found[4][0]) for found in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)}
    names = {f"{name}:{port}" for name in hosts} | {canonicalize_bootstrap_address(address)}
    here: set[str] = find_gcs_addresses()  # type: ignore[no-untyped-call]
    return not names.isdisjoint(here)


def _start_node(address: str, folder: Path) -> None:
    """Makes this machine a node of the cluster, without CPUs or GPUs: the work stays where it was.

    Args:
        address: host:port of the cluster.
        folder: of the session; whoever removes it ends the node.

    Raises:
        RunnerError: the node does not start.
    """
    options = {"address": address, "temp-dir": folder, "object-store-memory": OBJECT_STORE_BYTES}
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--num-cpus=0", "--num-gpus=0"]
    command += ["--disable-usage-stats", *(f"--{name}={value}" for name, value in options.items())]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        told = " ".join((done.stdout + done.stderr).split())[-300:]
        raise RunnerError(f"this machine cannot become a node of the cluster at {address}: {told}")


def _code() -> dict[str, Any]:
    """Ray's `runtime_env` with the packages that workers import, as they lie here."""
    return {"py_modules": [str(Path(__file__).resolve().parents[1] / name) for name in PACKAGES], "excludes": UNSENT}


def _own() -> dict[str, str | None]:
    return {MODE: "token", TOKEN: secrets.token_hex(32), TOKEN_PATH: None}


def _joining() -> dict[str, str | None]:
    """A token that is there is used; Ray does so of itself for clusters that it finds, not for given addresses."""
    return {MODE: os.environ.get(MODE) or ("token" if _given() else None)}


def _given() -> list[str]:
    """Where a token is, in words."""
    default = Path.home() / ".ray" / "auth_token"
    return [name for name in (TOKEN, TOKEN_PATH) if os.environ.get(name)] or [str(default)] * default.is_file()


def _set(values: Mapping[str, str | None]) -> dict[str, str | None]:
    """Sets variables of the environment (None: takes them away) and tells Ray, which remembers them; the old values."""
    before = {name: os.environ.get(name) for name in values}
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    if "ray" in sys.modules:
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
    return before


def _check_answers(address: str) -> None:
    """Raises RunnerError where nothing listens at host:port; Ray would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        remedy = "start it (`ray start --head`) or correct the address, which is that of its port 6379 as a rule"
        raise RunnerError(f"no Ray cluster answers at {address} ({error}); {remedy}") from None


@contextmanager
def _heard() -> Iterator[Any]:
    """Keeps what is written to the standard error meanwhile, also by Ray's C++; yields what tells it so far.

    It is shown afterwards, unless an error says it better.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:

        def words() -> str:
            return os.pread(file.fileno(), 1 << 20, 0).decode(errors="replace")

        os.dup2(file.fileno(), 2)
        try:
            yield words
            os.write(kept, words().encode())
        finally:
            os.dup2(kept, 2)
            os.close(kept)
