"""Precompilation: all that tuning would try is compiled once, in processes of its own, within the time given."""

from pathlib import Path
from typing import Any

import pytest
from triton.runtime.jit import JITFunction

from kernels.tuning import GPU
from model.errors import UserError
from profiling.cases import registry
from profiling.measure import precompile
from profiling.measure.precompile import CompileJob, compile_job, compile_jobs
from tests.profiling import toy

H100 = GPU("NVIDIA H100 80GB HBM3", "9.0", 132)
NORM = "rms_norm_silu/14b-w1-level3/bf16"
TUNED = {  # a job of each tuned kernel
    (case.operation.name, case.dtype, job.backend): job
    for case in registry().values()
    for job in compile_jobs([case], whole_space=True)
    if job.config
}


def test_jobs_are_what_is_launched_and_what_tuning_would_try() -> None:
    case = registry()[NORM]
    assert list(compile_jobs([case], whole_space=False)) == [CompileJob(NORM, "triton")]
    whole_space = list(compile_jobs([case], whole_space=True))
    assert len(whole_space) == 9
    assert CompileJob(NORM, "triton", (("PIXELS", 32), ("num_warps", 8))) in whole_space


@pytest.mark.parametrize("job", TUNED.values(), ids=map("/".join, TUNED))
def test_launchers_take_what_tuning_would_try(job: CompileJob, monkeypatch: pytest.MonkeyPatch) -> None:
    launched: list[dict[str, Any]] = []
    monkeypatch.setattr(JITFunction, "run", lambda _self, *_args, **kwargs: launched.append(kwargs))
    assert compile_job(job, H100, None) == ""
    of_the_scheduler = {"GROUP_N", "SPLIT_K"}  # the order and split of tiles: not every kernel gets them
    for name, value in job.config:
        if name not in of_the_scheduler:
            assert any(_parameter(kwargs, name) == value for kwargs in launched), (name, launched)


def _parameter(kwargs: dict[str, Any], name: str) -> Any:
    """What a launch got for a parameter. Those of a second product begin with OUT_; rows are the keys of all frames."""
    if name == "ROWS" and "FRAMES" in kwargs:
        return kwargs["FRAMES"] * kwargs["KEYS"]
    return kwargs.get(name.removeprefix("OUT_"))


def test_what_is_compiled_is_found_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # the processes' own, too
    todo = [CompileJob(NORM, "triton", (("PIXELS", n), ("num_warps", 4))) for n in (4, 8)]
    assert precompile.compile_all(todo, H100, None, 120) == (2, [])
    binaries = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.cubin")}
    assert len(binaries) == 2
    assert compile_job(todo[0], H100, None) == ""
    assert binaries == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.cubin")}


def test_compile_errors_are_reported_in_one_line() -> None:
    said = compile_job(CompileJob(NORM, "triton", (("PIXELS", 3), ("num_warps", 4))), H100, None)
    assert "power of 2" in said
    assert "\n" not in said


def test_a_compiler_that_is_out_of_time_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """If it were, both jobs would be done."""
    monkeypatch.setattr(precompile, "compile_job", toy.compile_for_ten_minutes)
    assert precompile.compile_all([CompileJob(NORM, "triton")] * 2, H100, None, 0) == (0, [])


def test_a_gpu_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="warm: there is no GPU to compile for"):
        precompile.warm_command([], False, 10, None)
