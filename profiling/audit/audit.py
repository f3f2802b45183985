"""Audits kernels without a GPU: compiles what a launcher would launch, reads the result, and models what bounds it.

Nothing is described twice. The audit calls a back-end's own `launcher` on fake tensors (`profiling.fake_gpu`), so what
it audits is what would run: arguments, specialisation, grid, warps, stages, and every kernel of the launcher.

*Model* (`bounds`): the least seconds of a launch, for each unit of the GPU. The largest is the bound, and FLOPs over it
are the modelled TFLOP/s, an upper bound. The model takes clock, rates and bandwidths from devices.toml and assumes that
all units are busy all the time: no latency, no dependencies, no power limit. It counts the work of one pass of the main
loop (`ttgir.py`), times the passes that the case's FLOPs need: no prologue, no epilogue, no padding. An algorithm that
saves FLOPs makes fewer passes, and these count. Masked lanes load and store no bytes. A kernel whose branches or loops
depend on loaded values is not modelled. `AuditResult.tile` describes one pass in one block:

    flops_DTYPE      of matrix products on tensor cores, by operand: flops_bf16, flops_fp8, flops_tf32 ...
    fma              multiply-adds of matrix products on the ordinary units
    load_bytes, store_bytes      from and to global memory; all of it passes through L2
    mufu             elements of special functions: exponentials, divisions, roots
    fp32             elements of additions, multiplications, maxima, including those of reductions and `fma`
    tensor_cycles, mufu_cycles, fp32_cycles, l2_cycles      cycles of each unit of a multiprocessor
    passes           in the whole launch

`AuditResult.bounds` has seconds by unit: tensor, mufu, fp32, l2, hbm. Not modelled are conversions, selections, address
arithmetic, shared memory, and the instructions around a special function (`tl.exp2` costs three multiplications for
denormals).

Fake tensors count as aligned to 16 bytes, whatever views a launcher takes of them.
"""

import fnmatch
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from triton import knobs
from triton.compiler.errors import CompilationError

from kernels.tuning import GPU
from model.errors import UserError
from model.files import read_toml
from profiling.audit import sass, ttgir
from profiling.cases import Case, load_cases, registry, select
from profiling.devices import Device, of_target
from profiling.fake_gpu import KernelLaunch, compiling_for
from profiling.machine import describe_machine
from profiling.results import AuditResult, Machine, NvmlTrace, Run, as_json_text, build, now, save, to_json
from profiling.tables import audit_table, terminal

BUDGETS = Path(__file__).with_name("budgets.toml")  # of this repository's kernels
TENSOR_CORE_DTYPES = ("bf16", "fp16", "fp8", "int8")  # operands whose products must run on tensor cores at full rate
MIN_TABLE_WIDTH = 110  # columns, even if a log or a terminal has fewer
SERIALISED = "C75"  # ptxas serialised wgmma instructions


# --- Budgets --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """Limits for kernels; budgets.toml explains the fields."""

    registers: int | None = None
    shared: int | None = None
    spills: int = 0
    local: int = 0
    blocks: int = 1
    needs: tuple[str, ...] = ()
    forbids: tuple[str, ...] = ()
    mma: tuple[str, ...] = ()
    modelled: bool | None = None
    target: str | None = None


class Budgets:
    """A budget file: which tables apply to which kernel."""

    def __init__(self, path: Path) -> None:
        """Reads the file; raises `UserError` if it is missing, malformed, or has an unknown key."""
        self._tables = read_toml(path, f"budget {path}")
        try:
            for pattern, table in self._tables.items():
                if (target := build(Budget, table, f"[{pattern}]").target) is not None:
                    of_target(target)
        except ValueError as error:
            raise UserError(f"budget {path} is malformed: {error}") from error
        self.unused = set(self._tables)  # tables that have matched nothing so far

    def of(self, kernel: str, case: str, target: str) -> Budget:
        """The budget of a kernel: all matching tables, later ones over earlier ones."""
        merged: dict[str, Any] = {}
        for pattern, table in self._tables.items():
            names = fnmatch.fnmatchcase(kernel, pattern) or fnmatch.fnmatchcase(case, pattern)
            if names and table.get("target", target) == target:
                merged |= table
                self.unused.discard(pattern)
        return build(Budget, merged, "budget")


