"""Import of latents that somebody has already: checked, projected, refreshed and refused as films are.

What is imported here came out of a lake of ours, written as the documents tell strangers to write it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

import pipeline.ingest.plan
from model.codecs.linear import LinearCodec
from pipeline.ingest import plan_ingest
from pipeline.ingest.block import BlockWorker
from pipeline.ingest.cost import estimate
from pipeline.items import CodecFacts
from pipeline.media import latents as files
from pipeline.media.decode import select_frames
from pipeline.media.faults import DecodeError
from pipeline.sources.folders import SourceError, discover
from storage.failures import read_failures
from storage.layout import Lake
from storage.shards import ShardReader
from storage.version import load
from tests.pipeline.ingest.in_process import RECIPE, InProcess, NoWork, make, rows, sound
from tests.s3_server import S3Server

Film = Callable[..., Path]


def samples(lake: Path) -> dict[tuple[str, float], dict[str, Any]]:
    """The newest version's samples by caption and start."""
    opened = Lake.open(lake)
    found = {}
    for row in rows(lake):
        sample = ShardReader(opened, row["shard"]).read(row["shard_row"])
        found[row["caption"], row["clip_start"]] = {**sample, "row": row}
    return found


def write(path: Path, latents: np.ndarray, times: np.ndarray | None, **about: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"latents": np.ascontiguousarray(latents)}
    if times is not None:
        tensors["frame_time"] = times
    save_file(tensors, path, {name: str(value) for name, value in about.items()})
    return path


