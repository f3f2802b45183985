"""Results files that others wrote, as runs of ours: pytest-benchmark's JSON, and that of the first GPU probe.

pytest-benchmark keeps every round, if told to, so nothing is lost; what a benchmark is about it has from `extra_info`
(case, backend, ours, operation, shape, dtype, flops, bytes, world, calls, dims). The probe keeps no rounds, only the
20th, 50th and 80th percentile: these three stand as its samples, too few for statistics, and a note says so.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from profiling.results import ERROR, OK, SKIPPED, WRONG, CaseResult, Ceilings, Gauges, Machine, Measurement, Run

if TYPE_CHECKING:
    from profiling.cases import Case

# --- pytest-benchmark -----------------------------------------------------------------------------------------------


def from_pytest_benchmark(values: Any) -> Run | None:
    """The run in pytest-benchmark's JSON, None if it is something else.

    A benchmark without `extra_info` of ours becomes a case of its full name with the back-end "pytest".
    """
    if not (isinstance(values, dict) and "benchmarks" in values and "machine_info" in values):
        return None
    cases: dict[str, CaseResult] = {}
    for benchmark in values["benchmarks"]:
        _add(cases, *_benchmark_result(benchmark))
    return Run(
        "pytest --benchmark-only",
        datetime.fromisoformat(values["datetime"]).astimezone(UTC).isoformat(timespec="seconds"),
        _benchmark_machine(values["machine_info"], values.get("commit_info") or {}),
        cases=tuple(cases.values()),
    )


def _add(cases: dict[str, CaseResult], case: CaseResult, measurement: Measurement) -> None:
    """Puts a measurement with the others of its case; the first one that knows FLOPs or bytes says what the case is."""
    before = cases.get(case.case, case)
    known = before if before.flops or before.bytes else case
    cases[case.case] = replace(known, measurements=(*before.measurements, measurement))


def _benchmark_result(benchmark: Mapping[str, Any]) -> tuple[CaseResult, Measurement]:
    info, stats = benchmark.get("extra_info") or {}, benchmark["stats"]
    # Rounds are kept by --benchmark-json and --benchmark-save-data; a file without them still has quartiles.
    samples = stats.get("data") or [stats["q1"], stats["median"], stats["q3"]]
    case = CaseResult(
        case=str(info.get("case", benchmark["fullname"])),
        operation=str(info.get("operation", benchmark["name"])),
        shape=str(info.get("shape", "")),
        dtype=str(info.get("dtype", "")),
        flops=float(info.get("flops", 0)),
        bytes=float(info.get("bytes", 0)),
        world=int(info.get("world", 1)),
        calls=float(info.get("calls", 0)),
        dims={str(name): int(size) for name, size in info.get("dims", {}).items()},
    )
    backend, ours = str(info.get("backend", "pytest")), bool(info.get("ours", False))
    return case, Measurement(backend, OK, ours, samples=tuple(map(float, samples)))


def _benchmark_machine(info: Mapping[str, Any], commit: Mapping[str, Any]) -> Machine:
    cpu = info.get("cpu") or {}
    device = cpu.get("brand_raw") or info.get("processor") or info.get("machine") or "unknown CPU"
    dirty = "-dirty" if commit.get("dirty") else ""
    revision = f"{commit['id']}{dirty}" if commit.get("id") else None
    versions = {"python": str(info["python_version"])} if "python_version" in info else {}
    return Machine("cpu", str(device), int(cpu.get("count", 0)), 0, versions=versions, revision=revision)


# --- The first GPU probe --------------------------------------------------------------------------------------------

PROBE_KEYS = {"argv", "started", "deadline", "workers", "results"}
VERSIONS = ("python", "torch", "triton", "cuda", "cudnn", "ptxas")
# NVML's bits for why clocks are low, which the probe reads once a measurement.
THROTTLE_REASONS = {"power cap": 0x04, "heat or hardware": 0x08 | 0x20 | 0x40 | 0x80}


@dataclass(frozen=True)
class Rule:
    """What the measurements are whose name matches; `dtype`, `backend` and `shape` may name groups of the pattern."""

    pattern: str
    operation: str
    dtype: str
    backend: str
    shape: str | None = None  # None: that of our case with the dimensions in the name


OURS = ("eager", "triton ")  # how the names of back-ends begin that are ours
# The probe's library attention reads [head, token, channel] memory, ours [token, head, channel], as does the one called
# token-major; the others are therefore back-ends of their own. Its linear layers and cuDNN convolutions add no bias.
_SIZES = r"(?P<rows>\d+)x(?P<inputs>\d+)->(?P<outputs>\d+)"
_PLANE = r"(?P<rows>\d+)x(?P<columns>\d+)"
_CLIP = rf"1x(?P<channels>\d+)x(?P<frames>\d+)x{_PLANE} channels_last"
RULES = (
    Rule(r"attn H(?P<heads>\d+) (?P<by>\w+) token-major", "chunk_attention", "bf16", "sdpa-{by}"),
    Rule(r"attn H(?P<heads>\d+)(/(?P<ranks>\d+))? (?P<by>\w+)", "chunk_attention", "bf16", "sdpa-{by} head-major"),
    Rule(r"triton attn (?P<dtype>\w+) (?P<by>.+)", "chunk_attention", "{dtype}", "triton {by}", "gpu_first"),
    Rule(rf"linear {_SIZES} bf16", "linear", "bf16", "eager"),
    Rule(rf"linear {_SIZES} fp8 row", "linear", "fp8", "scaled-mm-row"),
    Rule(rf"triton gemm (?P<by>.+) {_SIZES}", "linear", "fp8", "triton {by}"),
    Rule(rf"layernorm\+modulate (?P<by>\w+) {_PLANE}", "layer_norm_modulate", "bf16", "{by}"),
    Rule(rf"quantise rows (?P<by>\w+) {_PLANE}", "quantize_rows", "fp8", "{by}"),
    Rule(rf"rms\+silu (?P<by>\w+) {_CLIP}", "rms_norm_silu", "bf16", "{by}"),
    Rule(r"cudnn conv (?P<size>C\d+ \S+) (?P<by>\w+)", "causal_conv3d", "bf16", "cudnn {by}", "gpu_first-{size}"),
    Rule(r"triton conv (?P<by>.+) (?P<size>C\d+ \S+)", "causal_conv3d", "bf16", "triton {by}", "gpu_first-{size}"),
)


def from_gpu_first(values: Any) -> Run | None:
    """The run in the first GPU probe's JSON, None if it is something else.

    What measures the same as a case of ours, at production shapes on a GPU, becomes that case; the rest become cases
    of their own. An error above the dtype's tolerance, unwritten elements, or other bits at a repeated launch (a race)
    make a result wrong.
    """
    if not (isinstance(values, dict) and values.keys() >= PROBE_KEYS):
        return None
    from profiling.cases import TOLERANCES, registry  # brings torch, which no other file needs to be read

    results: dict[str, dict[str, Any]] = dict(values["results"])
    machine = _probe_machine(results.pop("env", {}))
    real = machine.kind == "cuda" and "--tiny" not in values["argv"]
    known = [c for c in registry().values() if c.shape.name.startswith("14b-")] if real else []
    half = "bf16" if machine.kind == "cuda" else "fp16"
    cases: dict[str, CaseResult] = {}
    for name, result in results.items():
        if not result.keys().isdisjoint(("ms", "error", "skipped")):  # else it is a table of something
            case, blank = _probe_place(name, known, half)
            tolerance = TOLERANCES.get(case.dtype, TOLERANCES["bf16"])
            _add(cases, _with_work(case, result), _probe_measurement(name, result, blank, tolerance))
    return Run(
        " ".join(("gpu_first.py", *values["argv"])),
        datetime.fromtimestamp(values["started"], UTC).isoformat(timespec="seconds"),
        machine,
        seconds=float(sum(r.get("wall_s", 0) for r in results.values())),
        ceilings=_probe_ceilings(results),
        cases=tuple(cases.values()),
        gauges=_probe_gauges(results.values()),
        notes=("the probe keeps no rounds: samples are the 20th, 50th and 80th percentile of its calls",),
    )


def _probe_machine(env: Mapping[str, Any]) -> Machine:
    versions = {name: str(env[name]) for name in VERSIONS if env.get(name) is not None}
    if "device" not in env:
        return Machine("cpu", "unknown CPU", int(env.get("cpus", 0)), 0, versions=versions)
    sizes = int(env["sms"]), round(env["gb"] * 2**30)
    l2, driver = round(env["l2_mb"] * 2**20), env.get("driver")
    return Machine("cuda", env["device"], *sizes, str(env["capability"]), l2, driver, versions)


def _probe_place(name: str, known: "Iterable[Case]", half: str) -> tuple[CaseResult, Measurement]:
    """The case a measurement belongs to, and its back-end, both without results.

    `known` are our cases at the probe's shapes, none if it measured others; `half` is its 16-bit type.
    """
    for rule in RULES if known else ():
        if not (match := re.fullmatch(rule.pattern, name)):
            continue
        words = {key: word for key, word in match.groupdict().items() if word is not None}
        words["by"] = words.get("by", "").lower()
        dtype, backend = rule.dtype.format(**words), rule.backend.format(**words)
        blank = Measurement(backend, OK, backend.startswith(OURS))
        if rule.shape is not None:
            shape = rule.shape.format(**words).replace(" ", "-")
            return CaseResult(f"{rule.operation}/{shape}/{dtype}", rule.operation, shape, dtype, 0.0, 0.0), blank
        if (case := _find(known, rule.operation, dtype, words)) is not None:
            return case, blank
    dtype = "fp8" if "fp8" in name else half
    return CaseResult(f"gpu_first/{name}", "gpu_first", name, dtype, 0.0, 0.0), Measurement("gpu_first", OK)


def _find(known: "Iterable[Case]", operation: str, dtype: str, words: Mapping[str, str]) -> CaseResult | None:
    """Our case of an operation and dtype that has the dimensions which the words name."""
    dims = {key: int(word) for key, word in words.items() if word.isdigit()}
    if ranks := dims.pop("ranks", None):
        dims["heads"] //= ranks
    for case in known:
        shape = case.shape
        if (case.operation.name, case.dtype) != (operation, dtype) or shape.name.endswith("-ring"):
            continue
        if dims.items() <= dict(shape.dims).items():
            work = case.flops, case.bytes, shape.world, shape.calls
            return CaseResult(case.name, operation, shape.name, dtype, *work, dims=dict(shape.dims))
    return None


def _with_work(case: CaseResult, result: Mapping[str, Any]) -> CaseResult:
    """A case of the probe's own with its FLOPs and bytes, got back from the rates they were divided into."""
    if case.flops or case.bytes or "ms" not in result:
        return case
    ms = result.get("graph_ms", result["ms"])
    return replace(case, flops=result.get("tflops", 0.0) * ms * 1e9, bytes=result.get("gbs", 0.0) * ms * 1e6)


