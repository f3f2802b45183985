"""`python -m profiling`: measure, compare, audit and report. This file only reads options; each command has its module.

Tables go to standard output; with `--json` the same goes there as JSON, and nothing else. Exit codes: 0 is good, 1
means that the answer is no (a regression, a broken budget, a missed target, a wrong kernel), 2 is a user's mistake,
explained in one line, 3 means that a target is unmeasured.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

try:
    from model.command import leave, spell_what_cannot_be_printed
    from model.errors import UserError
except ImportError as error:  # another package named like one of ours came first
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Measures kernels and whole chunks on a GPU, and audits kernels without one.",
)

Patterns = Annotated[
    list[str] | None,
    typer.Argument(
        help="Cases: shell patterns, or parts of the names of cases made for the device. Default: all of those."
    ),
]
Cases = Annotated[Path | None, typer.Option("--cases", help="A Python file whose CASES are added to the registry.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
Hot = Annotated[bool, typer.Option("--hot", help="Warm the GPU to its power cap first; report MHz, W, J a call.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Results = Annotated[Path, typer.Option(help="Folder of committed results.")]

RESULTS = Path(__file__).parent / "results"
TARGETS = Path(__file__).parent / "analyse" / "targets.toml"


@app.command()
def bench(
    patterns: Patterns = None,
    device: Device = "auto",
    backend: Annotated[list[str] | None, typer.Option(help="Only these back-ends (repeatable).")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds; each one times every back-end once, in a new order.")] = 20,
    out: Annotated[
        Path | None, typer.Option(help="Write the results file, or a profiler's report, to this path.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List cases and back-ends without measuring.")] = False,
    hot: Hot = False,
    once: Annotated[bool, typer.Option("--once", help="Make one call inside a profiler's range, untimed.")] = False,
    ncu: Annotated[bool, typer.Option("--ncu", help="Profile one call with Nsight Compute, or print how.")] = False,
    proton: Annotated[bool, typer.Option("--proton", help="Profile calls with Triton's Proton, or print how.")] = False,
    interpret: Annotated[
        bool, typer.Option("--interpret", help="Only check Triton kernels, on a CPU in Triton's interpreter.")
    ] = False,
    sweep: Annotated[
        str | None,
        typer.Option(help="Sizes of a dimension: rows=1024:16384:x2, rows=1000:5000:+500, queries=keys=512:8192:x2."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the sweep into this file, .svg or .png.")] = None,
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of tables.")] = False,
    cases: Cases = None,
    json: Json = False,
) -> None:
    """Checks every back-end against the reference, then times the correct ones in interleaved rounds."""
    modes = {"interpret": interpret, "once": once, "ncu": ncu, "proton": proton}
    chosen = [name for name, wanted in modes.items() if wanted]
    if len(chosen) > 1:
        raise UserError(f"bench --{chosen[0]} and --{chosen[1]}: only one of them can be done")
    if interpret:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when kernels are defined, which the import below does
    from profiling.measure.bench import BenchOptions, bench_command
    from profiling.measure.interpret import interpret_command
    from profiling.measure.profilers import profile_command

    options = BenchOptions(
        patterns=patterns or (),
        device=device,
        backends=backend or (),
        rounds=rounds,
        out=out,
        list_only=list_,
        sweep=sweep,
        plot=plot,
        hot=hot,
        profiler="" if interpret else "".join(chosen),
        extra=cases,
        as_json=json,
        as_csv=csv,
    )
    if list_ or not chosen:
        raise typer.Exit(bench_command(options))
    raise typer.Exit(interpret_command(options) if interpret else profile_command(options))


@app.command()
def audit(
    patterns: Patterns = None,
    target: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_86, sm_89, sm_90 (default), sm_100, sm_120; repeatable.")
    ] = None,
    budget: Annotated[
        Path | None, typer.Option(help="Budget file that kernels must keep to. Default: that of this repository.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the results file to this path.")] = None,
    cases: Cases = None,
    json: Json = False,
) -> None:
    """Compiles every Triton kernel ahead of time, without a GPU, and models what bounds it."""
    from profiling.audit.audit import audit_command

    raise typer.Exit(audit_command(patterns or [], target or ["sm_90"], budget, out, cases, json))


@app.command()
def compare(
    before: Annotated[
        str, typer.Argument(help="Results file, a folder of them, or a git revision whose results are committed.")
    ],
    after: Annotated[str, typer.Argument(help="The same.")],
    again: Annotated[
        list[str] | None, typer.Option(help="Further runs of the first one; their spread counts as noise (repeatable).")
    ] = None,
    threshold: Annotated[float, typer.Option(help="Smallest change that counts, as a fraction: 0.02 is 2 %.")] = 0.02,
    force: Annotated[
        bool, typer.Option("--force", help="Compare even across devices or versions, with a warning.")
    ] = False,
    accepted: Annotated[Path | None, typer.Option(help="TOML file of accepted regressions.")] = None,
    results: Results = RESULTS,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a table for a pull request.")] = False,
    json: Json = False,
) -> None:
    """Compares results by case: whether each became faster or slower, or broke. Exit code 1 on a regression."""
    from model.errors import UserError
    from profiling.analyse.compare import JSON, MARKDOWN, compare_command

    if markdown and json:
        raise UserError("--markdown and --json: only one of them can be printed")
    shown_as = MARKDOWN if markdown else JSON if json else ""
    raise typer.Exit(compare_command(before, after, again or [], threshold, force, results, accepted, shown_as))


@app.command()
def bisect(
    case: Annotated[str, typer.Argument(help="The case, by its whole name.")],
    good: Annotated[Path, typer.Option(help="Results file of a good revision, as bench --out wrote it.")],
    rounds: Annotated[int, typer.Option(help="Rounds of bench.")] = 20,
    threshold: Annotated[float, typer.Option(help="Smallest change that counts, as a fraction: 0.02 is 2 %.")] = 0.02,
) -> None:
    """A step of git bisect run: exit code 0 is good, 1 slower or broken, 125 cannot be measured, 128 ends it."""
    from profiling.analyse.bisection import bisect_command

    raise typer.Exit(bisect_command(case, good, rounds, threshold))


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="Results file.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write one self-contained HTML file.")] = None,
    png: Annotated[Path | None, typer.Option(help="Write the figures as PNG files into this folder.")] = None,
    results: Results = RESULTS,
    json: Json = False,
) -> None:
    """Shows a run: verdict, timeline of a chunk, roofline, history, tables."""
    from profiling.report.report import report_command

    raise typer.Exit(report_command(run, out, png, results, TARGETS, json))


@app.command()
def docs(
    root: Annotated[Path, typer.Option(help="The repository whose documents are written.")] = Path(),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a committed document differs.")
    ] = False,
) -> None:
    """Writes docs/performance.md, and tables in other documents, from committed results, tuned tables and counts."""
    from profiling.report.performance import docs_command

    raise typer.Exit(docs_command(root, check))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def trace(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Write the Chrome/Perfetto trace to this path.")] = Path("trace.json"),
    top: Annotated[int, typer.Option(help="Number of operations in the table.")] = 15,
    json: Json = False,
) -> None:
    """Profiles a command: trace -- python -m streaming run ..."""
    from profiling.measure.trace import trace_command

    raise typer.Exit(trace_command(context.args, out, top, json))


@app.command()
def tune(
    patterns: Patterns = None,
    device: Device = "auto",
    budget: Annotated[float, typer.Option(help="Seconds for all cases together.")] = 600,
    out: Annotated[Path | None, typer.Option(help="Folder of the table. Default: kernels/tuned.")] = None,
    hot: Hot = False,
    cases: Cases = None,
    json: Json = False,
) -> None:
    """Searches launch parameters and writes the fastest correct ones to DEVICE.json."""
    from profiling.measure.tune import tune_command

    raise typer.Exit(tune_command(patterns or [], device, budget, out, hot, cases, json))


@app.command()
def targets(
    file: Annotated[Path, typer.Option(help="File of goals.")] = TARGETS,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Results files, tuned tables or folders of them (repeatable). Default: the committed ones."),
    ] = None,
    allow_unmeasured: Annotated[
        bool, typer.Option("--allow-unmeasured", help="Exit with 0 if no goal is missed, even if some are unmeasured.")
    ] = False,
    json: Json = False,
) -> None:
    """Compares the newest measurements with the goals; exit code 1 if one is missed, else 3 if one is unmeasured."""
    from profiling.analyse.targets import targets_command
    from profiling.cases.evidence import COMMITTED

    raise typer.Exit(targets_command(file, results or COMMITTED, allow_unmeasured, json))


@app.command()
def warm(
    patterns: Patterns = None,
    space: Annotated[
        bool, typer.Option("--space", help="Also compile all launch parameters that tuning would try.")
    ] = False,
    budget: Annotated[float, typer.Option(help="Seconds for all cases together.")] = 120,
    cases: Cases = None,
) -> None:
    """Compiles the kernels of cases in parallel on all CPU cores, so that no GPU time is spent on it."""
    from profiling.measure.precompile import warm_command

    raise typer.Exit(warm_command(patterns or [], space, budget, cases))


@app.command()
def gpu(
    phase: Annotated[str, typer.Option(help="check, bench, tune or e2e; or several, comma-separated, in that order.")],
    out: Annotated[Path, typer.Option(help="Folder for results; a second call continues where the first one stopped.")],
    budget: Annotated[float, typer.Option(help="Seconds for everything; never exceeded.")] = 540,
    device: Device = "auto",
    patterns: Annotated[list[str] | None, typer.Option("--only", help="Only these cases or variants.")] = None,
    cases: Cases = None,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
    json: Json = False,
) -> None:
    """Time-boxed campaign on a GPU: resumable, the most important tasks first, every result saved at once."""
    from profiling.measure.campaign import gpu_command

    raise typer.Exit(gpu_command(phase, out, budget, device, patterns or [], cases, worker, json))


@app.command()
def project(
    places: Annotated[
        list[Path] | None,
        typer.Argument(help="Results files or folders; tuned tables always count. Default: the committed ones."),
    ] = None,
    gpus: Annotated[str, typer.Option(help="Numbers of GPUs, comma-separated.")] = "1,2,4,8",
    device_link: Annotated[
        str, typer.Option(help="What connects the GPUs: names in devices.toml, comma-separated.")
    ] = "H100,H800",
    size: Annotated[
        list[str] | None, typer.Option(help="WIDTHxHEIGHT of the picture (repeatable). Default: that of the preset.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps. Default: those measured.")] = None,
    json: Json = False,
) -> None:
    """Projects chunk time and startup to several GPUs and other sizes, and prints all that it assumes."""
    from profiling.analyse.project import project_command

    raise typer.Exit(project_command(places or [RESULTS], gpus, device_link, size or (), steps, json))


@app.command()
def quality(
    preset: Annotated[str, typer.Option(help="A preset with bundled weights.")] = "tiny",
    device: Device = "auto",
    setting: Annotated[
        list[str] | None,
        typer.Option(help="PRECISION[,STEPS[,FRAMES]], such as bf16,2, or teacher,30 (repeatable). Default: fp32."),
    ] = None,
    people: Annotated[int, typer.Option(min=1, help="Held-out people.")] = 8,
    voices: Annotated[int, typer.Option(min=1, help="Held-out voices, each with every person.")] = 8,
    chunks: Annotated[int, typer.Option(min=2, help="Chunks of each stream.")] = 12,
    drift: Annotated[int, typer.Option(min=0, help="Chunks of long streams, whose drift is measured; 0: none.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Write the results file to this path.")] = None,
    json: Json = False,
) -> None:
    """Judges generated video: lips, colours, sharpness, seams, life and drift, on held-out people and voices."""
    from profiling.measure.quality import quality_command

    raise typer.Exit(quality_command(preset, device, setting or (), people, voices, chunks, drift, out, json))


@app.command()
def psnr(
    preset: Annotated[str, typer.Option(help="A preset with bundled weights.")] = "tiny",
    device: Device = "auto",
    precision: Annotated[
        list[str] | None, typer.Option(help="As of streaming run (repeatable). Default: bf16, fp8 and int8.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1, help="Frames that are compared.")] = 84,
    out: Annotated[Path | None, typer.Option(help="Write the results file to this path.")] = None,
    json: Json = False,
) -> None:
    """Compares the video of a precision with that of fp32, frame by frame."""
    from profiling.measure.likeness import likeness_command

    raise typer.Exit(likeness_command(preset, device, precision or ["bf16", "fp8", "int8"], frames, out, json))


@app.command()
def soak(
    minutes: Annotated[float, typer.Option(help="Length of the session.")] = 30,
    seed: Annotated[int, typer.Option(help="Of what is done to it.")] = 0,
    preset: Annotated[str, typer.Option(help="A preset with bundled weights.")] = "tiny",
    size: Annotated[str | None, typer.Option(help="Picture as WIDTHxHEIGHT. Default: the preset's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps a chunk.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Write the results file to this path.")] = None,
    json: Json = False,
) -> None:
    """Treats a live session at random against the wall clock; exit code 1 if it lost, repeated or kept anything."""
    from profiling.measure.soak import soak_command
    from streaming.__main__ import parse_size

    raise typer.Exit(soak_command(minutes, seed, parse_size(size), steps, preset, out, json))


@app.command()
def visit(
    minutes: Annotated[float, typer.Option(help="Length of the visit.")] = 30,
    seed: Annotated[int, typer.Option(help="Of what the visitor does.")] = 0,
    preset: Annotated[str, typer.Option(help="A preset with bundled weights.")] = "tiny",
    size: Annotated[str | None, typer.Option(help="Picture as WIDTHxHEIGHT. Default: the preset's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps a chunk.")] = 4,
    video: Annotated[str, typer.Option(help="How the video comes: webrtc or mp4.")] = "webrtc",
    out: Annotated[Path | None, typer.Option(help="Write the results file to this path.")] = None,
    json: Json = False,
) -> None:
    """Visits the page of a server with a headless Chromium, which talks; exit code 1 if it broke or grew."""
    from profiling.measure.visit import visit_command

    raise typer.Exit(visit_command(minutes, seed, size, steps, preset, video, out, json))


INTERRUPTED = 130  # the exit code


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    """Runs the command line: a user's mistake ends with one line and exit code 2, an interruption with 130."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # a kill or a closed terminal ends like Ctrl-C
        signal.signal(number, _interrupt)
    spell_what_cannot_be_printed()
    try:
        code = app(standalone_mode=False) or 0
        if code != INTERRUPTED:  # what typer returns on Ctrl-C
            return code
        message = None
    except UserError as error:
        message = str(error)
    except typer.TyperException as error:
        message = error.format_message()
    except (KeyboardInterrupt, typer.Abort):
        message = None
    if message is None:
        print("interrupted: results written so far are kept", file=sys.stderr)
        return INTERRUPTED
    if message:
        print("error:", " ".join(message.split()), file=sys.stderr)
    return 2


if __name__ == "__main__":
    leave(main())
