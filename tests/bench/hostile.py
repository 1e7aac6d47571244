"""Hostile films, by seed: real films of many containers that were changed, cut, named or linked to do harm.

Each is drawn by its own number, so film i is the same whatever the others are. `Outside` is what none of them may
reach: a film of one colour, a text, and an address that counts who connects.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.media.decode import ffmpeg_binary

MAGENTA = (255, 0, 255)
"""Colour of the film that must not be read."""

SEEDS: dict[str, tuple[str, ...]] = {
    "fast.mp4": ("-c:v", "libx264", "-movflags", "faststart"),
    "plain.mp4": ("-c:v", "libx264", "-bf", "2"),
    "fragments.mp4": ("-c:v", "libx264", "-g", "8", "-movflags", "frag_keyframe+empty_moov"),
    "lossless.mov": (
        "-c:v",
        "png",
    ),
    "part4.mov": ("-c:v", "mpeg4"),
    "film.mkv": ("-c:v", "libx264", "-g", "8"),
    "film.webm": ("-c:v", "libvpx", "-deadline", "realtime"),
    "film.avi": ("-c:v", "mpeg4"),
    "film.ts": ("-c:v", "mpeg2video"),
    "film.mpg": ("-c:v", "mpeg1video", "-r", "25"),
    "film.flv": ("-c:v", "flv"),
    "film.ogv": ("-c:v", "libtheora"),
    "film.wmv": ("-c:v", "wmv2"),
    "film.gif": (),
}
"""Films by their names, and how they are encoded."""
BOMBS: dict[str, tuple[str, tuple[str, ...]]] = {
    "wide-png.mov": ("color=gray:size=8000x4000:rate=4:duration=1", ("-c:v", "png")),
    "wide-png.mkv": ("color=black:size=16000x2000:rate=4:duration=1", ("-c:v", "png")),
    "wide-h264.mp4": ("color=black:size=8192x4096:rate=4:duration=1", ("-c:v", "libx264", "-preset", "ultrafast")),
    "wider.mkv": ("color=black:size=12000x8000:rate=2:duration=1", ("-c:v", "png")),
    "wide.mov": ("color=gray:size=3000x2000:rate=2:duration=1", ("-c:v", "png")),
    "wide.gif": ("color=black:size=9000x3000:rate=4:duration=1", ()),
    "raw.avi": ("color=black:size=64x48:rate=8:duration=1", ("-c:v", "rawvideo", "-pix_fmt", "bgr24")),
    "many.mkv": ("color=black:size=16x16:rate=1000:duration=21", ("-c:v", "mpeg4", "-g", "1000")),
    "many.mp4": ("color=black:size=16x16:rate=1000:duration=21", ("-c:v", "libx264", "-preset", "ultrafast")),
}
"""Small files of large or many frames."""
FEW_SEEDS = ("plain.mp4", "fragments.mp4", "film.mkv", "film.avi", "film.ts", "film.gif")
FEW_BOMBS = ("wide.mov", "raw.avi", "many.mkv")
JUMPS = ("PTS+{t}*gt(N,9)/TB", "PTS*{t}", "PTS+{t}/TB", "PTS-mod(N,3)*{t}/TB", "N*N*N*{t}")
"""Times by ffmpeg's expressions; t is drawn."""
TIMES = (0.001, 1, 60, 3600, 1e6, 1e9)
NUMBERS = (
    b"\0\0\0\0",
    b"\0\0\0\1",
    b"\x7f\xff\xff\xff",
    b"\x80\0\0\0",
    b"\xff\xff\xff\xff",
    b"\xff\xff\xff\xfe",
    b"\0\0\xff\xff",
)
"""What sizes, counts and times are overwritten with."""
_MP4_TAGS = (
    *(b"ftyp", b"moov", b"trak", b"mdia", b"stsd", b"avcC", b"stsz", b"stsc", b"stco", b"tkhd", b"dref", b"mdat"),
    *(b"moof", b"trun"),
)
_MATROSKA_TAGS = (
    b"\x1a\x45\xdf\xa3",
    b"\x18\x53\x80\x67",
    b"\x16\x54\xae\x6b",
    b"\x1f\x43\xb6\x75",
    b"\xb0\x82",
    b"\xba\x81",
)
_OTHER_TAGS = (
    *(b"RIFF", b"avih", b"strh", b"strf", b"movi", b"idx1", b"FLV", b"OggS", b"theora", b"GIF8", b"IHDR", b"IDAT"),
    *(b"\x30\x26\xb2\x75", b"\0\0\1\xb3", b"\0\0\1\xba"),
)
_TIME_TAGS = (
    *(b"stts", b"ctts", b"elst", b"mvhd", b"mdhd", b"tfdt", b"trun", b"stss", b"OggS"),
    *(b"\xe7", b"\x2a\xd7\xb1", b"\0\0\1\xe0"),
)
TAGS = {"header": (*_MP4_TAGS, *_MATROSKA_TAGS, *_OTHER_TAGS), "jump": _TIME_TAGS}
"""Places where a container keeps what it says of itself, and of times."""
NAMES = (
    *("-i", "--", "-version.mp4", "%d", "%05d", "a:b", "file:a", "concat:a|b", "http:a", "pipe:0", "@list"),
    *(
        "a'b",
        'a"b',
        "a b ",
        "a\tb",
        "a\nb",
        "a;b",
        "$(touch x)",
        "`touch x`",
        "a|b",
        "a\\b",
        "*",
        "?",
        "[a]",
        "{a}",
        "!a",
    ),
    *("~", "~root", "#1-2", "a#0-1", "\xe4", "e\u0301", "\u202egpj", "\U0001f600", "\u2028", "\x7f", "\x1b[31m"),
    *("CON", "a,b", "a=b", "a" * 240, "subfile,,start,0,end,9,,:a"),
)

