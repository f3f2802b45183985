"""What the 14B system needs of a GPU's memory, and what fits on which card, for docs/precision-and-memory.md."""

from collections.abc import Iterator, Sequence

from model.config import PRECISIONS, PRESETS
from model.memory import GIB, Card, Fit, all_fits, memory_plan
from profiling.devices import Device, devices
from profiling.report.markdown import head, line

PRESET = "flashtalk-14b"
COLUMNS = ("bf16", "fp8-vae", "int8")  # precisions whose memory is listed; those between need the same, or less
CARDS = ("RTX3090", "RTX4090", "RTX5090", "A100-40GB", "L40S", "A100", "H100")
CONTEXT_BYTES = 0.6 * GIB  # of a CUDA context with its kernels: an assumption


def memory_tables() -> str:
    """Memory by purpose, then what fits on a card of 24 GB and more, in Markdown."""
    return "\n".join((*_purposes(), "", *_cards()))


def _purposes() -> Iterator[str]:
    config = PRESETS[PRESET]
    size = f"{config.chunk.width} x {config.chunk.height}"
    plans = [[memory_plan(config, PRECISIONS[name], graphs) for graphs in (False, True)] for name in COLUMNS]
    rows: dict[str, Sequence[int]] = {
        "weights that stay: student, VAE, speech encoder": [launched.weights for launched, _ in plans],
        "keys and values": [launched.keys_values for launched, _ in plans],
        "a chunk, launched from Python": [launched.chunk for launched, _ in plans],
        "a chunk, as CUDA graphs": [graphs.chunk for _, graphs in plans],
        "the text encoder, while a session is prepared on the card": [launched.text for launched, _ in plans],
        "the image encoder, likewise": [launched.image for launched, _ in plans],
        "the portrait's clip, likewise": [launched.portrait for launched, _ in plans],
        "**peak, text encoder on the CPU, launched from Python**": [launched.peak(False) for launched, _ in plans],
        "**peak, text encoder on the CPU, as CUDA graphs**": [graphs.peak(False) for _, graphs in plans],
        "**peak, text encoder on the card, as CUDA graphs**": [graphs.peak(True) for _, graphs in plans],
    }
    yield from head(f"{PRESET}, {size}", *(f"`{name}`" for name in COLUMNS))
    for name, sizes in rows.items():
        yield line(name, *(f"{size / GIB:.1f} GiB" for size in sizes))


def _cards() -> Iterator[str]:
    names = [name for name in PRECISIONS if name != "fp32"]
    yield from head("card", "free", *(f"`{name}`" for name in names))
    for device in (devices()[name] for name in CARDS):
        card = as_card(device)
        found = {fit.precision: fit for fit in all_fits(PRESETS[PRESET], card)}
        cells = (_cell(found.get(name), card.has_fp8 or not PRECISIONS[name].needs_fp8) for name in names)
        yield line(device.name, f"{card.free / GIB:.1f} GiB", *cells)


def as_card(device: Device) -> Card:
    """A card of the data sheets with nothing on it but a CUDA context."""
    major, minor = map(int, device.capability.split("."))
    return Card(device.name, (major, minor), int(device.memory_bytes - CONTEXT_BYTES))


def _cell(fit: Fit | None, multiplies: bool) -> str:
    if fit is None:
        return "no" if multiplies else "no FP8"
    return "; ".join((("graphs" if fit.graphs else "launched"), *(() if fit.text_on_card else ("text on CPU",))))
