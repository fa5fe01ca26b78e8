"""Settings of a model for as long as something is measured; afterwards, also after an error, they are as before."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import GenerationConfig


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode of all modules."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """
    `generate` with what its caller says alone: a checkpoint may bring penalties, sampling and end tokens of its own.
    """
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
