"""Compares a measured chunk on one GPU with its calls, each timed alone, and finds the factors between them.

A chunk takes longer than its calls: in a long run the power cap lowers the clock, and some passes over memory are timed
by a ceiling. That is a factor on the work of a network, one for the student and one for the VAE, so that a rank which
computes a share takes the same factor on its share. What the chunk takes beyond its stages, such as gaps while the host
launches, is added once to every chunk, however many GPUs there are.
"""

import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from model.config import PRECISIONS
from model.errors import UserError
from profiling.analyse.recipe import AUDIO, COLOR, DECODE, MOTION, STEP, Recipe, StageWork
from profiling.analyse.times import Times
from profiling.results import OK, Run, VariantResult
from profiling.tables import stage_value

STUDENT, VAE = "student", "VAE"
EMULATED_PRECISION = "fp8-vae"  # of emulated ranks
_EMULATED = re.compile(r"rank-\d+-of-\d+")  # their variants, as profiling.measure.e2e names them
BESIDE = "decode beside the steps"  # of the motion latents, whose frames nobody sees
FIRST_FRAME, CHUNK = "first frame", "chunk"


@dataclass(frozen=True)
class MeasuredChunk:
    """A steady chunk on one GPU."""

    file: str
    device: str
    variant: VariantResult

    @property
    def seconds(self) -> float:
        """Of the whole chunk, the median."""
        return statistics.median(self.variant.chunk)

    @property
    def steps(self) -> int:
        """Its denoising steps."""
        return len(self.calls(STEP))

    def calls(self, stage: str) -> list[float]:
        """Median seconds of each call of a stage in a chunk."""
        samples = self.variant.stages.get(stage, ())
        each = len(samples) // len(self.variant.chunk)
        return [statistics.median(samples[i::each]) for i in range(each)]

    def fits(self, recipe: Recipe) -> bool:
        """Whether it has as many calls of each stage as the model has now."""
        counts = Counter(work.stage for work in recipe)
        return all(len(self.calls(stage)) == count for stage, count in counts.items())


def fastest_chunk(runs: Sequence[tuple[str, Run]]) -> MeasuredChunk:
    """The fastest chunk on a GPU, of the newest of each precision; `runs` are (file, run), the newest first.

    Raises `UserError` if there is none.
    """
    found: dict[tuple[str, str], MeasuredChunk] = {}
    for file, run in runs:
        for variant in run.variants if run.machine.kind == "cuda" else ():
            if variant.status == OK and variant.variant in PRECISIONS and variant.chunk and variant.stages.get(STEP):
                measured = MeasuredChunk(file, run.machine.device, variant)
                found.setdefault((run.machine.device, variant.variant), measured)
    if not found:
        raise UserError("no results have a whole chunk on a GPU to project from; give a run of gpu --phase e2e")
    return min(found.values(), key=lambda chunk: chunk.seconds)


def emulated_chunks(runs: Sequence[tuple[str, Run]], device: str) -> dict[int, list[MeasuredChunk]]:
    """Chunks in which one GPU did what one of several does, by the number of GPUs; the newest of each rank.

    `runs` are (file, run), the newest first. Copies on the device stand in for exchanges.
    """
    found: dict[str, MeasuredChunk] = {}
    for file, run in runs:
        for variant in run.variants if run.machine.device == device else ():
            if variant.status == OK and _EMULATED.fullmatch(variant.variant) and variant.chunk:
                found.setdefault(variant.variant, MeasuredChunk(file, device, variant))
    by_world: dict[int, list[MeasuredChunk]] = defaultdict(list)
    for name, chunk in found.items():
        by_world[int(name.rpartition("-")[2])].append(chunk)
    return by_world


@dataclass(frozen=True)
class Part:
    """A part of the measured chunk beside its calls; all in seconds."""

    name: str
    calls: float  # each timed alone
    calibrated: float
    measured: float


