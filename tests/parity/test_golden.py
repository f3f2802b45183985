"""Every golden case in a folder, within the tolerances that it states: `pytest tests/parity --golden DIR`."""

import json
from pathlib import Path
from typing import cast

import pytest
import torch

from tests.parity.cases import RUN, Case


def pass_mark(marks: dict[str, float], name: str) -> float:
    """The mark of output `name`: that of its last part (frames255), of its beginning (out.prepare), or of all (out)."""
    if (last := name.rpartition(".")[2]) in marks:
        return marks[last]
    fitting = [prefix for prefix in marks if f"{name}.".startswith(f"{prefix}.")]
    assert fitting, f"no pass mark for {name} among {sorted(marks)}"
    return marks[max(fitting, key=len)]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder = cast(Path, metafunc.config.getoption("--golden"))
    if "meta" in metafunc.fixturenames:
        metas = [path for path in sorted(folder.glob("*.json")) if "case" in json.loads(path.read_text())]
        if not metas:
            raise pytest.UsageError(f"--golden {folder}: no golden case there")
        metafunc.parametrize("meta", metas, ids=[path.stem for path in metas])


def test_case(meta: Path) -> None:
    case = Case(meta)
    assert case.name in RUN, f"nothing here computes {case.name}"
    with torch.inference_mode():
        outputs = RUN[case.name](case)
    wanted = {name: tensor for name, tensor in case.tensors.items() if name.startswith("out.")}
    assert outputs.keys() == wanted.keys()
    marks = case.meta["suggested_max_abs_difference"]
    for name, want in wanted.items():
        got = outputs[name]
        assert got.shape == want.shape, f"{name}: {list(got.shape)}, want {list(want.shape)}"
        difference = (got.double() - want.double()).abs().max().item()
        print(f"{name}: max |difference| {difference:.2e}, pass mark {pass_mark(marks, name):.0e}")
        assert difference <= pass_mark(marks, name), f"{name}: {difference:.3e} > {pass_mark(marks, name):.0e}"


def test_pass_marks() -> None:
    marks = {"out": 1.0, "out.prepare": 2.0, "latents": 3.0}
    names = ("out.x", "out.prepare.y", "out.chunk0.latents", "out.latents.steps4")
    assert [pass_mark(marks, name) for name in names] == [1.0, 2.0, 3.0, 1.0]
    with pytest.raises(AssertionError, match="no pass mark"):
        pass_mark({"latents": 3.0}, "out.chunk0.decoded")
