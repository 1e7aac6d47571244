"""`make demo`: films to a report, on this machine, each step done once.

Without films of the user's own it is a proof: the compositional corpus, and in the end captions that no film had.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from model.progress import Progress, clock
from storage.fingerprint import fingerprint

CORPUS_FILMS = 900
"""Films of the compositional corpus, each with a caption of its own."""
UNSEEN: dict[str, Any] = {"captions": 12, "seeds": 4, "guidance": 2.0}
"""How many captions that were held out are judged by the probes, with how many seeds, and the guidance of one row."""
UNSEEN_STEPS = 1800
"""Steps of the recipe `combinations` that fit into a quarter of an hour; with all of its steps it follows better."""


def demo(
    out: str | Path,
    source: str | None = None,
    captions: str | None = None,
    limit: int | None = None,
    steps: int | None = None,
) -> int:
    """Corpus (or `source`), ingest, training, samples, report; returns the exit status.

    limit: films, at most.  steps: of the training, in place of the recipe's.

    Everything lies in `out`/corpus, or `out`/<name of the source>-<six digits>. What is done is not done again:
    a lake that holds the films already, a run that reached its last step, a report of that checkpoint.
    """
    began = time.monotonic()
    base = Path(out) / (_folder_name(source) if source else "corpus")
    steps = steps or (None if source else UNSEEN_STEPS)
    recipe, count = ("demo", 0) if source else ("combinations", min(limit or CORPUS_FILMS, CORPUS_FILMS))
    if source is None:
        captions = str(_corpus(base / "films", count))
        source = str(base / "films")
    lake = base / "lake"
    number, status = _ingest(source, lake, captions, limit, recipe)
    if number is None:
        return status
    run = _train(lake, base / f"run-{number}", number, steps, recipe)
    report, samples = base / f"report-{number}", base / f"samples-{number}"
    lines = _evaluate(run, lake, report)
    if count:
        lines += _unseen(run, samples, count)
    else:
        _samples(run, lake, number, samples)
    print(f"\ndone in {clock(time.monotonic() - began)}")
    print("\n".join(f"  {line}" for line in lines))
    print((report / "report.html").resolve())
    return status


def _folder_name(source: str) -> str:
    """The source's name, with a few digits of its path: two folders of one name keep apart."""
    path = Path(source).resolve()
    return f"{path.name}-{fingerprint(str(path))[:6]}"


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _corpus(folder: Path, films: int) -> Path:
    from pipeline.corpus import make_combinations

    progress: list[Progress] = []

    def tell(done: int, total: int, film: str) -> None:
        if not progress:
            progress.append(Progress("corpus", total, "films", done))
        progress[0].update(done, film)

    return make_combinations(folder, films=films, films_per_caption=1, progress=tell)


def _ingest(source: str, lake: Path, captions: str | None, limit: int | None, name: str) -> tuple[int | None, int]:
    """The version that holds the source's films by the recipe of this name, and the exit status of the ingest."""
    from pipeline.ingest import carry_out, plan_ingest
    from pipeline.recipes import recipe_named
    from pipeline.sources.folders import discover
    from storage.layout import Lake

    recipe = recipe_named(name)
    found = discover([source], captions, recipe.captions_required)  # a slip of the pen is told before the servers start
    if (lake / "versions").is_dir():
        opened = Lake.open(lake)
        with opened.writing():
            plan = plan_ingest(opened, found, recipe, limit)
            if not plan.clips and plan.parent is not None:
                report = carry_out(plan)
                _say("ingest     " + report.lines()[-1])
                return report.version, report.exit_status
    _say("ingest     starting Prefect and Ray")
    from flows.dataset import run_ingest
    from flows.progress import Stages

    told = run_ingest(source, str(lake), captions, name, limit=limit, on_progress=Stages(), found=found)
    _say(f"error: {told['error']}" if "error" in told else "\n".join(told["lines"]))
    return told["version"], int(told["exit_status"])


