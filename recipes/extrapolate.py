"""
Trains models that differ in one thing at a short length, and tests them on the same tokens with ever longer contexts.

    python recipes/extrapolate.py recipes/demo/demo.yaml

The YAML names the variants; all share shape, data, seed and optimiser. Its fields may be changed on the command line,
as name=value. What is finished is not run again, so a killed run continues where it was. Under the output folder:
`results.json`, `perplexity.png`, `learned_bias.png` and, for each variant and seed, a folder with the model as it
would go to the Hub.
"""

import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from additions import ADDITIONS
from corpus import byte_tokenizer, corpus, evaluation_windows, training_blocks
from grid import Job, losses_by_context, mean_losses, print_perplexities, run_grid, versions, write_json
from settings import changed, one_line_errors, settings_from_command_line
from transformers import TrainingArguments, default_data_collator, set_seed

from modeling_fire import FireConfig, FireForCausalLM
from modeling_fire.evaluation import loss_by_context, plot_learned_bias, plot_perplexity_by_context
from modeling_fire.training import FireTrainer


@dataclass
class Study:
    """
    The YAML. `variants` maps a name to the fields of [`FireConfig`] in which it differs from `model`, and may have
    those of `OF_ONE_RUN` for itself. One that has `from` is not trained: it is the variant of that name, with other
    fields where it is tested. `training` holds transformers' TrainingArguments.
    """

    output_dir: str
    model: dict
    variants: dict[str, dict]
    length: int  # of the training texts, in tokens
    contexts: list[int]  # of the test, in tokens
    training: dict
    text: str | None = None  # pattern of the names of text files; None: what Python comes with
    seeds: list[int] = field(default_factory=lambda: [0])
    num_windows: int = 64
    num_targets: int = 64
    bias_lr_multiplier: float = 1.0  # learning rate of the position bias, as a multiple of the others'
    bias_weight_decay: float = 0.0  # of the weights of f; its biases, c and L never decay
    show: str | None = None  # the variant whose biases are drawn and that speaks at the end
    prompt: str = "def "

    def __post_init__(self):
        trained = [variant for variant, changes in self.variants.items() if "from" not in changes]
        named = [changes["from"] for changes in self.variants.values() if "from" in changes]
        for name in [*named, self.show or trained[0]]:
            if name not in trained:
                raise ValueError(f"{name!r} is not among the variants that are trained: {', '.join(trained)}.")
        for name in [changes["addition"] for changes in self.variants.values() if "addition" in changes]:
            if name not in ADDITIONS:
                raise ValueError(f"{name!r} is no addition: there are {', '.join(ADDITIONS)}.")

    def folder(self, variant: str, seed: int) -> Path:
        return Path(self.output_dir) / f"{variant}-seed{seed}"


# What may change without making a finished run another one.
NOT_OF_A_RUN = {"output_dir", "variants", "seeds", "show", "prompt"}
# What a variant may have for itself: fields of the study; `random_positions`, below which its positions are drawn; and
# the name of an `addition` to the model.
OF_ONE_RUN = {"length", "training", "bias_lr_multiplier", "bias_weight_decay", "random_positions", "addition"}


def train(study: Study, variant: str, seed: int, folder: Path) -> FireForCausalLM:
    """Trains one variant with transformers' Trainer and saves it, whole or not at all."""
    set_seed(seed)
    changes = study.variants[variant]
    own = {name: value for name, value in changes.items() if name in OF_ONE_RUN}
    reach, addition = own.pop("random_positions", None), own.pop("addition", None)
    study = replace(study, **changed(vars(study), own))
    fields = {name: value for name, value in changes.items() if name not in OF_ONE_RUN}
    model = FireForCausalLM(FireConfig(**{**study.model, "max_position_embeddings": study.length, **fields}))
    if addition is not None:
        ADDITIONS[addition](model, study.length)
    print(f"{model.num_parameters():,} parameters", flush=True)
    unfinished = folder.with_name(folder.name + ".unfinished")
    arguments = TrainingArguments(
        output_dir=str(unfinished), seed=seed, data_seed=seed, save_strategy="no", report_to="none", **study.training
    )
    trainer = FireTrainer(
        model=model,
        args=arguments,
        train_dataset=training_blocks(corpus(study.text)[0], study.length),
        data_collator=default_data_collator if reach is None else partial(at_random_positions, reach=reach),
        processing_class=byte_tokenizer(),
        bias_lr_multiplier=study.bias_lr_multiplier,
        bias_weight_decay=study.bias_weight_decay,
    )
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return model


