"""
A whole FIRE model beside LLaMA of the same shape: `make bench-model`, or e.g.

    python benchmarks/model.py --lengths 1024 2048 --contexts 1024 8192 --out benchmarks/results/cpu

Training: tokens a second and peak memory of forward and backward. Generation: tokens a second after a context of so
many tokens, one token at a time with a dynamic cache, and the peak memory beside that cache. The peers run in turns in
one process.
"""

import argparse
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import measure
import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.models.llama import LlamaConfig

from modeling_fire import FireConfig, FireForCausalLM
from modeling_fire.cache_fire import named


BASE = "LLaMA, RoPE, SDPA"


def build_models(shape: dict, device: str, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """FIRE, the same model without a bias, and LLaMA: all with random weights."""
    torch.manual_seed(0)
    models: dict[str, Any] = {
        "FIRE": FireForCausalLM(FireConfig(**shape)),
        "FIRE's model, no bias, SDPA": FireForCausalLM(FireConfig(**shape, position_bias="none")),
        BASE: LlamaForCausalLM(LlamaConfig(**shape)),
    }
    return {name: model.to(device, dtype) for name, model in models.items()}


def training_step(model: PreTrainedModel, ids: torch.Tensor) -> None:
    model(ids, labels=ids, use_cache=False).loss.backward()
    model.zero_grad()


def decoding(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int):
    """A function that generates `new_tokens` tokens after a context, whose cache is filled here."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for chunk in ids.split(1024, dim=1):
            model(chunk, logits_to_keep=1, **named(cache))
    last = ids[:, -1:]

    @torch.no_grad()
    def decode() -> None:
        token = last
        for _ in range(new_tokens):
            token = model(token, logits_to_keep=1, **named(cache)).logits.argmax(-1)
        cache.crop(-new_tokens)

    return decode


def measure_training(models: dict, length: int, args) -> list[dict]:
    ids = torch.randint(args.vocab, (args.batch, length), device=args.device)
    functions = {name: partial(training_step, model.train(), ids) for name, model in models.items()}
    memory = {name: measure.peak_memory(function, args.device) for name, function in functions.items()}
    times = measure.interleaved(functions, args.device, args.seconds)
    return [row(name, "training", length, times, ids.numel(), memory[name]) for name in models]


def measure_decoding(models: dict, context: int, args) -> list[dict]:
    ids = torch.randint(args.vocab, (args.batch, context), device=args.device)
    functions = {name: decoding(model.eval(), ids, args.new_tokens) for name, model in models.items()}
    memory = {name: measure.peak_memory(function, args.device) for name, function in functions.items()}
    times = measure.interleaved(functions, args.device, args.seconds)
    return [row(name, "generation", context, times, args.batch * args.new_tokens, memory[name]) for name in models]


def row(name: str, kind: str, length: int, times: dict, tokens: int, memory: float) -> dict:
    return {
        "model": name,
        "kind": kind,
        "length": length,
        "tokens_per_second": tokens / statistics.median(times[name]),
        "ratio": measure.ratio(times, name, BASE),
        "MiB": memory,
    }


def print_table(rows: list[dict]) -> None:
    print(f"\n{rows[0]['kind']}: tokens/s, time as a multiple of {BASE}, peak MiB")
    for entry in rows:
        speed = f"{entry['tokens_per_second']:12.1f} tokens/s {entry['ratio']:8.2f}x"
        print(f"{entry['length']:8} {entry['model']:28}{speed}{entry['MiB']:10.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="float32 on CPU, bfloat16 on a GPU, unless given")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 2048], help="of training")
    parser.add_argument("--contexts", type=int, nargs="*", default=[1024, 8192], help="before generation")
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=40.0, help="for each length")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON")
    args = parser.parse_args()
    shape = {
        "vocab_size": args.vocab,
        "hidden_size": args.hidden,
        "intermediate_size": 4 * args.hidden,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "max_position_embeddings": max(args.lengths, default=2048),
    }
    dtype = getattr(torch, args.dtype or ("bfloat16" if args.device == "cuda" else "float32"))
    models = build_models(shape, args.device, dtype)
    every: list[dict] = []
    for lengths, measure_one in ((args.lengths, measure_training), (args.contexts, measure_decoding)):
        rows = [entry for length in lengths for entry in measure_one(models, length, args)]
        if rows:
            print_table(rows)
        every += rows
    args.out.mkdir(parents=True, exist_ok=True)
    measure.write_json(args.out / "model.json", {"dtype": str(dtype), "rows": every}, args.device)


if __name__ == "__main__":
    main()
