"""The model: student, VAE, encoders, sampler and checkpoints. Imports `kernels`, never `streaming`.

from model import PRECISIONS, PRESETS, load_models
"""

from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any


def _check_kernels() -> None:
    """Raises ImportError if another package named `kernels` comes first; does not import ours, which takes seconds."""
    with suppress(ValueError):  # what an imported package without a spec raises
        spec = find_spec("kernels")
        places = (spec and spec.submodule_search_locations) or ()
        if any((Path(place) / "causal_conv3d.py").is_file() for place in places):
            return
    raise ImportError(
        "something else named 'kernels' hides flashtalk-triton's: leave its folder, or run: pip uninstall kernels",
        name=__name__,  # so that python -m prints this in one line
    )


_check_kernels()

if TYPE_CHECKING:
    from model.config import PRECISIONS, PRESETS, ChunkConfig, Config, Precision
    from model.dit import DiT
    from model.errors import UserError
    from model.vae import VAE
    from model.weights.checkpoint import Models, load_models, random_models

_HOMES = {
    "ChunkConfig": "model.config",
    "Config": "model.config",
    "DiT": "model.dit",
    "Models": "model.weights.checkpoint",
    "PRECISIONS": "model.config",
    "PRESETS": "model.config",
    "Precision": "model.config",
    "UserError": "model.errors",
    "VAE": "model.vae",
    "load_models": "model.weights.checkpoint",
    "random_models": "model.weights.checkpoint",
}
__all__ = [
    "PRECISIONS",
    "PRESETS",
    "VAE",
    "ChunkConfig",
    "Config",
    "DiT",
    "Models",
    "Precision",
    "UserError",
    "load_models",
    "random_models",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for: most take seconds, and command lines answer before."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