KINDS = ("bytes", "cut", "header", "jump", "bomb", "name", "reference", "link")
WEIGHTS = (30, 16, 18, 12, 6, 8, 8, 2)


class Outside:
    """What no film may reach: files outside of the folder, and an address on this machine."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.film = folder / "canary.mp4"
        _encode("color=magenta:size=64x48:rate=16:duration=2", ("-c:v", "libx264"), self.film)
        self.text = folder / "canary.txt"
        self.text.write_text("a caption from outside")
        self.connections = 0
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/canary.mp4"
        threading.Thread(target=self._listen, daemon=True).start()

    def close(self) -> None:
        """Nobody listens any more."""
        self._socket.close()

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.connections += 1
                connection.close()


def _encode(picture: str, how: Sequence[str], path: Path) -> None:
    ffmpeg = [ffmpeg_binary(), "-v", "error", "-nostdin", "-y", "-f", "lavfi", "-i", picture, *how, str(path)]
    subprocess.run(ffmpeg, check=True)


def make_seeds(folder: Path, names: Iterable[str], real: Path | None = None, most: int = 3) -> dict[str, bytes]:
    """Those of SEEDS, by name, and up to `most` of the films in `real`, made small and cut to 1.5 s."""
    folder.mkdir(parents=True)
    for name in names:
        _encode("testsrc2=size=64x48:rate=16:duration=1.5", SEEDS[name], folder / name)
    found = [path for path in sorted(real.iterdir()) if path.suffix in (".mp4", ".mkv")] if real is not None else []
    for path in found[-most:]:
        how = ("-t", "1.5", "-an", "-vf", "scale=96:-2", "-c:v", "libx264", "-preset", "ultrafast")
        command = [ffmpeg_binary(), "-v", "error", "-nostdin", "-y", "-i", str(path), *how]
        subprocess.run([*command, str(folder / f"real-{path.stem}{path.suffix}")], check=True)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def make_bombs(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    """Those of BOMBS, by name."""
    folder.mkdir(parents=True)
    for name in names:
        picture, how = BOMBS[name]
        _encode(picture, how, folder / name)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


class Hostile:
    """Makes hostile films in `folder`, by number."""

    def __init__(self, folder: Path, seeds: Mapping[str, bytes], bombs: Mapping[str, bytes], outside: Outside) -> None:
        self.folder, self.seeds, self.bombs, self.outside = folder, seeds, bombs, outside
        self._draw: Mapping[str, Callable[[random.Random, int], None]] = {
            kind: getattr(self, f"_{kind}") for kind in KINDS
        }

    def make(self, number: int, seed: int = 0) -> str:
        """Writes film `number`; its kind."""
        rng = random.Random(f"{seed}-{number}")
        kind = rng.choices(KINDS, WEIGHTS)[0]
        self._draw[kind](rng, number)
        return kind

    def _write(self, number: int, kind: str, name: str, data: bytes) -> None:
        (self.folder / f"{number:04d}-{kind}{Path(name).suffix}").write_bytes(data)

    def _seed(self, rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(list(self.seeds))
        return name, self.seeds[name]

    def _bytes(self, rng: random.Random, number: int) -> None:
        """Random bytes changed, taken out, doubled or put in."""
        name, data = self._seed(rng)
        out = bytearray(data)
        for _ in range(rng.choice((1, 1, 3, 10, 100))):
            where = rng.randrange(rng.choice((64, 2048, len(out)))) % len(out)
            length = rng.choice((1, 1, 4, 64, 1024))
            how = rng.randrange(5)
            if how == 0:
                out[where] ^= 1 << rng.randrange(8)
            elif how == 1:
                out[where : where + length] = rng.randbytes(len(out[where : where + length]))
            elif how == 2:
                del out[where : where + length]
            elif how == 3:
                out[where:where] = out[where : where + length]
            else:
                out[where:where] = rng.randbytes(length)
            if not out:
                break
        self._write(number, "bytes", name, bytes(out))

    def _cut(self, rng: random.Random, number: int) -> None:
        """Its end is not there, or is zeros, or that of another film."""
        name, data = self._seed(rng)
        where = rng.randrange(rng.choice((32, len(data), len(data))) + 1)
        end = rng.choice((b"", b"", b"\0" * rng.randrange(5000), self._seed(rng)[1][where:]))
        self._write(number, "cut", name, data[:where] + end)

    def _header(self, rng: random.Random, number: int, kind: str = "header") -> None:
        """Sizes, counts and times of its own structure are overwritten."""
        name, data = self._seed(rng)
        out = bytearray(data)
        tags = [tag for tag in TAGS[kind] if tag in data]
        for _ in range(rng.choice((1, 1, 2, 5))):
            tag = rng.choice(tags or [data[:4]])
            places = [place for place in range(len(data)) if data.startswith(tag, place)][:50]
            where = rng.choice(places) + rng.choice(
                (-4, len(tag), len(tag) + 4, len(tag) + 8, len(tag) + rng.randrange(40))
            )
            where = max(0, where)
            out[where : where + 4] = rng.choice((*NUMBERS, rng.randbytes(4)))
        self._write(number, kind, name, bytes(out))

    def _jump(self, rng: random.Random, number: int) -> None:
        """Times far apart, backwards, negative or equal: by an encoder, or overwritten."""
        if rng.random() < 0.5:
            self._header(rng, number, "jump")
            return
        expression = rng.choice(JUMPS).format(t=rng.choice(TIMES) * rng.choice((1, 1, -1)))
        suffix, codec = rng.choice(
            ((".mkv", "mpeg4"), (".mp4", "mpeg4"), (".ts", "mpeg2video"), (".avi", "mpeg4"), (".mov", "png"))
        )
        path = self.folder / f"{number:04d}-jump{suffix}"
        picture = "testsrc2=size=32x32:rate=16:duration=1.5"
        how = ["-vf", f"setpts='{expression}'", "-c:v", codec, "-fps_mode", "passthrough", "-bf", "0"]
        command = [ffmpeg_binary(), "-v", "quiet", "-nostdin", "-y", "-f", "lavfi", "-i", picture, *how, str(path)]
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(command, timeout=20, check=False)
        if not path.exists():
            path.write_bytes(b"")

    def _bomb(self, rng: random.Random, number: int) -> None:
        """Much to decode from few bytes, whole or with a size overwritten."""
        name = rng.choice(list(self.bombs))
        data = bytearray(self.bombs[name] + rng.randbytes(8))
        for tag in (b"IHDR", b"strf", b"avih", b"GIF89a", b"tkhd", b"stsz", b"stts", b"\xb0\x82"):
            where = data.find(tag)
            if where >= 0 and rng.random() < 0.3:
                where += len(tag) + rng.choice((0, 4, 8, 32))
                data[where : where + 4] = rng.choice(NUMBERS)
        self._write(number, "bomb", name, bytes(data))

    def _name(self, rng: random.Random, number: int) -> None:
        """A good film under a bad name."""
        name, data = self._seed(rng)
        suffix = Path(name).suffix
        chosen = rng.choice(NAMES)
        raw = (
            os.fsencode(f"{chosen}{suffix}")
            if rng.random() < 0.85
            else rng.randbytes(9).replace(b"/", b"").replace(b"\0", b"") + suffix.encode()
        )
        folder = os.fsencode(self.folder / f"{number:04d}-name")
        os.makedirs(folder, exist_ok=True)
        with contextlib.suppress(OSError), open(os.path.join(folder, raw), "wb") as file:
            file.write(data + str(number).encode())

    def _reference(self, rng: random.Random, number: int) -> None:
        """A film that names others: a playlist, a list, a manifest, or a film whose pictures are in another file."""
        name, data = self._seed(rng)
        film, url = str(self.outside.film), self.outside.url
        port = url.rpartition(":")[2].partition("/")[0]
        target = rng.choice(
            (
                film,
                film,
                url,
                f"file:{film}",
                f"../../{self.outside.film.parent.name}/canary.mp4",
                "/etc/passwd",
                "plain.mp4",
            )
        )
        texts = [
            f"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{target}\n#EXT-X-ENDLIST\n",
            f'#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXT-X-MAP:URI="{target}"\n#EXT-X-KEY:METHOD=AES-128,URI="{target}"\n#EXTINF:2,\n{target}\n',
            f"ffconcat version 1.0\nfile '{target}'\nduration 2\n",
            f"ffconcat version 1.0\nfile '{target}'\noption protocol_whitelist file,http,tcp\n",
            '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
            f'mimeType="video/mp4"><Representation id="0"><BaseURL>{target}</BaseURL></Representation>'
            "</AdaptationSet></Period></MPD>",
            "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=a\nc=IN IP4 127.0.0.1\nt=0 0\n"
            f"m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\na=control:{target}\n",
            f'<asx version="3.0"><entry><ref href="{target}"/></entry></asx>',
            f"rtsp://127.0.0.1/{target}\n",
            f"import('{target}')\nFFmpegSource2('{target}')\n",
            f"[playlist]\nFile1={target}\n",
            f'<SMIL><body><video src="{target}"/></body></SMIL>',
            f"{target}\n{target}\n",
        ]
        text = rng.choice(texts).encode()
        how = rng.randrange(4)
        if how == 0 and "plain.mp4" in self.seeds:
            name, body = "plain.mp4", elsewhere(self.seeds["plain.mp4"], target.encode())
        else:
            body = (text, text, text + data, data + text)[how]
        self._write(number, "reference", rng.choice((name, "a.mp4", "a.mkv", "a.ts", "a.avi", "a.gif")), body)

    def _link(self, rng: random.Random, number: int) -> None:
        """A link that leads out, to a folder, to itself, to a device or to nothing; a pipe."""
        path = self.folder / f"{number:04d}-link.mp4"
        target = rng.choice(
            (
                self.outside.film,
                self.outside.film.parent,
                path,
                "/dev/zero",
                "/dev/stdin",
                "/etc/passwd",
                "nothing.mp4",
                None,
            )
        )
        if target is None:
            os.mkfifo(path)
        else:
            path.symlink_to(target)


def elsewhere(film: bytes, target: bytes) -> bytes:
    """An MP4 whose index says that its pictures are in the file `target`: its data reference is not the file itself.

    film: one with its index (`moov`) behind its pictures, so that no offset changes.
    """
    boxes = (b"moov", b"trak", b"mdia", b"minf", b"dinf", b"dref")
    out, begin = bytearray(film), 0
    places = []
    for name in boxes:
        begin = film.index(name, begin)
        places.append(begin - 4)
    entry = places[-1] + 16  # behind the size, the name, the version and the count of the table
    size = struct.unpack(">I", film[entry : entry + 4])[0]
    new = struct.pack(">I4sI", 13 + len(target), b"url ", 0) + target + b"\0"
    out[entry : entry + size] = new
    for place in places:
        old = struct.unpack(">I", out[place : place + 4])[0]
        out[place : place + 4] = struct.pack(">I", old + len(new) - size)
    return bytes(out)


def control(folder: Path, seeds: Mapping[str, bytes]) -> Iterator[str]:
    """Good films beside the bad ones, which must not suffer; their names."""
    for name, data in seeds.items():
        (folder / f"good-{name}").write_bytes(data)
        yield f"good-{name}"
