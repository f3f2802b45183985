"""A CUDA stream beside the current one, for work that the current stream need not wait for."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_leaves


class SideStream:
    """A second stream on a GPU, which work is forked to and joined from. On a CPU, work runs where it is called."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def fork(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        """Runs the body on this stream, after the event `after`, or after all work of the current stream so far.

        Without an event, memory that the body allocates may have been freed on the current stream: its last use there
        lies before the fork.
        """
        if self._stream is None:
            yield
            return
        if after is None:
            self._stream.wait_stream(torch.cuda.current_stream())
        else:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            yield

    def join(self, results: Any = ()) -> None:
        """Makes the current stream wait for all work on this one, and lets it use `results`, any tree of tensors.

        Their memory is not reused before the current stream's work so far is done, whenever the next fork begins.
        """
        if self._stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            for tensor in tree_leaves(results):
                if isinstance(tensor, torch.Tensor):
                    tensor.record_stream(current)

    def record_event(self) -> torch.cuda.Event | None:
        """An event on the current stream, for a later `fork` to come after; None on a CPU."""
        if self._stream is None:
            return None
        event = torch.cuda.Event()
        event.record()
        return event
