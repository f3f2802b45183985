"""A chunk made of calls with known times, beside a measured one: factors, rest, and what is said of both."""

from collections import Counter
from typing import Any

import pytest

from model.errors import UserError
from profiling.analyse.calibration import BESIDE, CHUNK, FIRST_FRAME, STUDENT, VAE, calibrate, fastest_chunk
from profiling.analyse.calls import Call
from profiling.analyse.recipe import AUDIO, COLOR, DECODE, MOTION, STEP, Recipe, StageWork
from profiling.analyse.times import Times
from profiling.results import WRONG, Machine, Run
from tests.profiling.analyse.made_up import GPU, chunk, run


def work(stage: str, seconds: float, beside: bool = False) -> StageWork:
    """A stage of one pass over memory, which takes so long at 4 TB/s."""
    return StageWork(stage, Counter({Call("fused pass", (), "bf16", 0.0, 4e12 * seconds): 1}), beside)


# 0.1 s of audio, two steps of 0.5 s with 0.2 s beside them, two decode steps of 0.1 s with colour, 0.1 s of encoding
RECIPE: Recipe = (
    work(AUDIO, 0.1), work(STEP, 0.5), work(DECODE, 0.2, beside=True), work(STEP, 0.5), work(DECODE, 0.1),
    work(COLOR, 0.01), work(DECODE, 0.1), work(COLOR, 0.01), work(MOTION, 0.1),
)  # fmt: skip
STAGES: dict[str, Any] = {
    "audio": (0.2,),
    "denoise_step": (0.6, 0.85),  # a quarter of a second is that of the decoding beside the second one
    "decode": (9.0, 0.125, 0.125),  # the first is beside a step: how long it lasts there does not count
    "color": (0.01, 0.01),
    "motion": (0.125,),
}


def of(*runs: Run) -> list[tuple[str, Run]]:
    return [(f"{i}.json", run) for i, run in enumerate(runs)]


MEASURED = fastest_chunk(of(run(variants=(chunk(seconds=2.1, **STAGES),))))
TIMES = Times([run()], GPU.device)


def test_each_network_has_a_factor_and_the_rest_is_what_no_stage_has() -> None:
    calibration = calibrate(RECIPE, TIMES, MEASURED)
    assert calibration.factors == pytest.approx({STUDENT: 1.2, VAE: 1.25})
    assert calibration.rest == pytest.approx(2.1 - (0.2 + 1.45 + 0.25 + 0.02 + 0.125))


def test_each_part_stands_beside_what_was_measured() -> None:
    parts = {part.name: part for part in calibrate(RECIPE, TIMES, MEASURED).parts}
    rows = {name: (part.calls, part.calibrated, part.measured) for name, part in parts.items()}
    assert rows == {
        AUDIO: pytest.approx((0.1, 0.12, 0.2)),
        STEP: pytest.approx((1.0, 1.2, 1.2)),
        BESIDE: pytest.approx((0.2, 0.25, 0.25)),
        DECODE: pytest.approx((0.2, 0.25, 0.25)),
        COLOR: pytest.approx((0.02, 0.025, 0.02)),
        MOTION: pytest.approx((0.1, 0.125, 0.125)),
        FIRST_FRAME: pytest.approx((1.41, 0.12 + 1.2 + 0.25 + 0.125 + 0.0125, 1.5)),
        CHUNK: pytest.approx((1.62, 0.12 + 1.2 + 0.25 + 0.25 + 0.025 + 0.125 + 0.055, 2.1)),
    }


def test_the_fastest_precision_counts_by_its_newest_chunk() -> None:
    slow, fast, newer = (run(variants=(chunk(name, s, **STAGES),)) for name, s in (("bf16", 3), ("fp8", 1), ("fp8", 2)))
    assert fastest_chunk(of(newer, fast, slow)).seconds == 2
    assert fastest_chunk(of(newer, slow, fast)).file == "0.json"


@pytest.mark.parametrize(
    "other",
    [
        run(variants=(chunk("bf16-eager", **STAGES), chunk("two-steps", **STAGES))),
        run(variants=(chunk(),)),
        run(variants=(chunk(**STAGES),), machine=Machine("cpu", "AMD EPYC", 2, 1)),
    ],
)
def test_other_variants_and_other_machines_are_no_basis(other: Run) -> None:
    broken = chunk(**STAGES)
    wrong = run(variants=(type(broken)(broken.variant, WRONG, stages=broken.stages, chunk=broken.chunk),))
    with pytest.raises(UserError, match="no results have a whole chunk on a GPU"):
        fastest_chunk(of(other, wrong))


@pytest.mark.parametrize(
    ("stages", "complaint"),
    [
        ({"decode": (0.1,)}, "1 calls of decode in a chunk, and 3 in the model as it is now"),
        ({"motion": ()}, "its chunk has no stage motion"),
    ],
)
def test_a_chunk_of_another_model_is_refused(stages: dict[str, Any], complaint: str) -> None:
    given = {name: calls for name, calls in (STAGES | stages).items() if calls}
    measured = fastest_chunk(of(run(variants=(chunk(**given),))))
    with pytest.raises(UserError, match=complaint):
        calibrate(RECIPE, TIMES, measured)
