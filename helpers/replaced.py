"""A module's forward, or its call, replaced on the instance and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

from torch import nn


@contextlib.contextmanager
def replaced_forward(model: nn.Module, forward: Callable) -> Iterator[None]:
    """Within, ``model``'s forward is ``forward``, on the instance. Where a trainer has wrapped that by the end, the
    wrapper stays: ``forward`` must then pass on to the one before it."""
    previous = vars(model).get("forward")
    model.forward = forward
    try:
        yield
    finally:
        if vars(model).get("forward") is forward:
            del model.forward
            if previous is not None:
                model.forward = previous


@contextlib.contextmanager
def called_as(modules: Iterable[nn.Module], call: Callable) -> Iterator[None]:
    """Within, ``module(...)`` is ``call(its class, module, ...)``. A call is looked up on the class: that is changed.

    Replacing forward instead would hide from some releases of transformers that the layer can be checkpointed.
    """
    before = [(module, type(module)) for module in modules]

    def compiled_class(cls: type) -> type:
        def __call__(self, *args, **kwargs):
            return call(cls, self, *args, **kwargs)

        return type(f"Compiled{cls.__name__}", (cls,), {"__call__": __call__, "__module__": cls.__module__})

    classes = {cls: compiled_class(cls) for cls in {cls for _, cls in before}}  # one each: its identity is guarded
    for module, cls in before:
        module.__class__ = classes[cls]
    try:
        yield
    finally:
        for module, cls in before:
            if type(module) is classes[cls]:  # and not one that FSDP2 has made of it
                module.__class__ = cls
        for changed in classes.values():
            del changed.__call__  # FSDP2 keeps the class for good, and with it whatever ``call`` knows
