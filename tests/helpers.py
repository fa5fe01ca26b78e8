"""What several test modules share: tiny configurations and models, and how recipes are run."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_fire import FireConfig, FireForCausalLM, FirePositionBias


ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

# Of TrainingArguments, for a few steps on the CPU that leave nothing behind.
FEW_STEPS = {
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "learning_rate": 0.01,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
}


def tiny_config(**changes) -> FireConfig:
    """
    A configuration small enough for CPU tests, whose `fire_init_L` of 7 lies inside the lengths that tests use, so
    that both sides of the threshold are exercised. The large `initializer_range` makes attention far from uniform.
    """
    fields = {
        "vocab_size": 99,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.3,
        "max_position_embeddings": 64,
        "fire_init_L": 7.0,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return FireConfig(**{**fields, **changes})


def tiny_model(model_class=FireForCausalLM, seed: int = 0, attn_implementation: str | None = None, **changes):
    """A randomly initialised model in evaluation mode, the same for the same `seed`."""
    torch.manual_seed(seed)
    config = tiny_config(**changes)
    return model_class._from_config(config, attn_implementation=attn_implementation).eval()


def random_fire(num_heads: int = 3, mlp_width: int = 5, init_L: float = 7.0, **options) -> FirePositionBias:
    """A bias in float64 with an `f` of no particular shape, whose `c` and `L_multiplier` are negative."""
    torch.manual_seed(0)
    bias = FirePositionBias(num_heads, mlp_width, init_L=init_L, init_f="uniform", **options).double()
    with torch.no_grad():
        for parameter, value in ((bias.c, -0.3), (bias.L_multiplier, -1.1)):
            if parameter is not None:
                parameter.fill_(value)
    return bias


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest memory has of which an operation returns a tensor."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.numel = max([self.numel] + [x.untyped_storage().nbytes() // x.itemsize for x in tensors])
        return result


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Token ids without the special tokens of `tiny_config`."""
    return torch.randint(3, 99, shape, generator=torch.Generator().manual_seed(seed))


def write_rows(path: Path, rows: list[dict]) -> str:
    """As JSON lines; returns the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_texts(path: Path, texts: list[str]) -> str:
    return write_rows(path, [{"text": text} for text in texts])


def random_texts(count: int, most: int, seed: int = 0) -> list[str]:
    words = ["once", "upon", "a", "time", "there", "was", "little", "fox", "that", "ran", "through", "the", "woods"]
    numbers = random.Random(seed)
    return [" ".join(numbers.choices(words, k=numbers.randint(1, most))) for _ in range(count)]


def recipe_command(name: str, settings: dict, *changes: str) -> list[str]:
    """The arguments of Python that run a recipe, whose YAML is written beside its `output_dir`."""
    path = Path(settings["output_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return [str(ROOT / "recipes" / f"{name}.py"), str(path), *changes]


def execute(*arguments: str) -> subprocess.CompletedProcess:
    """What a Python process with these arguments does, without the Hub."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=ENVIRONMENT)
