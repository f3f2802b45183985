"""Projects chunk time and startup to other world sizes from measured kernels: projections, never measurements.

Every rank does the same work on its share, so one rank's time is the chunk's time. It has three parts:

    kernels        for every case measured at that world size: median of the fastest correct back-end x calls per chunk
    communication  bytes that each rank sends, over the link's one-way bandwidth; latency and overlap are left out
    rest           what a measured chunk on one GPU takes beyond its kernels (launch gaps, small operations, host);
                   assumed to be the same at every world size

There are projections for two sets of kernels: the best of all back-ends, peers included, and ours alone. A third one,
which needs no kernels, divides the stages of a chunk that was measured on one GPU. No kernel is more efficient on a
share than on the whole, so it is what can be reached at most. The bytes
follow from `model/config.py`. In every layer q, k, v and the attention's output change between split tokens and split
heads (bf16); the output of each step is gathered (float32), and so are the decoded video and the motion latents (bf16).
"""

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from model.config import PRESETS, Config
from model.errors import UserError
from profiling.cases import FAMILIES, Case, Family, registry
from profiling.cases.evidence import gather
from profiling.cases.shapes import COLOR, DECODE, DENOISE, STAGE_NAMES
from profiling.devices import devices
from profiling.results import OK, CaseResult, Run, VariantResult, as_json_text
from profiling.tables import duration, stage_value, terminal

BEST, OURS, DIVIDED = "best", "ours", "divided"  # sets of kernels, and the chunk without them
TITLES = {BEST: "the best of all kernels", OURS: "our kernels alone", DIVIDED: "the measured chunk, divided evenly"}
BF16, FP32 = 2, 4  # bytes


@dataclass(frozen=True)
class Link:
    """The connection between the GPUs."""

    name: str
    bytes_s: float  # both directions summed

    @property
    def one_way(self) -> float:
        """Bytes a second in one direction."""
        return self.bytes_s / 2


@dataclass(frozen=True)
class KernelTimes:
    """Seconds that the kernels of a chunk take on one rank."""

    stages: dict[str, float]
    lacks: tuple[str, ...]  # cases without a time; if there are any, the sum is incomplete

    @property
    def total(self) -> float:
        """Seconds of all stages together."""
        return sum(self.stages.values())


@dataclass(frozen=True)
class Projection:
    """A chunk at one world size, in one dtype, with one set of kernels; all times in seconds."""

    world: int
    dtype: str
    kernels: str
    lacks: tuple[str, ...] = ()
    stages: dict[str, float] = field(default_factory=dict)
    communication: float | None = None
    rest: float | None = None
    chunk: float | None = None
    startup: float | None = None
    fps: float | None = None


def merged(runs: Sequence[Run]) -> Run:
    """One run of all cases and variants of the device with most cases; of what is in several runs, the newest.

    `runs` are the newest first. Raises `UserError` if there are none.
    """
    if not runs:
        raise UserError("there are no results to project from")
    count = Counter(device for run in runs for device in [run.machine.device] * len(run.cases))
    device = max(count, key=lambda name: count[name], default=runs[0].machine.device)
    same = [run for run in reversed(runs) if run.machine.device == device]
    cases: dict[str, CaseResult] = {}
    for case in (case for run in same for case in run.cases):
        if case.best(ours=True) or case.case not in cases:
            cases[case.case] = case
    variants = {variant.variant: variant for run in same for variant in run.variants}
    return replace(same[-1], cases=tuple(cases.values()), variants=tuple(variants.values()))


def communication(config: Config, world: int) -> dict[str, float]:
    """Bytes that a rank sends in a chunk, by stage; it receives as many."""
    dit, chunk, others = config.dit, config.chunk, (world - 1) / world
    channels, rows, columns = config.latent_shape[1:]
    tokens = math.prod(config.grid) / world
    exchange = 4 * tokens * dit.dim * BF16 * others * dit.num_layers  # q, k, v there, the output back
    heads = tokens * dit.out_dim * math.prod(dit.patch_size) * FP32 * (world - 1)
    video = chunk.frame_num * 3 * chunk.height * chunk.width * BF16 * others
    num_motion_latents = (chunk.motion_frames_num - 1) // config.vae.temporal_stride + 1
    motion = num_motion_latents * channels * rows * columns * BF16 * others
    return {DENOISE: chunk.sample_steps * (exchange + heads), DECODE: video + motion}


