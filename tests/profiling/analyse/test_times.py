"""Times of calls: the measured one, one scaled from the nearest shape, or what the ceilings allow."""

import dataclasses

import pytest

from model.errors import UserError
from profiling.analyse.calls import Call, call, matmul
from profiling.analyse.times import CEILING, MEASURED, SCALED, Timed, Times
from profiling.analyse.waves import launch_parameters, tiles
from profiling.devices import devices
from profiling.results import CaseResult, Ceilings
from tests.profiling.analyse.made_up import CEILINGS, GPU, case, run

UNITS, LEAST = devices()["B200"].multiprocessors, devices()["B200"].kernel_s
WAVE = {"rows": 128 * UNITS, "inputs": 1024, "outputs": 256}  # one tile of 128 x 256 for each multiprocessor
NORM = {"rows": 1024, "columns": 1024}


def of(call: Call, *cases: CaseResult) -> Timed:
    return Times([run(*cases)], GPU.device).of(call)


def linear(**dims: int) -> Call:
    return call("linear", "fp8", **(WAVE | dims))


def test_a_measured_shape_takes_what_ours_took() -> None:
    assert of(linear(), case("linear/wave/fp8", WAVE, 0.5)) == Timed(0.5, MEASURED, "linear/wave/fp8")


def test_the_newest_run_counts_but_a_tuned_table_goes_before_it() -> None:
    newest, older = run(case("linear/a/fp8", WAVE, 0.1)), run(case("linear/a/fp8", WAVE, 0.2))
    tuned = run(case("linear/a/fp8", WAVE, 0.3), command="tune", ceilings=Ceilings())
    assert Times([newest, older], GPU.device).of(linear()).seconds == 0.1
    assert Times([newest, older, tuned], GPU.device).of(linear()).seconds == 0.3


def test_results_of_other_programs_and_devices_do_not_count() -> None:
    foreign = run(case("linear/a/fp8", WAVE, 0.1), command="probe.py --out x")
    other = run(case("linear/a/fp8", WAVE, 0.1), machine=dataclasses.replace(GPU, device="NVIDIA H100"))
    assert Times([other, foreign], GPU.device).of(linear()).source == CEILING


@pytest.mark.parametrize(("rows", "waves"), [(1, 1), (128 * UNITS - 1, 1), (128 * UNITS + 1, 2), (128 * UNITS * 3, 3)])
def test_products_are_scaled_by_waves_of_tiles(rows: int, waves: int) -> None:
    timed = of(linear(rows=rows), case("linear/wave/fp8", WAVE, 0.5))
    assert timed.source == SCALED if rows != WAVE["rows"] else MEASURED
    assert timed.seconds == pytest.approx(0.5 * waves)


def test_a_wave_of_longer_products_takes_longer() -> None:
    assert of(linear(inputs=4096), case("linear/wave/fp8", WAVE, 0.5)).seconds == pytest.approx(2.0)


def test_a_strip_of_a_picture_takes_a_whole_wave() -> None:
    """Tiles are 24 rows high and 8 columns wide, of 96 channels: 4 x 7 x 4 of them, or 7 x 4 for six rows."""
    dims = {"frames": 1, "channels": 384, "rows": 96, "columns": 56, "outputs": 384, "kt": 3, "k": 3}
    parameters = launch_parameters(None, "causal_conv3d", dims, "bf16")
    width = int(parameters["BLOCK_N0"]) + int(parameters["BLOCK_N1"])
    assert tiles("causal_conv3d", dims, parameters) == 4 * 7 * 384 // width
    whole = case("causal_conv3d/level/bf16", dims, 1e-4)
    assert of(call("causal_conv3d", "bf16", **(dims | {"rows": 6})), whole).seconds == pytest.approx(1e-4)
    twice = call("causal_conv3d", "bf16", **(dims | {"rows": 192, "columns": 112}))
    assert of(twice, whole).seconds == pytest.approx(1e-4 * -(-8 * 14 * 384 // width // UNITS))


def test_passes_are_scaled_by_bytes_and_attention_by_flops() -> None:
    norm = case("layer_norm_modulate/a/bf16", NORM, 1e-3)
    assert of(call("layer_norm_modulate", "bf16", rows=512, columns=1024), norm).seconds == pytest.approx(5e-4)
    dims = {"queries": 4096, "keys": 4096, "heads": 8, "head_dim": 128}
    attention = case("chunk_attention/a/bf16", dims, 1e-3)
    share = call("chunk_attention", "bf16", **(dims | {"heads": 2}))
    assert of(share, attention).seconds == pytest.approx(2.5e-4)
    other = call("chunk_attention", "bf16", **(dims | {"head_dim": 64}))
    assert of(other, attention).source == CEILING  # another kernel


def test_the_nearest_shape_is_scaled() -> None:
    far, near = case("linear/far/fp8", WAVE | {"rows": 10**6}, 9.0), case("linear/near/fp8", WAVE, 0.5)
    assert of(linear(rows=100), far, near).basis == "linear/near/fp8"


def test_what_was_never_measured_takes_its_flops_or_bytes() -> None:
    product = matmul("bf16", 10**4, 10**4, 10**4)
    assert of(product).seconds == pytest.approx(2e12 / 1e15)
    assert of(product).source == CEILING
    assert of(Call("fused pass", (), "bf16", 0.0, 4e9)).seconds == pytest.approx(1e-3)
    assert of(Call("fused pass", (), "bf16", 0.0, 4.0)).seconds == LEAST


def test_no_scaled_time_is_shorter_than_a_copy_or_the_shortest_kernel() -> None:
    norm = case("layer_norm_modulate/a/bf16", NORM, 1e-9)
    large = call("layer_norm_modulate", "bf16", rows=10**6, columns=1024)
    assert of(large, norm).seconds == pytest.approx(large.bytes / 4e12)
    assert of(call("layer_norm_modulate", "bf16", rows=1, columns=8), norm).seconds == LEAST


def test_what_the_device_reaches_must_be_known() -> None:
    for ceilings in (Ceilings(), Ceilings(4e12), dataclasses.replace(CEILINGS, copy_launched=False)):
        with pytest.raises(UserError, match="no results say how fast NVIDIA B200 copies and multiplies"):
            Times([run(ceilings=ceilings)], GPU.device)
    with pytest.raises(UserError, match=r"AMD is not in devices\.toml"):
        Times([run()], "AMD")
