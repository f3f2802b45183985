"""Tuned launch parameters: the entry used for a shape and device, and the errors of damaged tables."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import tuning
from kernels.tuning import (
    GPU,
    TunedConfig,
    TunedEntry,
    TunedTable,
    assume_gpu,
    device_slug,
    distance,
    gpu_of,
    launch_config,
    nearest_config,
    read_table,
    reads_by_pointers,
    table_for,
    to_json,
    tuned_config,
)
from profiling.fake_gpu import FakeCudaMode

H100 = "NVIDIA H100 80GB HBM3"
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0"}


def entry(dims: Mapping[str, int], block: int, operation: str = "attention", dtype: str = "bf16") -> TunedEntry:
    """An entry whose Triton back-end is the fastest up to 1000 tokens."""
    seconds = {"triton": 1.0, "cudnn": 0.5 if dims["tokens"] > 1000 else 2.0}
    fastest = min(seconds, key=lambda name: seconds[name])
    return TunedEntry(operation, dtype, dims, fastest, {"triton": {"BLOCK": block}}, seconds, "2026-01-31", VERSIONS)


def dims(tokens: int, size: int = 128) -> dict[str, int]:
    return {"tokens": tokens, "size": size}


TABLE = TunedTable(
    H100,
    "9.0",
    (
        entry(dims(100), 16),
        entry(dims(1000), 32),
        entry(dims(10000), 64),
        entry(dims(990, 64), 96),
        entry(dims(100), 112, dtype="fp8"),
        entry(dims(100), 128, operation="norm"),
    ),
)


@pytest.mark.parametrize(
    ("tokens", "size", "wanted"),
    [
        (100, 128, TunedConfig("triton", {"BLOCK": 16})),
        (1000, 128, TunedConfig("triton", {"BLOCK": 32})),
        (300, 128, TunedConfig("triton", {"BLOCK": 16})),  # the middle of 100 and 1000 is 316
        (330, 128, TunedConfig("triton", {"BLOCK": 32})),
        (1, 128, TunedConfig("triton", {"BLOCK": 16})),
        (10**7, 128, TunedConfig("cudnn", {})),
    ],
)
def test_the_nearest_shape_is_used(tokens: int, size: int, wanted: TunedConfig) -> None:
    assert nearest_config(TABLE, "attention", dims(tokens, size), "bf16") == wanted


def test_dimensions_can_be_matched_exactly() -> None:
    """The nearest shape has another size: it is used unless the size must match exactly."""
    assert nearest_config(TABLE, "attention", dims(990, 65), "bf16") == TunedConfig("triton", {"BLOCK": 96})
    assert nearest_config(TABLE, "attention", dims(990, 128), "bf16", match_exactly=["size"]) == TunedConfig(
        "triton", {"BLOCK": 32}
    )
    assert nearest_config(TABLE, "attention", dims(990, 65), "bf16", match_exactly=["size"]) is None


def test_a_slower_back_end_can_be_selected() -> None:
    assert nearest_config(TABLE, "attention", dims(10000), "bf16", ["triton"]) == TunedConfig("triton", {"BLOCK": 64})
    assert nearest_config(TABLE, "attention", dims(100), "bf16", ["cudnn"]) == TunedConfig("cudnn", {})
    assert nearest_config(TABLE, "attention", dims(100), "bf16", ["gluon"]) is None
    fastest = nearest_config(TABLE, "attention", dims(100), "bf16", ["gluon", "cudnn", "triton"])
    assert fastest == nearest_config(TABLE, "attention", dims(100), "bf16")
    assert nearest_config(TABLE, "attention", dims(100), "bf16", ["gluon", "cudnn"]) == TunedConfig("cudnn", {})


@pytest.mark.parametrize(
    ("operation", "shape", "dtype"),
    [("attention", dims(100), "fp32"), ("conv", dims(100), "bf16"), ("attention", {"rows": 100}, "bf16")],
)
def test_other_operations_dtypes_and_dimensions_are_not_used(operation: str, shape: dict, dtype: str) -> None:
    assert nearest_config(TABLE, operation, shape, dtype) is None


sizes = st.fixed_dictionaries({"tokens": st.integers(0, 10**6), "size": st.integers(0, 256)})


@given(sizes, sizes, sizes)
def test_the_distance_is_a_metric(a: dict, b: dict, c: dict) -> None:
    assert distance(a, b) == distance(b, a)
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, c) <= distance(a, b) + distance(b, c) + 1e-9


@given(sizes)
def test_a_measured_shape_uses_its_own_entry(shape: dict) -> None:
    exact = entry(shape, 256)
    assert nearest_config(replace(TABLE, entries=(*TABLE.entries, exact)), "attention", shape, "bf16", ["triton"]) in (
        TunedConfig("triton", {"BLOCK": 256}),
        *(TunedConfig("triton", e.configs["triton"]) for e in TABLE.entries if e.dims == shape),
    )


# --- Files ----------------------------------------------------------------------------------------------------------


def save(folder: Path, device: str, capability: str, block: int) -> None:
    table = TunedTable(device, capability, (entry(dims(100), block),))
    (folder / f"{device_slug(device)}.json").write_text(to_json(table))


def test_device_slugs() -> None:
    assert device_slug(H100) == "nvidia-h100-80gb-hbm3"
    assert device_slug("Intel(R) Xeon(R) CPU @ 2.20GHz") == "intel-r-xeon-r-cpu-2-20ghz"


def test_a_device_uses_its_own_table_or_one_of_its_capability(tmp_path: Path) -> None:
    assert table_for(H100, "9.0", tmp_path) is None
    save(tmp_path, "NVIDIA B200", "10.0", 1)
    assert table_for("NVIDIA H200", "9.0", tmp_path) is None
    save(tmp_path, H100, "9.0", 2)
    save(tmp_path, "NVIDIA A", "9.0", 3)
    assert table_for(H100, "9.0", tmp_path) == TunedTable(H100, "9.0", (entry(dims(100), 2),))
    other = table_for("NVIDIA H200", "9.0", tmp_path)
    assert other is not None
    assert other.device == "NVIDIA A"
    assert table_for("NVIDIA L4", "8.9", tmp_path) is None
    assert table_for("NVIDIA A", "8.0", tmp_path) is None


def test_a_missing_folder_has_no_table(tmp_path: Path) -> None:
    assert table_for(H100, "9.0", tmp_path / "none") is None


def test_the_text_does_not_depend_on_the_order_of_entries(tmp_path: Path) -> None:
    text = to_json(TABLE)
    assert to_json(replace(TABLE, entries=TABLE.entries[::-1])) == text
    (tmp_path / "t.json").write_text(text)
    again = read_table(tmp_path / "t.json")
    assert set(map(repr, again.entries)) == set(map(repr, TABLE.entries))
    assert to_json(again) == text


@pytest.fixture
def h100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """A machine with two H100s; yields the list of tables that were read."""
    opened: list[Path] = []

    def counted(path: Path) -> TunedTable:
        opened.append(path)
        return read_table(path)

    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    monkeypatch.setattr(tuning, "read_table", counted)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    properties = SimpleNamespace(name=H100, major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for cached in (tuning._tuned_config, tuning._table_of, tuning._gpu):
        cached.cache_clear()
    yield opened
    for cached in (tuning._tuned_config, tuning._table_of, tuning._gpu):
        cached.cache_clear()


def test_a_table_is_read_once_per_kind_of_device(tmp_path: Path, h100: list[Path]) -> None:
    save(tmp_path, H100, "9.0", 48)
    wanted = TunedConfig("triton", {"BLOCK": 48})
    assert tuned_config("attention", dims(100), "bf16", "cuda") == wanted
    assert tuned_config("attention", dims(200), "bf16", torch.device("cuda:1"), match_exactly=["size"]) == wanted
    assert tuned_config("attention", dims(300), "bf16", "cuda", backends=["cudnn"]) == TunedConfig("cudnn", {})
    assert len(h100) == 1
    assert tuned_config("attention", dims(100), "bf16", "cuda:0") == wanted
    assert len(h100) == 1


def test_assume_gpu_replaces_the_installed_gpu(tmp_path: Path, h100: list[Path]) -> None:
    save(tmp_path, "NVIDIA B200", "10.0", 48)
    assert gpu_of(torch.device("cuda")) == GPU(H100, "9.0", 132)
    with assume_gpu(GPU("B200", "10.0", 148)):
        assert gpu_of(torch.device("cuda")).multiprocessors == 148
        assert tuned_config("attention", dims(100), "bf16", "cuda") == TunedConfig("triton", {"BLOCK": 48})
    assert tuned_config("attention", dims(100), "bf16", "cuda") is None
    assert h100


def test_a_cpu_and_an_unmeasured_gpu_have_no_config(h100: list[Path]) -> None:
    assert tuned_config("attention", dims(100), "bf16", "cpu") is None
    assert tuned_config("attention", dims(100), "bf16", "cuda") is None
    assert h100 == []


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_pointers_are_for_what_tma_cannot_read_and_where_triton_does_not_overlap_it() -> None:
    whole = torch.zeros(9, 132)
    assert not reads_by_pointers(whole, whole[:, 4:])
    assert reads_by_pointers(whole, whole[:, 1:])  # the address
    assert reads_by_pointers(whole, torch.zeros(9, 133)[:, :132])  # the stride
    for capability, pointers in (("8.0", True), ("9.0", False), ("12.0", True)):
        with assume_gpu(GPU("any", capability, 80)), FakeCudaMode():
            assert reads_by_pointers(torch.zeros(9, 132, device="cuda")) is pointers


def test_launch_config_takes_the_given_then_the_tuned_then_the_default(tmp_path: Path, h100: list[Path]) -> None:
    save(tmp_path, H100, "9.0", 48)
    default = {"BLOCK": 16, "num_warps": 4}
    for device, override, expected in (
        ("cuda", {"BLOCK": 8}, {"BLOCK": 8, "num_warps": 4}),
        ("cuda", None, {"BLOCK": 48, "num_warps": 4}),
        ("cuda", {}, {"BLOCK": 48, "num_warps": 4}),
        ("cpu", None, default),
    ):
        assert (
            launch_config("attention", dims(100), "bf16", torch.device(device), default=default, given=override)
            == expected
        )
    assert launch_config("conv", dims(100), "bf16", torch.device("cuda"), default=default) == default
    unlike = dims(100, 64)
    exactly = launch_config("attention", unlike, "bf16", torch.device("cuda"), default=default, match_exactly=["size"])
    assert exactly == default


def test_untuned_parameters_replace_defaults_by_compute_capability(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "untuned.toml"
    file.write_text(
        '[[untuned]]\noperation = "conv"\ndtype = "bf16"\ncapabilities = ["8.0", "8.9"]\nconfig = { BLOCK = 8 }\n'
    )
    monkeypatch.setattr(tuning, "UNTUNED", file)
    tuning._untuned.cache_clear()
    default, cuda = {"BLOCK": 16, "num_warps": 4}, torch.device("cuda")
    for capability, dtype, device, given_, expected in (
        ("8.0", "bf16", cuda, None, 8),
        ("8.9", "bf16", cuda, None, 8),
        ("9.0", "bf16", cuda, None, 16),
        ("8.0", "fp8", cuda, None, 16),
        ("8.0", "bf16", torch.device("cpu"), None, 16),
        ("8.0", "bf16", cuda, {"BLOCK": 32}, 32),
    ):
        with assume_gpu(GPU("any", capability, 80)):
            found = launch_config("conv", dims(100), dtype, device, default=default, given=given_)
        assert found == {"BLOCK": expected, "num_warps": 4}
    tuning._untuned.cache_clear()


def damaged(change: Mapping[str, Any], where: str | None = "entries") -> str:
    values = json.loads(to_json(TABLE))
    part = values["entries"][2] if where else values
    for name, value in change.items():
        if value is ...:
            del part[name]
        else:
            part[name] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a flashtalk-tuned file of version 2"),
        (damaged({"schema": "flashtalk-results"}, None), "is not a flashtalk-tuned file of version 2"),
        (damaged({"version": 1}, None), "is not a flashtalk-tuned file of version 2"),
        (damaged({"device": 3}, None), "table.device is 3, wanted str"),
        (damaged({"entries": {}}, None), "table.entries is {}, wanted list"),
        (damaged({"capability": ...}, None), "table lacks capability"),
        (damaged({"note": "by hand"}), r"table.entries[2] has the unknown field note"),
        (damaged({"dtype": ...}), r"table.entries[2] lacks dtype"),
        (damaged({"dims": {"tokens": "many"}}), r"table.entries[2].dims.tokens is 'many', wanted int"),
        (damaged({"configs": {"triton": {"BLOCK": None}}}), r"table.entries[2].configs.triton.BLOCK is None"),
        (damaged({"configs": {"triton": 3}}), r"table.entries[2].configs.triton is 3, wanted dict"),
        (damaged({"backend": "gluon"}), r"table.entries[2].seconds lacks gluon"),
    ],
)
def test_a_damaged_table_names_file_and_entry(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / f"{device_slug(H100)}.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"nvidia-h100-80gb-hbm3\.json") as caught:
        table_for(H100, "9.0", tmp_path)
    assert said in str(caught.value)
