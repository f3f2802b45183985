"""Which precision a card runs the 14B system in, what is said about it, and what is refused in one line."""

from dataclasses import replace

import pytest

from model.config import FLASHTALK_14B, PRECISIONS
from model.errors import UserError
from model.memory import GIB, Card, Fit
from streaming.fitting import choose_fit

H100 = Card("NVIDIA H100 80GB HBM3", (9, 0), 78 * GIB)
L40S = Card("NVIDIA L40S", (8, 9), 44 * GIB)
RTX4090 = Card("NVIDIA GeForce RTX 4090", (8, 9), 23 * GIB)
A100 = Card("NVIDIA A100-SXM4-80GB", (8, 0), 78 * GIB)
RTX3090 = Card("NVIDIA GeForce RTX 3090", (8, 6), 23 * GIB)


def chosen(
    card: Card, precision: str = "auto", held: str | None = None, compiled: bool | None = None
) -> tuple[Fit, str]:
    fit, notes = choose_fit(FLASHTALK_14B, precision, held, compiled, card, random_weights=False)
    return fit, "; ".join(notes)


@pytest.mark.parametrize(
    ("card", "held", "precision", "graphs", "text_on_card"),
    [
        (H100, None, "bf16", True, True),
        (L40S, None, "bf16", True, False),
        (RTX4090, None, "fp8", False, False),
        (RTX3090, None, "int8", False, False),
        (A100, None, "bf16", True, True),
        (H100, "fp8", "fp8", True, True),
        (RTX4090, "fp8", "fp8", False, False),
        (A100, "fp8", "bf16", True, True),
        (RTX3090, "fp8", "int8", False, False),
        (RTX3090, "int8", "int8", False, False),
        (H100, "int8", "int8", True, True),
    ],
)
def test_auto(card: Card, held: str | None, precision: str, graphs: bool, text_on_card: bool) -> None:
    fit, said = chosen(card, held=held)
    assert (fit.precision, fit.graphs, fit.text_on_card) == (precision, graphs, text_on_card)
    assert ("text encoder runs on the CPU" in said) != text_on_card
    assert ("would not fit" in said) == (held is None and precision != "bf16")
    assert ("widened to" in said) == (held == "fp8" and precision != "fp8")


def test_a_widened_checkpoint_is_told_with_the_reason() -> None:
    assert chosen(A100, held="fp8")[1] == (
        "the FP8 checkpoint is widened to bf16: NVIDIA A100-SXM4-80GB (compute capability 8.0) has no FP8"
    )
    assert chosen(H100, "bf16", held="fp8")[1] == "the FP8 checkpoint is widened to bf16"


@pytest.mark.parametrize("precision", [name for name, x in PRECISIONS.items() if x.needs_fp8])
def test_fp8_is_refused_where_a_card_lacks_it(precision: str) -> None:
    for card in (A100, RTX3090):
        with pytest.raises(UserError, match=f"^precision {precision}: .* has no FP8, .* use bf16 or int8$"):
            chosen(card, precision)


@pytest.mark.parametrize(
    ("card", "precision", "compiled", "message"),
    [
        (
            RTX4090,
            "bf16",
            None,
            r"needs 3\d\.\d GiB .*RTX 4090 has 23.0 GiB free; what fits: --precision fp8 --no-compile",
        ),
        (RTX4090, "fp8-vae", True, "what fits: --precision fp8 --no-compile, or --precision fp8-attn --no-compile"),
        (RTX3090, "bf16", None, "what fits: --precision int8 --no-compile$"),
        (replace(RTX4090, free=12 * GIB), "auto", None, "needs .*; no precision fits; take a smaller --size"),
        (L40S, "fp32", None, "what fits: --precision bf16, or --precision fp8, or --precision fp8-attn$"),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(
    card: Card, precision: str, compiled: bool | None, message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        chosen(card, precision, compiled=compiled)
    assert f"precision {precision} at 448x768 needs" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_compiled_run_has_graphs_and_one_that_is_not_has_none() -> None:
    assert chosen(H100, "fp8-vae", compiled=True)[0].graphs
    assert not chosen(H100, "fp8-vae", compiled=False)[0].graphs


def test_weights_that_are_drawn_are_whole_at_first() -> None:
    with pytest.raises(UserError, match=r"needs 3\d\.\d GiB"):
        choose_fit(FLASHTALK_14B, "fp8", None, None, RTX4090, random_weights=True)
    assert choose_fit(FLASHTALK_14B, "fp8", None, None, L40S, random_weights=True)[0].precision == "fp8"
