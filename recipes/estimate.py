"""
Estimates what training a model takes: memory and speed, before a machine is asked for.

    python recipes/estimate.py configuration/models/fire-125m.json --length 2048 --batch-size 8

An estimate, not a measurement: what it counts is said in [`bytes_per_token`] and [`flops_per_token`]; what it leaves
out are the allocator's fragments, kernels' workspaces, communication, and how well a machine does what it is asked to.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

from modeling_fire import FireConfig, FireForCausalLM
from modeling_fire.base_bias_fire import PositionBias


def on_meta(config: FireConfig) -> FireForCausalLM:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return FireForCausalLM(config)


def bytes_of_state(config: FireConfig) -> dict[str, int]:
    """
    What training holds from step to step, in bytes: float32 weights and gradients, and AdamW's two moments.

    These are the 16 bytes a parameter of Rajbhandari et al. (ZeRO, arXiv 1910.02054, section 3.1). Under bf16 autocast
    a copy of 2 bytes for each weight comes on top while a step runs.
    """
    parameters = on_meta(config).num_parameters()
    return {"weights": 4 * parameters, "gradients": 4 * parameters, "optimizer": 8 * parameters}


def bytes_per_token(config: FireConfig, bf16: bool = True) -> int:
    """
    What a forward keeps for the backward, in bytes for each token of the batch, with fused attention.

    Korthikanti et al. (arXiv 2205.05198, section 4.1) count this for GPT; here the same for this model's layers, in
    numbers of 2 bytes under bf16 autocast and of 4 without, h being the hidden size, i the MLP's, q and k what all
    query heads and all key heads hold:

    - each of two norms: its input (h, float32), what it divided by (4 bytes) and, under autocast, float32 while it
      computes (h);
    - attention: its input (h), queries, keys and values (q + 2 k), output (q), and one float32 a head;
    - MLP: its input (h), and 4 i with a gate (gate, its activation, up, their product), else 2 i;
    - last: a norm, the input of the head (h), the logits and their float32 logarithms of probabilities, and the
      gradient of those.
    """
    size = 2 if bf16 else 4
    hidden, heads = config.hidden_size, config.num_attention_heads
    query, key = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    norm = 2 * 4 * hidden + 4
    attention = size * (hidden + 2 * query + 2 * key) + 4 * heads
    mlp = size * (hidden + (4 if config.mlp_gated else 2) * config.intermediate_size)
    last = norm + size * (hidden + config.vocab_size) + 2 * 4 * config.vocab_size
    return config.num_hidden_layers * (2 * norm + attention + mlp) + last


def flops_per_token(config: FireConfig, length: int) -> int:
    """
    Floating-point operations of a forward and a backward, for each token of windows of `length`.

    `6 N + 12 L H Q T`, with N weights in matrix products (all but the embedding's), L layers of H heads of width Q,
    and T tokens (Chowdhery et al., PaLM, arXiv 2204.02311, appendix B). Like there the half of the scores that a
    causal kernel leaves out is counted. The position bias is not: fused, it has no matrix products.
    """
    model = on_meta(config)
    biases = {each for bias in model.modules() if isinstance(bias, PositionBias) for each in bias.modules()}
    products = [each for each in model.modules() if isinstance(each, nn.Linear) and each not in biases]
    weights = sum(each.weight.numel() for each in products)
    width = config.num_attention_heads * config.head_dim
    return 6 * weights + 12 * config.num_hidden_layers * width * length


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a JSON of configuration/models, or any FireConfig")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a window (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="windows on a device at once (default: %(default)s)")
    parser.add_argument("--float32", action="store_true", help="compute in float32 rather than under bf16 autocast")
    parser.add_argument(
        "--peak-flops", type=float, default=989e12, help="of a device, a second (default: an H100's in dense bf16)"
    )
    parser.add_argument("--utilization", type=float, default=0.4, help="share of that peak (default: %(default)s)")
    given = parser.parse_args()

    config = FireConfig.from_pretrained(given.config)
    state = bytes_of_state(config)
    tokens = given.length * given.batch_size
    activations = tokens * bytes_per_token(config, not given.float32)
    flops = flops_per_token(config, given.length)
    print(f"{given.config}: {state['weights'] // 4:,} parameters")
    for name, size in {**state, f"activations of {given.batch_size} x {given.length} tokens": activations}.items():
        print(f"{size / 2**30:9.2f} GiB  {name}")
    print(f"{(sum(state.values()) + activations) / 2**30:9.2f} GiB  together, on each device (FSDP2 splits the state)")
    print(f"{flops / 1e9:9.2f} GFLOP a token, forward and backward")
    achieved = given.utilization * given.peak_flops
    print(f"{achieved / flops:9,.0f} tokens a second and device, at {achieved:.3g} FLOP a second")


if __name__ == "__main__":
    main()
