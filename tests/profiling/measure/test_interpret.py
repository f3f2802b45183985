"""`bench --interpret`: kernels are checked in Triton's interpreter, without a GPU and without times.

Triton chooses between compiler and interpreter when a kernel is defined, so the command has a process of its own.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.tuning import GPU, assume_gpu
from profiling.__main__ import main
from profiling.cases import load_cases, registry
from profiling.measure.interpret import interpreted_case
from profiling.measure.tune import candidates
from profiling.results import ERROR, OK, UNSUPPORTED, WRONG
from tests.processes import ROOT, Interpreter
from tests.profiling import attention_kernel, toy

EXAMPLE = ROOT / "examples" / "my_kernel.py"

KERNELS = """
from dataclasses import replace
import torch
from profiling.cases import Backend, Case, Shape, no_setup
from tests.profiling.attention_kernel import OPERATION, TINY, TRITON, attention

def without_its_tail(q, k, v, config=None):
    out = torch.empty_like(q)
    out[:-4] = attention(q[:-4].contiguous(), k, v)
    return out

def raises(q, k, v):
    raise TypeError("launch() misses an argument")

def on_cpu(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1)

def kernel(name, function, **more):
    return Backend(name, no_setup(function), ours=True, devices=("cuda",), launcher=function, **more)

backends = (
    kernel("right", attention), kernel("broken", without_its_tail), kernel("raises", raises),
    kernel("gluon", raises, gluon=True), kernel("no-kernel", on_cpu), *OPERATION.backends["bf16"][1:],
)
CASES = [Case(replace(OPERATION, backends={"bf16": backends}), TINY, "bf16", 5e-3)]
"""


BENCH = ("-m", "profiling", "bench", "--interpret")


def test_every_kernel_is_checked_and_nothing_is_timed(interpreting_python: Interpreter, tmp_path: Path) -> None:
    (tmp_path / "kernels.py").write_text(KERNELS)
    done = interpreting_python.run(*BENCH, "--cases", tmp_path / "kernels.py", "--json")
    assert done.returncode == 1, done.stderr
    (case,) = json.loads(done.stdout)["cases"]
    assert case["case"] == "test_attention/tiny/fp32", "the interpreter's products of bfloat16 are wrong"
    found: dict[str, dict[str, Any]] = {m["backend"]: m for m in case["measurements"]}
    assert {name: m["status"] for name, m in found.items()} == {
        "right": OK,
        "broken": WRONG,
        "raises": ERROR,
        "gluon": UNSUPPORTED,
        "no-kernel": UNSUPPORTED,
    }
    assert "elements are NaN" in found["broken"]["detail"]
    assert found["raises"]["detail"] == "TypeError: launch() misses an argument"
    assert {(m["first_call"], *m["samples"]) for m in found.values()} == {(None,)}
    assert found["right"]["error"] < 1e-5


def test_the_example_is_right() -> None:
    """The command lets Triton interpret, as nothing has done so before it."""
    command = [sys.executable, *BENCH, "small", "--cases", str(EXAMPLE), "--sweep", "columns=255:257:+1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split()[1] for line in done.stdout.splitlines() if "triton" in line] == ["right"] * 3


def test_the_example_is_audited_tuned_and_compared_with_peers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(EXAMPLE.read_text().splitlines()) < 80
    small, large = load_cases(EXAMPLE)
    with assume_gpu(GPU("NVIDIA H100 80GB HBM3", "9.0", 132)):
        assert len(candidates(large, torch.device("cuda"))) == 9
    monkeypatch.setattr(sys, "argv", ["profiling", "audit", large.name, "--cases", str(EXAMPLE), "--json"])
    assert main() == 0
    (audited,) = json.loads(capsys.readouterr().out)["audit"]
    assert (audited["kernel"], audited["spills"], audited["faults"]) == ("gated_rms_norm_fwd", 0, [])
    command = ["profiling", "bench", small.name, "--cases", str(EXAMPLE), "--device", "cpu", "--rounds", "1", "--json"]
    monkeypatch.setattr(sys, "argv", command)
    assert main() == 0
    (timed,) = json.loads(capsys.readouterr().out)["cases"]
    assert {m["backend"]: m["status"] for m in timed["measurements"]} == {
        "triton": UNSUPPORTED,
        "torch": OK,
        "torch-compiled": UNSUPPORTED,
    }


def test_a_case_keeps_its_kernels_alone() -> None:
    case = interpreted_case(registry()["causal_conv3d/14b-w1-level3/bf16"])
    assert {b.name: b.devices for b in case.backends} == {"gluon": ("cuda",)}
    case = interpreted_case(registry()["layer_norm_modulate/tiny-w1/fp32"])
    assert {b.name: b.devices for b in case.backends} == {"triton": ("cpu",)}, "it has a launcher in bf16"
    assert case.tolerance == 1e-5
    assert interpreted_case(registry()["quantize_rows/14b-w1-wide/fp8"]).dtype == "fp8"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["toy_good", "--cases", toy.__file__], "none of these cases has a back-end with a launcher"),
        (["--cases", attention_kernel.__file__, "--backend", "gluon"], "they have triton"),
        (["--device", "cuda"], "runs on the CPU"),
        (["--csv"], "measures nothing"),
    ],
)
def test_mistakes_end_in_one_line(interpreting_python: Interpreter, arguments: list[str], said: str) -> None:
    done = interpreting_python.run(*BENCH, *arguments)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert said in line