def cases_of_chunk(cases: Mapping[str, Case], tag: str, world: int, dtype: str) -> list[Case]:
    """Those of `cases` that make up a chunk of one family on one of `world` GPUs.

    If an operation has several dtypes, the one in `dtype` counts, or else the family's first.
    """
    wanted: dict[tuple[str, str], Case] = {}
    for case in cases.values():
        if case.shape.world == world and case.shape.calls and case.shape.name.startswith(f"{tag}-"):
            place = case.operation.name, case.shape.name
            if place not in wanted or case.dtype == dtype:
                wanted[place] = case
    return list(wanted.values())


def sum_kernel_times(
    run: Run, cases: Mapping[str, Case], tag: str, world: int, dtype: str, kernel_set: str
) -> KernelTimes:
    """Sums the run's times of all `cases` that make up a chunk of one family on one of `world` GPUs."""
    stages: dict[str, float] = dict.fromkeys(STAGE_NAMES, 0.0)
    lacks, wanted = [], cases_of_chunk(cases, tag, world, dtype)
    for case in wanted:
        result = run.case(case.name)
        best = result.best(True if kernel_set == OURS else None) if result else None
        if result is None or best is None or best.seconds is None:
            lacks.append(case.name)
        else:
            stages[case.shape.stage] += best.seconds * case.shape.calls
    if not wanted:
        lacks.append(f"any case of {world} GPUs")
    return KernelTimes(stages, tuple(lacks))


def fastest_variant(run: Run, dtype: str) -> VariantResult | None:
    """The variant of that dtype with the fastest chunk."""
    fitting = [v for v in run.variants if v.chunk and v.status == OK and v.variant.startswith(f"{dtype}-")]
    return min(fitting, key=lambda v: statistics.median(v.chunk), default=None)


def first_frame_seconds(config: Config, stages: Mapping[str, float]) -> float:
    """Seconds of kernels until the first new frames: denoising, then decoding of the motion and these frames."""
    chunk, group = config.chunk, config.vae.temporal_stride
    decoded = (chunk.motion_frames_num + group) / chunk.frame_num
    return stages[DENOISE] + stages[DECODE] * decoded + stages[COLOR] * group / chunk.new_frames


def divided_chunk(variant: VariantResult, dtype: str, config: Config, world: int, link: Link) -> Projection | None:
    """The stages of a measured chunk divided by `world`, with communication; None if it has no stages.

    Not divided are what no stage covers, and what comes between denoising and the first frame.
    """
    step, chunk, first = (stage_value(variant, stage) for stage in ("denoise/step", "chunk", "first_frame"))
    if step is None or chunk is None or first is None:
        return None
    steps = len(variant.stages["denoise/step"]) / len(variant.chunk)
    decode, motion, color = (stage_value(variant, stage) or 0.0 for stage in ("decode", "motion", "color"))
    whole = {DENOISE: steps * step, DECODE: decode + motion, COLOR: color}
    stages = {stage: seconds / world for stage, seconds in whole.items()}
    sent = {stage: count / link.one_way for stage, count in communication(config, world).items()}
    rest = max(0.0, chunk - sum(whole.values()))
    total = sum(stages.values()) + sum(sent.values()) + rest
    startup = first - whole[DENOISE] + stages[DENOISE] + sent[DENOISE]
    return Projection(
        world, dtype, DIVIDED, (), stages, sum(sent.values()), rest, total, startup, variant.frames / total
    )


@dataclass(frozen=True)
class Overhead:
    """What a measured chunk on one GPU takes beyond its kernels, in one dtype; times in seconds."""

    dtype: str
    variant: str = ""  # empty if none was measured
    chunk: float = 0.0
    kernels: float = 0.0
    rest: float = 0.0
    startup_rest: float = 0.0


