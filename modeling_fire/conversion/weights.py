"""Weights: found, matched by name and shape before anything is written, then streamed from shard to shard."""

import itertools
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from ..configuration_fire import FireConfig
from ..modeling_fire import FireForCausalLM
from ..position_bias_fire import FirePositionBias, build_position_bias
from .family import ConversionError, Family, Fused, reading


# A checkpoint file, or the tensors themselves where transformers had to read them.
Shard = Path | Mapping[str, torch.Tensor]

# A checkpoint in one file, and the index of one in several: safetensors come first.
WEIGHT_FILES = ((SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME))
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def shard_names(folder: Path) -> list[str]:
    """
    The names of a checkpoint's weight files, those that its index has for them included, whether they are there or
    not; none without weights. Raises [`ConversionError`] if the index is broken.
    """
    for name, index_name in WEIGHT_FILES:
        if (folder / name).exists():
            return [name]
        if (folder / index_name).exists():
            with reading(index_name):
                index = json.loads((folder / index_name).read_text())
                return sorted({str(shard) for shard in index["weight_map"].values()})
    return []


def find_shards(folder: Path) -> list[Path]:
    """The weight files of a checkpoint, see [`shard_names`]. Raises [`ConversionError`] if one or all are missing."""
    names = shard_names(folder)
    if not names:
        raise ConversionError(f"The source has no weights: none of {', '.join(itertools.chain(*WEIGHT_FILES))}.")
    if missing := [name for name in names if not (folder / name).exists()]:
        raise ConversionError(f"The index of the weights names files that are missing: {', '.join(missing)}.")
    return [folder / name for name in names]


