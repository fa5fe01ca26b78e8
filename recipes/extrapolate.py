"""
Trains models that differ in one thing at a short length, and tests them on the same tokens with ever longer contexts.

    python recipes/extrapolate.py recipes/demo/demo.yaml

The YAML names the variants; all share shape, data, seed and optimiser. What is finished is not run again, so a killed
run continues where it was. Under the output folder: `results.json`, `perplexity.png`, `learned_bias.png` and, for each
variant and seed, a folder with the model as it would go to the Hub.
"""

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from corpus import byte_tokenizer, evaluation_windows, python_corpus, training_blocks
from grid import Job, losses_by_context, mean_losses, print_perplexities, run_grid, versions, write_json
from transformers import TrainingArguments, default_data_collator, set_seed

from modeling_fire import FireConfig, FireForCausalLM
from modeling_fire.evaluation import loss_by_context, plot_learned_bias, plot_perplexity_by_context
from modeling_fire.training import FireTrainer


@dataclass
class Study:
    """
    The YAML. `variants` maps a name to the fields of [`FireConfig`] in which it differs from `model`, and may name a
    `bias_lr_multiplier` and a `bias_weight_decay` of its own; `training` holds transformers' TrainingArguments;
    `contexts` are lengths in tokens, the first of which is the training length.
    """

    output_dir: str
    model: dict
    variants: dict[str, dict]
    contexts: list[int]
    training: dict
    seeds: list[int] = field(default_factory=lambda: [0])
    num_windows: int = 64
    num_targets: int = 64
    bias_lr_multiplier: float = 1.0  # learning rate of the position bias, as a multiple of the others'
    bias_weight_decay: float = 0.0  # of the weights of f; its biases, c and L never decay
    show: str | None = None  # the variant whose biases are drawn and that speaks at the end
    prompt: str = "def "


# What may change without making a finished run another one.
NOT_OF_A_RUN = {"output_dir", "variants", "seeds", "show", "prompt"}


def train(study: Study, variant: str, seed: int, folder: Path) -> FireForCausalLM:
    """Trains one variant with transformers' Trainer and saves it, whole or not at all."""
    set_seed(seed)
    changes = {"max_position_embeddings": study.contexts[0], **study.variants[variant]}
    bias_lr_multiplier = changes.pop("bias_lr_multiplier", study.bias_lr_multiplier)
    bias_weight_decay = changes.pop("bias_weight_decay", study.bias_weight_decay)
    model = FireForCausalLM(FireConfig(**{**study.model, **changes}))
    print(f"{model.num_parameters():,} parameters", flush=True)
    unfinished = folder.with_name(folder.name + ".unfinished")
    arguments = TrainingArguments(
        output_dir=str(unfinished), seed=seed, data_seed=seed, save_strategy="no", report_to="none", **study.training
    )
    trainer = FireTrainer(
        model=model,
        args=arguments,
        train_dataset=training_blocks(python_corpus()[0], study.contexts[0]),
        data_collator=default_data_collator,
        processing_class=byte_tokenizer(),
        bias_lr_multiplier=bias_lr_multiplier,
        bias_weight_decay=bias_weight_decay,
    )
    trainer.train()
    trainer.save_model()
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return model


def measure(study: Study, windows: torch.Tensor, variant: str, seed: int, folder: Path) -> dict[str, Any]:
    """Trains and evaluates one variant."""
    model = train(study, variant, seed, folder)
    return {"loss": loss_by_context(model, windows, study.contexts, study.num_targets)}


def jobs(study: Study) -> list[Job]:
    """One for each variant and seed."""
    windows = evaluation_windows(python_corpus()[1], study.contexts[-1] + 1, study.num_windows)
    shared = {name: value for name, value in vars(study).items() if name not in NOT_OF_A_RUN}
    result = []
    for seed in study.seeds:
        for variant, changes in study.variants.items():
            folder = Path(study.output_dir) / f"{variant}-seed{seed}"
            run = partial(measure, study, windows, variant, seed, folder)
            result.append(Job(variant, seed, folder / "loss_by_context.json", {**shared, "variant": changes}, run))
    return result


# Run by a fresh interpreter that cannot import this package: what a stranger gets who downloads the folder.
STRANGER = """
import sys
sys.modules["modeling_fire"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
folder, prompt = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
set_seed(0)
output = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=200, do_sample=True, top_p=0.9)
print(tokenizer.decode(output[0]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the YAML that names the variants")
    study = Study(**yaml.safe_load(parser.parse_args().study.read_text()))
    if study.show is not None and study.show not in study.variants:
        parser.error(f"`show` names {study.show!r}, which is not among the variants: {', '.join(study.variants)}.")

    start = time.monotonic()
    output = Path(study.output_dir)
    losses = losses_by_context(run_grid(jobs(study)))
    means = mean_losses(losses)
    print(
        f"\nPerplexity per byte of the same {study.num_windows * study.num_targets} held-out tokens, trained at "
        f"{study.contexts[0]}, by context"
        + (f"; mean of {len(study.seeds)} seeds and their standard deviation" if len(study.seeds) > 1 else "")
    )
    print_perplexities(losses)
    write_json(output / "results.json", {"versions": versions(), "study": vars(study), "mean_loss": means})
    plot_perplexity_by_context(means, output / "perplexity.png", study.contexts[0], "Trained short, tested long")
    print(f"\nWrote {output / 'results.json'} and {output / 'perplexity.png'}.")

    if study.show is not None:
        folder = output / f"{study.show}-seed{study.seeds[0]}"
        model = FireForCausalLM.from_pretrained(folder)
        queries = [study.contexts[0] - 1, study.contexts[-1] - 1]
        plot_learned_bias(model, output / "learned_bias.png", queries)
        print(f"Wrote {output / 'learned_bias.png'}: what each head of {study.show} learned.")
        print(f"\n{folder} is ready for the Hub. A fresh process without this package loads it and goes on from")
        print(f"{study.prompt!r}:\n", flush=True)
        subprocess.run([sys.executable, "-c", STRANGER, str(folder), study.prompt], check=True)
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
