"""A lake, a run on it and its evaluation, and a page as a browser would read it."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from model.evaluate import evaluate
from model.methods.base import SampleSettings
from model.recipes import train_recipe
from model.settings import override
from model.train import train
from model.training.data import Clips
from storage import version
from tests.model.tiny_lake import make_lake

CAPTION = 'square {number} <b>slides</b> & "shines" > <script src="x.js">'
SETTINGS = SampleSettings(steps=4, warmup_steps=2, seed=11)
TINY = override(
    train_recipe("demo"),
    {
        "width": 32, "depth": 2, "heads": 2, "batch": 4, "steps": 30, "log_every": 5, "checkpoint_every": 30,
        "validate_every": 30, "learning_rate_warmup": 2, "ema_decay": 0.8,
    },
)  # fmt: skip


class Made:
    """A lake, a run and its evaluation."""

    def __init__(self, folder: Path, **looks: Any) -> None:
        self.lake, self.run, self.out = make_lake(folder / "lake", **looks), folder / "run", folder / "report"
        train(self.lake.root, self.run, TINY)
        self.metrics = self.evaluate()
        self.page = (self.out / "report.html").read_text()
        self.clips = list(Clips(self.lake, version.load(self.lake), "train").every())

    def evaluate(self, **more: Any) -> dict[str, Any]:
        return evaluate(self.run, self.lake.root, self.out, SETTINGS, shown=3, **more)


class Page(HTMLParser):
    """Collects a page's text and addresses, and checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: list[str] = []
        self.images: list[bytes] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "data", "action", "srcset", "poster"):
                assert tag == "img", tag
                kind, _, data = str(value).partition(",")
                assert kind in ("data:image/webp;base64", "data:image/png;base64")
                self.images.append(base64.b64decode(data, validate=True))
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)
