"""How products and convolutions of other sizes fill a GPU: in waves of tiles.

A kernel computes its output in tiles, one on each multiprocessor at a time. The last wave takes as long as a full one,
however few tiles are left for it, so a share of a picture takes more than its share of the time. Tiles are those of our
kernels, by the launch parameters in kernels/tuned/; the library's are assumed to be alike.
"""

from collections.abc import Mapping

from kernels import conv_sm90, linear_sm90
from kernels.tuning import LaunchConfig, TunedTable, nearest_config
from profiling.analyse.calls import CONVOLUTION
from profiling.cases.case import TORCH_DTYPES
from profiling.defaults import CHOICES

UP, DOWN = "upsample_conv2d", "downsample_conv2d"


def launch_parameters(table: TunedTable | None, operation: str, dims: Mapping[str, int], dtype: str) -> LaunchConfig:
    """The parameters that our Hopper kernel of the operation is launched with; none for other operations."""
    if operation not in ("linear", CONVOLUTION, UP, DOWN):
        return {}
    exact = tuple(name for name in CHOICES[operation].match_exactly if name in dims)
    tuned = nearest_config(table, operation, dims, dtype, ("gluon",), exact) if table else None
    default: LaunchConfig = linear_sm90.DEFAULT_CONFIG
    if operation != "linear":
        default = conv_sm90.default_config(TORCH_DTYPES[dtype], dims["outputs"], dims.get("k", 3))
    return {**default, **(tuned.config if tuned else {})}


def tiles(operation: str, dims: Mapping[str, int], launch: LaunchConfig) -> int:
    """Tiles of a launch of the operation's Hopper kernel."""
    if operation == "linear":
        rows = linear_sm90.WGMMA_M.value * int(launch["CONSUMERS"])
        return -(-dims["rows"] // rows) * -(-dims["outputs"] // int(launch["BLOCK_N"]))
    size = conv_sm90.BOX_SIZE.value
    height = int(launch["TILE_H"]) * conv_sm90.CONSUMERS.value
    scale = 2 if operation == DOWN else 1
    rows, columns = dims["rows"] // scale, dims["columns"] // scale
    outputs = -(-dims["outputs"] // (int(launch["BLOCK_N0"]) + int(launch["BLOCK_N1"])))
    return dims["frames"] * -(-rows // height) * -(-columns // size) * outputs


def wave_work(operation: str, dims: Mapping[str, int], flops: float, launch: LaunchConfig, units: int) -> float:
    """Waves on that many multiprocessors, times the multiply-adds for each output: proportional to the time."""
    outputs = dims["outputs"] * dims["rows"] * dims.get("columns", 1) * dims.get("frames", 1)
    return -(-tiles(operation, dims, launch) // units) * flops / outputs