def _train(lake: Path, run: Path, number: int, steps: int | None, name: str) -> Path:
    from model.recipes import train_recipe
    from model.settings import override
    from model.train import train
    from model.training.checkpoint import Run
    from model.training.record import RunRecord

    chosen = override(train_recipe(name), {} if steps is None else {"steps": steps})
    if Run(run).file.is_file():
        try:
            other = RunRecord.read(Run(run)).differences(chosen)
        except ValueError:
            other = [("format", "", "")]
        if other:
            raise ValueError(f"{run} was trained by another version of this program; remove that folder to train anew")
    done = Run(run).steps()
    if done and done[-1] >= chosen.steps:
        _say(f"train      {done[-1]} steps are done already")
    train(lake, run, chosen, number)  # a signal raises Stopped: half a model is no demo
    return run


def _evaluate(run: Path, lake: Path, out: Path) -> list[str]:
    from model.evaluate import evaluate
    from model.evaluation.headline import headline

    return headline(evaluate(run, lake, out))


def _samples(run: Path, lake: Path, number: int, folder: Path) -> None:
    """One mp4 for each of six clips, at 24 frames per second: a rate that nothing was trained at."""
    from model.sample import Sampler
    from model.training.data import Clips, lake_and_version
    from model.video import write_video

    done = folder / "samples.json"
    sampler = Sampler(run)
    if done.is_file() and json.loads(done.read_text()).get("step") == sampler.step:
        return
    clips = Clips(*lake_and_version(lake, number), "train")
    chosen = [clips[i] for i in sorted({round(k * (len(clips) - 1) / 5) for k in range(6)})]
    progress = Progress("sample", len(chosen), "videos")
    for index, clip in enumerate(chosen):
        about = clip.about
        frames = sampler.videos([about["caption"]], 24, sampler.window, start=about["clip_start"])[0]
        write_video(folder / f"{index + 1}-{Path(about['film']).stem}.mp4", frames, 24)
        progress.advance()
    done.write_text(json.dumps({"step": sampler.step, "captions": [clip.about["caption"] for clip in chosen]}))


def _unseen(run: Path, folder: Path, films: int) -> list[str]:
    """What the probes say of captions that were held out, and videos of some: seeds, a picture continued, a long one.

    films: of the corpus that the run was trained on.
    """
    from model.methods.base import SampleSettings
    from model.sample import Sampler
    from model.spread import spread_evenly
    from model.video import from_frames, write_video
    from pipeline.corpus.combinations import plan_film
    from pipeline.corpus.drawing import draw_frames
    from pipeline.corpus.grammar import OPEN_SPEED, combinations
    from pipeline.experiments.combinations import experiment, table

    def lines(found: dict[str, Any]) -> list[str]:
        return ["", "captions that were held out, read by the probes:", *table(found).splitlines()]

    done = folder / "unseen.json"
    sampler = Sampler(run)
    if done.is_file() and (found := json.loads(done.read_text())).get("step") == sampler.step:
        return lines(found)
    held = combinations(held_out=True)
    shown = spread_evenly([one for one in held if one.speed == OPEN_SPEED], 3)
    progress = Progress("sample", 3 * len(shown), "videos")
    settings = SampleSettings(guidance=UNSEEN["guidance"])

    def write(name: str, prompt: str, duration: float, **how: Any) -> None:
        write_video(folder / name, sampler.videos([prompt], 24, duration, settings, **how)[0], 24)
        progress.advance()

    for number, one in enumerate(shown, 1):
        slug = one.caption.replace(" ", "-")
        for seed in range(2):
            write(f"{number}-{slug}-seed-{seed}.mp4", one.caption, sampler.window, seeds=[seed])
        picture = from_frames(draw_frames(one, plan_film(one, seed=1).path, [0.0]))[0]
        write(f"{number}-{slug}-from-a-picture-long.mp4", one.caption, 3 * sampler.window, image=picture)
    progress = Progress("judge", 1, "experiment")
    found = experiment(run, films=films, films_per_caption=1, **UNSEEN)
    progress.advance()
    done.write_text(json.dumps(found))
    return lines(found)
