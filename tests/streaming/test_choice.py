"""What a pipeline is made of on a GPU: the card decides before anything is loaded, and loading gets what it decided."""

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from model.config import PRECISIONS
from model.errors import UserError
from model.memory import GIB, Card
from streaming import choice
from streaming.choice import Choice, choose

RTX4090 = Card("NVIDIA GeForce RTX 4090", (8, 9), 23 * GIB)
A100 = Card("NVIDIA A100-SXM4-80GB", (8, 0), 78 * GIB)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def chosen(
    monkeypatch: pytest.MonkeyPatch, folder: Path, card: Card, precision: str = "auto", **options: Any
) -> tuple[Choice, Mock, Mock]:
    """The choice on a card, with what loads a checkpoint compiled or not."""
    compiled, plain = Mock(), Mock()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice, "card_of", lambda _: card)
    monkeypatch.setattr(choice, "load_compiled", compiled)
    monkeypatch.setattr(choice, "load_models", plain)
    given: dict[str, Any] = {
        "preset": None, "device": "auto", "size": None, "frames": None, "steps": 4, "shift": None, "color": 1.0,
        "compiled": None, "wav2vec": None, "noise": "counter", "random_weights": False,
    }  # fmt: skip
    return choose(folder, precision=precision, **(given | options)), compiled, plain


def test_24_gb_take_8_bits_without_graphs_and_the_text_encoder_on_the_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made, compiled, plain = chosen(monkeypatch, tmp_path, RTX4090)
    assert (made.settings["precision"], made.settings["graphs"], made.settings["text_encoder"]) == ("fp8", False, "cpu")
    assert (made.settings["compiled"], made.graphs, made.device) == (True, False, CUDA)
    assert [note.partition(":")[0] for note in made.notes] == [
        "precision fp8", "the text encoder runs on the CPU, for lack of GPU memory",
    ]  # fmt: skip
    made.load(None)
    compiled.assert_called_once_with(made.config, tmp_path, CUDA, PRECISIONS["fp8"], None, None, CPU)
    plain.assert_not_called()


def test_an_fp8_checkpoint_is_loaded_in_bf16_on_a_card_without_fp8(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "fp8.json").touch()
    made, _, plain = chosen(monkeypatch, tmp_path, A100, compiled=False)
    assert made.notes == (f"the FP8 checkpoint is widened to bf16: {A100} has no FP8",)
    made.load(None)
    plain.assert_called_once_with(made.config, tmp_path, CUDA, PRECISIONS["bf16"], None, CUDA)


def test_a_card_that_cannot_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no FP8"):
        chosen(monkeypatch, tmp_path, A100, "fp8-vae")
    with pytest.raises(UserError, match=r"needs .* GiB of GPU memory"):
        chosen(monkeypatch, tmp_path, RTX4090, "bf16")


def test_a_cpu_asks_no_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "fp8.json").touch()
    made, _, plain = chosen(monkeypatch, tmp_path, RTX4090, device="cpu")
    assert (made.settings["precision"], made.settings["graphs"], made.notes) == ("fp8", False, ())
    made.load(None)
    plain.assert_called_once_with(made.config, tmp_path, CPU, PRECISIONS["fp8"], None, CPU)
