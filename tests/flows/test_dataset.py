"""The flow `ingest`, run for real in Prefect's ephemeral server and on Ray, on two tiny films."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows.artifacts import artifact_key
from pipeline.corpus import make_corpus
from storage.layout import Lake
from storage.verify import verify
from storage.version import latest, list_versions, read_manifest


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture(scope="module")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two films of the corpus and a text that calls itself a film."""
    folder = make_corpus(tmp_path_factory.mktemp("films"), films=2).parent
    (folder / "notes.mp4").write_text("no film at all")
    with (folder / "captions.csv").open("a") as table:
        table.write("notes.mp4,Some notes.,\n")
    return folder


class Ran:
    """One run of the flow, and what the server knows of it."""

    def __init__(self, films: Path, lake: Path) -> None:
        from flows.dataset import run_ingest

        self.lake, self.told = lake, list[tuple[str, int, int]]()
        self.report = run_ingest(str(films), str(lake), on_progress=lambda *step: self.told.append(step))
        self.flow_run = read("flow_runs", {"sort": "EXPECTED_START_TIME_DESC", "limit": 1})[0]
        mine = {"flow_runs": {"id": {"any_": [self.flow_run["id"]]}}}
        self.tasks = {task["name"]: task["state_type"] for task in read("task_runs", mine)}
        self.artifacts = {artifact["key"]: artifact for artifact in read("artifacts", mine)}
        self.key = artifact_key("ingest", str(lake), "")


