"""Every table in kernels/tuned/ can be used as it stands: contributed ones too, of cards that nobody here has."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kernels.tuning import FOLDER, GPU, LaunchConfig, TunedEntry, TunedTable, _untuned, device_slug, read_table, to_json
from profiling.cases import Backend, Case, registry
from profiling.cases.case import Shape
from profiling.devices import Device, devices, named
from profiling.fake_gpu import compiling_for

TABLES = sorted(FOLDER.glob("*.json"))
MAX_WARPS = 32  # of a block, on every GPU: 1,024 threads
LEAST_VERSIONS = {"torch", "triton", "cuda", "cudnn"}

each_table = pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)


def device_of(table: TunedTable) -> Device:
    device = named(table.device)
    assert device is not None, f"{table.device} is not in profiling/devices.toml: add its data sheet"
    return device


def case_of(entry: TunedEntry) -> Case:
    """A case like the entry, at the entry's shape."""
    like = [
        case
        for case in registry().values()
        if (case.operation.name, case.dtype, case.shape.dims.keys())
        == (entry.operation, entry.dtype, entry.dims.keys())
    ]
    assert like, f"no case is like {entry.key}"
    known = {name for case in like for name in (b.name for b in case.backends)}
    assert set(entry.seconds) <= known, f"{entry.key}: unknown back-ends {set(entry.seconds) - known}"
    case = next(case for case in like if set(entry.configs) <= {b.name for b in case.backends if b.configs})
    return Case(case.operation, Shape("tuned", dict(entry.dims)), case.dtype, case.tolerance)


def configs(table: TunedTable) -> Iterator[tuple[Case, Backend, LaunchConfig]]:
    for entry in table.entries:
        case = case_of(entry)
        for backend in case.backends:
            if backend.name in entry.configs:
                yield case, backend, entry.configs[backend.name]


@each_table
def test_a_table_is_what_the_tuner_writes(path: Path) -> None:
    table = read_table(path)
    assert path.read_text() == to_json(table), "edited by hand?"
    assert path.stem == device_slug(table.device)
    assert device_of(table).capability == table.capability
    for entry in table.entries:
        assert entry.versions.keys() >= LEAST_VERSIONS, entry.key
        assert entry.configs.keys() <= entry.seconds.keys(), entry.key
        assert all(0 < seconds < 60 for seconds in entry.seconds.values()), entry.key


@each_table
def test_parameters_are_those_that_the_tuner_tries(path: Path) -> None:
    """So launchers take them: the same names, and no value that is not among those tried for the operation."""
    for case, backend, config in configs(read_table(path)):
        assert backend.configs is not None
        space = list(backend.configs(case.shape.dims))
        names = {name for tried in space for name in tried}
        assert set(config) <= names, f"{case.operation.name} {backend.name}: unknown {set(config) - names}"
        for name, value in config.items():
            assert value in {tried.get(name) for tried in space}, (
                f"{case.operation.name} {backend.name}: {name}={value}"
            )


@each_table
def test_warps_are_within_the_limits_of_the_card(path: Path) -> None:
    table = read_table(path)
    limit = min(MAX_WARPS, device_of(table).warps)
    for case, backend, config in configs(table):
        warps = config.get("num_warps", 4)
        assert isinstance(warps, int)
        assert 1 <= warps <= limit, (case.operation.name, backend.name)
        assert warps & (warps - 1) == 0, (case.operation.name, backend.name)


@pytest.mark.slow
@each_table
def test_kernels_compile_within_the_shared_memory_of_the_card(path: Path) -> None:
    table = read_table(path)
    device = device_of(table)
    gpu = GPU(table.device, table.capability, device.multiprocessors)
    for case, backend, config in configs(table):
        assert backend.launcher is not None
        assert not case.lacks(backend, "cuda", table.capability), (case.operation.name, backend.name)
        with compiling_for(gpu) as recorder:
            backend.launcher(*case.inputs(torch.device("cuda"), None), config=config)
        assert recorder.launches, (case.operation.name, backend.name)
        for launch in recorder.launches:
            assert launch.compiled.metadata.shared <= device.shared_bytes_block, (case.operation.name, config)


def test_untuned_parameters_are_of_known_operations_and_cards() -> None:
    """Each names an operation, a dtype, capabilities of devices.toml, and parameters that its kernel has."""
    cards = {device.capability for device in devices().values()}
    for (operation, dtype, capability), config in _untuned().items():
        assert capability in cards
        cases = [case for case in registry().values() if (case.operation.name, case.dtype) == (operation, dtype)]
        spaces = [
            b.configs(case.shape.dims) for case in cases for b in case.backends if b.name == "triton" and b.configs
        ]
        assert spaces, operation
        assert set(config) <= {name for space in spaces for tried in space for name in tried}, operation
