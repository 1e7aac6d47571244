"""Rows in the column layouts that the seven datasets are published with, joined with films."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources.folders import Discovery, SourceError, discover
from pipeline.sources.formats import FORMATS, folder_words

Part = tuple[str, str, float, float | None]


def films(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"film")
    return folder


def parts(found: Discovery) -> list[Part]:
    return [(Path(entry.path).name, entry.caption, entry.start, entry.end) for entry in found.entries]


def test_openvid(tmp_path: Path) -> None:
    folder = films(tmp_path / "video", "celebv_--5xsgMEjrw_0_0.mp4", "part/IIvwqskxtdE_0.mp4", "unnamed.mp4")
    (tmp_path / "OpenVid-1M.csv").write_text(
        "video,caption,aesthetic score,motion score,temporal consistency score,camera motion,frame,fps,seconds\n"
        'celebv_--5xsgMEjrw_0_0.mp4,"A woman, speaking.",5.08,3.2,0.99,static,100,25.0,4.0\n'
        "IIvwqskxtdE_0.mp4,Two dogs run.,4.9,,0.98,pan_left,240,24.0,10.0\n"
        "IIvwqskxtdE_0.mp4,Two dogs run.,4.9,,0.98,pan_left,240,24.0,10.0\n"
        "gone_1.mp4,A river.,4.9,1.0,0.98,static,240,24.0,10.0\n"
    )
    found = discover(folder, tmp_path / "OpenVid-1M.csv", table_format="openvid")
    assert parts(found) == [
        ("celebv_--5xsgMEjrw_0_0.mp4", "A woman, speaking.", 0.0, None),
        ("IIvwqskxtdE_0.mp4", "Two dogs run.", 0.0, None),
    ], "the same row twice is one"
    assert [(failure.film, failure.reason) for failure in found.failures] == [("unnamed.mp4", "no_caption")]
    assert found.notes == ["1 of 4 rows of OpenVid-1M.csv are of films that are not there, such as gone_1.mp4"]
    beside = films(tmp_path / "beside", "a/IIvwqskxtdE_0.mp4")
    (tmp_path / "OpenVid-1M.csv").rename(beside / "OpenVid-1M.csv")
    assert parts(discover(beside / "OpenVid-1M.csv", table_format="openvid")) == parts(found)[1:], "the table as source"


def test_ids_that_are_there_twice_are_told(tmp_path: Path) -> None:
    folder = films(tmp_path / "video", "x.mp4", "a/y.mp4", "b/y.mp4")
    (tmp_path / "t.csv").write_text("video,caption\nx.mp4,One.\nx.mp4,Another.\ny.mp4,Which?\n")
    found = discover(folder, tmp_path / "t.csv", table_format="openvid")
    assert parts(found) == [("x.mp4", "One.", 0.0, None)]
    told = {failure.reason: failure.detail for failure in found.failures}
    assert "x.mp4 is named twice" in told["duplicate_name"]
    assert told["bad_row"] == "a/y.mp4 and b/y.mp4 are both its film; keep one"


def test_ucf101_by_its_folders_and_by_its_lists(tmp_path: Path) -> None:
    names = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", "TaiChi/v_TaiChi_g01_c01.avi", "YoYo/v_YoYo_g01_c01.avi"]
    folder = films(tmp_path / "UCF-101", *names)
    assert [entry.caption for entry in discover(folder, table_format="ucf101").entries] == [
        "apply eye makeup", "tai chi", "yo yo",
    ]  # fmt: skip
    (tmp_path / "trainlist01.txt").write_text(f"{names[0]} 1\nTaiChi/v_TaiChi_g09_c09.avi 91\n")
    found = discover(folder, tmp_path / "trainlist01.txt", table_format="ucf101")
    assert parts(found)[0] == ("v_ApplyEyeMakeup_g08_c01.avi", "apply eye makeup", 0.0, None)
    (folder / "testlist01.txt").write_text(f"{names[1]}\n")
    assert parts(discover(folder / "testlist01.txt", table_format="ucf101")) == [
        ("v_TaiChi_g01_c01.avi", "tai chi", 0.0, None)
    ], "a list as the source: its films only"
    assert [folder_words(f"{name}/v.avi") for name in ("BaseballPitch", "CleanAndJerk", "HandstandPushups")] == [
        "baseball pitch", "clean and jerk", "handstand pushups",
    ]  # fmt: skip


def test_kinetics(tmp_path: Path) -> None:
    """Clips as the official scripts name them, and whole films, of which the row's times are the part."""
    folder = films(
        tmp_path / "k400", "abseiling/-3B32lodo2M_000059_000069.mp4", "train/_dbcJuKJQNs.mkv", "val/0wR5jVB-WPk.webm"
    )
    (tmp_path / "train.csv").write_text(
        "label,youtube_id,time_start,time_end,split,is_cc\n"
        "abseiling,-3B32lodo2M,59,69,val,0\n"
        '"air drumming",_dbcJuKJQNs,40,50,val,0\n'
        '"air drumming",_dbcJuKJQNs,60,70,val,0\n'
        "archery,0wR5jVB-WPk,30,20,val,0\n"
        "archery,notherexxxx,3,13,val,0\n"
    )
    found = discover(folder, tmp_path / "train.csv", table_format="kinetics")
    assert sorted(parts(found)) == [
        ("-3B32lodo2M_000059_000069.mp4", "abseiling", 0.0, None),
        ("_dbcJuKJQNs.mkv", "air drumming", 40.0, 50.0),
        ("_dbcJuKJQNs.mkv", "air drumming", 60.0, 70.0),
    ]
    (failure,) = found.failures
    assert (failure.reason, failure.detail) == (
        "bad_times", "it ends at 20 s, not after its start at 30 s; correct the table"
    )  # fmt: skip
    assert found.notes == [
        "1 of 5 rows of train.csv are of films that are not there, such as archery/notherexxxx_000003_000013"
    ]
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end,split\n_dbcJuKJQNs,40,50,test\n")
    bare = discover(folder, tmp_path / "test.csv", captions_required=False, table_format="kinetics")
    assert ("_dbcJuKJQNs.mkv", "", 40.0, 50.0) in parts(bare), "its test split has no labels"


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_internvid(tmp_path: Path, kind: str) -> None:
    folder = films(tmp_path / "films", "cut/cLEj5hnUGAQ_00:00:03.503_00:00:06.006.mp4", "yF5NZ5UDYrw.mp4")
    rows = [
        {"YoutubeID": "cLEj5hnUGAQ", "Start_timestamp": "00:00:03.503", "End_timestamp": "00:00:06.006",
         "Caption": "a man in a suit", "Aesthetic_Score": 4.29, "UMT_Score": 0.41},
        {"YoutubeID": "yF5NZ5UDYrw", "Start_timestamp": "00:01:02.500", "End_timestamp": "01:00:00.000",
         "Caption": "a cat sleeps", "Aesthetic_Score": 4.29, "UMT_Score": 0.41},
        {"YoutubeID": "yF5NZ5UDYrw", "Start_timestamp": "soon", "End_timestamp": "00:00:09.000",
         "Caption": "a cat wakes", "Aesthetic_Score": 4.29, "UMT_Score": 0.41},
    ]  # fmt: skip
    table = tmp_path / f"InternVid-10M-flt.{kind}"
    if kind == "jsonl":
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), table)
    found = discover(folder, table, table_format="internvid")
    assert sorted(parts(found)) == [
        ("cLEj5hnUGAQ_00:00:03.503_00:00:06.006.mp4", "a man in a suit", 0.0, None),
        ("yF5NZ5UDYrw.mp4", "a cat sleeps", 62.5, 3600.0),
    ]
    assert [failure.detail for failure in found.failures] == [
        "'soon' is neither seconds nor H:MM:SS; correct the table"
    ]