LIMITS = {
    "registers": "registers a thread",
    "shared": "bytes of shared memory a block",
    "spills": "bytes spilled",
    "local": "bytes of local memory a thread",
}


def budget_faults(result: AuditResult, budget: Budget, device: Device, tile: ttgir.Tile) -> Iterator[str]:
    """Describes each way in which a kernel breaks its budget."""
    if result.shared > device.shared_bytes_block:
        yield f"{result.shared} bytes of shared memory, a block on {device.target} has {device.shared_bytes_block}"
    elif result.blocks < budget.blocks:
        yield f"room for {result.blocks} blocks on a multiprocessor, wanted {budget.blocks}"
    for name, what in LIMITS.items():
        limit, value = getattr(budget, name), getattr(result, name)
        if limit is not None and value > limit:
            yield f"{value} {what}, allowed {limit}"
    yield from (f"no {name} in the SASS" for name in budget.needs if name not in result.instructions)
    yield from (f"{name} in the SASS" for name in budget.forbids if name in result.instructions)
    if budget.modelled not in (None, tile.modelled):
        yield f"its work is {'' if tile.modelled else 'not '}modelled, and the budget says otherwise"
    for remark in result.warnings:
        if f"({SERIALISED}" in remark:
            yield re.sub(r" (in|for) the function .*", "", remark)
    if set(TENSOR_CORE_DTYPES) & set(tile.flops):
        allowed = budget.mma or device.mma
        others = [name for name in result.instructions if name.endswith("MMA") and name not in allowed]
        if others or not set(allowed) & set(result.instructions):
            yield f"matrix products by {', '.join(others) or 'no matrix instruction'}, wanted {' or '.join(allowed)}"


# --- The model ------------------------------------------------------------------------------------------------------


def work_shares(launches: Sequence[KernelLaunch], tiles: Sequence[ttgir.Tile]) -> list[float]:
    """The share of the case's FLOPs and bytes that each launch is assumed to do.

    It is proportional to the matrix products of all its blocks, or of one pass in them if the number of passes is not
    known of all launches. If no kernel has products, it is proportional to float operations.
    """
    blocks = [math.prod(launch.grid) for launch in launches]
    passes = [tile.passes for tile in tiles]
    each = [1.0 if None in passes else n or 0.0 for n in passes]
    weights = [n * tile.products * times for n, tile, times in zip(blocks, tiles, each, strict=True)]
    if not any(weights):
        weights = [n * (tile.fp32 + tile.mufu) for n, tile in zip(blocks, tiles, strict=True)]
    if not any(weights):
        weights = [n * (tile.load_bytes + tile.store_bytes) for n, tile in zip(blocks, tiles, strict=True)]
    return [weight / (sum(weights) or 1) for weight in weights]


def cycles(tile: ttgir.Tile, device: Device) -> dict[str, float]:
    """Cycles of one pass on each unit of a multiprocessor, which has an equal share of L2."""
    l2_cycle = device.l2_bytes_s / device.multiprocessors / device.clock
    return {
        "tensor": sum(flops / device.flop_cycle.get(dtype, math.inf) for dtype, flops in tile.flops.items()),
        "mufu": tile.mufu / device.mufu_cycle,
        "fp32": tile.fp32 / device.fp32_cycle,
        **({"l2": (tile.load_bytes + tile.store_bytes) / l2_cycle} if tile.loads_known else {}),
    }


def bounds(tile: ttgir.Tile, passes: float, blocks: int, least_bytes: float, device: Device) -> dict[str, float]:
    """Least seconds of a launch by unit, for units that do anything.

    Multiprocessors take blocks as they become free, and all blocks take equally long: the busiest multiprocessor has
    ceil(blocks / multiprocessors) of them. A persistent grid, no larger than what fits at once, divides the work
    evenly.
    """
    busiest = passes * math.ceil(blocks / device.multiprocessors) / blocks
    seconds = {unit: n * busiest / device.clock for unit, n in cycles(tile, device).items() if unit != "l2"}
    if tile.loads_known:
        seconds["l2"] = passes * (tile.load_bytes + tile.store_bytes) / device.l2_bytes_s
    seconds["hbm"] = least_bytes / device.hbm_bytes_s
    return {unit: value for unit, value in seconds.items() if value}


