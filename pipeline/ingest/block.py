"""A block of clips from plan to staged file: what one Ray worker does, and what a merge of its parts gives."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.items import BlockResult, ClipPlan, ClipWork, CodecFacts, Failure, MadeClip, Resources
from pipeline.media.decode import decode, ffmpeg_binary
from pipeline.media.faults import DecodeError, MediaLimits
from pipeline.media.latents import NOT_LATENTS, read_latents
from pipeline.recipes import DataRecipe
from pipeline.sources.fetch import FilmChanged, as_file, is_file
from pipeline.stage import Stage, fail, one_line, run_stages
from pipeline.stages.content import ContentStage
from pipeline.stages.invert import GROUP_FRAMES, InvertStage, SharedCodec, in_16_bits, next_in_16_bits
from pipeline.stages.project import ProjectStage
from storage.arrays import NEXT_ARRAYS, read_clips
from storage.fingerprint import fingerprint, short_id
from storage.layout import DiskFull, Lake, LakeError
from storage.s3_client import BucketError
from storage.staging import read_block, read_block_meta, remove_block, staged_blocks, write_block


@dataclass(frozen=True)
class Block:
    """Clips that are made, staged and packed together."""

    block_id: str
    clips: tuple[ClipPlan, ...]

    @property
    def copied(self) -> bool:
        """Whether all of its clips are only copied."""
        return all(clip.copied for clip in self.clips)


class DecodeStage:
    """The kept frames of each clip and the one after them; clips of a film that follow each other share one ffmpeg."""

    name = "decode"

    def __init__(self, size: tuple[int, int], limits: MediaLimits) -> None:
        self.size, self.limits = size, limits
        self.resources = Resources()

    def setup(self) -> None:
        """Makes sure that there is an ffmpeg. Raises DecodeError `no_ffmpeg`."""
        ffmpeg_binary()

    def process(self, works: Iterable[ClipWork]) -> Iterator[ClipWork]:
        """Fills in `frames` and `next_frames`; reasons are DecodeError's, and film_changed."""
        run: list[ClipWork] = []
        for work in works:
            if run and not _follows(run[-1], work):
                yield from self._decode(run)
                run = []
            run.append(work)
        if run:
            yield from self._decode(run)

    def teardown(self) -> None:
        """Nothing is held."""

    def _decode(self, run: Sequence[ClipWork]) -> Iterator[ClipWork]:
        done = 0
        try:
            plan = run[0].plan
            _check_unchanged(plan)
            with as_file(plan.path, plan.bytes, plan.modified_ns) as file:
                for frames in decode(file, [work.plan.window for work in run], self.size, self.limits):
                    work, done = run[done], done + 1
                    kept = len(work.plan.window.ticks)
                    work.frames, work.next_frames = frames[:kept], frames[kept:]
                    yield work
        except (DiskFull, BucketError):
            raise  # no clip's fault
        except Exception as error:  # a clip's fault must not stop its block
            work = run[done]
            faulty = isinstance(error, DecodeError) and error.reason in ("corrupt", "truncated")
            if faulty and work.plan.window.next_ticks:  # a clip can do without the frame after its window
                yield from self._decode([replace(work, plan=replace(work.plan, window=work.plan.window.alone))])
            else:
                yield fail(work, self.name, *_said(error, "decode_failed"))
            # The fault may lie in one window alone: the others get a process of their own.
            for work in run[done + 1 :]:
                yield from self._decode([work])


class ImportStage:
    """Latents of clips whose film is a file of latents; no frame is seen, and no codec is needed."""

    name = "import"

    def __init__(self) -> None:
        self.resources = Resources()

    def setup(self) -> None:
        """Nothing is needed."""

    def process(self, works: Iterable[ClipWork]) -> Iterator[ClipWork]:
        """Fills in `latents` and `next_latents`; reasons: not_finite, film_changed, and what `read_latents` says."""
        for work in works:
            try:
                work = self._import(work)
            except (DiskFull, BucketError):
                raise  # no clip's fault
            except Exception as error:
                work = fail(work, self.name, *_said(error, NOT_LATENTS))
            yield work

    def teardown(self) -> None:
        """Nothing is held."""

    def _import(self, work: ClipWork) -> ClipWork:
        plan = work.plan
        _check_unchanged(plan)
        with as_file(plan.path, plan.bytes, plan.modified_ns) as file:
            latents = read_latents(file, plan.window)
        kept = len(plan.window.ticks)
        work.next_latents = next_in_16_bits(latents[kept:])
        return in_16_bits(work, latents[:kept], self.name, "encode its film again")


