"""One ffmpeg at work: its output and its messages are read together, within bounds of time and of memory."""

from __future__ import annotations

import os
import re
import select
import subprocess
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np

from model.ffmpeg import Ffmpeg, environment, packet
from pipeline.media.faults import DecodeError, MediaLimits, tool_failed

LONGEST_LINE = 2**14
"""Bytes of a message; a longer one is cut into pieces."""
MOST_LINES = 200
"""Messages that are kept of those that say what the film is, and of the last ones."""
_ACCOUNT = re.compile(r"^Input #0| Stream #|config in time_base")


class FfmpegProcess:
    """A running ffmpeg; as a context it ends with its block.

    Args:
        command: the program and its arguments.
        on_line: told every line of its messages.

    Raises:
        DecodeError: `decoder_failed`, it cannot be started.
    """

    def __init__(self, command: Sequence[str], on_line: Callable[[str], None] | None = None) -> None:
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                env=environment(),
            )
        except OSError as error:
            raise DecodeError("decoder_failed", f"{command[0]} cannot start: {error.strerror}; run again") from None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._output, self._errors = self._process.stdout.fileno(), self._process.stderr.fileno()
        self._open = {self._output, self._errors}
        self._on_line = on_line
        self._unfinished = b""
        self._account: list[str] = []
        self._last: deque[str] = deque(maxlen=MOST_LINES)

    def __enter__(self) -> FfmpegProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    @property
    def messages(self) -> str:
        """What it said, lines of showinfo left out: its account of the film, and the last lines."""
        return "\n".join([*self._account, *self._last])

    def read_into(self, buffer: memoryview, deadline: float) -> int:
        """Fills `buffer` with output; returns the bytes read, fewer only at the output's end.

        Raises:
            TimeoutError: not before `deadline`, a value of time.monotonic.
        """
        filled = 0
        while filled < len(buffer) and self._output in self._open:
            if self._output in self._ready(self._open, deadline):
                got = os.readv(self._output, [buffer[filled:]])
                filled += got
                if not got:
                    self._open.remove(self._output)
        return filled

    def listen(self, enough: Callable[[], bool], deadline: float) -> None:
        """Reads messages until there are enough or they end. Raises TimeoutError at `deadline`."""
        while not enough() and self._errors in self._open:
            self._ready({self._errors}, deadline)

    def finish(self, deadline: float) -> int:
        """Reads to the end, throwing output away; the exit status. Raises TimeoutError at `deadline`."""
        scratch = memoryview(bytearray(2**16))
        while self.read_into(scratch, deadline) == len(scratch):
            pass
        self.listen(lambda: False, deadline)
        try:
            return self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise TimeoutError from None

    def _ready(self, pipes: set[int], deadline: float) -> set[int]:
        """Waits for one of the pipes; takes in messages where there are any. Those that can be read."""
        poll = select.poll()
        for pipe in pipes:
            poll.register(pipe, select.POLLIN)
        left = deadline - time.monotonic()
        ready = {pipe for pipe, _ in poll.poll(left * 1000)} if left > 0 else set()
        if not ready:
            raise TimeoutError
        if self._errors in ready:
            self._hear()
        return ready

    def _hear(self) -> None:
        data = os.read(self._errors, 2**16)
        if not data:
            self._open.remove(self._errors)
            data = b"\n" if self._unfinished else b""
        *lines, self._unfinished = (self._unfinished + data).split(b"\n")
        if len(self._unfinished) > LONGEST_LINE:
            lines, self._unfinished = [*lines, self._unfinished], b""
        for line in lines:
            text = line[:LONGEST_LINE].decode("utf-8", "replace").rstrip()
            if _ACCOUNT.search(text) and len(self._account) < MOST_LINES:
                self._account.append(text)
            elif not text.startswith("[Parsed_showinfo"):
                self._last.append(text)
            if self._on_line is not None:
                self._on_line(text)


def too_many_frames(limits: MediaLimits) -> DecodeError:
    """A film of more frames than the recipe allows."""
    return DecodeError("too_large", f"over {limits.max_frames} frames; cut the film, or raise max_frames")


class PacketTable:
    """The table of a film's packets in the framecrc format, read as ffmpeg prints it; it takes 24 bytes a packet."""

    def __init__(self, tool: Ffmpeg, limits: MediaLimits) -> None:
        self.header: dict[str, str] = {}
        """What the table says of the stream: `tb 0`, `codec_id 0`, `dimensions 0`."""
        self._tool, self._limits = tool, limits
        self._values = array("q")

    def __len__(self) -> int:
        return len(self._values) // 3

    @property
    def columns(self) -> np.ndarray:
        """(3, packets) int64: presentation times, durations, flags."""
        return np.array(self._values, dtype=np.int64).reshape(-1, 3).T

    def read(self, process: FfmpegProcess, deadline: float) -> None:
        """Raises TimeoutError, and DecodeError for a table that is too long or not understood."""
        buffer = memoryview(bytearray(2**16))
        rest = b""
        got = len(buffer)
        while got == len(buffer):
            got = process.read_into(buffer, deadline)
            *lines, rest = (rest + buffer[:got]).split(b"\n")
            for line in lines:
                self._add(line)

    def _add(self, line: bytes) -> None:
        if line.startswith(b"#"):
            name, _, value = line[1:].decode("utf-8", "replace").partition(": ")
            if len(self.header) < 100:
                self.header[name] = value
        elif line:
            try:
                self._values.extend(packet(line))
            except (ValueError, OverflowError):
                raise tool_failed(self._tool, f"it lists packets in an unknown form ({line[:80]!r})") from None
            if len(self) > self._limits.max_frames:
                raise too_many_frames(self._limits)
