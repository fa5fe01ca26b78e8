"""
Retrofits one model in several ways, and tests all of them on the same tokens with ever longer contexts.

    python recipes/retrofit_study.py recipes/retrofit/study.yaml base.model.source=... base.data.text=...

Fields of the YAML may be changed on the command line. What is finished is not run again, and a killed run goes on from
its last checkpoint. Under the output folder: `results.json`, `perplexity.png`, `recovery.png` and, for each variant
and seed, a folder as `retrofit.py` leaves it.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from grid import Job, losses_by_context, mean_losses, origin, print_perplexities, run_grid, write_json
from retrofit import load, measure, retrofit
from retrofit_plan import windows_of
from retrofit_settings import Retrofit
from sampled import with_sampled
from settings import changed, one_line_errors, read_fields, settings_from_command_line
from transformers import AutoTokenizer

from modeling_fire.evaluation import plot_perplexity_by_context, plot_perplexity_by_tokens


@dataclass
class Study:
    """
    The YAML. `variants` maps a name to changes of `base`, the settings of a [`Retrofit`]. One that has `from` is not
    trained: it is the variant of that name, with changes to its `config`. `control` is what all are compared with.
    """

    output_dir: str
    base: dict
    variants: dict[str, dict]
    control: str
    seeds: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self):
        trained = [name for name, changes in self.variants.items() if "from" not in changes]
        for name in [self.control, *(changes["from"] for changes in self.variants.values() if "from" in changes)]:
            if name not in trained:
                raise ValueError(f"{name!r} is not among the variants that are trained: {', '.join(trained)}.")
        for name, changes in self.variants.items():
            if "from" in changes and set(changes) != {"from", "config"}:
                raise ValueError(f"{name!r} is not trained: it has `from` and `config`, and no other fields.")

    def folder(self, variant: str, seed: int) -> Path:
        return Path(self.output_dir) / f"{variant}-seed{seed}"

    def run(self, variant: str, seed: int) -> Retrofit:
        """The settings of a variant; if it has `from`, those of the other one with the changes to the config."""
        changes = self.variants[variant]
        if "from" in changes:
            changes = changed(self.variants[changes["from"]], {"model.config": changes["config"]})
        folder = self.folder(variant, seed)
        run = {"output_dir": str(folder), "training.seed": seed, "training.run_name": folder.name}
        return read_fields(Retrofit, changed(changed(self.base, changes), run))

    def measure_changed(self, variant: str, seed: int) -> dict[str, Any]:
        """Measures another variant's model with changes to its config."""
        run, folder = self.run(variant, seed), self.folder(self.variants[variant]["from"], seed) / "model"
        windows = with_sampled(windows_of(run, AutoTokenizer.from_pretrained(folder)), folder.parent)
        return {"loss": measure(run, load(folder, run.model.config), windows)}

    def jobs(self) -> list[Job]:
        """One for each variant and seed; first those that are trained."""
        trained, changed_ones = [], []
        for seed in self.seeds:
            for variant, changes in self.variants.items():
                run, path = self.run(variant, seed), self.folder(variant, seed) / "results.json"
                if "from" in changes:
                    do = partial(self.measure_changed, variant, seed)
                    changed_ones.append(Job(variant, seed, path, {**run.settings, "from": changes["from"]}, do))
                else:
                    trained.append(Job(variant, seed, path, run.settings, partial(retrofit, run)))
        return trained + changed_ones


def loss_by_tokens(results: dict[int, dict[str, Any]]) -> dict[int, float]:
    """The mean over the seeds of the held-out loss at the training length, by tokens trained on."""
    first = next(iter(results.values()))
    return {
        int(step) * first["tokens_per_step"]: mean(result["eval_loss"][step] for result in results.values())
        for step in first["eval_loss"]
    }


def main() -> None:
    study = settings_from_command_line(Study, __doc__)
    with one_line_errors():
        results = run_grid(study.jobs())
    results = {variant: results[variant] for variant in study.variants}
    losses = losses_by_context(results)
    means = mean_losses(losses)
    length, longest = study.run(study.control, study.seeds[0]).data.length, max(means[study.control])
    control = means[study.control][length]
    print(f"\nPerplexity of the same held-out tokens, trained at {length}, by context; then at {length} as a multiple")
    print(f"of the control ({study.control}), and at {longest} as a multiple of its own at {length}")
    ratios = {
        "x control": {variant: f"{math.exp(loss[length] - control):.3f}" for variant, loss in means.items()},
        "x own 1x": {variant: f"{math.exp(loss[longest] - loss[length]):.3f}" for variant, loss in means.items()},
    }
    print_perplexities(losses, ratios)
    # On the way each is measured at the length that it is trained at.
    drawn = [
        variant
        for variant, changes in study.variants.items()
        if "from" not in changes and study.run(variant, study.seeds[0]).data.length == length
    ]
    curves = {variant: loss_by_tokens(results[variant]) for variant in drawn}
    output = Path(study.output_dir)
    content = {**origin(), "study": vars(study), "mean_loss": means, "loss_by_seed": losses, "loss_by_tokens": curves}
    write_json(output / "results.json", content)
    plot_perplexity_by_context(means, output / "perplexity.png", length, "Retrofitted at one length, tested at others")
    plot_perplexity_by_tokens(curves, output / "recovery.png", f"Held-out text, at the training length of {length}")
    print(f"\nWrote results.json, perplexity.png and recovery.png to {output}.")


if __name__ == "__main__":
    main()
