"""What tests of talking heads need: conditions of the machine, and takes that cost nothing."""

import ctypes.util

import numpy as np
import pytest

from model.config import TINY
from model.distill.face import MOTION
from model.distill.takes import BEFORE, FRAMES, STARTS, Take

needs_espeak = pytest.mark.skipif(ctypes.util.find_library("espeak-ng") is None, reason="needs libespeak-ng")


def quiet(_: str) -> None:
    """For the progress of trainings."""


def random_take(seed: int) -> Take:
    """A take of noise, in the shapes of a true one."""
    rng, latent = np.random.default_rng(seed), (TINY.vae.z_dim, 16, 16)
    return Take(
        first=rng.normal(size=(STARTS, *latent)).astype(np.float16),
        later=rng.normal(size=(20, *latent)).astype(np.float16),
        portrait=rng.normal(size=latent).astype(np.float16),
        heard=rng.normal(size=(STARTS, BEFORE + TINY.chunk.frame_num, 6)).astype(np.float32),
        centres=rng.uniform(40, 90, size=(FRAMES, 2)).astype(np.float32),
        motion=rng.uniform(size=(FRAMES, len(MOTION))).astype(np.float32),
    )