def at_random_positions(blocks: list[dict[str, torch.Tensor]], reach: int) -> dict[str, torch.Tensor]:
    """A batch whose blocks stand at ascending positions below `reach`, drawn anew each time (arXiv 2305.16843)."""
    batch = default_data_collator(blocks)
    drawn = torch.rand(len(blocks), reach).argsort(dim=1)[:, : batch["input_ids"].shape[1]]
    return {**batch, "position_ids": drawn.sort(dim=1).values}


def measure(study: Study, windows: torch.Tensor, variant: str, seed: int) -> dict[str, Any]:
    """Trains a variant, or takes another's model with changes to its config, and evaluates it."""
    changes = dict(study.variants[variant])
    if "from" in changes:
        folder = study.folder(changes.pop("from"), seed)
        config = FireConfig.from_dict({**FireConfig.from_pretrained(folder).to_dict(), **changes})
        model = FireForCausalLM.from_pretrained(folder, config=config)
    else:
        model = train(study, variant, seed, study.folder(variant, seed))
    return {"loss": loss_by_context(model, windows, study.contexts, study.num_targets)}


def jobs(study: Study) -> list[Job]:
    """One for each variant and seed; first those that are trained."""
    windows = evaluation_windows(corpus(study.text)[1], max(study.contexts) + 1, study.num_windows)
    shared = {name: value for name, value in vars(study).items() if name not in NOT_OF_A_RUN}
    result = []
    for seed in study.seeds:
        for variant, changes in study.variants.items():
            path = study.folder(variant, seed) / "loss_by_context.json"
            settings = {**shared, "variant": changes}
            if "from" in changes:
                settings["of"] = study.variants[changes["from"]]
            result.append(Job(variant, seed, path, settings, partial(measure, study, windows, variant, seed)))
    return sorted(result, key=lambda job: "from" in study.variants[job.variant])


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
    study = settings_from_command_line(Study, __doc__)
    start = time.monotonic()
    output = Path(study.output_dir)
    with one_line_errors():
        grid = jobs(study)
    results = run_grid(grid)
    losses = losses_by_context({variant: results[variant] for variant in study.variants})
    means = mean_losses(losses)
    print(
        f"\nPerplexity per byte of the same {study.num_windows * study.num_targets} held-out tokens, trained at "
        f"{study.length}, by context"
        + (f"; mean of {len(study.seeds)} seeds with its 95% confidence interval" if len(study.seeds) > 1 else "")
    )
    print_perplexities(losses)
    result = {"versions": versions(), "study": vars(study), "mean_loss": means, "loss_by_seed": losses}
    write_json(output / "results.json", result)
    plot_perplexity_by_context(means, output / "perplexity.png", study.length, "Trained short, tested long")
    print(f"\nWrote {output / 'results.json'} and {output / 'perplexity.png'}.")

    if study.show is not None:
        folder = study.folder(study.show, study.seeds[0])
        model = FireForCausalLM.from_pretrained(folder)
        queries = [study.length - 1, max(study.contexts) - 1]
        plot_learned_bias(model, output / "learned_bias.png", queries)
        print(f"Wrote {output / 'learned_bias.png'}: what each head of {study.show} learned.")
        print(f"\n{folder} is ready for the Hub. A fresh process without this package loads it and goes on from")
        print(f"{study.prompt!r}:\n", flush=True)
        subprocess.run([sys.executable, "-c", STRANGER, str(folder), study.prompt], check=True)
    print(f"\nDone in {(time.monotonic() - start) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
