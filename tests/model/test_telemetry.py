"""Metrics, liveness, JSON logs and options by the environment: what operators read and set."""

from __future__ import annotations

import argparse
import io
import json
import logging
import socket
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from model import logs, telemetry
from model.program import parse_settings, take_from_environment
from model.progress import Progress
from model.settings import override
from model.train import arguments, train
from tests.model.test_train import TINY
from tests.model.tiny_lake import make_lake


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        where = f"127.0.0.1:{found.getsockname()[1]}"
    monkeypatch.setenv(telemetry.METRICS, where)
    yield where
    telemetry._served.cache_clear()


def page(address: str) -> dict[str, float]:
    """What Prometheus would read."""
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines if line[0] != "#")}


def test_a_training_is_watched(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive = tmp_path / "alive"
    monkeypatch.setenv(telemetry.ALIVE, str(alive))
    train(make_lake(tmp_path / "lake").root, tmp_path / "run", override(TINY, {"steps": 4, "checkpoint_every": 2}))
    found = page(address)
    assert found["vlfm_train_step"] == 4
    assert found["vlfm_train_clips_per_second"] > 0
    assert 0 <= found["vlfm_train_data_wait"] <= 1
    assert {"vlfm_train_loss", "vlfm_train_gradient_norm", "vlfm_train_memory_gib"} <= set(found)
    assert 0 <= found["vlfm_train_checkpoint_age_seconds"] < 60
    assert found['vlfm_train_events_total{event="start"}'] == 1
    assert time.time() - alive.stat().st_mtime < 60
    time.sleep(0.01)
    assert page(address)["vlfm_train_checkpoint_age_seconds"] > found["vlfm_train_checkpoint_age_seconds"]


def test_counters_and_gauges_have_labels(address: str) -> None:
    watched = telemetry.metrics()
    assert telemetry.metrics() is watched, "the port is opened once"
    for reason in ("corrupt", "corrupt", "truncated"):
        watched.count("ingest_clips", outcome="failed", reason=reason)
    watched.set("train_odd name/here", 2.5)
    found = page(address)
    assert found['vlfm_ingest_clips_total{outcome="failed",reason="corrupt"}'] == 2
    assert found["vlfm_train_odd_name_here"] == 2.5


@pytest.mark.parametrize("wrong", ["nowhere", "127.0.0.1:99999", "no.such.host.invalid:9400"])
def test_what_cannot_be_told_hurts_no_work(
    wrong: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv(telemetry.METRICS, wrong)
    monkeypatch.setenv(telemetry.ALIVE, str(tmp_path / "no folder" / "alive"))
    telemetry.metrics().set("train_step", 1)
    alive = telemetry.Alive()
    alive.touch()
    alive.touch()
    telemetry._served.cache_clear()
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert f"no metrics at VLFM_METRICS={wrong}" in told[0]
    assert "its folder must be there" in told[1]


def test_a_port_that_is_taken_is_a_warning(address: str, caplog: pytest.LogCaptureFixture) -> None:
    host, _, port = address.rpartition(":")
    with socket.socket() as other:
        other.bind((host, int(port)))
        other.listen()
        telemetry.metrics().set("train_step", 1)
    assert "name a free port" in caplog.text


def test_logs_are_json_with_their_ids(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(logs.VARIABLE, "json")
    logger = logging.getLogger("pipeline")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        logs.start_logging()
        logs.start_logging()
        ids = {"run": "r1", "film": "a\nb.mp4", "clip": "c1", "reason": "corrupt"}
        logging.getLogger("pipeline.ingest.steps").info("the film ends early", extra=ids)
        out = io.StringIO()
        Progress("train", 10, "steps", out=out).update(10, "loss 0.1")
    finally:
        for name in logs.OURS:
            logging.getLogger(name).handlers, logging.getLogger(name).propagate = [], True
        logger.handlers, logger.level, logger.propagate = before
    (line,) = capsys.readouterr().err.splitlines()
    told = json.loads(line)
    assert {name: told[name] for name in ids} == ids
    assert (told["level"], told["message"], told["time"][-6:]) == ("info", "the film ends early", "+00:00")
    progress = json.loads(out.getvalue())
    assert (progress["stage"], progress["done"], progress["total"], progress["message"]) == (
        "train",
        10,
        10,
        "loss 0.1",
    )


def test_a_trainer_is_set_up_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "VLFM_LAKE": "s3://bucket/lake", "VLFM_RUN_DIR": "run", "VLFM_RECIPE": "demo", "VLFM_VERSION": "3",
        "VLFM_COPY_TO": "s3://bucket/runs/1", "VLFM_ALLOW_MISMATCH": "yes", "VLFM_PROCESSES": "2",
        "VLFM_SET": "steps=5 'compile=false'", "VLFM_INIT_FROM": "",
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    parser = argparse.ArgumentParser()
    arguments(parser)
    found = parser.parse_args([])
    assert (found.lake, found.run, found.recipe, found.version) == ("s3://bucket/lake", "run", "demo", 3)
    assert (found.copy_to, found.allow_mismatch, found.processes) == ("s3://bucket/runs/1", True, 2)
    assert found.init_from is None, "an empty variable is none"
    assert parse_settings(found.settings) == {"steps": "5", "compile": "false"}
    given = parser.parse_args(["--lake", "here", "--set", "steps=7", "--processes", "1"])
    assert (given.lake, given.processes) == ("here", 1), "the command line comes first"
    assert parse_settings(given.settings)["steps"] == "7"


def test_a_wrong_variable_is_told_as_a_wrong_option(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--version", type=int)
    take_from_environment(parser, {"VLFM_VERSION": "three"})
    with pytest.raises(SystemExit):
        parser.parse_args([])
    assert "argument --version: invalid int value: 'three'" in capsys.readouterr().err