def read(shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
    """
    The tensors of a shard by name. Files are mapped into memory: values are read where they are used. Raises
    [`ConversionError`] for a file that is broken or holds other things, or a pickle of more: it could run code.
    """
    if isinstance(shard, Mapping):
        yield from shard.items()
        return
    with reading(shard.name):
        if shard.suffix == ".safetensors":
            with safe_open(shard, "pt") as file:
                for name in file.keys():  # noqa: SIM118 (it cannot be iterated over)
                    yield name, file.get_tensor(name)
            return
        mapped = zipfile.is_zipfile(shard)  # files of PyTorch before 1.6 are none
        try:
            state = torch.load(shard, map_location="cpu", weights_only=True, mmap=mapped)
        except UnpicklingError as error:
            raise ConversionError(
                f"{shard.name} is refused: it is broken, or a pickle of more than tensors, which could run code as it "
                "is read. Take the checkpoint as safetensors."
            ) from error
        if not isinstance(state, Mapping) or not all(isinstance(each, torch.Tensor) for each in state.values()):
            raise ConversionError(f"{shard.name} holds something else than tensors by name.")
        yield from state.items()


class WeightMap:
    """
    A family's table, written out for the layers and the options of one model.

    Args:
        family ([`Family`]): whose names the source has.
        model ([`FireForCausalLM`]): what the weights are for; may be on the meta device.
    """

    def __init__(self, family: Family, model: FireForCausalLM):
        self.family = family
        self.num_heads = model.config.num_attention_heads
        self.tied = model.config.tie_word_embeddings
        self.shapes = {name: value.shape for name, value in model.state_dict().items()}
        # For each tensor of the source FIRE's names, and how it is split if they are several.
        self.targets: dict[str, tuple[str, ...]] = {}
        self.fused: dict[str, Fused] = {}
        for source, target in family.weights.items():
            targets = target.targets if isinstance(target, Fused) else (target,)
            for i in range(model.config.num_hidden_layers if "{i}" in source else 1):
                for kind in (".weight", ".bias"):
                    name = source.format(i=i) + kind
                    names = tuple(module.format(i=i) + kind for module in targets)
                    if names[0] in self.shapes:
                        self.targets[name] = names
                        if isinstance(target, Fused):
                            self.fused[name] = target

    def rename(self, name: str) -> str:
        """What the name would be had the checkpoint been saved with its head."""
        prefixed = self.family.prefix + name
        return prefixed if prefixed in self.targets else name

    def ignores(self, name: str) -> bool:
        return any(re.search(pattern, name) for pattern in self.family.ignored)

    def convert(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """FIRE's tensors from one of the source's: several if it is fused, none if FIRE has no use for it."""
        name = self.rename(name)
        targets = self.targets.get(name, ())
        if not targets or (self.tied and targets == (HEAD,)):
            return {}
        parts = self.fused[name].split(tensor, self.num_heads) if name in self.fused else (tensor,)
        return dict(zip(targets, parts, strict=True))

    def convert_all(self, shards: list[Shard]) -> Iterator[tuple[str, torch.Tensor]]:
        """FIRE's tensors from all of the source's, one by one."""
        for name, tensor in (pair for shard in shards for pair in read(shard)):
            yield from self.convert(name, tensor).items()

    def check(self, shards: list[Shard]) -> None:
        """Raises [`ConversionError`] with the names of tensors that are unknown, missing, doubled or misshapen."""
        found: Counter[tuple[str, ...]] = Counter()
        embeddings: dict[str, torch.Tensor] = {}
        unknown, misshapen = [], []
        for name, tensor in (pair for shard in shards for pair in read(shard)):
            targets = self.targets.get(self.rename(name))
            if targets is None:
                unknown += [] if self.ignores(name) else [name]
                continue
            found[targets] += 1
            if targets[0] in (EMBEDDING, HEAD):
                embeddings[targets[0]] = tensor
            rows = sum(self.shapes[target][0] for target in targets)
            expected = (rows, *self.shapes[targets[0]][1:])
            if tensor.shape != expected:
                misshapen.append(f"{name} ({tuple(tensor.shape)} instead of {expected})")
        if self.tied:
            found[HEAD,] = 1  # stored or not
        doubled = [", ".join(targets) for targets, count in found.items() if count > 1]
        missing = [name for name, targets in self.targets.items() if not found[targets]]
        for names, problem in (
            (unknown, "has weights that are not in this family's map, or that its config rules out"),
            (missing, "lacks weights"),
            (misshapen, "has weights of another shape than its config says"),
            (doubled, "has these twice (by FIRE's names)"),
        ):
            if names:
                raise ConversionError(f"The source {problem}: {', '.join(sorted(names))}.")
        if self.tied and HEAD in embeddings and not torch.equal(embeddings[EMBEDDING], embeddings[HEAD]):
            raise ConversionError(
                "`tie_word_embeddings=True`, but the source has an output embedding that is not its input embedding."
            )


def bias_weights(config: FireConfig, slopes: torch.Tensor | None) -> Iterator[tuple[str, torch.Tensor]]:
    """
    The position bias of every layer, in float32.

    Args:
        config ([`FireConfig`]): of the converted model.
        slopes (`torch.Tensor` of shape `(num_heads,)`, *optional*):
            ALiBi's. Without them the bias is 0: the output layer of `f` is, and the hidden one, at its usual start,
            lets it learn.
    """
    bias: Any
    if slopes is not None:
        bias = FirePositionBias.from_alibi(config.num_attention_heads, int(config.fire_init_L), slopes)
    else:
        bias = build_position_bias(config)
        for parameter in bias.mlp[-1].parameters():
            nn.init.zeros_(parameter)
    for i in range(config.num_hidden_layers):
        for name, value in bias.state_dict().items():
            yield f"model.layers.{i}.self_attn.position_bias.{name}", value.clone()


def write_shards(tensors: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_size: int) -> None:
    """
    Writes safetensors files and, if there are several, their index, under the names that `save_pretrained` uses.

    Args:
        tensors (`Iterable[tuple[str, torch.Tensor]]`): names and values, taken one by one.
        folder (`Path`): where to.
        max_shard_size (`int`): bytes a file holds at most, unless one tensor has more.
    """
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total_size = 0

    def flush() -> None:
        shards.append(list(pending))
        save_file(pending, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        pending.clear()

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > max_shard_size:
            flush()
            size = 0
        tensor = tensor.contiguous()
        if any(tensor.data_ptr() == other.data_ptr() for other in pending.values()):
            tensor = tensor.clone()  # a pickle may hold one tensor under two names, which safetensors refuse
        pending[name] = tensor
        size += tensor.nbytes
        total_size += tensor.nbytes
    flush()

    if len(shards) == 1:
        (folder / "1.safetensors").rename(folder / SAFE_WEIGHTS_NAME)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{number}.safetensors").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def replace_weights(folder: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """
    Gives tensors of a safetensors checkpoint other values, in the files and the types that they have.

    Args:
        folder (`Path`): of the checkpoint.
        weights (`Mapping[str, torch.Tensor]`): by name; those that the checkpoint does not store are left out.
    """
    for shard in find_shards(folder):
        tensors = {name: weights.get(name, old).to("cpu", old.dtype).contiguous() for name, old in read(shard)}
        temporary = shard.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"format": "pt"})
        temporary.replace(shard)
