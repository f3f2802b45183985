"""Results files: what is written comes back, and what is not a results file is refused by name."""

import dataclasses
import json
import math
import os
import pty
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.errors import UserError
from profiling.formats import from_json, load
from profiling.results import (
    VERSION,
    AuditResult,
    CaseResult,
    Ceilings,
    Machine,
    Measurement,
    NvmlTrace,
    Run,
    StageInterval,
    VariantResult,
    as_json_text,
    check_writable,
    from_own_json,
    save,
    to_json,
    write,
)

MACHINE = Machine("cpu", "some CPU", 2, 1)
CASE = CaseResult("a/b/fp32", "a", "b", "fp32", 1.0, 2.0, measurements=(Measurement("eager", "ok", samples=(1.0,)),))
RUN = Run("bench", "2026-01-01T00:00:00+00:00", MACHINE, cases=(CASE,))


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Anything that a field of that type may hold."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return st.none() | values_of(arguments[0])
    if origin is tuple:
        return st.lists(values_of(arguments[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    if dataclasses.is_dataclass(hint):
        hints = typing.get_type_hints(hint)
        return st.builds(
            typing.cast(type, hint), **{f.name: values_of(hints[f.name]) for f in dataclasses.fields(hint)}
        )
    return {
        str: st.text(max_size=8),
        int: st.integers(),
        bool: st.booleans(),
        float: st.just(0.0) | st.floats(1e-29, 1e29) | st.floats(-1e29, -1e-29),  # no quantity is beyond these
    }[hint]


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(values_of(Run))
def test_what_is_written_comes_back(run: Run) -> None:
    text = json.dumps(to_json(run), allow_nan=False)
    assert from_own_json(json.loads(text), "file") == run


def test_a_file_comes_back(tmp_path: Path) -> None:
    save(RUN, tmp_path / "new" / "run.json")
    assert load(tmp_path / "new" / "run.json") == RUN
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run.json"]


def test_what_json_lacks_becomes_null() -> None:
    run = dataclasses.replace(RUN, ceilings=Ceilings(math.inf), cases=())
    assert to_json(run)["ceilings"]["copy_bytes_s"] is None
    assert from_json(to_json(run), "file").ceilings.copy_bytes_s is None


def change(path: str, value: Any) -> dict[str, Any]:
    """The JSON of `RUN` with the value at that dotted path replaced."""
    document = json.loads(json.dumps(to_json(RUN)))
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    place: Any = document
    for key in way:
        place = place[key]
    place[last] = value
    return document


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        (change("version", VERSION + 1), f"schema version {VERSION + 1}, this is version {VERSION}"),
        (change("version", None), "schema version None"),
        (change("started", 5), "run.started is 5, wanted str"),
        (change("machine.units", 2.5), "run.machine.units is 2.5, wanted int"),
        (change("machine.units", True), "run.machine.units is True, wanted int"),
        (change("machine", []), "run.machine is list, wanted an object"),
        (change("cases.0.measurements.0.samples", [0.1, "x"]), r"run.cases\[0\].measurements\[0\].samples\[1\] is 'x'"),
        (change("cases.0.measurements.0.samples", None), r"samples is None"),
        (change("cases.0.flavour", 1), r"run.cases\[0\] has the unknown field flavour"),
        ({k: v for k, v in to_json(RUN).items() if k != "machine"}, "run lacks machine"),
        (change("version", 0), f"schema version 0, this is version {VERSION}"),
        (change("cases", [None]) | {"version": 1}, "is damaged"),
        (change("cases", {"case": "a/b/fp32"}) | {"version": 1}, "is damaged"),
        (change("cases.0.shape", 5) | {"version": 1}, "is damaged"),
        (change("cases.0", {"case": "a/b/fp32"}) | {"version": 1}, r"run.cases\[0\] lacks operation"),
        (change("audit", [{}]) | {"version": 1}, r"run.audit\[0\] lacks case"),
        ({}, "holds no results"),
        ([1, 2], "holds no results"),
        (None, "holds no results"),
        ({"traceEvents": []}, "holds no results"),
    ],
)
def test_what_is_no_results_file_is_refused(document: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        from_json(document, "odd.json")
    assert str(caught.value).startswith("odd.json ")
    assert "\n" not in str(caught.value)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text(json.dumps(to_json(RUN))[:-20])
    with pytest.raises(UserError, match=r"half.json is not JSON"):
        load(tmp_path / "half.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary.json is not JSON"):
        load(tmp_path / "binary.json")
    with pytest.raises(UserError, match=r"none.json cannot be read \(No such file"):
        load(tmp_path / "none.json")
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path)


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*; name another place"):
        save(RUN, tmp_path / "file" / "run.json")
    (tmp_path / "folder.json").mkdir()
    with pytest.raises(UserError, match="cannot be written"):
        save(RUN, tmp_path / "folder.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.json"]


def test_stages_are_summed_over_each_chunk() -> None:
    stages = {"denoise/step": (1.0, 2.0, 3.0, 5.0), "decode": (1.0, 2.0, 3.0)}
    variant = VariantResult("v", "ok", stages=stages, chunk=(4.0, 9.0))
    assert variant.per_chunk("denoise/step") == (3.0, 8.0)
    assert variant.per_chunk("decode") == ()  # 3 calls are no whole number a chunk
    assert variant.per_chunk("motion") == ()
    assert VariantResult("v", "ok", stages=stages).per_chunk("decode") == ()


def test_the_bound_is_the_longer_of_computing_and_moving() -> None:
    case = CaseResult("a/b/bf16", "a", "b", "bf16", flops=8e12, bytes=1e9)
    assert case.bound(Ceilings(1e12, {"bf16": 4e14})) == ("compute", 0.02)
    assert case.bound(Ceilings(1e10, {"bf16": 4e14})) == ("memory", 0.1)
    assert case.bound(Ceilings(1e10, {"fp8": 4e14})) == ("memory", 0.1)
    assert case.bound(Ceilings()) is None


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "1e300", "1e-310"])
def test_numbers_that_are_none_are_damage(tmp_path: Path, number: str) -> None:
    text = json.dumps(to_json(dataclasses.replace(RUN, seconds=123.5))).replace("123.5", number)
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"damaged: run\.seconds is .*, wanted a finite number"):
        load(tmp_path / "run.json")


