"""What tests of talking heads need of the machine."""

import ctypes.util

import pytest

needs_espeak = pytest.mark.skipif(ctypes.util.find_library("espeak-ng") is None, reason="needs libespeak-ng")


def quiet(_: str) -> None:
    """For the progress of trainings."""
