"""Projects a chunk to other numbers of GPUs, links and picture sizes: projections, never measurements.

    recipe.py       what a rank computes and exchanges in a chunk, recorded from the model
    times.py        how long each call takes, from results and tuned tables of one device
    calibration.py  what a measured chunk on one GPU takes beyond its calls
    devices.toml    how long an exchange takes: latency, and bytes over the link's rate

An exchange is added to the time of its stage, or what is left of it behind the computation that hides it. As ranks wait
for each other, every stage takes as long as on the slower one of two: the rank with most to compute, and rank 0, which
gathers the frames. Where ranks of the chunk were emulated on a GPU, their measured stages go before sums of calls.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from kernels.tuning import FOLDER
from model.config import PRESETS, Config
from model.errors import UserError
from model.weights.checkpoint import Models
from profiling.analyse.calibration import (
    CHUNK,
    EMULATED_PRECISION,
    FIRST_FRAME,
    STUDENT,
    VAE,
    Calibration,
    MeasuredChunk,
    calibrate,
    emulated_chunks,
    fastest_chunk,
    network_of,
    part_of,
)
from profiling.analyse.recipe import COLOR, Recipe, StageWork, busiest_rank, meta_models, record
from profiling.analyse.recorder import Exchange
from profiling.analyse.times import CEILING, MEASURED, SCALED, Times
from profiling.cases.evidence import gather
from profiling.devices import Device, devices
from profiling.results import Run, as_json_text
from profiling.tables import duration, percent, terminal

EMULATED = "of emulated ranks"  # a source of times
PRESET = "flashtalk-14b"  # of the chunks that are measured on GPUs


@dataclass(frozen=True)
class Setting:
    """What is projected to."""

    world: int  # GPUs
    link: str  # device in devices.toml whose link connects them
    width: int
    height: int
    steps: int


@dataclass(frozen=True)
class Projection:
    """A chunk in one setting; all times in seconds."""

    setting: Setting
    stages: dict[str, float]  # computation of the busiest rank, by part of the chunk
    exchange: float  # what of the exchanges is not hidden
    rest: float  # in none of the stages
    startup: float  # until the first frames are ready
    frames: int  # new frames of the chunk
    sources: dict[str, float]  # share of the computation by the source of its times
    operations: dict[str, float]  # computation of the busiest rank by operation; empty for emulated ranks

    @property
    def computed(self) -> float:
        """Seconds of computation."""
        return sum(self.stages.values())

    @property
    def chunk(self) -> float:
        """Seconds of the chunk."""
        return self.computed + self.exchange + self.rest

    @property
    def fps(self) -> float:
        """New frames a second."""
        return self.frames / self.chunk


class Projector:
    """Projections from all results of the device on which the fastest chunk was measured."""

    def __init__(
        self, runs: Sequence[tuple[str, Run]], recipes_of: Callable[[str, Setting], Sequence[Recipe]] | None = None
    ) -> None:
        """Calibrates by the fastest chunk. Raises `UserError` if the runs do not suffice.

        Args:
            runs: (file, run), the newest first.
            recipes_of: of the ranks that decide, by precision and setting; None records them from the model.
        """
        self._recipes_of = recipes_of or recorded
        self.measured = fastest_chunk(runs)
        self.times = Times([run for _, run in runs], self.measured.device)
        chunk = PRESETS[PRESET].chunk
        self._base = Setting(1, "", chunk.width, chunk.height, self.measured.steps)
        self.calibration = calibrate(self.recipe, self.times, self.measured)
        chunks = emulated_chunks(runs, self.measured.device)
        self.emulated = chunks if self.precision == EMULATED_PRECISION else {}

    @property
    def recipe(self) -> Recipe:
        """Of the measured chunk."""
        return self._recipes_of(self.precision, self._base)[0]

    @property
    def precision(self) -> str:
        """Of the measured chunk, and so of all projections."""
        return self.measured.variant.variant

    def setting(self, world: int, link: str, size: tuple[int, int] | None = None, steps: int | None = None) -> Setting:
        """A setting with size (width, height) and steps of the measured chunk, unless others are given."""
        base = self._base
        return Setting(world, link, *(size or (base.width, base.height)), steps or base.steps)

    def project(self, setting: Setting) -> Projection:
        """The projection to a setting. Raises `UserError` if the model cannot run in it."""
        link, recipes = devices()[setting.link], self._recipes_of(self.precision, replace(setting, link=""))
        emulated = self._emulated_ranks(setting, recipes[0])
        computed = [self._emulated(recipe, emulated) if emulated else self._computed(recipe) for recipe in recipes]
        stages: dict[str, float] = defaultdict(float)
        exchange, startup, shown = 0.0, 0.0, False
        for works, seconds in zip(zip(*recipes, strict=True), zip(*computed, strict=True), strict=True):
            exchanged = [self._exchanged(work, link) for work in works]
            slowest = max(zip(seconds, exchanged, strict=True), key=sum)
            stages[part_of(works[0])] += slowest[0]
            exchange += slowest[1]
            startup += 0.0 if shown else sum(slowest)
            shown = shown or works[0].stage == COLOR
        sources, operations = ({EMULATED: 1.0}, {}) if emulated else self._by_source_and_operation(recipes[0])
        frames, rest = config_of(setting).chunk.new_frames, self.calibration.rest
        return Projection(setting, dict(stages), exchange, rest, startup, frames, sources, operations)

    def _emulated_ranks(self, setting: Setting, recipe: Recipe) -> list[MeasuredChunk]:
        """The ranks of this chunk that were emulated on the GPU; none if it is of another size."""
        same = replace(setting, world=1, link="") == self._base
        return [rank for rank in self.emulated.get(setting.world, ()) if same and rank.fits(recipe)]

    def _computed(self, recipe: Recipe) -> list[float]:
        """Seconds that a rank computes in each stage, by its calls."""
        return [self.calibration.seconds(work, self.times) for work in recipe]

    @staticmethod
    def _emulated(recipe: Recipe, ranks: Sequence[MeasuredChunk]) -> list[float]:
        """Seconds of each stage on the slowest of the emulated ranks. What runs beside the steps is in their time."""
        calls: Counter[str] = Counter()
        seconds = []
        for work in recipe:
            measured = [rank.calls(work.stage) for rank in ranks]
            number = calls[work.stage]
            calls[work.stage] += 1
            seconds.append(0.0 if work.beside else max(stage[number] for stage in measured))
        return seconds

    def _exchanged(self, work: StageWork, link: Device) -> float:
        """Seconds of a stage's exchanges that nothing hides."""
        return sum(count * self._visible(exchange, link) for exchange, count in work.exchanges.items())

    def _visible(self, exchange: Exchange, link: Device) -> float:
        whole = link.link_latency_s + exchange.bytes / link.link_one_way_bytes_s
        return max(0.0, whole - sum(self.times.of(call).seconds for call in exchange.behind))

    def _by_source_and_operation(self, recipe: Recipe) -> tuple[dict[str, float], dict[str, float]]:
        """Share of the computation by the source of its times, and its seconds by operation."""
        sources: dict[str, float] = dict.fromkeys((MEASURED, SCALED, CEILING), 0.0)
        operations: dict[str, float] = defaultdict(float)
        for work in recipe:
            for call, count in work.calls.items():
                timed = self.times.of(call)
                seconds = self.calibration.factors[network_of(work)] * count * timed.seconds
                sources[timed.source] += seconds
                operations[call.operation] += seconds
        total = sum(sources.values())
        return {source: part / total for source, part in sources.items()}, dict(operations)