def measured_overhead(run: Run, cases: Mapping[str, Case], config: Config, tag: str, dtype: str) -> Overhead:
    """Compares the fastest measured chunk with the sum of our kernels or, if that is incomplete, of the best."""
    variant = fastest_variant(run, dtype)
    sums = [sum_kernel_times(run, cases, tag, 1, dtype, kernel_set) for kernel_set in (OURS, BEST)]
    whole = next((total for total in sums if not total.lacks), None)
    if variant is None or whole is None:
        return Overhead(dtype)
    chunk, startup = statistics.median(variant.chunk), statistics.median(variant.first_frame or (0.0,))
    waiting = max(0.0, startup - first_frame_seconds(config, whole.stages))
    return Overhead(dtype, variant.variant, chunk, whole.total, max(0.0, chunk - whole.total), waiting)


def project(run: Run, worlds: Sequence[int], link: Link) -> tuple[list[Projection], list[Overhead], str]:
    """All projections that the run's cases allow, the overheads they are based on, and the preset."""
    cases, (preset, family) = registry(), family_of(run)
    config, found, overheads = PRESETS[preset], [], []
    for dtype in family.dtypes:
        if not any(case.dtype == dtype and case.calls for case in run.cases):
            continue
        overhead = measured_overhead(run, cases, config, family.tag, dtype)
        overheads.append(overhead)
        for kernel_set, world in itertools.product((BEST, OURS), worlds):
            kernel_times = sum_kernel_times(run, cases, family.tag, world, dtype, kernel_set)
            if kernel_times.lacks:
                found.append(Projection(world, dtype, kernel_set, kernel_times.lacks))
                continue
            sent = {stage: count / link.one_way for stage, count in communication(config, world).items()}
            stages = {stage: seconds + sent.get(stage, 0.0) for stage, seconds in kernel_times.stages.items()}
            chunk = sum(stages.values()) + overhead.rest
            startup, fps = first_frame_seconds(config, stages) + overhead.startup_rest, config.chunk.new_frames / chunk
            times = kernel_times.stages, sum(sent.values()), overhead.rest, chunk, startup, fps
            found.append(Projection(world, dtype, kernel_set, (), *times))
        if variant := fastest_variant(run, dtype):
            shares = (divided_chunk(variant, dtype, config, world, link) for world in worlds)
            found += [share for share in shares if share is not None]
    return found, overheads, preset


def family_of(run: Run) -> tuple[str, Family]:
    """The preset that most of the run's cases belong to. Raises `UserError` if there is none."""
    counts = {p: sum(c.calls > 0 and c.shape.startswith(f"{f.tag}-w") for c in run.cases) for p, f in FAMILIES.items()}
    preset = max(counts, key=lambda name: counts[name])
    if not counts[preset]:
        raise UserError("the run has no cases that a chunk is made of; give one of bench, or of gpu --phase bench")
    return preset, FAMILIES[preset]


def assumptions(preset: str, device: str, link: Link, overheads: Sequence[Overhead]) -> Iterator[str]:
    """The assumptions of the projections, in words."""
    rates = f"{link.bytes_s / 1e9:g} GB/s in both directions, {link.one_way / 1e9:g} one way"
    yield f"{preset} on {device}; every rank is as fast as this GPU was alone, and has an equal share of the work"
    yield f"link {link.name}: {rates}; no latency, no overlap with computation; bf16 whatever the kernels' dtype"
    yield "VAE tiles have no halo; the number of GPUs divides the number of heads"
    yield "startup: from the window of speech features to the first new frames, decoding in proportion to frames"
    if any(overhead.dtype == "fp8" for overhead in overheads):
        yield "fp8: products only; quantising their inputs is not included"
    yield "divided: kernels are as efficient on a share as on the whole, so it is what can be reached at most"
    for overhead in overheads:
        dtype, rest = overhead.dtype, overhead.rest
        if not overhead.variant:
            yield f"{dtype}: no chunk on one GPU was measured with its kernels; what no case covers is left out"
            continue
        chunk, kernels = duration(overhead.chunk), duration(overhead.kernels)
        took = f"{dtype}: {overhead.variant} took {chunk} a chunk, its kernels {kernels}"
        if not rest:
            yield f"{took}, which is more; no rest is added"
            continue
        yield f"{took}; the rest, {duration(rest)}, is added at every world size"
        if overhead.startup_rest:
            yield f"{dtype}: so is {duration(overhead.startup_rest)} of startup"