def _probe_measurement(name: str, result: Mapping[str, Any], blank: Measurement, tolerance: float) -> Measurement:
    if "error" in result:
        return replace(blank, status=ERROR, detail=str(result["error"]))
    if "skipped" in result:
        return replace(blank, status=SKIPPED, detail=str(result["skipped"]))
    error = result.get("err")
    faults = {
        "not finite": error is not None and not isinstance(error, float | int),  # NaN is written as text
        f"relative error {error}, allowed {tolerance:.0e}": isinstance(error, float | int) and error > tolerance,
        "elements unwritten, written out of place or not finite": result.get("bad"),
        "a repeated launch gave other bits": result.get("moved"),
    }
    error = float(error) if isinstance(error, float | int) else None
    if found := [fault for fault, there in faults.items() if there]:
        return replace(blank, status=WRONG, detail="; ".join(found), error=error)
    graph = "graph_ms" in result
    samples = tuple(result[("graph_" if graph else "") + key] / 1e3 for key in ("p20", "ms", "p80"))
    remarks = {
        "not warp-specialised": " ws " in name and result.get("ws") is False,
        f"{result.get('spills')} registers spilled": result.get("spills"),
    }
    detail = "; ".join(remark for remark, there in remarks.items() if there)
    return replace(
        blank, detail=detail, error=error, samples=samples, first_call=result.get("first_call_s"), graph=graph
    )


def _probe_ceilings(results: Mapping[str, Mapping[str, Any]]) -> Ceilings:
    copy, products = None, {}
    for name, result in results.items():
        if name.startswith("copy ") and "gbs" in result:
            copy = result["gbs"] * 1e9
        if (match := re.match(r"ceiling matmul (bf16|fp8)", name)) and "tflops" in result:
            products[match[1]] = max(products.get(match[1], 0.0), result["tflops"] * 1e12)
    return Ceilings(copy, products)


def _probe_gauges(results: Iterable[Mapping[str, Any]]) -> Gauges:
    """How many of the measurements were throttled; clocks and power, read once in each, are no series in time."""
    bits = [int(result["throttle"], 16) for result in results if "throttle" in result]
    shares = {name: sum(bool(b & mask) for b in bits) / len(bits) for name, mask in THROTTLE_REASONS.items() if bits}
    throttled = {name: share for name, share in shares.items() if share > 0}
    return Gauges(throttled=throttled, note="read once a measurement, so there is no series" if bits else "no NVML")
