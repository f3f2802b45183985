"""Where each tensor of an official checkpoint goes in a module of ours.

The VAE carries the official names, so its table is the identity; the student does but for the layers that are several
official ones joined. The encoders are transformers' modules, whose parameters are named, and for CLIP cut, differently;
a table of name patterns describes that.
"""

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn


class Slot(NamedTuple):
    """A tensor of the official checkpoint: its shape there, and our parameters that it fills.

    Several names: the official tensor is their concatenation along dimension 0, in this order. With `start`: it fills
    the rows from there on of the one parameter, which has more.
    """

    shape: tuple[int, ...]
    names: tuple[str, ...]
    start: int | None = None


def own_slots(module: nn.Module) -> dict[str, Slot]:
    """The slots of a module that carries the official names itself."""
    return {name: Slot(tuple(tensor.shape), (name,)) for name, tensor in module.state_dict().items()}


def named_slots(module: nn.Module, names: Mapping[str, str | tuple[str, ...]], layers: int) -> dict[str, Slot]:
    """The slots of `module` by a table {official name: our name or names}.

    `{i}` in a pair of names stands for each of 0 .. layers - 1. The official shape is that of our parameters, joined.
    """
    own = module.state_dict()
    slots = {}
    for official, ours in names.items():
        ours = (ours,) if isinstance(ours, str) else ours
        for i in range(layers) if "{i}" in official else (0,):
            targets = tuple(name.format(i=i) for name in ours)
            first, *rest = (tuple(own[name].shape) for name in targets)
            rows = sum(shape[0] for shape in (first, *rest)) if rest else None
            slots[official.format(i=i)] = Slot(first if rows is None else (rows, *first[1:]), targets)
    return slots


def joined_slots(module: nn.Module, joined: Mapping[str, tuple[str, ...]]) -> dict[str, Slot]:
    """The slots of a module some of whose layers, by the end of their name, are several official ones joined by rows.

    `joined` is {end of our layer's name: ends of the official names, in the order of rows}; parts are equally large.
    """
    slots = {}
    for name, tensor in module.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        end = next((end for end in joined if layer.endswith(f".{end}")), None)
        if end is None:
            slots[name] = Slot(tuple(tensor.shape), (name,))
            continue
        rows = tensor.shape[0] // len(joined[end])
        for i, official in enumerate(joined[end]):
            start = i * rows if len(joined[end]) > 1 else None
            slots[f"{layer.removesuffix(end)}{official}.{leaf}"] = Slot((rows, *tensor.shape[1:]), (name,), start)
    return slots
