"""
Trains models from scratch that differ in one thing, and tests them on the same tokens with ever longer contexts.

    accelerate launch --config_file configuration/accelerate/cpu.yaml recipes/pretrain_study.py \
        recipes/compare/tiny.yaml

Fields of the YAML may be changed on the command line. What is finished is not run again, and a killed run goes on from
its last checkpoint, also on other machines. Under the output folder: `results.json`, `perplexity.png` and, for each
variant and seed, a folder as `pretrain.py` leaves it.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from corpus import byte_tokenizer
from grid import Job, mean_losses, origin, print_perplexities, read_finished, run_grid, write_json
from pretrain import pretrain, windows_of
from pretrain_settings import Pretrain
from settings import SettingsError, changed, one_line_errors, read_fields, settings_from_command_line

from modeling_fire import FireForCausalLM
from modeling_fire.cards import write_card
from modeling_fire.evaluation import loss_by_context, plot_perplexity_by_context


@dataclass
class Study:
    """
    The YAML. `variants` maps a name to changes of `base`, the settings of a [`Pretrain`]. One that has `from` is not
    trained: it is the variant of that name, with other `model.changes` where it is tested.
    """

    output_dir: str
    base: dict
    variants: dict[str, dict]
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self):
        self.variants = {name: changed({}, changes or {}) for name, changes in self.variants.items()}
        trained = [name for name, changes in self.variants.items() if "from" not in changes]
        first = None
        for name, changes in self.variants.items():
            if "from" in changes and changes["from"] not in trained:
                raise SettingsError(f"{changes['from']!r} is not among the trained variants: {', '.join(trained)}.")
            if "from" in changes and (set(changes) != {"from", "model"} or set(changes["model"]) != {"changes"}):
                raise SettingsError(
                    f"{name!r} is not trained: it has `from` and `model.changes`, and no other fields."
                )
            try:
                run = self.run(name, self.seeds[0])
                run.config(byte_tokenizer())  # whatever the tokenizer: this asks whether there is such a model
            except ValueError as error:
                raise SettingsError(f"The variant {name!r}: {error}") from error
            measured = run.tokenizer, run.data.held_out, run.data.column, run.evaluation
            first = first or measured
            if measured != first:
                raise SettingsError(
                    f"{name!r} would be measured on other tokens: leave `tokenizer`, `data.held_out`, `data.column` "
                    "and `evaluation` to `base`."
                )

    def folder(self, variant: str, seed: int) -> Path:
        return Path(self.output_dir) / f"{variant}-seed{seed}"

    def run(self, variant: str, seed: int) -> Pretrain:
        """The settings of a variant; if it has `from`, those of the other one with the changes to the model."""
        changes = dict(self.variants[variant])
        source = self.variants[changes.pop("from")] if "from" in changes else {}
        folder = self.folder(variant, seed)
        own = {"output_dir": str(folder), "training.seed": seed, "training.run_name": folder.name}
        return read_fields(Pretrain, changed(changed(changed(self.base, source), changes), own))

    def jobs(self) -> list[Job]:
        """One for each variant and seed; first those that are trained."""
        jobs = []
        for seed in self.seeds:
            for variant, changes in self.variants.items():
                run = self.run(variant, seed)
                settings, work = run.settings, partial(train, run)
                if "from" in changes:
                    settings["from"] = changes["from"]
                    work = partial(measure, run, self.folder(changes["from"], seed) / "model")
                jobs.append(Job(variant, seed, self.folder(variant, seed) / "results.json", settings, work))
        return sorted(jobs, key=lambda job: "from" in job.settings)


# Work of all processes: the results are those of the main one, the others' are of no use.


def train(run: Pretrain) -> dict[str, Any]:
    """As `pretrain.py` does."""
    result = pretrain(run)
    if result:
        write_card(Path(run.output_dir) / "model", results={"settings": run.settings, **result})
    return result


def measure(run: Pretrain, folder: Path) -> dict[str, Any]:
    """The losses of the model in `folder`, with the config of `run`; the processes share the windows."""
    arguments, evaluation = run.arguments(), run.evaluation
    tokenizer = run.load_tokenizer()
    windows = windows_of(run, tokenizer)  # by when the main process has saved the model
    model: Any = FireForCausalLM.from_pretrained(folder, config=run.config(tokenizer))
    part = windows[arguments.process_index :: arguments.world_size]
    with torch.autocast(arguments.device.type, torch.bfloat16, enabled=arguments.bf16):  # as Trainer evaluates
        losses = loss_by_context(model.to(arguments.device), part, evaluation.contexts, evaluation.num_targets)
    parts = gather_object([losses])
    return {"loss": {context: mean(loss for each in parts for loss in each[context]) for context in losses}}


def main() -> None:
    study = settings_from_command_line(Study, __doc__)
    with one_line_errors():
        jobs = study.jobs()
        for variant in study.variants:  # makes the processes known to each other, and refuses what they cannot share
            study.run(variant, study.seeds[0]).arguments()
        is_main = PartialState().is_main_process
        if is_main:
            results = run_grid(jobs)
        else:
            for job in [job for job in jobs if read_finished(job.path, job.settings) is None]:
                job.do()
        PartialState().destroy_process_group()  # a process that exits while threads of it still talk may abort
    if not is_main:
        return
    losses = {
        variant: {
            seed: {int(context): loss for context, loss in result["loss"].items()}
            for seed, result in results[variant].items()
        }
        for variant in study.variants
    }
    means, length = mean_losses(losses), study.base["length"]
    print(
        f"\nPerplexity of the same held-out tokens, trained at {length}, by context"
        + (f"; mean of {len(study.seeds)} seeds with its 95% confidence interval" if len(study.seeds) > 1 else "")
    )
    print_perplexities(losses)
    output = Path(study.output_dir)
    content = {**origin(), "study": vars(study), "mean_loss": means, "loss_by_seed": losses}
    write_json(output / "results.json", content)
    plot_perplexity_by_context(means, output / "perplexity.png", length, "Trained short, tested long")
    print(f"\nWrote results.json and perplexity.png to {output}.")


if __name__ == "__main__":
    main()