def old_case(operation: str, shape: str, dims: dict[str, int], **more: Any) -> dict[str, Any]:
    """A case as schema version 1 wrote it."""
    named = {"case": f"{operation}/{shape}/bf16", "operation": operation, "shape": shape, "dtype": "bf16"}
    return named | {"flops": 1.0, "bytes": 2.0, "products": True, "dims": dims} | more


@pytest.mark.parametrize(
    ("old", "case", "dims"),
    [
        (("self_attention", "14b-w8-ring", {"queries": 5, "channels": 128}), "chunk_attention/14b-w8-ring/bf16",
         {"queries": 5, "head_dim": 128}),
        (("wide_attention", "14b-w1-level0", {"heads": 1, "channels": 384}), "chunk_attention/14b-w1-level0/bf16",
         {"heads": 1, "head_dim": 384}),
        (("text_image_attention", "14b-w1-prompt", {"collapsed": 1, "channels": 8}),
         "text_image_attention/14b-w1-prompt/bf16", {"dedup_padding": 1, "head_dim": 8}),
        (("quantize_qkv", "14b-w1", {"channels": 128}), "rms_norm_rope_fp8/14b-w1/bf16", {"head_dim": 128}),
        (("audio_attention", "14b-w1", {"channels": 128}), "audio_layer/14b-w1/bf16", {"head_dim": 128}),
        (("causal_conv3d", "14b-w1-head", {"channels": 96}), "causal_conv3d/14b-w1-head/bf16",
         {"channels": 96, "kt": 3, "k": 3}),
        (("time_conv", "14b-w1-level0", {"channels": 384}), "causal_conv3d/14b-w1-level0-time/bf16",
         {"channels": 384, "kt": 3, "k": 1}),
        (("conv_norm", "14b-w1-level2", {"channels": 192}), "causal_conv3d_norm/14b-w1-level2/bf16",
         {"channels": 192, "kt": 3, "k": 3}),
        (("upsample_conv", "14b-w1", {"channels": 96}), "upsample_conv2d/14b-w1/bf16", {"channels": 96}),
        (("downsample_conv", "14b-w1", {"channels": 96}), "downsample_conv2d/14b-w1/bf16", {"channels": 96}),
        (("norm_silu", "14b-w1", {"channels": 96}), "rms_norm_silu/14b-w1/bf16", {"channels": 96}),
        (("causal_conv3d", "probe", {}), "causal_conv3d/probe/bf16", {}),
        (("linear", "14b-w1", {"rows": 4}), "linear/14b-w1/bf16", {"rows": 4}),
    ],
)  # fmt: skip
def test_a_case_of_version_1_is_read_under_its_new_name(
    old: tuple[str, str, dict[str, int]], case: str, dims: dict[str, int]
) -> None:
    measurement = {"backend": "eager", "status": "ok", "samples": [0.25, 0.5]}
    document = change("cases", [old_case(*old, products=False, calls=3.5, measurements=[measurement])])
    (found,) = from_json(document | {"version": 1}, "old.json").cases
    operation, shape, dtype = case.split("/")
    assert found == CaseResult(
        case, operation, shape, dtype, 1.0, 2.0, 1, 3.5, False, dims, (Measurement("eager", "ok", samples=(0.25, 0.5)),)
    )