def test_miradata(tmp_path: Path) -> None:
    """Version 1 by the clip's file, by the number of the download, by the film's id; version 0 by its index."""
    folder = films(
        tmp_path / "miradata",
        "clip_video/000000000/000000000001_000000000003.mp4", "raw_video/000000000/000000000007.mp4", "f-abc.mp4",
    )  # fmt: skip
    head = (
        "clip_id,source,video_url,video_id,width,height,fps,seconds,timestamp,frame_number,framestamp,file_path,"
        "short_caption,dense_caption,background_caption,main_object_caption,style_caption,camera_caption\n"
    )
    rest = ",A dog.,A dog runs over a field.,A field.,A dog.,Plain.,Still.\n"
    span = "\"['0:01:02.500', '0:02:02.000']\""
    (tmp_path / "miradata_v1_9k.csv").write_text(
        head
        + f'1.3,youtube_nature,https:,vid1,1280,720,30,60,{span},1785,"[1, 2]",'
        + f"miradata/clip_video/000000000/000000000001_000000000003.mp4{rest}"
        + f'7.0,pixabay,https:,vid7,1280,720,30,60,{span},1785,"[1, 2]",clip_video/x.mp4{rest}'
        + f'8.0,pexels,https:,f-abc,1280,720,30,60,{span},1785,"[1, 2]",clip_video/y.mp4,A dog.,,,,,\n'
    )
    found = discover(folder, tmp_path / "miradata_v1_9k.csv", table_format="miradata")
    assert sorted(parts(found)) == [
        ("000000000001_000000000003.mp4", "A dog runs over a field.", 0.0, None),
        ("000000000007.mp4", "A dog runs over a field.", 62.5, 122.0),
        ("f-abc.mp4", "A dog.", 62.5, 122.0),
    ]
    older = films(tmp_path / "v0", "000000008783_AJp_ANXoGoM-000114.mp4", "bFPlCi36RSQ.mp4")
    (tmp_path / "miradata_v0.csv").write_text(
        "index,video_id,start_frame,end_frame,main_object_caption,background_caption,style_caption,camera_caption,"
        "short_caption,dense_caption,fps,start_timestep,end_timestep,,\n"
        "000000008783_AJp_ANXoGoM-000114,AJp_ANXoGoM,163272,166872,m,b,s,c,Cars.,A car show.,30,1:30:42,1:32:42,,\n"
        "000000008003_bFPlCi36RSQ-000623,bFPlCi36RSQ,913907,915766,m,b,s,c,A street.,,30,8:27:44,8:28:46,,\n"
    )
    assert sorted(parts(discover(older, tmp_path / "miradata_v0.csv", table_format="miradata"))) == [
        ("000000008783_AJp_ANXoGoM-000114.mp4", "A car show.", 0.0, None),
        ("bFPlCi36RSQ.mp4", "A street.", 30464.0, 30526.0),
    ]