def read(what: str, query: dict[str, Any]) -> list[dict[str, Any]]:
    """Asks the server."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        response = client._client.post(f"/{what}/filter", json=query)
        return list(response.raise_for_status().json())


@pytest.fixture(scope="module")
def ran(server: None, films: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return Ran(films, tmp_path_factory.mktemp("lakes") / "lake")


def test_publishes_what_is_good_and_fails_for_what_is_not(ran: Ran) -> None:
    report = ran.report
    assert report["exit_status"] == 3
    assert report["films"] == {
        "discovered": 3,
        "done": 2,
        "unchanged": 0,
        "filtered": {},
        "failed": {"not_a_video": 1},
    }
    assert report["clips"]["done"] == report["clips"]["discovered"] == 2
    version = latest(Lake.open(ran.lake))
    assert version is not None
    assert version.number == report["version"] == 1
    assert verify(Lake.open(ran.lake), version) == []
    assert ran.flow_run["state_type"] == "FAILED"
    message = "1 of 3 films failed, more than the recipe tolerates (5%); version 1 holds the others"
    assert ran.flow_run["state"]["message"] == message


def test_runs_have_names_that_people_understand(ran: Ran, films: Path) -> None:
    assert ran.flow_run["name"] == f"ingest-{films.name}-to-lake"
    assert ran.tasks == {
        f"look for films in {films.name}": "COMPLETED",
        f"plan the clips of {films.name}": "COMPLETED",
        "embed the captions of 2 clips": "COMPLETED",
        "decode, invert, project block 1 of 1": "COMPLETED",
        "pack shards and commit": "COMPLETED",
        "leave artifacts": "COMPLETED",
    }


def test_progress_is_told_to_the_end(ran: Ran) -> None:
    clips = [(done, total) for what, done, total in ran.told if what == "clips"]
    assert clips[0] == (0, 2)
    assert clips[-1] == (2, 2)


def test_artifacts_hold_table_summary_and_frames(ran: Ran) -> None:
    from PIL import Image

    assert set(ran.artifacts) == {f"{ran.key}{what}" for what in ("accounts", "summary", "contact-sheet")}
    assert '"reason": "not_a_video", "number": 1' in ran.artifacts[f"{ran.key}accounts"]["data"]
    summary = ran.artifacts[f"{ran.key}summary"]["data"]
    assert "**Version 1** was published" in summary
    assert "| notes.mp4 | source | failed | not_a_video |" in summary or "| notes.mp4 | plan | failed |" in summary
    address = ran.artifacts[f"{ran.key}contact-sheet"]["data"]
    kind, _, picture = address.partition(",")
    assert kind == "data:image/png;base64"
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")).astype(int)
    clips = read_manifest(Lake.open(ran.lake), latest(Lake.open(ran.lake)), "clips").to_pylist()  # type: ignore[arg-type]
    assert sheet.shape[0] // 90 == sum(clip["preview"] for clip in clips) == 2
    first, last = sheet[30:80, 10:60], sheet[30:80, -60:-10]
    assert np.abs(first - last).mean() > 10, "the first clip's first and last frame look the same"


def test_a_second_run_finds_nothing_new_and_starts_no_workers(ran: Ran, films: Path) -> None:
    again = Ran(films, ran.lake)
    assert again.report["published"] is False
    assert again.report["clips"]["unchanged"] == 2
    assert list_versions(Lake.open(ran.lake)) == [1]
    assert not any(name.startswith(("embed", "decode")) for name in again.tasks)
    assert ("leave artifacts" in again.tasks) == (again.report["exit_status"] != 0)


def test_a_refresh_is_skipped_while_the_lake_is_in_use(ran: Ran, films: Path) -> None:
    from flows.dataset import refresh

    before = len(read("artifacts", {}))
    with Lake.open(ran.lake).writing():
        state = refresh(str(films), str(ran.lake), return_state=True)
    assert (state.type.value, state.name) == ("COMPLETED", "Skipped")
    assert "is in use by process" in state.message
    settings = {"tolerate": 0.5}  # of the three films one is none
    report = refresh(str(films), str(ran.lake), settings=settings)
    assert (report["published"], list_versions(Lake.open(ran.lake))) == (False, [1])
    assert len(read("artifacts", {})) == before, "nothing is new, so nothing is left to look at"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source": "nowhere"}, "source nowhere does not exist"),
        ({"captions": "nothing.csv"}, "captions file nothing.csv does not exist"),
        ({"recipe": "cake"}, "data recipe 'cake' is unknown"),
        ({"settings": {"rat": 8}}, "setting 'rat' is unknown; the fields are"),
    ],
)
def test_what_is_known_to_go_wrong_is_one_line(
    server: None,
    films: Path,
    tmp_path: Path,
    arguments: dict[str, Any],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from flows.dataset import run_ingest

    lake = tmp_path / "lake"
    report = run_ingest(**({"source": str(films), "lake": str(lake)} | arguments))
    assert report["exit_status"] == 1
    assert report["error"].startswith(message)
    assert not [record.getMessage() for record in caplog.records if record.exc_info], "a trace is logged"
    assert "\n" not in report["error"]
    assert not lake.exists(), "a lake was made for nothing"


def test_called_directly_the_flow_raises_what_run_ingest_reports(server: None, tmp_path: Path) -> None:
    from flows.dataset import IngestFailed, ingest

    with pytest.raises(IngestFailed, match="source nowhere does not exist") as failed:
        ingest("nowhere", str(tmp_path / "lake"))
    assert failed.value.report["exit_status"] == 1


def test_a_lake_that_another_run_writes_to_is_left_alone(server: None, films: Path, tmp_path: Path) -> None:
    from flows.dataset import run_ingest

    with Lake.create(tmp_path / "lake").writing():
        report = run_ingest(str(films), str(tmp_path / "lake"))
    assert report["exit_status"] == 1
    assert str(tmp_path / "lake") in report["error"]
    assert list_versions(Lake.open(tmp_path / "lake")) == []


def test_what_the_pipeline_warns_of_is_in_the_log_and_on_the_terminal(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    from flows.dataset import _warnings_to

    run_log, worker_log = logging.getLogger("a run"), logging.getLogger("pipeline.runner")
    for aloud, printed in ((True, "warning: compiling failed\n"), (False, "")):
        caplog.clear()
        with _warnings_to(run_log, aloud):
            worker_log.warning("compiling %s", "failed")
            worker_log.info("all is well")
        worker_log.warning("after the run")
        assert [record.getMessage() for record in caplog.records if record.name == "a run"] == ["compiling failed"]
        assert capsys.readouterr().err == printed


def test_many_blocks_are_shared_out_to_a_dozen_tasks() -> None:
    from pipeline.ingest.steps import groups as share_out

    blocks: Any = [f"block {number}" for number in range(1, 1001)]
    groups = share_out(blocks)
    assert [block for _, group in groups for block in group] == blocks
    assert len(groups) == 12
    assert groups[0][0] == "decode, invert, project blocks 1-84 of 1000"
    assert [title for title, _ in share_out(blocks[:9])] == [
        "decode, invert, project blocks 1-8 of 9",
        "decode, invert, project block 9 of 9",
    ]
    assert share_out([]) == []
