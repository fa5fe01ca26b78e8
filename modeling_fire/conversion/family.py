"""What a family of checkpoints is: the config fields and the weight names that make it a FIRE model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..errors import FULL_DISK, FireError


class ConversionError(FireError):
    """A checkpoint that cannot be converted, or a conversion that went wrong. The message names what is at fault."""


@contextmanager
def reading(what: str) -> Iterator[None]:
    """
    Makes one [`ConversionError`] of whatever libraries raise for a file that is broken, or that asks for what they do
    not have. They agree on no class: it may be any, and of tokenizers it is `Exception` itself.
    """
    try:
        yield
    except FireError:
        raise
    except Exception as error:
        problem = error.__cause__ if isinstance(error, StrictDataclassError) else error
        raise ConversionError(f"{what} cannot be read: {problem}") from error


@contextmanager
def writing() -> Iterator[None]:
    """Makes a [`ConversionError`] of a full disk, in whose error it may be."""
    try:
        yield
    except Exception as error:
        if not any(sign in str(error) for sign in FULL_DISK):
            raise
        raise ConversionError(f"The disk takes no more: {error}. Nothing was written.") from error


@dataclass(frozen=True)
class Fused:
    """
    One tensor of the source that holds several of FIRE's.

    Args:
        targets (`tuple[str, ...]`): FIRE's names, in the order of the parts.
        split (`Callable[[torch.Tensor, int], tuple[torch.Tensor, ...]]`):
            Given the tensor and the number of heads, returns its parts.
    """

    targets: tuple[str, ...]
    split: Callable[[torch.Tensor, int], tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Family:
    """
    Checkpoints that share their weights' names and layout.

    Args:
        model_types (`tuple[str, ...]`): the `model_type`s of transformers that belong to it.
        prefix (`str`): what the names of a checkpoint without a head leave out.
        weights (`dict[str, str | Fused]`):
            FIRE's module for each of the source's. Both stand for a `.weight` and a `.bias`, as far as the model has
            them, and `{i}` for every layer.
        fire_fields (`Callable[[PreTrainedConfig], dict]`):
            The fields of the [`FireConfig`], with `rope_parameters` where the source rotates. Raises
            [`ConversionError`] for options that FIRE does not have.
        ignored (`tuple[str, ...]`): patterns of tensors that old versions saved and that nothing reads.
        alibi_slopes (`Callable[[PreTrainedConfig], torch.Tensor]`, *optional*):
            For ALiBi: its slopes, of shape `(num_heads,)`.
    """

    model_types: tuple[str, ...]
    prefix: str
    weights: dict[str, str | Fused]
    fire_fields: Callable[[PreTrainedConfig], dict[str, Any]]
    ignored: tuple[str, ...] = ()
    alibi_slopes: Callable[[PreTrainedConfig], torch.Tensor] | None = None


def common_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that every family has under the same name."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    fields = {name: getattr(config, name) for name in (*names, "tie_word_embeddings", "dtype", "use_cache")}
    fields |= {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id")}
    # Old LLaMA configs say -1 for none.
    pads = config.pad_token_id is not None and 0 <= config.pad_token_id < config.vocab_size
    return fields | {"pad_token_id": config.pad_token_id if pads else None}


def require(config: PreTrainedConfig, **supported: Any) -> None:
    """Refuses any option that has another value than the one given. An option that the config lacks is fine."""
    for name, value in supported.items():
        found = getattr(config, name, value)
        if found != value:
            raise ConversionError(f"`{name}={found!r}` is not supported, only `{name}={value!r}`.")


def split_by_head(fused: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, ...]:
    """Query, key and value of one head stand together: `(num_heads * 3 * head_dim, ...)`."""
    return tuple(part.flatten(0, 1) for part in fused.unflatten(0, (num_heads, 3, -1)).unbind(1))


def split_in_thirds(fused: torch.Tensor, num_heads: int) -> tuple[torch.Tensor, ...]:
    """All queries, all keys, all values: `(3 * num_heads * head_dim, ...)`."""
    return fused.chunk(3)


QKV = tuple(f"model.layers.{{i}}.self_attn.{name}_proj" for name in "qkv")