def test_pixabay(tmp_path: Path) -> None:
    """Open-Sora-Plan's list, and the answers of Pixabay's own API."""
    folder = films(tmp_path / "pixabay_v2", "folder_01/video0.mp4", "folder_01/video1.mp4", "125.mp4")
    (tmp_path / "video_pixabay.json").write_text(
        json.dumps([
            {"path": "folder_01/video0.mp4", "cap": ["A wave.", "Another."], "num_frames": 65, "fps": 25},
            {"path": "pixabay_v2/folder_01/video1.mp4", "frame_idx": "50:115", "cap": "A beach.", "fps": 25},
            {"path": "pixabay_v2/folder_01/video1.mp4", "frame_idx": "0:65", "cap": "No rate."},
            "no row",
        ])
    )  # fmt: skip
    found = discover(folder, tmp_path / "video_pixabay.json", table_format="pixabay")
    assert parts(found) == [("video0.mp4", "A wave.", 0.0, None), ("video1.mp4", "A beach.", 2.0, 4.6)]
    assert sorted((failure.reason, failure.detail.partition(",")[0]) for failure in found.failures) == [
        ("bad_row", "it is no object; remove it"),
        ("bad_times", "frame_idx is '0:65'"),
        ("no_caption", "it has no caption; add a line to the captions file"),
    ]
    answer = {
        "total": 1,
        "totalHits": 1,
        "hits": [{"id": 125, "type": "film", "tags": "flowers, yellow", "duration": 12}],
    }
    (tmp_path / "hits.json").write_text(json.dumps(answer))
    assert ("125.mp4", "flowers, yellow", 0.0, None) in parts(
        discover(folder, tmp_path / "hits.json", table_format="pixabay")
    )


def varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def message(field: int, data: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(data)) + data


