"""Tiny random checkpoints of other architectures, and how to change them, for the tests of the conversion."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from modeling_fire.conversion.proof import PROMPT


ROPE = {"rope_type": "default", "rope_theta": 10000.0}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **SPECIAL}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 32}


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Moves every parameter away from its initial value, which for norms and biases would hide a mix-up."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def llama(**changes) -> LlamaForCausalLM:
    return randomised(LlamaForCausalLM(LlamaConfig(**{**LLAMA, "rope_parameters": dict(ROPE), **changes})))


def mistral(**changes) -> MistralForCausalLM:
    return randomised(MistralForCausalLM(MistralConfig(**{**LLAMA, "sliding_window": None, **changes})))


def ministral(**changes) -> MinistralForCausalLM:
    fields = {**LLAMA, "head_dim": 8, "sliding_window": 32, **changes}
    return randomised(MinistralForCausalLM(MinistralConfig(**fields)))


def qwen2(**changes) -> Qwen2ForCausalLM:
    return randomised(Qwen2ForCausalLM(Qwen2Config(**{**LLAMA, **changes})))


def qwen3(**changes) -> Qwen3ForCausalLM:
    return randomised(Qwen3ForCausalLM(Qwen3Config(**{**LLAMA, "head_dim": 12, **changes})))


def gpt_neox(rotary: float = 0.5, **changes) -> GPTNeoXForCausalLM:
    rope = {**ROPE, "partial_rotary_factor": rotary}
    fields = {**SIZES, "intermediate_size": 80, "max_position_embeddings": 32, "rope_parameters": rope, **changes}
    return randomised(GPTNeoXForCausalLM(GPTNeoXConfig(**fields)))


def bloom(**changes) -> BloomForCausalLM:
    return randomised(
        BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=48, **SPECIAL, **{"n_head": 4, **changes}))
    )


def mpt(**changes) -> MptForCausalLM:
    fields = {"d_model": 48, "n_heads": 4, "n_layers": 2, "vocab_size": 99, "max_seq_len": 64, **SPECIAL, **changes}
    return randomised(MptForCausalLM(MptConfig(**fields)))


def save_tokenizer(folder: Path, vocabulary: list[str] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of the 96 letters and signs that ids below 99 have room for, with a chat template."""
    vocabulary = vocabulary or ["<pad>", "<s>", "</s>", *sorted(set(PROMPT))]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocabulary)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return fast


def change_weights(folder: Path, change) -> None:
    """Rewrites the weights of a checkpoint; `change` edits the dict."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def reads(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same_state(folder: Path, other: Path):
    torch.testing.assert_close(reads(folder), reads(other), rtol=0.0, atol=0.0)
