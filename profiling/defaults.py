"""Which back-end of an operation runs by default on a GPU, as the dispatchers in kernels/ decide it.

They look the shape up in kernels/tuned/ and fall back to a choice of their own. tests/profiling/test_defaults.py calls
them and holds this description to what they launch.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kernels.chunk_attention import LARGE_HEAD_DIM
from kernels.tuning import FOLDER, TunedTable, nearest_config, table_for
from model.errors import UserError
from profiling.results import OK, CaseResult, Machine


@dataclass(frozen=True)
class Choice:
    """How an operation with several back-ends chooses one of them."""

    backends: tuple[str, ...]  # that it can choose
    untuned: Mapping[str, str]  # by dtype, for shapes that nothing was measured for
    elsewhere: str  # instead of "gluon" on GPUs that are not Hopper
    match_exactly: tuple[str, ...] = ()  # dimensions that a tuned entry must share


_CONV = Choice(("gluon", "library"), {"bf16": "library", "fp8": "gluon"}, "library", ("outputs", "kt", "k"))
_RESAMPLE = Choice(("gluon", "library"), {"bf16": "library"}, "library", ("outputs",))
CHOICES = {
    "chunk_attention": Choice(
        ("gluon", "triton", "flash-attn"), {"bf16": "gluon", "fp8": "gluon"}, "triton", ("head_dim",)
    ),
    "linear": Choice(
        ("gluon", "triton", "library", "torchao"), {"bf16": "library", "fp8": "triton", "int8": "triton"}, "triton"
    ),
    "causal_conv3d": _CONV,
    "upsample_conv2d": _RESAMPLE,
    "downsample_conv2d": _RESAMPLE,
    "text_image_attention": Choice(("gluon", "triton"), {"bf16": "triton"}, "triton", ("head_dim",)),
    "frame_attention": Choice(("triton", "sdpa", "sdpa-compiled"), {"bf16": "triton"}, "triton"),
    "absorbed_audio_attention": Choice(
        ("gluon", "triton", "library", "bf16"), {"bf16": "library", "fp8": "bf16"}, "triton"
    ),
}
FIXED = {"audio_layer": "absorbed"}  # what the model calls for one speaker, without a choice by shape
SAME = {"sdpa-compiled": "sdpa"}  # PyTorch's attention is one call, which a compiler leaves as it is


def default_backend(case: CaseResult, machine: Machine) -> str | None:
    """The back-end that runs on that machine if nothing is asked for; None where that is not known.

    It follows the tuned tables as they are now, not as they were when the case was measured. An operation with a single
    back-end of ours has no choice. Raises `UserError` if a table is damaged.
    """
    ours = [m.backend for m in case.measurements if m.ours and m.status == OK]
    choice = CHOICES.get(case.operation)
    if choice is None or machine.kind != "cuda" or case.dtype not in choice.untuned:
        return ours[0] if len(ours) == 1 else FIXED.get(case.operation)
    tuned = _tuned_backend(case, choice, machine)
    if tuned is None and case.dims.get("head_dim", 0) > LARGE_HEAD_DIM:
        return "sdpa"
    backend = tuned or choice.untuned[case.dtype]
    if case.dims.get("queries", 0) % case.dims.get("tokens_per_frame", 1):
        return choice.elsewhere  # PyTorch's attention takes whole frames only
    if backend == "gluon" and machine.capability != "9.0":
        return choice.elsewhere
    return SAME.get(backend, backend)


def _tuned_backend(case: CaseResult, choice: Choice, machine: Machine) -> str | None:
    table = _table(machine)
    if table is None:
        return None
    exact = tuple(name for name in choice.match_exactly if name in case.dims)
    found = nearest_config(table, case.operation, case.dims, case.dtype, choice.backends, exact)
    return found.backend if found else None


def _table(machine: Machine) -> TunedTable | None:
    try:
        return table_for(machine.device, machine.capability or "", FOLDER)
    except ValueError as error:
        raise UserError(str(error)) from error
