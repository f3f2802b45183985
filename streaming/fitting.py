"""Which precision a GPU runs a system in, and how: what the card can multiply, what a checkpoint holds, what fits."""

from collections.abc import Iterator, Sequence

from model.config import PRECISIONS, Config, precisions_of
from model.errors import UserError
from model.memory import GIB, Card, Fit, all_fits, fit_precision, memory_plan, pairs_caches, require_fp8

GRAPHS = {None: (True, False), True: (True,), False: (False,)}  # what is tried, by the choice of --compile
MAX_NAMED = 3  # alternatives that an error names


def choose_fit(
    config: Config,
    precision: str,
    checkpoint_format: str | None,
    compiled: bool | None,
    card: Card,
    random_weights: bool,
) -> tuple[Fit, tuple[str, ...]]:
    """How a system runs on a card, and sentences about what was not asked for.

    Args:
        config: all dimensions, in the picture's size.
        precision: one of `PRECISIONS`, or "auto": bf16, the published one, where it fits, else 8 bits. Of a quantised
            checkpoint it is the precision that it holds, or one that it can be widened to.
        checkpoint_format: the format of a quantised checkpoint, "fp8" or "int8"; None for other weights.
        compiled: whether CUDA graphs are wanted; None: where they fit.
        card: the GPU.
        random_weights: whether the weights are drawn at random.

    Raises `UserError` if the card cannot multiply in the precision, or has too little memory for it.
    """
    if precision != "auto":
        require_fp8(precision, card)
    wanted = _candidates(checkpoint_format, card) if precision == "auto" else (precision,)
    for name in wanted:
        paired = pairs_caches(config, PRECISIONS[name], card)
        found = fit_precision(config, name, GRAPHS[compiled], card.free, random_weights, paired)
        if found is not None:
            return found, tuple(_notes(found, precision, wanted[0], checkpoint_format, card))
    raise UserError(_too_little(config, precision, wanted, checkpoint_format, compiled, card, random_weights))


def _candidates(checkpoint_format: str | None, card: Card) -> tuple[str, ...]:
    """What "auto" tries, in this order."""
    if checkpoint_format == "int8" or (checkpoint_format == "fp8" and card.has_fp8):
        return (checkpoint_format,)
    return ("bf16", "fp8" if card.has_fp8 else "int8")


def _notes(found: Fit, precision: str, first: str, checkpoint_format: str | None, card: Card) -> Iterator[str]:
    if checkpoint_format == "fp8" and found.precision in ("bf16", "int8", "int8-vae", "fp32"):
        reason = "" if card.has_fp8 else f": {card} has no FP8"
        yield f"the FP8 checkpoint is widened to {found.precision}{reason}"
    elif precision == "auto" and found.precision != first:
        yield f"precision {found.precision}: {first} would not fit in the {_gib(card.free)} that are free"
    if not found.text_on_card:
        yield "the text encoder runs on the CPU, for lack of GPU memory: a prompt that is new takes seconds longer"


def _too_little(
    config: Config, precision: str, wanted: Sequence[str], checkpoint_format: str | None, compiled: bool | None,
    card: Card, random_weights: bool,
) -> str:  # fmt: skip
    """What is needed, what there is, and what fits."""
    plans = [
        memory_plan(config, PRECISIONS[name], graphs, random_weights, pairs_caches(config, PRECISIONS[name], card))
        for name in wanted
        for graphs in GRAPHS[compiled]
    ]
    needed = min(plan.peak(text_on_card=False) for plan in plans)
    usable = precisions_of(checkpoint_format) if checkpoint_format == "int8" else tuple(PRECISIONS)
    others = [x for x in all_fits(config, card, random_weights=random_weights) if x.precision in usable]
    named = [f"--precision {x.precision}" + ("" if x.graphs else " --no-compile") for x in others[:MAX_NAMED]]
    advice = f"what fits: {', or '.join(named)}" if named else "no precision fits; take a smaller --size"
    return (
        f"precision {precision} at {config.chunk.width}x{config.chunk.height} needs {_gib(needed)} of GPU memory, and"
        f" {card.name} has {_gib(card.free)} free; {advice}"
    )


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"
