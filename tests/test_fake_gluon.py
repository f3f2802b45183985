"""The model of Hopper finds what it says that it finds."""

import pytest
import torch

from tests.fake_gluon import Descriptor, FakeProgram, Partition, Pointer, load, store


def test_no_address_lies_before_its_memory() -> None:
    """PyTorch would count a negative index from the end."""
    pointer, kept = Pointer(torch.ones(4)) + torch.tensor([-1, 2]), torch.tensor([False, True])
    assert load(pointer, kept).tolist() == [0, 1]
    store(pointer, torch.tensor(5.0), kept)
    assert pointer.base.tolist() == [1, 1, 5, 1]
    with pytest.raises(AssertionError, match="before the beginning"):
        load(pointer)
    with pytest.raises(AssertionError, match="before the beginning"):
        store(pointer, torch.tensor(5.0))


def test_a_fence_is_of_the_partition_that_wrote() -> None:
    program, target = FakeProgram(0, 1, 0), torch.zeros(2, 2)
    writer, other = Partition(lambda: None), Partition(lambda: None)
    tile, desc = program.allocate(torch.float32, [2, 2]), Descriptor(target, (2, 2), (2, 1), (2, 2))
    program.current = writer
    tile.store(torch.ones(2, 2))
    program.current = other
    program.fence()
    with pytest.raises(AssertionError, match="without a fence"):
        program.copy_to_global(desc, (0, 0), tile)
    program.current = writer
    program.fence()
    program.copy_to_global(desc, (0, 0), tile)
    program.store_wait(0)
    assert target.tolist() == [[1, 1], [1, 1]]
