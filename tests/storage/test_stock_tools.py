"""What is stored is read by the tools that everybody has, in a process that has none of our code."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

from storage.layout import Lake
from storage.version import load
from tests.storage.film_lake import RECIPE, Film, publish

ROOT = Path(__file__).resolve().parents[2]
READER = """
import io, json, os, subprocess, sys
os.environ["WDS_SECURE"] = "1"
import icechunk, numpy, pyarrow.parquet, webdataset, zarr
lake = sys.argv[1]
version = json.load(open(f"{lake}/versions/1.json"))
shards = [f"{lake}/shards/{shard['name']}" for shard in version["shards"]]
samples = list(webdataset.WebDataset(shards, shardshuffle=False))
own = {sample["__key__"]: sample for sample in samples}
rows = pyarrow.parquet.read_table(f"{lake}/{version['manifest']['clips']['path']}").to_pylist()
repository = icechunk.Repository.open(icechunk.local_filesystem_storage(f"{lake}/arrays"))
session = repository.readonly_session(snapshot_id=version["snapshot"])
group = zarr.open(session.store, mode="r")[version["group"]]
for row in rows:
    sample = own[row["clip_id"]]
    stored = group["coefficients"][row["array_row"]]
    shard = numpy.load(io.BytesIO(sample["coefficients.npy"]), allow_pickle=False)
    assert numpy.array_equal(stored, shard), row["clip_id"]
    assert bytes(group["clip_id"][row["array_row"]]).decode() == row["clip_id"]
    assert json.loads(sample["clip.json"])["caption"] == row["caption"]
names = subprocess.run(["tar", "tf", shards[0]], capture_output=True, text=True, check=True).stdout.split()
ours = sorted(name for name in sys.modules if name.partition(".")[0] in ("storage", "model", "pipeline", "flows"))
print(json.dumps({"clips": [row["clip_id"] for row in rows], "names": names, "ours": ours}))
"""


def test_webdataset_zarr_pyarrow_and_tar_read_a_lake(tmp_path: Path) -> None:
    lake = Lake.create(tmp_path / "lake")
    film = Film("a.mp4", "one", "ein Ball fällt", 3)
    publish(lake, [film])
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-W", "ignore", "-c", READER, str(lake.root)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ours"] == []
    assert sorted(told["clips"]) == sorted(film.clip_id(number, RECIPE) for number in range(3))
    assert {name.partition(".")[2] for name in told["names"]} == {
        "clip.json", "coefficients.npy", "frame_time.npy", "latents.npy", "observed.npy", "preview.npy", "text.npy",
    }  # fmt: skip
    assert len(load(lake).shards) == 1


def test_no_pickle_is_written_or_read() -> None:
    """No module of ours imports it; numpy (which loads none unless told to) and torch are nowhere allowed to."""
    loose, picklers = [], ("pickle", "dill", "joblib")
    for package in ("flows", "pipeline", "model", "storage"):
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                loose += [f"{path.name}: {name}" for name in names if name.partition(".")[0] in picklers]
                if not isinstance(node, ast.Call):
                    continue
                call = ast.unparse(node.func)
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                if call in ("np.save", "numpy.save", "torch.save") or given.get("allow_pickle") == "True":
                    loose.append(f"{path.name}: {call}")
                if call == "torch.load" and given.get("weights_only") != "True":
                    loose.append(f"{path.name}: {call}")
    assert loose == []
