"""The places of this machine: disks, shared memory, the store of a lake, and the clock."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from pipeline.health.finding import ERROR, OK, SKIPPED, WARNING, Finding
from storage.address import store_at
from storage.layout import Lake
from storage.local import LocalStore, free_bytes
from storage.store import Store
from storage.version import latest

DISK_ERROR, DISK_WARNING = 2**30, 10 * 2**30  # bytes; a demo's lake and run take less than the first
SHARED_MEMORY_BYTES = 300 * 2**20  # what the object store of a session of ours takes, and some more
CLOCK_SECONDS = 5.0  # clocks further apart order versions, leases and logs wrongly


def check_disks(folders: Iterable[str | Path]) -> list[Finding]:
    """The room on each disk that the folders are on."""
    found: dict[int, Finding] = {}
    for folder in folders:
        if "://" in str(folder):
            continue
        place = Path(folder).absolute()
        while not place.exists():
            place = place.parent
        found.setdefault(place.stat().st_dev, judge_room(str(place), free_bytes(place)))
    return list(found.values())


def judge_room(place: str, free: int) -> Finding:
    """The finding for a disk with `free` bytes left."""
    text = f"{free / 2**30:.1f} GiB free at {place}" if free >= 2**30 else f"{free / 2**20:.1f} MiB free at {place}"
    if free < DISK_ERROR:
        return Finding("disk", ERROR, text, "make room there, or name a folder on another disk (TMPDIR for temporary)")
    if free < DISK_WARNING:
        return Finding("disk", WARNING, text, "enough for small lakes; watch it")
    return Finding("disk", OK, text)


def check_shared_memory() -> Finding:
    """/dev/shm, where Ray keeps its object store and loader workers hand tensors over; containers give it 64 MiB."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding("memory", WARNING, "there is no /dev/shm", "Ray writes its objects to the disk then, slowly")
    size = shutil.disk_usage(place).total
    cores = len(os.sched_getaffinity(0))
    text = f"{cores} cores, {_memory_bytes() / 2**30:.1f} GiB, {size / 2**20:.0f} MiB of shared memory"
    if size < SHARED_MEMORY_BYTES:
        remedy = "start the container with --shm-size 1g, or a memory-backed emptyDir at /dev/shm"
        return Finding("memory", WARNING, text, remedy)
    return Finding("memory", OK, text)


def _memory_bytes() -> int:
    """Memory that this process may use: the machine's, or what its container allows."""
    bound = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text().strip() if Path(file).is_file() else ""
        bound = min(bound, int(text)) if text.isdigit() else bound
    return bound


def check_store(lake: str | None) -> Finding:
    """The store's operations tried in a lake, or in the folder where one is going to be made; nothing stays there."""
    if lake is None:
        return Finding("store", SKIPPED, "no lake was given", "`--lake DIR` tries one")
    if "://" in lake:
        return try_store(store_at(lake))
    if _is_lake(lake):
        return try_store(Lake.open(lake).store)
    place = Path(lake).absolute()
    if place.exists() and not place.is_dir():
        return Finding("store", ERROR, f"{lake} is a file", "name a folder for the lake")
    while not place.exists():
        place = place.parent
    with tempfile.TemporaryDirectory(prefix=".vlfm-doctor-", dir=place) as folder:
        finding = try_store(LocalStore(Path(folder)))
    return replace(finding, message=f"{lake} is no lake yet; in {place}, {finding.message.partition(' ')[2]}")


def _is_lake(lake: str) -> bool:
    return bool(store_at(lake).list_keys("versions/")) if "://" in lake else (Path(lake) / "versions").is_dir()


def try_store(store: Store) -> Finding:
    """Writes, reads, lists and removes a key, and makes sure that one is created once only."""
    begun = time.perf_counter()
    token, wrong = secrets.token_hex(8), []
    prefix = f"staging/doctor-{token}"
    data = os.urandom(64 * 1024)
    try:
        store.write(f"{prefix}.probe", data)
        wrong += ["reads other bytes than it wrote"] * (store.read(f"{prefix}.probe") != data)
        wrong += ["reads wrong ranges"] * (store.read(f"{prefix}.probe", 1000, 2000) != data[1000:2000])
        created = [store.create_exclusive(f"{prefix}.once", token.encode()) for _ in range(2)]
        wrong += ["does not create exclusively, which versions depend on"] * (created != [True, False])
        listed = store.list_keys(prefix)
        wrong += ["does not list what was written"] * (listed != [f"{prefix}.once", f"{prefix}.probe"])
    finally:
        for name in ("once", "probe"):
            store.delete(f"{prefix}.{name}")
    wrong += ["does not remove"] * bool(store.list_keys(prefix))
    if wrong:
        return Finding("store", ERROR, f"{store.address()} {', '.join(wrong)}", "use another disk or bucket")
    took = time.perf_counter() - begun
    return Finding("store", OK, f"{store.address()} writes, reads, creates once, lists and removes ({took:.2f} s)")


def check_lake(lake: str | None) -> list[Finding]:
    """The newest version of a lake can be read, and was not made in the future; nothing where there is no lake."""
    if lake is None or not _is_lake(lake):
        return []
    opened = Lake.open(lake)
    version = latest(opened)
    if version is None:
        return [Finding("lake", OK, f"{opened.store.address()} has no version yet")]
    ahead = datetime.fromisoformat(version.created).timestamp() - time.time()
    if ahead > 60:
        told = f"version {version.number} of {opened.store.address()} was made {ahead:.0f} s in the future"
        remedy = "set this machine's clock, or that of the machine which made it (NTP)"
        return [Finding("clock", WARNING, told, remedy)]
    return [Finding("lake", OK, f"{opened.store.address()} has version {version.number}, made {version.created}")]


def check_clock() -> Finding:
    """This machine's clock: not before the program was written, and not apart from that of its own disk."""
    newest = max(file.stat().st_mtime for file in Path(__file__).parent.glob("*.py"))
    now = time.time()
    text = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if now < newest - 60:
        return Finding("clock", ERROR, f"{text} is before this program was written", "set the clock (NTP)")
    with tempfile.NamedTemporaryFile() as file:
        apart = Path(file.name).stat().st_mtime - time.time()
    if abs(apart) > CLOCK_SECONDS:
        told = f"{text}; the disk at {tempfile.gettempdir()} says {apart:+.0f} s"
        return Finding("clock", WARNING, told, "set both clocks (NTP)")
    return Finding("clock", OK, text)