# --- Cases ----------------------------------------------------------------------------------------------------------


def audit_case(case: Case, device: Device, budgets: Budgets) -> list[AuditResult]:
    """One result for every kernel that the case's launchers launch on the device; none of back-ends that it cannot run.

    A launcher that raises, a kernel that does not compile, and a launcher without launches are results with a fault.
    """
    results = []
    for backend in case.backends:
        if backend.launcher is not None and not case.lacks(backend, "cuda", device.capability):
            launches, fault = _record_case(case, backend.launcher, device)
            results += _results(case, launches, device, budgets)
            if fault is not None:
                kernel, message = fault
                results.append(AuditResult(case.name, kernel or backend.name, device.target, faults=(message,)))
    return results


def _record_case(
    case: Case, launcher: Callable[..., object], device: Device
) -> tuple[list[KernelLaunch], tuple[str, str] | None]:
    """Compiles what the launcher launches on the case's inputs; also returns the kernel that failed, and why."""
    with compiling_for(GPU(device.name, device.capability, device.multiprocessors)) as recorder:
        try:
            launcher(*case.inputs(torch.device("cuda"), None))
        except Exception as error:
            return recorder.launches, (recorder.compiling, _compiler_message(error))
    return recorder.launches, None if recorder.launches else ("", "launches no Triton kernel")


def _compiler_message(error: Exception) -> str:
    """An error in one line: what ptxas says, or why Triton's compiler stopped, or else its first line.

    Triton raises an error for every call on the way to the line that it cannot compile. The first of them has a reason.
    """
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    told = lines[-1] if isinstance(error, CompilationError) else lines[0]
    told = next((line for line in lines if line.startswith("ptxas fatal")), told)
    return f"{type(error).__name__}: {told}"


def _results(case: Case, launches: Sequence[KernelLaunch], device: Device, budgets: Budgets) -> Iterator[AuditResult]:
    """Launches as results; repeated equal launches are one result, with the bounds of all of them together."""
    operations = {launch.compiled: ttgir.parse(launch.compiled.asm["ttgir"]) for launch in launches}
    tiles = {launch: _tile(launch, operations[launch.compiled]) for launch in Counter(launches)}
    parts = work_shares(launches, [tiles[launch] for launch in launches])
    for launch, times in Counter(launches).items():
        compiled, blocks = launch.compiled, math.prod(launch.grid)
        tile, part = tiles[launch], times * parts[launches.index(launch)]
        needed = part * case.flops / tile.products if tile.products else math.inf
        passes = needed if tile.passes is None else min(needed, times * blocks * tile.passes)
        seconds = bounds(tile, passes, blocks, part * case.bytes, device)
        result = replace(
            _compiled_result(case, launch, device),
            tile=tile_fields(tile, device) | {"passes": passes} if tile.modelled else {},
            bounds=seconds if tile.modelled else {},
            tflops=part * case.flops / max(seconds.values()) / 1e12 if part and tile.modelled else None,
        )
        budget = budgets.of(launch.kernel, case.name, device.target)
        miscompiled = ttgir.miscompilations(compiled.asm["ttgir"], operations[compiled])
        yield replace(result, faults=(*budget_faults(result, budget, device, tile), *miscompiled))


def _tile(launch: KernelLaunch, ops: Sequence[ttgir.Op]) -> ttgir.Tile:
    text = launch.compiled.asm["ttgir"]
    return ttgir.tile(ttgir.executed(ops, text, dict(launch.arguments), launch.grid))


def _compiled_result(case: Case, launch: KernelLaunch, device: Device) -> AuditResult:
    """What compiler and assembler report about a kernel."""
    assembly, metadata = sass.assemble(launch.compiled), launch.compiled.metadata
    blocks = sass.resident_blocks(device, metadata.num_warps, assembly.registers, metadata.shared)
    return AuditResult(
        case.name,
        launch.kernel,
        device.target,
        launch.grid,
        metadata.num_warps,
        metadata.num_stages,
        assembly.registers,
        assembly.spills,
        assembly.local,
        metadata.shared,
        blocks * metadata.num_warps / device.warps,
        blocks,
        assembly.instructions,
        warnings=assembly.remarks,
    )