@pytest.fixture(scope="module")
def films_lake(scene: Film, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A lake of two films, one at 24 frames a second, which are thinned unevenly, and one in milliseconds."""
    folder = tmp_path_factory.mktemp("films")
    scene(folder / "a.mp4", rate="24", seconds=3)
    scene(folder / "b.mkv", rate="10", seconds=2.5)
    (folder / "captions.csv").write_text("file,caption\na.mp4,a\nb.mkv,b\n")
    make(folder, folder.parent / "lake")
    return folder.parent / "lake"


@pytest.fixture
def codec(films_lake: Path) -> str:
    return str(load(Lake.open(films_lake)).codec["id"])


@pytest.fixture
def exported(films_lake: Path, codec: str, tmp_path: Path) -> Path:
    """A file of latents for each clip of that lake, the frame after it too, with the clip's caption beside it."""
    folder = tmp_path / "latents"
    for (caption, start), sample in samples(films_lake).items():
        latents, times = (
            np.concatenate([sample[f"{kept}.npy"], sample[f"{after}.npy"]])
            for kept, after in (("latents", "next_latents"), ("frame_time", "next_time"))
        )
        about = {"codec": codec, "duration": max(sample["row"]["duration"], times[-1])}
        path = write(folder / f"{caption}{start:g}.safetensors", latents, times, **about)
        path.with_suffix(".txt").write_text(f"{caption}{start:g}")
    return folder


def test_what_came_out_of_a_lake_gives_the_same_coefficients(films_lake: Path, exported: Path, tmp_path: Path) -> None:
    """Bit for bit, with nothing decoded, encoded, or decoded again for the certificate."""
    forbidden = mock.Mock(side_effect=AssertionError("not for latents"))
    names = ("encode", "decode", "without_inversion")
    codec = mock.patch.multiple(LinearCodec, **dict.fromkeys(names, forbidden))
    with codec, mock.patch("pipeline.media.decode.ffmpeg_tool", forbidden):
        report = make(exported, tmp_path / "lake", latents=True)
    assert (report.films.done, report.clips.done, report.exit_status) == (5, 5, 0)
    sound(tmp_path / "lake")
    made = {caption: sample for (caption, _), sample in samples(tmp_path / "lake").items()}
    for (caption, start), own in samples(films_lake).items():
        other = made[f"{caption}{start:g}"]
        for name in ("coefficients.npy", "latents.npy", "frame_time.npy", "observed.npy", "next_latents.npy"):
            assert own[name].tobytes() == other[name].tobytes()
        for name in ("projection_error", "heldout_error", "smoothness", "end_ratio", "order_used"):
            assert own["row"][name] == pytest.approx(other["row"][name], rel=1e-12)
        assert np.isnan(
            [other["row"][name] for name in ("psnr_codec", "psnr_projection", "motion", "short_side")]
        ).all()
        assert not other["row"]["preview"]


def test_latents_and_films_share_a_dataset(films_lake: Path, exported: Path, tmp_path: Path, scene: Film) -> None:
    """Each kind has its own runs; neither misses the other's films, and a second run has nothing to do."""
    lake = tmp_path / "lake"
    scene(exported / "film.mp4", rate="8", seconds=2)
    (exported / "film.txt").write_text("a film")
    make(exported, lake)
    with mock.patch.object(LinearCodec, "from_spec", side_effect=AssertionError("the version says which codec it is")):
        report = make(exported, lake, latents=True)
    assert (report.clips.done, len(rows(lake))) == (5, 7)
    sound(lake)
    for latents in (True, False):
        report = make(exported, lake, runner=NoWork(), latents=latents, prune=True)
        assert (report.published, report.clips.done, report.notes) == (False, 0, report.notes)
        assert not any("not in the source" in note for note in report.notes)


def test_a_refresh_of_latents(exported: Path, codec: str, tmp_path: Path) -> None:
    """Renamed, captioned anew, changed, projected otherwise and gone: as films."""
    lake = tmp_path / "lake"
    make(exported, lake, latents=True)
    (exported / "a0.safetensors").rename(exported / "z.safetensors")
    (exported / "a0.txt").rename(exported / "z.txt")
    report = make(exported, lake, runner=NoWork(), latents=True)
    assert (report.clips.done, {row["film"] for row in rows(lake)} >= {"z.safetensors"}) == (0, True)
    (exported / "z.txt").write_text("other words")
    with mock.patch.object(BlockWorker, "process", side_effect=AssertionError("only the text is new")):
        assert make(exported, lake, latents=True).clips.done == 1
    assert {row["caption"] for row in rows(lake)} == {"other words", "a1", "a2", "b0", "b1"}
    write(exported / "z.safetensors", np.zeros((16, 12, 4, 4), np.float32), None, codec=codec, rate=8)
    report = make(exported, lake, latents=True)
    assert (report.clips.done, report.superseded) == (2, 1)
    (exported / "b1.safetensors").unlink()
    assert make(exported, lake, runner=NoWork(), latents=True, prune=True).published
    assert {row["caption"] for row in rows(lake)} == {"other words", "a1", "a2", "b0"}
    other = dataclasses.replace(RECIPE, order=4)
    assert make(exported, lake, other, latents=True).clips.done == 5
    sound(lake)


def test_an_import_that_was_stopped_goes_on(exported: Path, tmp_path: Path) -> None:
    lake = tmp_path / "lake"
    with pytest.raises(KeyboardInterrupt):
        make(exported, lake, runner=InProcess(KeyboardInterrupt(), after=1), latents=True)
    again = InProcess()
    assert make(exported, lake, runner=again, latents=True).clips.done == 5
    assert again.clips == 2, "the staged block of three is kept"
    straight = tmp_path / "straight"
    make(exported, straight, latents=True)
    assert load(Lake.open(lake)).merkle_root == load(Lake.open(straight)).merkle_root


def test_times_and_types(codec: str, tmp_path: Path) -> None:
    """A rate, parts by a table, other float types, more frames than the recipe keeps, a tar, any rhythm."""
    import torch

    rng = np.random.default_rng(1)
    latents = rng.standard_normal((48, 12, 4, 4)).astype(np.float32)
    folder = tmp_path / "latents"
    write(folder / "f64.safetensors", latents.astype(np.float64), None, codec=codec, rate=16)
    write(folder / "f16.safetensors", latents.astype(np.float16), np.arange(48) / 16, codec=codec)
    uneven = (np.arange(48) / 16 + rng.uniform(0, 0.06, 48)).astype(np.float32)
    write(folder / "uneven.safetensors", latents, uneven, codec=codec, duration=3)
    save_torch_file(
        {"latents": torch.from_numpy(latents).bfloat16()}, folder / "bf16.safetensors", {"codec": codec, "rate": "16"}
    )
    lines = [
        f"{name}.safetensors,{name},{part}"
        for name, part in (("f64", "1,3"), ("f16", ","), ("bf16", ","), ("uneven", ","))
    ]
    (folder / "table.csv").write_text("\n".join(["file,caption,start,end", *lines, "film.mp4,a film,,"]))
    report = make(folder / "table.csv", tmp_path / "lake", latents=True)
    assert (report.films.done, report.clips.done) == (4, 2 + 3 + 3 + 3)
    assert any("1 rows of table.csv do not name latents" in note for note in report.notes)
    made = samples(tmp_path / "lake")
    half = latents[16:32:2].astype(np.float16)  # thinned from 16 to 8 a second
    for name in ("f64", "f16"):
        assert np.array_equal(made[name, 1.0]["latents.npy"], half)
        assert np.array_equal(made[name, 1.0]["frame_time.npy"], np.arange(8) / 8)
    assert made["f64", 1.0]["coefficients.npy"].tobytes() == made["f16", 1.0]["coefficients.npy"].tobytes()
    assert np.abs(made["bf16", 1.0]["latents.npy"] - half).max() <= 2**-8 * np.abs(half).max()
    kept = made["uneven", 1.0]["frame_time.npy"] + 1.0
    assert np.isin(kept, uneven.astype(np.float64)).all()
    assert len(kept) <= 8
    with tarfile.open(tmp_path / "shard-000.tar", "w") as tar:
        for suffix, data in ((".safetensors", (folder / "f16.safetensors").read_bytes()), (".txt", b"f16")):
            member = tarfile.TarInfo(f"walk{suffix}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    make(tmp_path / "shard-000.tar", tmp_path / "of-tar", latents=True)
    for start in (0.0, 1.0, 2.0):
        assert (
            samples(tmp_path / "of-tar")["f16", start]["coefficients.npy"].tobytes()
            == made["f16", start]["coefficients.npy"].tobytes()
        )


def bad_files(folder: Path, codec: str) -> dict[str, str]:
    """Files that cannot be used, and the reasons."""
    good, times = np.zeros((16, 12, 4, 4), np.float16), np.arange(16) / 8
    wrong: dict[str, tuple[str, Any, Any, dict[str, Any]]] = {
        "other-codec": ("codec_mismatch", good, times, {"codec": "linear-f4-c3"}),
        "no-codec": ("not_latents", good, times, {}),
        "size": ("wrong_shape", np.zeros((16, 12, 8, 8), np.float16), times, {"codec": codec}),
        "axes": ("wrong_shape", np.zeros((12, 16, 4, 4), np.float16), np.arange(12) / 8, {"codec": codec}),
        "flat": ("wrong_shape", np.zeros((16, 192), np.float16), times, {"codec": codec}),
        "integers": ("not_latents", np.zeros((16, 12, 4, 4), np.int8), times, {"codec": codec}),
        "empty": ("not_latents", good[:0], times[:0], {"codec": codec}),
        "no-times": ("bad_frame_times", good, None, {"codec": codec}),
        "both-times": ("bad_frame_times", good, times, {"codec": codec, "rate": 8}),
        "fewer-times": ("bad_frame_times", good, times[:-1], {"codec": codec}),
        "nan-time": ("bad_frame_times", good, np.where(times == 1, np.nan, times), {"codec": codec}),
        "backwards": ("bad_frame_times", good, times[::-1].copy(), {"codec": codec}),
        "negative": ("bad_frame_times", good, times - 1, {"codec": codec}),
        "integer-times": ("bad_frame_times", good, np.arange(16), {"codec": codec}),
        "endless": ("bad_frame_times", good, times * 1e300, {"codec": codec}),
        "rate": ("bad_frame_times", good, None, {"codec": codec, "rate": "fast"}),
        "slow": ("bad_frame_times", good, None, {"codec": codec, "rate": 1e-310}),
        "no-end": ("bad_frame_times", good, times, {"codec": codec, "duration": "inf"}),
        "ended": ("bad_frame_times", good, times, {"codec": codec, "duration": 1}),
        "short": ("shorter_than_window", good[:4], times[:4], {"codec": codec}),
    }  # fmt: skip
    for name, (_, latents, when, about) in wrong.items():
        write(folder / f"{name}.safetensors", latents, when, **about)
    whole = write(folder / "whole.safetensors", good, times, codec=codec).read_bytes()
    raw = {
        "cut": ("truncated", whole[:-100]),
        "cut-header": ("truncated", whole[:50]),
        "nothing": ("empty_file", b""),
        "seven": ("not_latents", b"\1\2\3\4\5\6\7"),
        "text": ("not_latents", b"this is no such file, and never was"),
        "bomb": ("not_latents", (2**63).to_bytes(8, "little") + b"{}"),
        "deep": ("not_latents", (200_000).to_bytes(8, "little") + b"[" * 200_000),
        "lies": ("not_latents", whole.replace(b"[16,12,4,4]", b"[99,12,4,4]")),
        "huge": ("not_latents", whole.replace(b"[16,12,4,4]", b"[9e9,12,4,]")),
    }
    for name, (_, data) in raw.items():
        (folder / f"{name}.safetensors").write_bytes(data)
    return {name: row[0] for name, row in wrong.items()} | {name: row[0] for name, row in raw.items()}


def test_bad_files_cost_themselves_only(codec: str, tmp_path: Path) -> None:
    folder, lake = tmp_path / "latents", tmp_path / "lake"
    reasons = bad_files(folder, codec)
    free = dataclasses.replace(RECIPE, captions_required=False, tolerate=1.0)
    report = make(folder, lake, free, latents=True)
    films = {row["film"].removesuffix(".safetensors"): row for row in rows(lake, table="films")}
    assert {name: row["reason"] for name, row in films.items() if row["reason"]} == reasons
    assert films["whole"]["clips"] == 2
    assert all(len(row["detail"]) > 20 and "\n" not in row["detail"] for name, row in films.items() if name != "whole")
    assert codec in films["no-codec"]["detail"], "says what to write"
    sound(lake)
    # What is at fault is not opened again; where all is put right, all is taken.
    with mock.patch.object(pipeline.ingest.plan, "probe_latents", side_effect=AssertionError("opened again")):
        assert not make(folder, lake, free, runner=NoWork(), latents=True).published
    for name in reasons:
        write(folder / f"{name}.safetensors", np.full((8, 12, 4, 4), len(name), np.float16), None, codec=codec, rate=8)
    report = make(folder, lake, free, latents=True)
    assert (report.films.failed, report.exit_status) == ({}, 0)


def test_mutated_files_raise_nothing_else(films_lake: Path, codec: str, tmp_path: Path) -> None:
    """Whatever bytes change: the file is read, or its fault is told as a film's is."""
    base = load(Lake.open(films_lake))
    facts = CodecFacts.from_json({**base.codec, "latent_shape": base.clip["latent_shape"]})
    path = write(tmp_path / "a.safetensors", np.zeros((16, 12, 4, 4), np.float16), np.arange(16) / 8, codec=codec)
    whole, rng, read = path.read_bytes(), random.Random(0), 0
    for _ in range(1000):
        data = bytearray(whole)
        for _ in range(rng.choice((1, 2, 8))):
            data[rng.randrange(rng.choice((8, 300)))] = rng.choice((*b'0129-+eE.[]{}":,', rng.randrange(256)))
        path.write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        with contextlib.suppress(DecodeError):
            found = files.probe_latents(path, facts)
            window = select_frames(found, 0.0, 1.0, 8.0)
            read += bool(window.ticks and files.read_latents(path, window).shape[1:] == (12, 4, 4))
    assert 0 < read < 900, "some changes are harmless"


def test_values_that_are_not_finite_cost_their_clip(codec: str, tmp_path: Path) -> None:
    latents = np.zeros((24, 12, 4, 4), np.float32)
    latents[9, 3, 2, 1], latents[18] = np.nan, 1e6
    write(tmp_path / "latents" / "a.safetensors", latents, None, codec=codec, rate=8).with_suffix(".txt").write_text(
        "a"
    )
    report = make(tmp_path / "latents", tmp_path / "lake", latents=True)
    assert (report.clips.done, report.clips.failed) == (1, {"not_finite": 2})
    said = [row["detail"] for row in read_failures(Lake.open(tmp_path / "lake"), report.run_id)]
    assert said == [
        "latents of frame 1 are not finite; encode its film again",
        "latents of frame 2 do not fit 16 bits; encode its film again",
    ]


def test_a_file_that_changes_during_the_run(exported: Path, codec: str, tmp_path: Path) -> None:
    """Between plan and import: the clip fails and the next run takes what is there then."""

    class Changing(InProcess):
        def run(self, *how: Any) -> None:
            write(exported / "a0.safetensors", np.zeros((8, 12, 4, 4), np.float16), None, codec=codec, rate=8)
            super().run(*how)

    report = make(exported, tmp_path / "lake", runner=Changing(), latents=True)
    assert (report.clips.done, report.clips.failed) == (4, {"film_changed": 1})
    assert make(exported, tmp_path / "lake", latents=True).clips.done == 1


def test_whole_shots_and_cuts(codec: str, tmp_path: Path) -> None:
    """Nobody looks for cuts in latents: a file is one shot."""
    noise = np.random.default_rng(0).standard_normal((16, 12, 4, 4)).astype(np.float16)
    write(tmp_path / "latents" / "a.safetensors", noise, None, codec=codec, rate=8).with_suffix(".txt").write_text("a")
    shots = dataclasses.replace(RECIPE, shots={"min_frames": 4, "max_frames": 20})
    make(tmp_path / "latents", tmp_path / "shots", shots, latents=True)
    assert [(row["clip_start"], row["duration"], row["frames"]) for row in rows(tmp_path / "shots")] == [(0.0, 2.0, 16)]
    make(tmp_path / "latents", tmp_path / "cuts", dataclasses.replace(RECIPE, split_at_cuts=True), latents=True)
    assert len(rows(tmp_path / "cuts")) == 2


def test_the_plan_and_its_cost(films_lake: Path, exported: Path) -> None:
    """A plan says what is only projected, and costs no stage that it does not need; an import is no measurement."""
    lake = Lake.open(films_lake)
    plan = plan_ingest(lake, discover(exported, latents=True), RECIPE)
    assert "5 of them are imported latents: they are only projected" in plan.lines()
    cost = estimate(plan)
    assert cost is not None
    assert cost.clips == 0
    make(exported, exported.parent / "lake", latents=True)
    assert load(Lake.open(exported.parent / "lake")).extra["measured"]["clips"] == 0


def test_latents_in_a_bucket(
    films_lake: Path, exported: Path, tmp_path: Path, s3: S3Server, s3_environment: None
) -> None:
    """The same coefficients as from the folder; files that were not changed are not fetched again."""
    bucket = "latents"
    url = f"s3://{bucket}/in"
    s3.client.create_bucket(Bucket=bucket)
    for file in exported.iterdir():
        s3.client.upload_file(str(file), bucket, f"in/{file.name}")
    report = make(url, tmp_path / "lake", latents=True)
    assert (report.films.done, report.clips.done) == (5, 5)
    sound(tmp_path / "lake")
    made = {caption: sample for (caption, _), sample in samples(tmp_path / "lake").items()}
    for (caption, start), own in samples(films_lake).items():
        assert own["coefficients.npy"].tobytes() == made[f"{caption}{start:g}"]["coefficients.npy"].tobytes()
    s3.requests()
    assert make(url, tmp_path / "lake", runner=NoWork(), latents=True).films.unchanged == 5
    assert not [line for line in s3.requests() if line.startswith("GET") and line.endswith(".safetensors")]
    s3.client.put_object(
        Bucket="latents", Key="in/a0.safetensors", Body=(exported / "a1.safetensors").read_bytes()[:99]
    )
    report = make(url, tmp_path / "lake", latents=True)
    assert report.films.failed == {"truncated": 1}


def test_nothing_there(tmp_path: Path, scene: Film) -> None:
    scene(tmp_path / "a.mp4", seconds=1)
    with pytest.raises(SourceError, match=r"no latents in .* \(\.safetensors\)"):
        discover(tmp_path, latents=True)
    assert files.HEADER_BYTES < 2**27
