"""`make demo`: films to a report, on this machine, each step done once."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from model.progress import Progress, clock
from storage.fingerprint import fingerprint
from storage.layout import write_atomic

FILMS = 900
"""Films of the corpus."""


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
    recipe = "demo" if source else "combinations"
    if source is None:
        films = base / "films"
        captions = str(_corpus(films))
        source = str(films)
    lake = base / "lake"
    number, status = _ingest(source, lake, captions, limit, recipe)
    if number is None:
        return status
    run = _train(lake, base / f"run-{number}", number, steps, recipe)
    report = base / f"report-{number}"
    lines = _evaluate(run, lake, report)
    if recipe == "combinations":
        lines += _unseen(run, base / f"samples-{number}")
    else:
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
    from pipeline.corpus import make_combinations

    progress: list[Progress] = []

    def tell(done: int, total: int, film: str) -> None:
        if not progress:
            progress.append(Progress("corpus", total, "films", done))
        progress[0].update(done, film)

    return make_combinations(folder, films=FILMS, progress=tell)


def _ingest(source: str, lake: Path, captions: str | None, limit: int | None, name: str) -> tuple[int | None, int]:
    """The version that holds the source's films, and the exit status of the ingest."""
    from pipeline.ingest import carry_out, plan_ingest
    from pipeline.recipes import recipe_named
    from pipeline.sources.folders import discover
    from storage.layout import Lake

    recipe = recipe_named(name)
    found = discover([source], captions, recipe.captions_required)  # a slip is told before the servers start
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
    processes = _processes(chosen.batch) if name == "combinations" else 1
    if processes > 1:
        _train_in_processes(lake, run, number, chosen.steps, name, processes)
    else:
        train(lake, run, chosen, number)  # a signal raises Stopped: half a model is no demo
    return run


def _processes(batch: int) -> int:
    """How many processes train on this machine: two on a CPU, where one with two threads leaves half of it idle."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 if cores > 1 and batch % 2 == 0 and not torch.cuda.is_available() else 1


def _train_in_processes(lake: Path, run: Path, number: int, steps: int, name: str, processes: int) -> None:
    from model.stop import STOPPED, Stopped
    from model.training.checkpoint import Run
    from model.training.launch import launch

    command = [sys.executable, "-m", "model.train", "--lake", str(lake), "--run-dir", str(run), "--recipe", name]
    status = launch([*command, "--set", f"steps={steps}", "--version", str(number)], processes)
    if status == STOPPED:
        raise Stopped((Run(run).steps() or [0])[-1])
    if status:
        raise ValueError(f"the training of {run} failed with status {status}; the lines above say why")


def _evaluate(run: Path, lake: Path, out: Path) -> list[str]:
    from model.evaluate import evaluate
    from model.evaluation.headline import headline

    return headline(evaluate(run, lake, out))


def _samples(run: Path, lake: Path, number: int, folder: Path) -> None:
    """One mp4 for each of six clips, at 24 frames per second: a rate that nothing was trained at."""
    from model.methods.base import SampleSettings
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
        frames = sampler.videos([about["caption"]], 24, sampler.window, SampleSettings(), start=about["clip_start"])[0]
        write_video(folder / f"{index + 1}-{Path(about['film']).stem}.mp4", frames, 24)
        progress.advance()
    done.write_text(json.dumps({"step": sampler.step, "captions": [clip.about["caption"] for clip in chosen]}))


def _unseen(run: Path, folder: Path) -> list[str]:
    """What the model makes of captions that no film was trained on: videos, and the probes' table."""
    from model.sample import Sampler
    from pipeline.experiments.combinations import experiment, show, table

    figures = folder / "unseen.json"
    found = json.loads(figures.read_text()) if figures.is_file() else {}
    if found.get("step") != Sampler(run).step:
        progress = Progress("unseen", 2, "parts")
        show(run, folder)
        progress.advance()
        found = experiment(run, captions=40, seeds=1, films=FILMS)
        progress.advance()
        write_atomic(figures, json.dumps(found, indent=1).encode())
    return table(found).splitlines()
