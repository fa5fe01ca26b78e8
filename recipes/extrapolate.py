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
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from additions import ADDITIONS
from corpus import byte_tokenizer, corpus, evaluation_windows, training_blocks
from disk import check_room
from extrapolate_settings import NOT_OF_A_RUN, OF_ONE_RUN, Study
from grid import Job, losses_by_context, mean_losses, origin, print_perplexities, run_grid, write_json
from rows import at_random_positions, in_documents
from settings import SettingsError, one_line_errors, settings_from_command_line
from training_arguments import training_arguments
from transformers import default_data_collator, set_seed

from modeling_fire import FireConfig, FireForCausalLM
from modeling_fire.cards import write_card
from modeling_fire.evaluation import loss_by_context, plot_learned_bias, plot_perplexity_by_context
from modeling_fire.training import FireTrainer


def train(study: Study, variant: str, seed: int, folder: Path) -> FireForCausalLM:
    """Trains one variant with transformers' Trainer and saves it, whole or not at all."""
    set_seed(seed)
    changes = study.variants[variant]
    fields = {name: value for name, value in changes.items() if name not in OF_ONE_RUN}
    study = study.of(variant)
    model = FireForCausalLM(FireConfig(**{**study.model, "max_position_embeddings": study.length, **fields}))
    if "addition" in changes:
        ADDITIONS[changes["addition"]](model, study.length)
    print(f"{model.num_parameters():,} parameters", flush=True)
    unfinished = folder.with_name(folder.name + ".unfinished")
    collator: Callable = default_data_collator
    if "random_positions" in changes:
        collator = partial(at_random_positions, reach=changes["random_positions"])
    elif "documents" in changes:
        collator = partial(in_documents, mean_length=changes["documents"])
    arguments = training_arguments(
        unfinished, {"output_dir": str(unfinished), "seed": seed, "data_seed": seed, **study.training}
    )
    check_room(folder, model.num_parameters(), arguments)
    trainer = FireTrainer(
        model=model,
        args=arguments,
        train_dataset=training_blocks(corpus(study.text)[0], study.length),
        data_collator=collator,
        processing_class=byte_tokenizer(),
        bias_lr_multiplier=study.bias_lr_multiplier,
        bias_weight_decay=study.bias_weight_decay,
    )
    trainer.train()
    trainer.save_model(str(unfinished))
    trainer.save_state()
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    return model


def measure(study: Study, windows: torch.Tensor, variant: str, seed: int) -> dict[str, Any]:
    """Trains a variant, or takes another's model with changes to its config, and evaluates it."""
    changes = dict(study.variants[variant])
    if "from" in changes:
        model = load_changed(study.folder(changes.pop("from"), seed), changes)
        return {"loss": loss_by_context(model, windows, study.contexts, study.num_targets)}
    folder = study.folder(variant, seed)
    model = train(study, variant, seed, folder)
    result = {"loss": loss_by_context(model, windows, study.contexts, study.num_targets)}
    if "addition" not in changes:  # which is not saved
        write_card(folder, results={"settings": vars(study.of(variant)), **origin(), **result})
    return result


def load_changed(folder: Path, changes: dict[str, Any]) -> FireForCausalLM:
    """A trained model with other fields of its config; a wider `dtype` is that of the bias too."""
    config = FireConfig.from_dict({**FireConfig.from_pretrained(folder).to_dict(), **changes})
    model: Any = FireForCausalLM.from_pretrained(folder, config=config)
    return model.to(PartialState().device, model.dtype)  # the bias was loaded in float32


def jobs(study: Study) -> list[Job]:
    """One for each variant and seed; first those that are trained."""
    train_files, held_out = corpus(study.text)
    longest = max(study.of(variant).length for variant in study.variants)
    if sum(map(len, train_files)) < longest:
        raise SettingsError(f"The training text is shorter than the {longest} bytes of one of its parts.")
    windows = evaluation_windows(held_out, max(study.contexts) + 1, study.num_windows)
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
        if PartialState().num_processes > 1 or torch.cuda.device_count() > 1:
            raise SettingsError("A study runs as one process on one GPU: set CUDA_VISIBLE_DEVICES.")
        results = run_grid(jobs(study))
    losses = losses_by_context({variant: results[variant] for variant in study.variants})
    means = mean_losses(losses)
    print(
        f"\nPerplexity per byte of the same {study.num_windows * study.num_targets} held-out tokens, trained at "
        f"{study.length}, by context"
        + (f"; mean of {len(study.seeds)} seeds with its 95% confidence interval" if len(study.seeds) > 1 else "")
    )
    print_perplexities(losses)
    result = {**origin(), "study": vars(study), "mean_loss": means, "loss_by_seed": losses}
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