class StoredStage:
    """Latents that the lake has, with the codec's part of the certificate; clips without any pass by."""

    name = "stored"

    def __init__(self, lake: Lake, codec: SharedCodec) -> None:
        self.lake, self.codec = lake, codec
        self.resources = Resources()

    def setup(self) -> None:
        """Nothing is needed."""

    def process(self, works: Iterable[ClipWork]) -> Iterator[ClipWork]:
        """Fills in latents where they are stored, by the same weights, can be read, and were not lost in a repair."""
        for work in works:
            stored = work.plan.stored
            if work.failure is None and stored is not None and stored.codec.id == self.codec.load().id:
                with contextlib.suppress(LakeError):  # damaged: they are made again
                    names = ["latents", *(NEXT_ARRAYS if stored.next_frame else ())]
                    rows = read_clips(self.lake, stored.snapshot, stored.group, [stored.row], names)
                    latents = rows["latents"][0, : len(work.plan.window.ticks)]
                    if np.isfinite(latents).all():
                        work.latents = latents
                        if stored.next_frame and tuple(rows["next_time"][0]) == work.plan.window.next_time:
                            work.next_latents = rows["next_latents"][0]
                        known = dataclasses.asdict(stored.certificate)
                        work.certify(**{name: known[name] for name in _OF_CODEC})
            yield work

    def teardown(self) -> None:
        """Nothing is held."""


_OF_CODEC = (
    *("psnr_codec", "ssim_codec", "psnr_vae", "ssim_vae"),
    *("residual", "latent_round_trip", "frames_certified"),
)
"""Figures of the certificate that do not depend on the projection."""


def _said(error: Exception, otherwise: str) -> tuple[str, str]:
    """Reason and detail of what went wrong with a film; `otherwise` is the reason where nobody expected it."""
    if isinstance(error, DecodeError):
        return error.reason, error.detail
    return "film_changed" if isinstance(error, FilmChanged) else otherwise, one_line(error)


def _follows(earlier: ClipWork, later: ClipWork) -> bool:
    before, after = earlier.plan.window, later.plan.window
    if earlier.plan.path != later.plan.path or before.ticks[-1] >= after.ticks[0]:
        return False
    return before.decoded[-1] <= after.ticks[0]  # the frame after a window may be the next one's first


def _check_unchanged(plan: ClipPlan) -> None:
    if not is_file(plan.path):
        return  # it is compared when it is fetched
    try:
        stat = Path(plan.path).stat()
    except OSError:
        raise DecodeError("film_missing", "the film went away during the run; run the command again") from None
    if (stat.st_size, stat.st_mtime_ns) != (plan.bytes, plan.modified_ns):
        raise DecodeError("film_changed", "the film changed during the run; run the command again")


