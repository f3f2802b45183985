"""The model of Hopper finds what it says that it finds."""

import pytest
import torch

from kernels.sm90 import smem_layout
from tests.fake_gluon import Descriptor, FakeProgram, Partition, Pointer, Shared, load, store


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


def test_a_box_is_zero_outside_of_its_tensor_and_stores_nothing_there() -> None:
    program, source, target = FakeProgram(0, 1, 0), torch.arange(1.0, 25).view(2, 3, 4), torch.zeros(2, 3, 4)
    box, bar = (1, 2, 2), program.allocate(torch.int64, [1])
    program.current = Partition(lambda: None)
    tiles = [program.allocate(torch.float32, box) for _ in range(3)]
    for tile, coords in zip(tiles, [(0, -1, -1), (1, 2, 3), (-1, 0, 0)], strict=True):
        program.init(bar, 1)
        program.barriers[bar.place].bytes = 16
        program.copy_to_shared(Descriptor(source, (2, 3, 4), (12, 4, 1), box), coords, bar, tile)
        assert tile.memory.isnan().all()
        program.copies.pop()()
        assert program.barriers[bar.place].bytes == 0
        program.copy_to_global(Descriptor(target, (2, 3, 4), (12, 4, 1), box), coords, tile)
    program.store_wait(0)
    assert [tile.memory.flatten().tolist() for tile in tiles] == [[0, 0, 0, 1], [24, 0, 0, 0], [0, 0, 0, 0]]
    assert target.nonzero().tolist() == [[0, 0, 0], [1, 2, 3]]


def allocated(columns: int) -> Shared:
    """Two boxes of 8 x 8 pixels, whose channels are the number of the row."""
    boxes = FakeProgram(0, 1, 0).allocate(
        torch.float16, [2, 8, 8, columns], smem_layout((8, 8, columns), torch.float16)
    )
    boxes.memory.copy_(torch.arange(16.0).view(2, 8, 1, 1).expand(2, 8, 8, columns))
    return boxes


def pixels_from(boxes: Shared, row: int, columns: int, width: int = 8) -> Shared:
    """The 64 pixels from a row on, where rows have `width` pixels."""
    row_layout, layout = (smem_layout((n, columns), torch.float16) for n in (8, 64))
    rows = boxes._reinterpret(torch.float16, [128 // width, width, columns], row_layout)
    return rows.index(row)._reinterpret(torch.float16, [64, columns], layout)


@pytest.mark.parametrize("columns", [16, 32, 64])
def test_rows_of_a_box_can_be_seen_together_with_those_of_the_next_one(columns: int) -> None:
    boxes = allocated(columns)
    assert pixels_from(boxes, 3, columns).memory[::8, 0].tolist() == list(range(3, 11))
    with pytest.raises(AssertionError, match="begins within the pattern"):
        pixels_from(boxes, 3, columns, width=4)
    with pytest.raises(AssertionError, match="another swizzle"):
        boxes._reinterpret(torch.float16, [128, columns], smem_layout((128, 8), torch.float16))
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        pixels_from(boxes, 9, columns)


def test_not_where_a_pixel_is_wider_than_a_row_of_the_swizzle() -> None:
    """A box then consists of two halves, so that the next pixel is not the next thing in memory."""
    with pytest.raises(AssertionError, match="another swizzle"):
        pixels_from(allocated(128), 1, 128)
