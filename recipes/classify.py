"""
Trains a classifier on a task of GLUE or SuperGLUE, once a seed, and scores it with the metric of that task.

    accelerate launch recipes/classify.py recipes/classify/tiny.yaml task=boolq data.train=... data.validation=... \\
        model=...

Fields of the YAML may be changed on the command line. Under the output folder: `results.json`, and for each seed
`results.json` and `model` (as it would go to the Hub). A seed that is finished is not run again.
"""

import copy
import shutil
from collections import Counter
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import PartialState
from classify_plan import Examples, Plan
from classify_settings import Classify
from classify_tasks import TASKS
from disk import check_room, last_checkpoint, train_from
from grid import half_interval, is_first_process, origin, read_finished, write_json
from settings import one_line_errors, settings_from_command_line
from training_arguments import blamed_on
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, PreTrainedModel, set_seed

from modeling_fire.cards import write_card
from modeling_fire.training import FireTrainer


def classify(run: Classify) -> dict[int, dict[str, Any]]:
    """Does what is not done yet; returns the results by seed, which are none on all processes but the main one."""
    output = Path(run.output_dir)
    read_finished(output / "settings.json", run.settings)
    results = {seed: read_finished(run.folder(seed) / "results.json", run.settings) for seed in run.seeds}
    unfinished = [seed for seed, result in results.items() if result is None]
    if not unfinished:
        return results if is_first_process() else {}
    plan = Plan.of(run)
    is_main = run.arguments(unfinished[0]).process_index == 0
    if is_main:
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "settings.json", {"settings": run.settings})
    for seed in unfinished:
        results[seed] = {"settings": run.settings, **train(run, plan, seed)}
        if is_main:
            write_card(run.folder(seed) / "model", results=results[seed])
            write_json(run.folder(seed) / "results.json", results[seed])
    return results if is_main else {}


def train(run: Classify, plan: Plan, seed: int) -> dict[str, Any]:
    """Trains, measures and saves the model of one seed."""
    arguments, folder = run.arguments(seed), run.folder(seed)
    set_seed(seed)
    model = start(run, plan)
    check_room(folder, model.num_parameters(), arguments)
    with blamed_on("training"):
        trainer = FireTrainer(
            model,
            arguments,
            train_dataset=plan.train.dataset,
            eval_dataset={name: examples.dataset for name, examples in plan.validation.items()},
            data_collator=DataCollatorWithPadding(plan.tokenizer),
            processing_class=plan.tokenizer,
            bias_lr_multiplier=run.bias_lr_multiplier,
        )
    # The heads take `**kwargs` but do not divide their loss by the `num_items_in_batch` that Trainer hands over then:
    # gradients would grow with processes and accumulation (huggingface/transformers issue 47688).
    trainer.model_accepts_loss_kwargs = False
    train_from(trainer, last_checkpoint(arguments.output_dir))
    measured = {name: measure(trainer, plan, examples) for name, examples in plan.validation.items()}
    unfinished = folder / "model.unfinished"
    trainer.save_model(str(unfinished))
    if trainer.is_world_process_zero():
        shutil.rmtree(folder / "model", ignore_errors=True)
        unfinished.rename(folder / "model")
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
    history = trainer.state.log_history
    return {
        "train": {"rows": len(plan.train.rows), "classes": plan.train.counts(plan.task), "cut": plan.train.cut},
        "measured": measured,
        "train_loss": {entry["step"]: entry["loss"] for entry in history if "loss" in entry},
        **origin(),
    }


def start(run: Classify, plan: Plan) -> PreTrainedModel:
    """The model with a new head, in float32, and with an embedding of the token to pad with."""
    config = copy.deepcopy(plan.config)  # which the next seed begins with
    if run.random_start:
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(run.model, config=config, dtype=torch.float32)
    if len(plan.tokenizer) > config.vocab_size:
        model.resize_token_embeddings(len(plan.tokenizer), mean_resizing=False)
    model.config.pad_token_id = plan.tokenizer.pad_token_id
    return model


def measure(trainer: FireTrainer, plan: Plan, examples: Examples) -> dict[str, Any]:
    """The metric of the task, for the model and for the baseline of the task, which needs none."""
    task, rows = plan.task, examples.rows
    outputs: Any = trainer.predict(examples.dataset).predictions
    result = {"rows": len(rows), "cut": examples.cut, "classes": examples.counts(task)}
    if task.labels:
        predicted = Counter(outputs.argmax(-1).tolist())
        result["predicted"] = {name: predicted[number] for number, name in enumerate(task.labels)}
        result["majority"] = task.score(task.majority(rows), rows)
    return {**result, "metrics": task.score(task.answers(outputs, rows), rows)}


def print_table(run: Classify, results: dict[int, dict[str, Any]]) -> None:
    """A table for each set that was measured: the baseline of the task, and the mean over the seeds."""
    first = next(iter(results.values()))
    print(f"\n{run.task}: trained on {described(first['train'])}; mean of {len(results)} seeds and its 95% interval")
    for name, measured in first["measured"].items():
        by_seed = [result["measured"][name]["metrics"] for result in results.values()]
        row = {}
        for figure in measured["metrics"]:
            values = [figures[figure] for figures in by_seed]
            row[figure] = f"{mean(values):.3f}" + (f" ±{half_interval(values):.3f}" if len(values) > 1 else "")
        majority = {figure: f"{value:.3f}" for figure, value in measured.get("majority", {}).items()}
        rows = {TASKS[run.task].baseline: majority, Path(run.output_dir).name: row}
        width = max(map(len, rows))
        print(f"{name}: {described(measured)}, {measured['cut']:.0%} of them cut to {run.length} tokens")
        print(" " * width + "".join(f"{figure:>22}" for figure in row))
        for label, figures in rows.items():
            if figures:
                print(label.ljust(width) + "".join(f"{figures[figure]:>22}" for figure in row))


def described(examples: dict[str, Any]) -> str:
    """The number of rows, of the pairs that they are read as where a row has several, and of those of each class."""
    rows, pairs = examples["rows"], sum(examples["classes"].values())
    classes = ", ".join(f"{name} {count}" for name, count in examples["classes"].items())
    return f"{rows} rows" + (f" as {pairs} pairs" if pairs > rows else "") + (f" ({classes})" if classes else "")


def main() -> None:
    run = settings_from_command_line(Classify, __doc__)
    with one_line_errors():
        results = classify(run)
        PartialState().destroy_process_group()  # a process that exits while threads of it still talk may abort
    if not results:
        return
    path = Path(run.output_dir) / "results.json"
    by_seed = {seed: {name: result[name] for name in result if name != "settings"} for seed, result in results.items()}
    write_json(path, {"settings": run.settings, "seeds": by_seed})
    print_table(run, results)
    print(f"\n{path.parent}/seed*/model are ready for the Hub; {path} has the figures.")


if __name__ == "__main__":
    main()