@pytest.mark.parametrize(
    ("operation", "old", "new"),
    [("audio_attention", "folded", "absorbed"), ("conv_norm", "apart", "separate"), ("linear", "folded", "folded")],
)
def test_a_backend_of_version_1_is_read_under_its_new_name(operation: str, old: str, new: str) -> None:
    measurements = [{"backend": old, "status": "ok", "ours": True}, {"backend": "eager", "status": "ok"}]
    document = change("cases", [old_case(operation, "s", {}, measurements=measurements)]) | {"version": 1}
    (found,) = from_json(document, "old.json").cases
    assert found.measurements == (Measurement(new, "ok", ours=True), Measurement("eager", "ok"))


@pytest.mark.parametrize(
    ("operation", "old", "new"),
    [
        ("audio_layer", "folded", "absorbed"),
        ("causal_conv3d_norm", "apart", "separate"),
        ("linear", "folded", "folded"),
    ],
)
def test_names_that_changed_while_version_2_was_written_are_the_present_ones(
    operation: str, old: str, new: str
) -> None:
    measurements = [{"backend": old, "status": "ok"}]
    values = old_case(operation, "s", {"per_frame": 4}, is_matmul=True, measurements=measurements)
    del values["products"]
    (found,) = from_json(change("cases", [values]) | {"version": 2}, "old.json").cases
    assert found.measurements == (Measurement(new, "ok"),)
    assert found.dims == ({"tokens_per_frame": 4} if operation == "audio_layer" else {"per_frame": 4})


def test_a_run_of_version_1_loses_nothing() -> None:
    document = to_json(RUN) | {"version": 1, "notes": ["a note"]}
    document["gauges"] = document.pop("nvml") | {"watts": [650.0], "note": "one reading"}
    document["cases"] = [old_case("conv_norm", "s", {})]
    interval = {"stage": "decode", "lane": 1, "begin": 0.5, "end": 0.75}
    document["variants"] = [{"variant": "a", "status": "ok", "timeline": [interval]}, {"variant": "b", "status": "ok"}]
    document["audit"] = [
        {"case": "time_conv/s/bf16", "kernel": "conv_hopper", "target": "sm_90"},
        {"case": "linear/s/bf16", "kernel": "linear_hopper", "target": "sm_90"},
    ]
    text = json.dumps(document)
    run = from_json(document, "old.json")
    assert json.dumps(document) == text, "the values that were read are left as they were"
    assert run == dataclasses.replace(
        RUN,
        cases=(CaseResult("causal_conv3d_norm/s/bf16", "causal_conv3d_norm", "s", "bf16", 1.0, 2.0),),
        variants=(
            VariantResult("a", "ok", timeline=(StageInterval("decode", 1, 0.5, 0.75),)),
            VariantResult("b", "ok"),
        ),
        audit=(
            AuditResult("causal_conv3d/s-time/bf16", "conv_hopper", "sm_90"),
            AuditResult("linear/s/bf16", "linear_hopper", "sm_90"),
        ),
        nvml=NvmlTrace(watts=(650.0,), note="one reading"),
        notes=("a note",),
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_printed_json_has_null_for_what_json_lacks(bad: float) -> None:
    text = as_json_text({"a": [bad, (1.0, bad)], "b": {"c": bad}, "d": "NaN"})
    assert json.loads(text, parse_constant=pytest.fail) == {"a": [None, [1.0, None]], "b": {"c": None}, "d": "NaN"}


def test_a_device_is_written_into(tmp_path: Path) -> None:
    """A terminal; the name leads to it through a link."""
    controller, device = pty.openpty()
    try:
        (tmp_path / "report.html").symlink_to(os.ttyname(device))
        write(tmp_path / "report.html", "new")
        assert os.read(controller, 100) == b"new"
        assert (tmp_path / "report.html").is_char_device()
    finally:
        os.close(device)
        os.close(controller)


@pytest.mark.parametrize("name", ["folder", "file/inside"])
def test_a_place_that_cannot_be_written_is_known_beforehand(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be written .*; name another place"):
        check_writable(tmp_path / name)
    check_writable(tmp_path / "new" / "file")
    assert list((tmp_path / "new").iterdir()) == []