def config_of(setting: Setting) -> Config:
    """The configuration of a setting. Raises `UserError` if the picture has no such size."""
    config = PRESETS[PRESET]
    chunk = replace(config.chunk, width=setting.width, height=setting.height, sample_steps=setting.steps)
    try:
        return replace(config, chunk=chunk)
    except ValueError as error:
        raise UserError(f"a picture of {setting.width}x{setting.height} cannot be projected: {error}") from error


@cache
def recorded(precision: str, setting: Setting) -> tuple[Recipe, ...]:
    """The recipes of the ranks that decide how long a chunk takes, recorded from the model."""
    config = config_of(setting)
    models = replace(_models(precision), config=config)
    ranks = dict.fromkeys((busiest_rank(config, setting.world), 0))
    return tuple(record(models, rank, setting.world) for rank in ranks)


@cache
def _models(precision: str) -> Models:
    return meta_models(PRESETS[PRESET], precision)


# --- The command ----------------------------------------------------------------------------------------------------


def project_command(
    places: Sequence[Path], gpus: str, links: str, sizes: Sequence[str], steps: int | None, as_json: bool
) -> int:
    """Implements `python -m profiling project`."""
    worlds, names = parse_world_sizes(gpus), parse_links(links)
    runs, unreadable = gather([*places, *(() if FOLDER in places else (FOLDER,))])
    projector = Projector(runs)
    pictures = [parse_size(size) for size in sizes] or [None]
    settings = (
        projector.setting(world, link, picture, steps) for picture in pictures for link in names for world in worlds
    )
    found = [projector.project(setting) for setting in settings]
    notes = [*assumptions(projector, names), *unreadable]
    if as_json:
        print(as_json_text(_document(projector, found, notes)))
    else:
        _show(projector, found, notes)
    return 0


