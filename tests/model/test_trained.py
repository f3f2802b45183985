"""Files of trained networks: what is written is read again, tensors in 8 bits within half a step."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.errors import UserError
from model.weights.trained import SCALE, in_8_bits, load_trained, save_trained


def test_tensors_and_settings_are_read_again(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 2).half(), "b": torch.arange(4)}
    save_trained(tmp_path / "new" / "x.safetensors", tensors, {"size": 3, "name": "x"})
    found, settings = load_trained(tmp_path / "new" / "x.safetensors")
    assert settings == {"size": 3, "name": "x"}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(-30, 30), st.integers(0, 2**31))
def test_8_bits_are_off_by_half_a_step_at_most(shape: list[int], exponent: int, seed: int) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    tensor[0] = 0
    stored = in_8_bits("w", tensor)
    assert stored["w"].dtype == torch.int8
    steps = stored["w" + SCALE].view(-1, *[1] * (tensor.ndim - 1))
    assert torch.allclose(127 * steps[1:], tensor[1:].abs().flatten(1).amax(1).view_as(steps[1:]))
    found = stored["w"] * steps
    assert ((found - tensor).abs() <= steps * 0.50001).all()
    assert not found[0].any()


def test_8_bits_are_read_as_float32(tmp_path: Path) -> None:
    tensor = torch.randn(6, 4, 2)
    save_trained(tmp_path / "x.safetensors", in_8_bits("w", tensor) | {"b": torch.ones(2)}, {})
    found, _ = load_trained(tmp_path / "x.safetensors")
    assert found.keys() == {"w", "b"}
    assert found["w"].dtype == torch.float32
    torch.testing.assert_close(found["w"], tensor, atol=float(tensor.abs().max()) / 250, rtol=0)


def test_another_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a trained network of this project"):
        load_trained(tmp_path / "x.safetensors")
