"""The command line, called in this process."""

import signal
import sys

import pytest

from streaming.__main__ import main


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `python -m streaming ARGUMENTS`, which leaves signals as they were."""
    monkeypatch.setattr(sys, "argv", ["streaming", *map(str, arguments)])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        return main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
