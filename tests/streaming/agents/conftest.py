"""One thread, as for live sessions."""

from tests.streaming.live.conftest import _one_thread

__all__ = ["_one_thread"]