def tile_fields(tile: ttgir.Tile, device: Device) -> dict[str, float]:
    """The entries of `AuditResult.tile`, as the module defines them."""
    work = {f"flops_{dtype}": flops for dtype, flops in tile.flops.items()}
    moved = ("load_bytes", "store_bytes") if tile.loads_known else ()
    work |= {name: getattr(tile, name) for name in ("fma", *moved, "mufu", "fp32")}
    return work | {f"{unit}_cycles": n for unit, n in cycles(tile, device).items()}


# --- The command ----------------------------------------------------------------------------------------------------


def audit_command(
    patterns: list[str], targets: list[str], budget: Path | None, out: Path | None, extra: Path | None, as_json: bool
) -> int:
    """Implements `python -m profiling audit`; returns 1 if any kernel has a fault."""
    if knobs.runtime.interpret:
        raise UserError("TRITON_INTERPRET=1 replaces the compiler, so there is nothing to audit; unset it")
    started, begin = now(), time.monotonic()
    devices, budgets = [of_target(target) for target in targets], Budgets(budget or BUDGETS)
    selected = _select_cases(extra, patterns)
    run = Run(
        "audit", started, describe_targets(devices), nvml=NvmlTrace(note="no GPU: kernels were compiled, not run")
    )
    if out is not None:
        save(run, out)  # fails now, not after the work, if the place cannot be written
    with Console(stderr=True).status("") as status:
        for device in devices:
            for case in selected:
                status.update(f"compiling {case.name} for {device.target}")
                run = replace(run, audit=(*run.audit, *audit_case(case, device, budgets)))
                if out is not None:
                    save(run, out)  # so that an interruption loses nothing
    all_chosen = not patterns and (extra is None or budget is not None)
    run = replace(run, notes=tuple(_notes(selected, all_chosen, budgets)), seconds=time.monotonic() - begin)
    if out is not None:
        save(run, out)
    if as_json:
        print(as_json_text(to_json(run)))
    else:
        _print_run(run)
    return int(any(result.faults for result in run.audit))


def describe_targets(devices: Sequence[Device]) -> Machine:
    """The GPUs that an audit is about, by their data sheet; versions and revision are those of the compiler here."""
    name = " and ".join(f"{device.name} ({device.target})" for device in devices)
    capability = devices[0].capability if len(devices) == 1 else None
    here = describe_machine(torch.device("cpu"))
    return replace(here, kind="cuda", device=name, units=0, memory_bytes=0, capability=capability)


def _print_run(run: Run) -> None:
    console = terminal()
    console.width = max(console.width, MIN_TABLE_WIDTH)
    if run.audit:
        console.print(audit_table(run.audit))
    for result in run.audit:
        for fault in result.faults:
            line = f"{result.case} {result.kernel} {result.target}: {fault}"
            console.print(line, style="red", markup=False, highlight=False, soft_wrap=True)
    for note in run.notes:
        console.print(note, markup=False, highlight=False, soft_wrap=True)


def _select_cases(extra: Path | None, patterns: Sequence[str]) -> list[Case]:
    """The cases with a launcher that match; without patterns, those of `extra`, or else all.

    Raises `UserError` if no matching case has a launcher.
    """
    if patterns:
        selected = select(registry(extra), patterns)
    else:
        selected = list(registry().values()) if extra is None else load_cases(extra)
    compiled = [case for case in selected if any(backend.launcher for backend in case.backends)]
    if patterns and not compiled:
        raise UserError(
            f"{', '.join(patterns)}: none of these cases has a Triton kernel; leave the pattern out to audit all"
        )
    return compiled


def _notes(selected: Sequence[Case], all_chosen: bool, budgets: Budgets) -> Iterator[str]:
    """What a reader must know beside the results; `all_chosen` if the cases are all that the budgets are for."""
    if not selected:
        yield "none of these cases has a Triton kernel"
    elif all_chosen:  # so an unused budget is a mistake
        yield from (f"budget [{name}] matches no kernel and no case" for name in sorted(budgets.unused))
