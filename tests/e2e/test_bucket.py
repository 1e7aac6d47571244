"""The chain on a lake in a bucket, with Ray's workers and a trainer as users run them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from flows.cli import main
from pipeline.corpus import make_corpus
from pipeline.ingest import ingest
from pipeline.recipes import linear
from pipeline.runner import Runner
from storage.layout import Lake
from storage.verify import verify
from storage.version import load
from tests.s3_server import S3Server

TINY = [
    f"--set={pair}"
    for pair in ("width=32", "depth=1", "heads=2", "batch=2", "steps=4", "checkpoint_every=2", "log_every=1")
]


def test_a_lake_in_a_bucket_is_ingested_refreshed_verified_and_trained_on(
    s3: S3Server, s3_environment: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket = f"chain-{os.getpid()}"
    s3.client.create_bucket(Bucket=bucket)
    lake = f"s3://{bucket}/lake"
    films = make_corpus(tmp_path / "films", films=3).parent
    recipe = dataclasses.replace(linear(), size=(32, 32), validation_fraction=0.0, block_clips=2)
    with Runner() as runner:
        first = ingest(films, lake, recipe=recipe, runner=runner, limit=2)
        assert (first.published, first.version, first.clips.done) == (True, 1, 2), first.lines()
        second = ingest(films, lake, recipe=recipe, runner=runner)
        assert (second.version, second.clips.done, second.clips.unchanged) == (2, 1, 2), second.lines()
    opened = Lake.open(lake)
    assert verify(opened, load(opened)) == []
    run = tmp_path / "run"
    words = ["--lake", lake, "--run", str(run)]
    assert main(["train", *words, "--recipe", "demo", *TINY, "--set", "loader_workers=1"]) == 0
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    everything = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".mp4"]
    assert not any(b"test-secret-7Q" in data for data in everything), "no file has the secret"
    assert "test-secret-7Q" not in "".join(capsys.readouterr())