def record(identity: str, labels: list[int], packed: bool = True) -> bytes:
    """A TFRecord of an Example with the features of YouTube-8M's video-level files."""
    numbers = message(1, b"".join(map(varint, labels))) if packed else b"".join(b"\x08" + varint(n) for n in labels)
    features = {
        b"id": message(1, message(1, identity.encode())),
        b"labels": message(3, numbers),
        b"mean_rgb": message(2, message(1, struct.pack("<4f", *range(4)))),
    }
    body = message(1, b"".join(message(1, message(1, name) + message(2, value)) for name, value in features.items()))
    return struct.pack("<Q", len(body)) + b"crc1" + body + b"crc2"


def test_youtube8m(tmp_path: Path) -> None:
    """The labels' names are the caption; the ids are joined with the films."""
    folder = films(tmp_path / "films", "nXSc.mp4", "deep/ABCD.mkv", "abcdefghijk.mp4")
    (tmp_path / "vocabulary.csv").write_text(
        "Index,TrainVideoCount,KnowledgeGraphId,Name,WikiUrl,Vertical1,Vertical2,Vertical3,WikiDescription\n"
        '0,788288,/m/03bt1gh,Game,https:,Games,,,"A game, played."\n1,539945,/m/01mw1,Vehicle,https:,Autos,,,V\n'
        "522,1000,/m/01,Drum kit,https:,Arts,,,D\n"
    )
    table = tmp_path / "train00.tfrecord"
    table.write_bytes(record("nXSc", [0, 522]) + record("ABCD", [1], packed=False) + record("gone", [1]))
    found = discover(folder, table, table_format="youtube8m", captions_required=False)
    assert sorted(parts(found)) == [
        ("ABCD.mkv", "Vehicle", 0.0, None),
        ("abcdefghijk.mp4", "", 0.0, None),
        ("nXSc.mp4", "Game, Drum kit", 0.0, None),
    ]
    table.write_bytes(record("nXSc", [0]) + record("ABCD", [1])[:-9])
    (bad,) = [each for each in discover(folder, table, table_format="youtube8m").failures if each.reason == "bad_row"]
    assert (bad.film, bad.detail) == (
        "train00.tfrecord, record 2", "the file is cut off or damaged here; download it again"
    )  # fmt: skip
    (tmp_path / "labels.csv").write_text("id,youtube_id,labels\nzzzz,abcdefghijk,1 522\n")
    assert ("abcdefghijk.mp4", "Vehicle, Drum kit", 0.0, None) in parts(
        discover(folder, tmp_path / "labels.csv", table_format="youtube8m")
    )
    (tmp_path / "vocabulary.csv").unlink()
    with pytest.raises(SourceError, match=r"vocabulary.csv does not exist; put YouTube-8M's vocabulary.csv beside"):
        discover(folder, tmp_path / "labels.csv", table_format="youtube8m")


def test_mistakes(tmp_path: Path) -> None:
    folder = films(tmp_path / "films", "a.mp4")
    (tmp_path / "t.csv").write_text("name,text\na.mp4,A\n")
    (tmp_path / "none.csv").write_text("video,caption\nb.mp4,B\n")
    (tmp_path / "out.csv").write_text("video,caption\n../../etc/a.mp4,A\n")
    for table, chosen, message_ in (
        ("t.csv", "openvid", "has not the columns of OpenVid-1M: .*; it has: name, text"),
        ("t.csv", "laion", "no table format 'laion'; there are: openvid, ucf101, kinetics"),
        ("t.csv", "ucf101", r"t.csv is no .txt; --table-format ucf101 is UCF-101"),
        ("absent.csv", "kinetics", r"absent.csv does not exist; give Kinetics-400"),
        ("out.csv", "openvid", r"no row that can be used \(it names no film"),
    ):
        with pytest.raises(SourceError, match=message_):
            discover(folder, tmp_path / table, table_format=chosen)
    with pytest.raises(SourceError, match="--table-format knows its columns; leave --column out"):
        discover(folder, tmp_path / "t.csv", columns={"file": "name"}, table_format="openvid")
    (folder / "none.csv").write_text("video,caption\nb.mp4,B\n")
    with pytest.raises(SourceError, match=r"no films in .*1 of 1 rows of none.csv are of films that are not there"):
        discover(folder / "none.csv", table_format="openvid")
    assert set(FORMATS) == {"openvid", "ucf101", "kinetics", "internvid", "miradata", "pixabay", "youtube8m"}