def parse_world_sizes(text: str) -> list[int]:
    """Numbers of GPUs from a comma-separated list."""
    try:
        worlds = sorted({int(size) for size in text.split(",")})
    except ValueError:
        worlds = [0]
    if worlds[0] < 1:
        raise UserError(f"--gpus {text}: give numbers of GPUs, comma-separated, as in 1,2,4,8")
    return worlds


def parse_links(text: str) -> list[str]:
    """Names of devices whose links connect the GPUs, from a comma-separated list."""
    names = list(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in devices()]:
        raise UserError(f"--device-link {unknown[0]}: name devices of devices.toml ({', '.join(devices())})")
    return names


def parse_size(text: str) -> tuple[int, int]:
    """Width and height from "640x320"."""
    if not (found := re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)):
        raise UserError(f"--size {text}: write WIDTHxHEIGHT, such as 448x768")
    return int(found[1]), int(found[2])


def assumptions(projector: Projector, links: Sequence[str]) -> Iterator[str]:
    """What the projections assume, in sentences."""
    measured, calibration = projector.measured, projector.calibration
    student, vae = (calibration.factors[network] for network in (STUDENT, VAE))
    whole = next(part for part in calibration.parts if part.name == CHUNK)
    yield (
        f"{PRESET} in {projector.precision}: every GPU computes as fast as the {measured.device} of "
        f"{Path(measured.file).name} did alone, whose chunk took {duration(whole.measured)}."
    )
    yield (
        "What a rank computes and exchanges is recorded from the model; a stage takes as long as on the slowest rank. "
        f"The measured chunk's calls, each timed alone, come to {percent(whole.calls / whole.measured)} of it."
    )
    yield (
        f"So the student's calls take {student:.3f} times, the VAE's {vae:.3f} times what they take alone, at every "
        "number of GPUs and every size: the power cap lowers the clock in a long run, and some calls were never timed. "
        "One factor is fitted to the steps, the other to decoding and encoding together, and nothing to the rest."
    )
    yield f"{duration(calibration.rest)} of the measured chunk are in no stage; they are added to every chunk."
    yield (
        "In the student's blocks, what PyTorch computes between two kernels of ours is one pass over memory, as a "
        "compiler fuses it; elsewhere each operation is a kernel."
    )
    yield (
        "A shape that was not measured takes the time of the nearest one by bytes, or by FLOPs; products and "
        "convolutions by the waves of tiles that the GPU works through. What was never measured takes its FLOPs or its "
        f"bytes over what the GPU reached at most: {projector.times.ceilings}."
    )
    if projector.emulated:
        worlds = ", ".join(map(str, sorted(projector.emulated)))
        yield (
            f"Ranks of {worlds} GPUs were emulated on this one, with copies in place of exchanges: their stages count "
            "as measured, and exchanges are added."
        )
    for name in links:
        link = devices()[name]
        yield (
            f"An exchange over the link of {name} takes {duration(link.link_latency_s)}, and its bytes over "
            f"{link.link_one_way_bytes_s / 1e9:g} GB/s each way. All GPUs are in one machine."
        )
    yield (
        "An exchange is hidden as far as the model computes something else before it waits for it, such as a slab "
        "while its neighbours' rows travel, without slowing that. Exchanges of attention hide behind nothing."
    )
    yield (
        "Startup is the time from the window of speech features to the first new frames, on the device. Not in a chunk "
        "are speech features, which hosts send to each other, copies to the host, and encoding of video."
    )