class BlockWorker:
    """Makes blocks of clips of one recipe and stages them; lives in a Ray actor, or in the caller's process.

    imported: where the clips' latents are imported, the codec that made them; it is not loaded then.
    """

    def __init__(
        self, lake: Lake, recipe: DataRecipe, recipe_fingerprint: str, imported: CodecFacts | None = None
    ) -> None:
        self.lake, self.recipe, self.recipe_fingerprint = lake, recipe, recipe_fingerprint
        self.imported = imported
        self.codec = SharedCodec(recipe.codec)
        # While the codec has a group of clips in hand, the next one is decoded.
        self.ahead = max(2, -(-GROUP_FRAMES // recipe.frames_max))
        self.stages = self._stages()

    def _stages(self) -> list[Stage]:
        recipe = self.recipe
        if self.imported is not None:
            return [ImportStage(), ProjectStage(None, recipe.coefficients, recipe.method)]
        return [
            DecodeStage(recipe.size, recipe.limits),
            ContentStage(recipe.rejecting_gates),
            StoredStage(self.lake, self.codec),
            InvertStage(self.codec, recipe.certify_frames),
            ProjectStage(self.codec, recipe.coefficients, recipe.method, recipe.certify_frames),
        ]

    @property
    def resources(self) -> Resources:
        """What the stages need together; they take turns on the same GPU."""
        return Resources(
            cpus=max(stage.resources.cpus for stage in self.stages),
            gpus=max(stage.resources.gpus for stage in self.stages),
        )

    def setup(self) -> None:
        """Sets the stages up, once. Raises what they raise, and ValueError for frames that do not suit the codec."""
        for stage in self.stages:
            stage.setup()
        if self.imported is None:
            self.codec.load().latent_shape(*self.recipe.size)  # before anything is decoded for nothing

    def process(self, block_id: str, clips: Sequence[ClipPlan]) -> BlockResult:
        """Makes the clips and stages those that were made under `block_id`. Safe to retry.

        Raises:
            DiskFull: no room for the staged block.
        """
        begin = time.perf_counter()
        works, clock = run_stages(self.stages, clips, self.ahead)
        if self.imported is None and self.codec.device == "cuda":
            clock = {**clock, "gpu": time.perf_counter() - begin}  # it holds the GPU while it decodes, too
        made = tuple(MadeClip.of(work) for work in works if work.failure is None)
        failures = tuple(work.failure for work in works if work.failure is not None)
        result = BlockResult(
            block_id, made, failures, clock, self.imported or codec_facts(self.codec, self.recipe.size)
        )
        arrays = staged_arrays(works, self.recipe.frames_max, self.recipe.uses_next_frame)
        stage_block(self.lake, result, arrays, self.recipe_fingerprint, clips)
        return result

    def teardown(self) -> None:
        """Frees what the stages hold."""
        for stage in self.stages:
            stage.teardown()


def codec_facts(shared: SharedCodec, size: tuple[int, int]) -> CodecFacts:
    """What is said of a codec whose frames are of `size`; it is loaded. Raises what `SharedCodec.load` does, and
    ValueError for a size that does not suit it."""
    codec = shared.load()
    shape = tuple(codec.latent_shape(*size))
    return CodecFacts(codec.id, codec.channels, codec.factor, codec.scale, codec.spec(), shape)


def staged_arrays(works: Sequence[ClipWork], frames_max: int, next_frame: bool = False) -> dict[str, np.ndarray]:
    """The arrays of a block as they are staged, with one row per finished clip.

    latents (n, frames_max, C, h, w) f16 zero-padded, coefficients (n, s, C, h, w) f16, frame_time (n, frames_max) f64
    NaN-padded, observed (n, frames_max) bool, preview (p, frames_max, H, W, 3) uint8 for the p clips that keep it; with
    `next_frame` also next_latents (n, 1, C, h, w) f16 and next_time (n, 1) f64, 0 and NaN where there is no such frame.
    """
    made = [work for work in works if work.failure is None]
    arrays: dict[str, np.ndarray] = {}
    if made:
        arrays["latents"] = np.stack([_padded(work.latents, frames_max, 0) for work in made])
        arrays["coefficients"] = np.stack([work.coefficients for work in made if work.coefficients is not None])
        times = [np.asarray(work.plan.window.frame_time) for work in made]
        arrays["frame_time"] = np.stack([_padded(row, frames_max, np.nan) for row in times])
        arrays["observed"] = np.stack([_padded(np.asarray(work.plan.observed), frames_max, False) for work in made])
        if next_frame:
            none = np.zeros((0, *arrays["latents"].shape[2:]), arrays["latents"].dtype)
            after = [none if work.next_latents is None else work.next_latents for work in made]
            arrays["next_latents"] = np.stack([_padded(latents, 1, 0) for latents in after])
            arrays["next_time"] = np.stack([_padded(np.array(work.next_time, float), 1, np.nan) for work in made])
        previews = [_padded(work.frames, frames_max, 0) for work in made if work.plan.preview]
        if previews:
            arrays["preview"] = np.stack(previews)
    return arrays


def _padded(rows: np.ndarray | None, length: int, filling: Any) -> np.ndarray:
    assert rows is not None
    padded = np.full((length, *rows.shape[1:]), filling, dtype=rows.dtype)
    padded[: len(rows)] = rows
    return padded


def stage_block(
    lake: Lake,
    result: BlockResult,
    arrays: Mapping[str, np.ndarray],
    recipe_fingerprint: str,
    clips: Sequence[ClipPlan] = (),
) -> None:
    """Stages the clips that were made; without any, nothing stays staged under the block's id.

    clips: the block's, which tell where its films are: a film may be gone when the next run finds the block.
    """
    if result.made:
        films = {clip.film: [clip.path, clip.origin] for clip in clips}
        write_block(lake, result.block_id, arrays, {**result.to_json(recipe_fingerprint), "films": films})
    else:
        remove_block(lake, result.block_id)


def cut_blocks(
    lake: Lake, clips: Sequence[ClipPlan], size: int, recipe_fingerprint: str
) -> tuple[list[Block], dict[str, BlockResult]]:
    """Blocks of `size` clips in their order; blocks that are staged already are taken as they are, with their results.

    Cut before any work starts, so the order in which workers finish changes nothing. Of a staged block only the clips
    that were made count: older programs staged failures too, and those clips are cut into new blocks. Its arrays are
    read, and checked, when it is packed.
    """
    by_id = {clip.clip_id: clip for clip in clips}
    blocks: list[Block] = []
    staged: dict[str, BlockResult] = {}
    for block_id in staged_blocks(lake):
        if "-" in block_id:
            continue  # a part of a block that did not come to its end
        try:
            meta = read_block_meta(lake, block_id)
            result = BlockResult.from_json(block_id, meta)
        except (ValueError, KeyError, TypeError, OSError):
            continue  # damaged: made again
        if meta["recipe"] == recipe_fingerprint and result.made and all(clip in by_id for clip in result.done):
            blocks.append(Block(block_id, tuple(by_id.pop(clip) for clip in result.done)))
            staged[block_id] = result
    rest = list(by_id.values())
    # Clips that are only copied have blocks of their own, which need no worker.
    for kind in (True, False):
        alike = [clip for clip in rest if clip.copied is kind]
        for first in range(0, len(alike), size):
            part = tuple(alike[first : first + size])
            content = {"recipe": recipe_fingerprint, "clips": [[clip.clip_id, clip.preview] for clip in part]}
            blocks.append(Block(short_id(fingerprint(content)), part))
    blocks.sort(key=lambda block: (block.clips[0].film_id, block.clips[0].window.start, block.clips[0].clip_id))
    return blocks, staged


def merge_parts(
    lake: Lake, block: Block, parts: Sequence[BlockResult], failures: Sequence[Failure], recipe_fingerprint: str
) -> BlockResult:
    """Stages `block` from its parts, in the block's order; its result, with `failures` and those of the parts.

    A part without a finished clip is not staged.
    """
    found: dict[str, tuple[MadeClip, dict[str, np.ndarray]]] = {}
    failed = {failure.clip_id: failure for failure in failures}
    clock: dict[str, float] = {}
    codec: CodecFacts | None = None
    for part in parts:
        failed |= {failure.clip_id: failure for failure in part.failures}
        codec = part.codec
        for stage, seconds in part.seconds.items():
            clock[stage] = clock.get(stage, 0.0) + seconds
        if not part.made:
            continue
        arrays, _ = read_block(lake, part.block_id)
        shown = 0
        for index, clip in enumerate(part.made):
            own = {name: array[index] for name, array in arrays.items() if name != "preview"}
            if clip.preview:
                own["preview"], shown = arrays["preview"][shown], shown + 1
            found[clip.clip_id] = (clip, own)
    made = [found[clip.clip_id] for clip in block.clips if clip.clip_id in found]
    names = sorted({name for _, own in made for name in own})
    merged = {name: np.stack([own[name] for _, own in made if name in own]) for name in names}
    lost = tuple(failed[clip.clip_id] for clip in block.clips if clip.clip_id in failed)
    result = BlockResult(block.block_id, tuple(clip for clip, _ in made), lost, clock, codec)
    stage_block(lake, result, merged, recipe_fingerprint, block.clips)
    for part in parts:
        if part.block_id != block.block_id:
            remove_block(lake, part.block_id)
    return result
