"""Results of earlier schema versions, in the names of the present one.

A results file outlives the names in it: `compare REV1 REV2` reads files as an old revision wrote them. Each schema
version therefore has one pure function here that turns its JSON values into the next version's. `profiling.results`
applies it when it meets an old file.

Version 2 gave operations, dimensions and back-ends the names that they have in `kernels`. Two operations that differed
only in their shapes became one: the VAE's attention is `chunk_attention`, and a convolution in time alone is a
`causal_conv3d` with a kernel of 3 x 1 x 1. What was measured is unchanged.

Version 3 records more about the machine. Names that changed while version 2 was written are the same in all its files:
the audio layer's back-end is "absorbed", that of a convolution and its normalisation is "separate", and the dimension
of attention by frame is `tokens_per_frame`.
"""

from typing import Any

OPERATIONS = {  # version 1 -> version 2
    "self_attention": "chunk_attention",
    "wide_attention": "chunk_attention",
    "time_conv": "causal_conv3d",
    "conv_norm": "causal_conv3d_norm",
    "upsample_conv": "upsample_conv2d",
    "downsample_conv": "downsample_conv2d",
    "norm_silu": "rms_norm_silu",
    "quantize_qkv": "rms_norm_rope_fp8",
    "audio_attention": "audio_layer",
}
SHAPE_SUFFIXES = {"time_conv": "-time"}  # tells the shape from that of another operation with the same new name
KERNEL_SIZES = {  # dimensions that only the operation's name stated
    "causal_conv3d": {"kt": 3, "k": 3},
    "conv_norm": {"kt": 3, "k": 3},
    "time_conv": {"kt": 3, "k": 1},
}
_HEADS = {"channels": "head_dim"}
_FRAMES = {"per_frame": "tokens_per_frame"}
DIMENSIONS = {  # by operation of version 2
    "chunk_attention": _HEADS,
    "text_image_attention": _HEADS | {"collapsed": "dedup_padding"},
    "frame_attention": _HEADS | _FRAMES,
    "audio_layer": _HEADS | _FRAMES,
    "rms_norm_rope": _HEADS,
    "rms_norm_rope_fp8": _HEADS,
    "norm_attention": _HEADS,
}
BACKENDS = {"audio_layer": {"folded": "absorbed"}, "causal_conv3d_norm": {"apart": "separate"}}  # the same


def newest(values: dict[str, Any]) -> dict[str, Any]:
    """A results file of any version as one of the present version.

    Damaged values may raise AttributeError, KeyError or TypeError.
    """
    if values["version"] == 1:
        values = version_2(values)
    return version_3(values) if values["version"] == 2 else values


def version_2(values: dict[str, Any]) -> dict[str, Any]:
    """A results file of version 1 as one of version 2.

    Damaged values may raise AttributeError, KeyError or TypeError.
    """
    new = _renamed(values, {"gauges": "nvml"})
    for section, migrated in (("cases", case), ("variants", _variant), ("audit", _audit)):
        if section in values:
            new[section] = [migrated(item) for item in values[section]]
    return new | {"version": 2}


def version_3(values: dict[str, Any]) -> dict[str, Any]:
    """A results file of version 2 as one of version 3."""
    cases = {"cases": [case(item) for item in values["cases"]]} if "cases" in values else {}
    return values | cases | {"version": 3}


def case(values: dict[str, Any]) -> dict[str, Any]:
    """A case of any version, also as pytest-benchmark's `extra_info` has it, in the present names."""
    new = _renamed(values, {"products": "is_matmul"})
    old: str = values.get("operation", "")
    if old in OPERATIONS:
        new["operation"] = OPERATIONS[old]
        new["shape"] = values["shape"] + SHAPE_SUFFIXES.get(old, "")
        new["case"] = _case_name(values["case"])
    if dims := values.get("dims"):  # a case without any has none to complete
        new["dims"] = KERNEL_SIZES.get(old, {}) | _renamed(dims, DIMENSIONS.get(OPERATIONS.get(old, old), {}))
    backends = BACKENDS.get(OPERATIONS.get(old, old), {})
    if "backend" in values:  # in extra_info, which is of one back-end
        new["backend"] = backends.get(values["backend"], values["backend"])
    if "measurements" in values:
        new["measurements"] = [
            m | {"backend": backends.get(m["backend"], m["backend"])} for m in values["measurements"]
        ]
    return new


def _case_name(name: str) -> str:
    """operation/shape/dtype under the new names; anything else, such as a test's full name, is returned as it is."""
    parts = name.split("/")
    if len(parts) != 3 or parts[0] not in OPERATIONS:
        return name
    operation, shape, dtype = parts
    return f"{OPERATIONS[operation]}/{shape}{SHAPE_SUFFIXES.get(operation, '')}/{dtype}"


def _variant(values: dict[str, Any]) -> dict[str, Any]:
    intervals = [_renamed(interval, {"lane": "stream"}) for interval in values.get("timeline", ())]
    return values | ({"timeline": intervals} if intervals else {})


def _audit(values: dict[str, Any]) -> dict[str, Any]:
    return {key: _case_name(value) if key == "case" else value for key, value in values.items()}


def _renamed(values: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}
