"""Options that several commands have."""

from pathlib import Path
from typing import Annotated

import typer

from model.errors import UserError
from model.files import read_toml


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Makes the options in a TOML file the defaults of the others."""
    if path is None:
        return None
    values = read_toml(path, f"--config {path}")
    options = {name.lstrip("-"): parameter.name for parameter in context.command.params for name in parameter.opts}
    for key in values:
        if key.replace("_", "-") not in options:
            raise UserError(f"--config {path}: there is no option {key}; --help lists them")
    context.default_map = {options[key.replace("_", "-")]: value for key, value in values.items()}
    return path


ImageOption = Annotated[str, typer.Option(help="Portrait: any picture Pillow reads. It is cut to fit; a face is kept.")]
OutOption = Annotated[
    str, typer.Option(help="Video: NAME.mp4, a folder for PNG frames, or '-' for raw RGB24 on standard output.")
]
PresetOption = Annotated[
    str | None,
    typer.Option(
        help="Dimensions of the networks: tiny (two CPU cores keep up) or flashtalk-14b (the official weights, a"
        " GPU). Default: flashtalk-14b with --checkpoint, else tiny."
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(help="Folder of the official weights. Without one, tiny draws small synthetic people."),
]
Wav2vecOption = Annotated[
    Path | None, typer.Option(help="Folder of the speech encoder, if it is not in or beside the checkpoint.")
]
RandomWeightsOption = Annotated[
    bool, typer.Option("--random-weights", help="Run flashtalk-14b without a checkpoint, for timing: noise.")
]
SizeOption = Annotated[
    str | None,
    typer.Option(
        help="Picture as WIDTHxHEIGHT, multiples of 16 such as 448x768 or 640x320; or auto, the largest that this"
        " machine plays in real time, which takes some chunks to find out. Default: the preset's."
    ),
]
PromptOption = Annotated[str | None, typer.Option(help="What is to be seen. Default: a person talking.")]
SeedOption = Annotated[int, typer.Option(help="Same seed, same video.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
PrecisionOption = Annotated[
    str,
    typer.Option(
        help="fp32, bf16, fp8 (the student's linear layers), fp8-attn (its self-attention too), fp8-vae (and a"
        " level of the decoder), int8 and int8-vae (linear layers in int8 instead), or auto: what the checkpoint is"
        " made for; else fp32 on a CPU, bf16 on a GPU, or 8 bits where that does not fit."
    ),
]
StepsOption = Annotated[int, typer.Option(help="Denoising steps a chunk; the student was distilled for 4.")]
CompiledOption = Annotated[
    bool | None,
    typer.Option(
        "--compile/--no-compile",
        help="Compile the student, and record what the GPU does as CUDA graphs: faster, but for a longer start, the"
        " longest on a machine where `python -m model.warm` has not run. Default: on a GPU only, graphs if they fit.",
    ),
]
ReportOption = Annotated[Path | None, typer.Option(help="Write timings, versions and settings there as JSON.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Show errors and warnings only.")]
ConfigOption = Annotated[
    Path | None,
    typer.Option(
        callback=read_config,
        is_eager=True,
        help="TOML file of these options, such as size = '640x320'; the command line wins over it.",
    ),
]


HostOption = Annotated[
    str, typer.Option(help="Address to listen at. Any other than a loopback address needs $FLASHTALK_TOKEN.")
]
PortOption = Annotated[int, typer.Option(min=0, max=65535, help="TCP port; 0: a free one.")]
ViewersOption = Annotated[int | None, typer.Option(min=1, help="Viewers of a session at once. Default: 8.")]
IdleOption = Annotated[
    float | None, typer.Option(min=1, help="Seconds without sound after which a session ends. Default: 300.")
]
LimitsOption = Annotated[
    Path | None, typer.Option(help="TOML file of limits on sizes, counts, rates and times; docs/serve.md has all.")
]
PortraitsOption = Annotated[
    Path | None, typer.Option(help="Folder of JPEG files that the page offers. Default: the examples.")
]
OriginOption = Annotated[
    list[str] | None,
    typer.Option(help="Site whose pages may use the API, such as https://example.com; repeatable."),
]
ProxyOption = Annotated[
    list[str] | None,
    typer.Option(help="Address of a reverse proxy, whose X-Forwarded-For says where requests come from; repeatable."),
]
IceServerOption = Annotated[
    list[str] | None,
    typer.Option(help="stun: or turn: address; repeatable. $FLASHTALK_TURN has USER:PASSWORD of turn servers."),
]
LogJsonOption = Annotated[bool, typer.Option("--log-json", help="Write the log as JSON, a line an event.")]