# --- The command ----------------------------------------------------------------------------------------------------


def project_command(places: Sequence[Path], gpus: str, link: str, as_json: bool) -> int:
    """Implements `python -m profiling project`; returns 1 if the runs lack cases for every projection."""
    worlds, connection = parse_world_sizes(gpus), parse_link(link)
    runs, unreadable = gather(places)
    results = merged([run for _, run in runs])
    found, overheads, preset = project(results, worlds, connection)
    notes = [*assumptions(preset, results.machine.device, connection, overheads), *unreadable]
    if as_json:
        about = {
            "projection": True,
            "files": sorted({file for file, run in runs if run.machine.device == results.machine.device}),
            "preset": preset,
            "link": asdict(connection),
            "assumptions": notes,
        }
        parts = {"measured": [asdict(overhead) for overhead in overheads], "rows": [asdict(row) for row in found]}
        print(as_json_text(about | parts))
    else:
        _show(found, notes)
    return int(all(projection.lacks for projection in found))


def parse_world_sizes(text: str) -> list[int]:
    """World sizes from a comma-separated list."""
    try:
        worlds = sorted({int(size) for size in text.split(",")})
    except ValueError:
        worlds = [0]
    if worlds[0] < 1:
        raise UserError(f"--gpus {text}: give numbers of GPUs, comma-separated, as in 1,2,4,8")
    return worlds


def parse_link(text: str) -> Link:
    """The link of a device in devices.toml, or one given by its GB/s in both directions together."""
    links = devices()
    if text in links:
        return Link(text, links[text].link_bytes_s)
    try:
        rate = float(text)
    except ValueError:
        rate = 0.0
    if not 0 < rate < math.inf:
        raise UserError(f"--link {text}: name a device ({', '.join(links)}), or give GB/s, both directions together")
    return Link(f"of {text} GB/s", rate * 1e9)


def _show(found: Sequence[Projection], notes: Sequence[str]) -> None:
    console = terminal()
    console.print("[bold]Projection, not a measurement[/]. It assumes:")
    for note in notes:
        console.print(f"- {escape(note)}", soft_wrap=True)
    for (dtype, kernel_set), group in itertools.groupby(found, lambda p: (p.dtype, p.kernels)):
        projections = list(group)
        console.print(f"\n[bold]projected: {dtype}, {TITLES[kernel_set]}[/]", soft_wrap=True)
        if complete := [p for p in projections if not p.lacks]:
            console.print(_table(complete))
        for projection in projections:
            if lacks := projection.lacks:
                console.print(escape(f"{_gpus(projection)}: incomplete, lacks {len(lacks)} times:"), soft_wrap=True)
                console.print(*(f"  {escape(line)}" for line in _by_operation(lacks)), sep="\n", soft_wrap=True)


def _by_operation(cases: Sequence[str]) -> Iterator[str]:
    """The names of cases, one line for each operation: "linear: 14b-w2-qkv/fp8, 14b-w2-up/fp8"."""
    for operation, names in itertools.groupby(sorted(cases), lambda name: name.partition("/")[0]):
        yield f"{operation}: {', '.join(rest for name in names if (rest := name.partition('/')[2]))}".removesuffix(": ")


def _table(projections: Sequence[Projection]) -> Table:
    """A table with world sizes side by side."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("a chunk")
    for projection in projections:
        out.add_column(_gpus(projection), justify="right")
    for stage in STAGE_NAMES:
        out.add_row(stage, *(duration(p.stages[stage]) for p in projections))
    out.add_row("communication", *(duration(p.communication or None) for p in projections))
    out.add_row("rest", *(duration(p.rest or None) for p in projections), end_section=True)
    out.add_row("all", *(duration(p.chunk) for p in projections), style="bold")
    out.add_row("FPS", *(f"{p.fps:.1f}" for p in projections))
    out.add_row("startup", *(duration(p.startup) for p in projections))
    return out


def _gpus(projection: Projection) -> str:
    return f"{projection.world} GPU{'s' if projection.world > 1 else ''}"