@dataclass(frozen=True)
class Calibration:
    """What a chunk takes beyond its calls, and how well that reproduces the measured one."""

    factors: Mapping[str, float]  # on the calls of a network
    rest: float  # seconds of a chunk that are in none of its stages
    parts: tuple[Part, ...] = ()  # the stages, the first frame, and the whole chunk

    def seconds(self, work: StageWork, times: Times) -> float:
        """Seconds of the calls of a stage."""
        return self.factors[network_of(work)] * calls_seconds(work, times)


def part_of(work: StageWork) -> str:
    """The part of a chunk that a stage counts as."""
    return BESIDE if work.beside else work.stage


def network_of(work: StageWork) -> str:
    """The network whose factor applies to a stage."""
    return STUDENT if work.stage in (AUDIO, STEP) else VAE


def calls_seconds(work: StageWork, times: Times) -> float:
    """Seconds of the calls of a stage, each timed alone."""
    return sum(count * times.of(call).seconds for call, count in work.calls.items())


def until_first_frame(recipe: Recipe) -> Recipe:
    """What comes before the first frames are shown; what runs beside the steps delays them."""
    first = next(i for i, work in enumerate(recipe) if work.stage == COLOR)
    return recipe[: first + 1]


def calibrate(recipe: Recipe, times: Times, measured: MeasuredChunk) -> Calibration:
    """The calibration by a measured chunk, whose `recipe` this is.

    Raises `UserError` if the two have different stages, as the model has changed since.
    """
    found = _measured_parts(recipe, measured)
    alone = Calibration({STUDENT: 1.0, VAE: 1.0}, 0.0)
    sums = _by_part(recipe, lambda work: alone.seconds(work, times))
    factors = {
        STUDENT: found[STEP] / sums[STEP],
        VAE: (found[DECODE] + found[MOTION]) / (sums[DECODE] + sums[MOTION]),
    }
    calibrated = Calibration(factors, max(0.0, measured.seconds - sum(found.values())))
    ready = _by_part(recipe, lambda work: calibrated.seconds(work, times))
    parts = [Part(name, sums[name], ready[name], seconds) for name, seconds in found.items()]
    if shown := stage_value(measured.variant, "first_frame"):
        before = [sum(c.seconds(work, times) for work in until_first_frame(recipe)) for c in (alone, calibrated)]
        parts.append(Part(FIRST_FRAME, before[0], before[1], shown))
    whole = Part(CHUNK, sum(sums.values()), sum(ready.values()) + calibrated.rest, measured.seconds)
    return Calibration(factors, calibrated.rest, (*parts, whole))


def _by_part(recipe: Recipe, seconds: Callable[[StageWork], float]) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for work in recipe:
        found[part_of(work)] += seconds(work)
    return found


def _measured_parts(recipe: Recipe, measured: MeasuredChunk) -> dict[str, float]:
    """Seconds of each part of the measured chunk.

    Work beside the steps runs beside one of them, and makes that one longer; it is what that one takes more than the
    others.
    """
    found: dict[str, float] = {}
    for stage in dict.fromkeys(work.stage for work in recipe if work.stage in measured.variant.stages):
        works, seconds = [work for work in recipe if work.stage == stage], measured.calls(stage)
        if len(works) != len(seconds):
            raise UserError(
                f"{measured.file}: {len(seconds)} calls of {stage} in a chunk, and {len(works)} in the model as it is "
                "now; measure the chunk again"
            )
        found[stage] = sum(s for work, s in zip(works, seconds, strict=True) if not work.beside)
    missing = [stage for stage in (STEP, DECODE, MOTION) if stage not in found]
    if missing:
        raise UserError(f"{measured.file}: its chunk has no stage {', '.join(missing)}; measure it again")
    return found | _beside_steps(recipe, measured, found[STEP])


def _beside_steps(recipe: Recipe, measured: MeasuredChunk, all_steps: float) -> dict[str, float]:
    steps = measured.calls(STEP)
    if len(steps) < 2 or not any(work.beside for work in recipe):
        return {}
    alone = statistics.mean(sorted(steps)[:-1]) * len(steps)
    return {STEP: alone, BESIDE: all_steps - alone}