def _document(projector: Projector, found: Sequence[Projection], notes: Sequence[str]) -> dict[str, object]:
    calibration = projector.calibration
    rows = [asdict(p.setting) | asdict(p) | {"chunk": p.chunk, "fps": p.fps} for p in found]
    return {
        "projection": True,
        "preset": PRESET,
        "precision": projector.precision,
        "file": projector.measured.file,
        "device": projector.measured.device,
        "assumptions": notes,
        "calibration": asdict(calibration),
        "rows": [{key: value for key, value in row.items() if key != "setting"} for row in rows],
    }


def _show(projector: Projector, found: Sequence[Projection], notes: Sequence[str]) -> None:
    console = terminal()
    console.print("[bold]Projection, not a measurement[/]. It assumes:")
    for note in notes:
        console.print(f"- {escape(note)}", soft_wrap=True)
    console.print("\n[bold]The measured chunk on one GPU, and its calls[/]")
    console.print(_calibration_table(projector.calibration))
    groups: dict[tuple[object, ...], list[Projection]] = defaultdict(list)
    for projection in found:
        setting = projection.setting
        groups[setting.width, setting.height, setting.steps, setting.link].append(projection)
    for (width, height, steps, link), group in groups.items():
        title = f"projected: {width} x {height}, {steps} steps, link of {link}"
        console.print(f"\n[bold]{title}[/]", soft_wrap=True)
        console.print(_table(group))


def _calibration_table(calibration: Calibration) -> Table:
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "measured", "calls, each alone", "of measured", "calibrated", "of measured"):
        out.add_column(heading, justify="right" if heading else "left")
    for part in calibration.parts:
        if part.name == FIRST_FRAME:
            out.add_section()
        cells = (part.calls, part.calls / part.measured, part.calibrated, part.calibrated / part.measured)
        out.add_row(
            part.name, duration(part.measured), *(f(x) for f, x in zip((duration, percent) * 2, cells, strict=True))
        )
    return out


def _table(projections: Sequence[Projection]) -> Table:
    """A table with numbers of GPUs side by side."""
    out = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    out.add_column("a chunk")
    for projection in projections:
        out.add_column(gpus_of(projection), justify="right")
    for name, *cells in table_rows(projections):
        out.add_row(name, *cells, style="bold" if name == CHUNK else None)
    return out


def table_rows(projections: Sequence[Projection]) -> Iterator[list[str]]:
    """The rows of a table of projections: a name, then a cell for each."""
    names = dict.fromkeys(name for p in projections for name in p.stages)
    for name in names:
        yield [name, *(duration(p.stages.get(name)) for p in projections)]
    yield ["exchanges", *(duration(p.exchange or None) for p in projections)]
    yield ["in no stage", *(duration(p.rest or None) for p in projections)]
    yield [CHUNK, *(duration(p.chunk) for p in projections)]
    yield ["FPS", *(f"{p.fps:.1f}" for p in projections)]
    yield ["startup", *(duration(p.startup) for p in projections)]
    for source in (MEASURED, SCALED, CEILING, EMULATED):
        shares = [p.sources.get(source, 0.0) for p in projections]
        if any(shares):
            yield [f"times {source}", *map(percent, shares)]


def gpus_of(projection: Projection) -> str:
    """How many GPUs: "1 GPU", "8 GPUs"."""
    world = projection.setting.world
    return f"{world} GPU{'s' if world > 1 else ''}"
