"""Sample strips while a run trains: a few captions as rows of frames, with the averaged weights of the moment."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.backbones.dit import Backbone
from model.sample import LoadedSampler
from model.spread import spread_evenly
from model.stop import StopSignal
from model.training.data import Clips
from model.training.processes import Processes
from model.training.record import RunRecord
from model.training.sharding import whole
from model.training.state import TrainingState
from storage.errors import is_expected

CAPTIONS, FRAMES = 4, 6
"""Strips that are made, and the frames of each, evenly over the clip."""
LONGEST = 240.0
"""Seconds that all strips of a step may take: the other processes wait, NCCL's for ten minutes at most."""


class _Interrupted(Exception):
    """A signal came: the checkpoint is more urgent than strips."""


class Strips:
    """Makes the strips of a run: each caption with the same noise every time, so that they compare over the steps.

    The first process makes them and the others wait. Where they cannot be made, as where the codec's weights are not on
    this machine, one line on stderr says so; there are no more of them then, and training goes on.

    Args:
        record: the run.
        clips: whose captions are shown, some that are spread evenly.
    """

    def __init__(self, record: RunRecord, clips: Clips, processes: Processes, stop: StopSignal) -> None:
        self.record, self.clips, self.processes, self.stop = record, clips, processes, stop
        self._off = False
        self._sampler: LoadedSampler | None = None

    def made(self, state: TrainingState) -> dict[str, NDArray[np.uint8]]:
        """Strips (H, FRAMES * W, 3) by `sample/<number> <caption>`; every process must call it.

        Empty in all processes but the first, and where a signal came: the checkpoint is more urgent.
        """
        found: dict[str, NDArray[np.uint8]] = {}
        if self.processes.any(self._off)[0]:
            return found
        weights = {}
        for name, value in state.average.tensors.items():
            full = whole(value)  # all join in: it may be sharded
            if self.processes.first:
                weights[name] = full
        self.processes.by_first(lambda: found.update(self._made(weights, state.step)))
        return found

    def _made(self, weights: Mapping[str, Tensor], step: int) -> dict[str, NDArray[np.uint8]]:
        ends = time.monotonic() + (LONGEST if self.processes.world > 1 else math.inf)

        def check(*_: object) -> None:
            if self.stop.seen:
                raise _Interrupted
            if time.monotonic() > ends:
                raise TimeoutError(f"they took more than {LONGEST:g} s, while the other processes wait")

        found: dict[str, NDArray[np.uint8]] = {}
        try:
            with torch.random.fork_rng(devices=[]):  # the new backbone's first weights are random
                self._sampler = self._sampler or LoadedSampler(
                    self.record, Backbone(self.record.backbone).to(self.processes.device)
                )
            self._sampler.backbone.load_state_dict(weights, strict=False)  # those that are not trained are the same
            with self._sampler.backbone.register_forward_pre_hook(check):
                for number, index in enumerate(spread_evenly(range(len(self.clips)), CAPTIONS)):
                    check()
                    caption = self.clips[index].about["caption"]
                    frames = self._sampler.strip(caption, FRAMES, number)
                    found[f"sample/{number} {caption}"] = np.concatenate(list(frames), axis=1)
        except _Interrupted:
            return {}
        except Exception as error:
            if not (is_expected(error) or isinstance(error, (ImportError, torch.cuda.OutOfMemoryError))):
                raise
            told = f"{error}".splitlines()[0]
            print(f"warning: no sample strips from step {step} on: {told}; training goes on", file=sys.stderr)
            self._off = True
        return found
