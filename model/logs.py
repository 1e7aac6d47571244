"""Logs as JSON, one object a line on the standard error, where VLFM_LOG=json asks for them.

Each has `time` (UTC, ISO 8601), `level`, `logger` and `message`, and the ids of what it is about: `run`, `film`,
`clip`, `stage`, `reason`. Progress becomes such lines too.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from datetime import UTC, datetime
from typing import Any

VARIABLE = "VLFM_LOG"
OURS = ("storage", "model", "pipeline", "flows")
_OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


def as_json() -> bool:
    """Whether logs are wanted as JSON."""
    return os.environ.get(VARIABLE, "").lower() == "json"


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON; what was given as `extra` becomes fields of it."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        extra = {name: value for name, value in vars(record).items() if name not in _OF_EVERY_RECORD}
        if record.exc_info:
            extra["traceback"] = self.formatException(record.exc_info)
        return line(record.levelname.lower(), record.name, record.getMessage(), record.created, **extra)


def line(level: str, logger: str, message: str, when: float, **more: Any) -> str:
    """A line of the log; `when` is in seconds since 1970."""
    time = datetime.fromtimestamp(when, UTC).isoformat(timespec="milliseconds")
    told = {"time": time, "level": level, "logger": logger, "message": message, **more}
    return json.dumps(told, default=str, ensure_ascii=False)


def start_logging() -> None:
    """Sends what our packages log, from `info` on, to the standard error as JSON, where that is wanted."""
    if not as_json():
        return
    for name in OURS:
        logger = logging.getLogger(name)
        if not any(isinstance(handler.formatter, JsonFormatter) for handler in logger.handlers):
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(JsonFormatter())
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False
