"""What the files of weights tell of a model, without loading it."""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..configuration_fire import FireConfig
from ..modeling_fire import FireModel
from .facts import CardError


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file of safetensors. Raises [`CardError`] if it is broken."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CardError(f"{path} cannot be read, and may be incomplete: {error}") from error


def count_parameters(folder: Path) -> tuple[int, set[str]]:
    """How many there are in the files, and of which types."""
    count, dtypes = 0, set()
    for path in folder.glob("*.safetensors"):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (it cannot be iterated over)
                part = file.get_slice(name)
                dtypes.add(part.get_dtype())
                if not name.endswith("position_bias.init_L"):  # a buffer
                    count += math.prod(part.get_shape())
    return count, dtypes


def saved_biases(folder: Path, config: dict[str, Any]) -> FireModel | None:
    """
    A model with the position biases that were saved, and small in all else: they depend on heads and layers alone, and
    the rest may not fit into memory.

    Args:
        folder (`Path`): of a FIRE model, or of an adapter that the bias was trained beside.
        config (`dict`): of the model.

    Returns:
        [`FireModel`], or `None` if no whole biases were saved.
    """
    weights = {}
    for path in folder.glob("*.safetensors"):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118
                if match := re.search(r"(layers\.\d+\.self_attn\.)?position_bias\..*", name):
                    weights[match[0]] = file.get_tensor(name)
    small = {"vocab_size": 1, "hidden_size": 2, "intermediate_size": 1, "head_dim": 2, "rope_parameters": None}
    no_tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    model = FireModel(FireConfig.from_dict({**config, **small, **no_tokens})).eval()
    missing = {name for name in model.state_dict() if "position_bias." in name} - set(weights)
    if missing or not weights:
        return None
    model.load_state_dict(weights, strict=False)
    return model
