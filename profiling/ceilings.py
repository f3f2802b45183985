"""What a machine can reach at most, and what to make of a time that is better.

A GPU's copy is measured as kernels are launched. Results files before `Ceilings.copy_launched` timed it in a CUDA
graph, where a copy is a memcpy node: 2.44 instead of 3.02 TB/s on one H100. Their shares of the ceiling are too high.
`with_launched_copy` replaces such a ceiling by that of another run of the same device, and says so in the run's notes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from profiling.devices import Device, named
from profiling.results import CaseResult, Ceilings, Machine, Run

GRAPH_COPY = "the copy was timed as a node of a CUDA graph, which is slower than a launched copy"


def copy_is_too_low(machine: Machine, ceilings: Ceilings) -> bool:
    """Whether the ceiling of memory was measured in the way that gives too low a rate."""
    return machine.kind == "cuda" and bool(ceilings.copy_bytes_s) and not ceilings.copy_launched


def with_launched_copy(runs: Sequence[tuple[str, Run]]) -> list[tuple[str, Run]]:
    """The runs, given as (file, run), the newest first; a copy's ceiling that is too low becomes a launched one.

    It is the newest one of the same device. A run of a device without any keeps its ceiling. The runs' notes say so.
    """
    launched: dict[str, tuple[str, Ceilings]] = {}
    for file, run in runs:
        if run.ceilings.copy_launched:
            launched.setdefault(run.machine.device, (file, run.ceilings))
    return [(file, _corrected(run, *launched.get(run.machine.device, ("", None)))) for file, run in runs]


def _corrected(run: Run, file: str, better: Ceilings | None) -> Run:
    own = run.ceilings
    if not copy_is_too_low(run.machine, own):
        return run
    if better is None or not better.copy_bytes_s:
        return replace(run, notes=(*run.notes, f"shares of the copy's ceiling are too high: {GRAPH_COPY}"))
    rate = f"{better.copy_bytes_s / 1e12:.2f} TB/s"
    note = f"the copy's ceiling is {rate}, of {Path(file).name}, as in the run itself {GRAPH_COPY}"
    ceilings = replace(own, copy_bytes_s=better.copy_bytes_s, copy_launched=True)
    return replace(run, ceilings=ceilings, notes=(*run.notes, note))


def ceiling_notes(runs: Iterable[Run]) -> list[str]:
    """What the runs' notes say of their ceilings, each sentence once."""
    notes = dict.fromkeys(note for run in runs for note in run.notes if "ceiling" in note)
    return [f"{note[0].upper()}{note[1:]}." for note in notes]


def above_ceiling(case: CaseResult, seconds: float | None, ceilings: Ceilings, machine: Machine) -> str:
    """Why a time is better than the machine's ceiling allows; empty if it is not.

    Beyond the data sheet of the device, the case's formula counts work that this algorithm does not do. Below it, the
    ceiling was measured too low, or the same.
    """
    bound = case.bound(ceilings)
    if not seconds or bound is None or bound[1] <= seconds:
        return ""
    device = named(machine.device)
    if bound[0] == "compute":
        peak = _peak_flop_s(device, case.dtype)
        if peak and case.flops / seconds > peak:
            return f"another algorithm, with fewer FLOPs: the data sheet allows {peak / 1e12:.0f} TFLOP/s"
        return "the ceiling of products is too low, or another algorithm with fewer FLOPs"
    if copy_is_too_low(machine, ceilings):
        return f"a wrong ceiling: {GRAPH_COPY}"
    if device and case.bytes / seconds > device.hbm_bytes_s:
        return f"fewer bytes than counted, or from a cache: the data sheet allows {device.hbm_bytes_s / 1e12:.2f} TB/s"
    return "the ceiling of the copy is too low, or fewer bytes than counted, or from a cache"


def _peak_flop_s(device: Device | None, dtype: str) -> float | None:
    rate = device.flop_cycle.get(dtype) if device else None
    return rate * device.multiprocessors * device.clock if device and rate else None
