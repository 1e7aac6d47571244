"""`make demo`: films to a report, on this machine, each step done once."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from model.progress import Progress, clock
from storage.fingerprint import fingerprint


def demo(
    out: str | Path,
    source: str | None = None,
    captions: str | None = None,
    limit: int | None = None,
    steps: int | None = None,
) -> int:
    """Corpus (or `source`), ingest, training, samples, report; returns the exit status.

    Everything lies in `out`/corpus, or `out`/<name of the source>-<six digits>. What is done is not done again:
    a lake that holds the films already, a run that reached its last step, a report of that checkpoint.
    """
    began = time.monotonic()
    base = Path(out) / (_folder_name(source) if source else "corpus")
    if source is None:
        films = base / "films"
        captions = str(_corpus(films))
        source = str(films)
    lake = base / "lake"
    number, status = _ingest(source, lake, captions, limit)
    if number is None:
        return status
    run = _train(lake, base / f"run-{number}", number, steps)
    report = base / f"report-{number}"
    lines = _evaluate(run, lake, report)
    _samples(run, lake, number, base / f"samples-{number}")
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


def _corpus(folder: Path) -> Path:
    from pipeline.corpus import make_corpus

    progress: list[Progress] = []

    def tell(done: int, total: int, film: str) -> None:
        if not progress:
            progress.append(Progress("corpus", total, "films", done))
        progress[0].update(done, film)

    return make_corpus(folder, progress=tell)


def _ingest(source: str, lake: Path, captions: str | None, limit: int | None) -> tuple[int | None, int]:
    """The version that holds the source's films, and the exit status of the ingest."""
    from pipeline.ingest import carry_out, plan_ingest
    from pipeline.recipes import demo as recipe
    from pipeline.sources.folders import discover
    from storage.layout import Lake

    found = discover(
        [source], captions, recipe().captions_required
    )  # a slip of the pen is told before the servers start
    if (lake / "versions").is_dir():
        opened = Lake.open(lake)
        with opened.writing():
            plan = plan_ingest(opened, found, recipe(), limit)
            if not plan.clips and plan.parent is not None:
                report = carry_out(plan)
                _say("ingest     " + report.lines()[-1])
                return report.version, report.exit_status
    _say("ingest     starting Prefect and Ray")
    from flows.dataset import run_ingest
    from flows.progress import Stages

    told = run_ingest(source, str(lake), captions, "demo", limit=limit, on_progress=Stages(), found=found)
    _say(f"error: {told['error']}" if "error" in told else "\n".join(told["lines"]))
    return told["version"], int(told["exit_status"])


def _train(lake: Path, run: Path, number: int, steps: int | None) -> Path:
    from model.recipes import demo as recipe
    from model.settings import override
    from model.train import train
    from model.training.checkpoint import Run
    from model.training.record import RunRecord

    chosen = override(recipe(), {} if steps is None else {"steps": steps})
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
