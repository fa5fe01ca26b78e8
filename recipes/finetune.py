"""
Fine-tunes a model to answer questions on long documents, and scores its answers by the length of the document.

    accelerate launch recipes/finetune.py recipes/finetune/narrativeqa.yaml model.source=... data.train=...

Fields of the YAML may be changed on the command line. Under the output folder: `model` (as it would go to the Hub),
`results.json` and `predictions.jsonl`. A run that was killed goes on from its last checkpoint, or with the answers if
the model is there; a finished one is not run again.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import evaluate
import torch
from accelerate.utils import release_memory
from disk import check_room, last_checkpoint, train_from
from finetune_settings import Finetune
from grid import origin, read_finished, run_once, write_json
from peft import LoraConfig, PeftModel, get_peft_model
from pretrained import open_pretrained
from prompts import Prompts, answer, collate
from questions import Example, evenly, hold_out, read_examples
from settings import SettingsError, settings_from_command_line
from tqdm.auto import tqdm
from training_arguments import blamed_on
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainingArguments, set_seed

from modeling_fire.evaluation.metrics import metric_path
from modeling_fire.training import FireTrainer


def finetune(run: Finetune) -> dict[str, Any]:
    """Does what is not done yet; returns the result, which is empty on all processes but the main one."""
    # 1. What is wrong with the settings or the data shows before any work.
    output, arguments, evaluation = Path(run.output_dir), run.arguments(), run.evaluation
    read_finished(output / "settings.json", run.settings)
    config, tokenizer = open_pretrained(run.model.source, "model.source", revision=run.model.revision)
    try:
        metric, lora = evaluate.load(metric_path("scrolls"), run.task), lora_config(run)
    except (ImportError, TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error
    train_examples, held_out = read_split(run)
    prompts = Prompts(tokenizer, max(run.data.length, *evaluation.lengths))
    evaluated = [] if arguments.eval_strategy == "no" else held_out
    features, eval_features = (
        [prompts.training(each, run.data.length) for each in tqdm(part, desc="Tokenising", disable=None)]
        for part in (train_examples, evaluated)
    )
    for example in held_out:
        prompts.prompt(example, min(evaluation.lengths) - evaluation.max_new_tokens)
    with arguments.main_process_first(local=False):
        output.mkdir(parents=True, exist_ok=True)
        if arguments.process_index == 0:
            write_json(output / "settings.json", {"settings": run.settings})

    # 2. Train and save, unless that is done.
    if not (output / "model").exists():
        train(run, arguments, lora, features, eval_features, tokenizer, config.dtype)
        release_memory()  # of the optimiser: the answers need the room
    arguments.distributed_state.wait_for_everyone()

    # 3. Answer with what was saved; the processes share the questions.
    model: Any = AutoModelForCausalLM.from_pretrained(output / "model")
    model.to(arguments.device)
    by_length = {
        length: answer(
            model, prompts, held_out, length, evaluation.max_new_tokens, arguments.per_device_eval_batch_size
        )
        for length in evaluation.lengths
    }
    if arguments.process_index != 0:
        return {}
    references = [example.answers for example in held_out]
    rows = [
        {"length": length, "id": example.id, "prediction": text, "references": example.answers}
        for length, texts in by_length.items()
        for example, text in zip(held_out, texts, strict=True)
    ]
    write_rows(output / "predictions.jsonl", rows)
    return {
        "scores": {
            length: metric.compute(predictions=texts, references=references) for length, texts in by_length.items()
        },
        "examples": {"train": len(train_examples), "held_out": len(held_out)},
        **json.loads((output / "losses.json").read_text()),
        "processes": arguments.world_size,
        **origin(),
    }


def read_split(run: Finetune) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those to be answered in the end."""
    examples, held_out = read_examples(run.data.train, run.task), run.data.held_out
    if isinstance(held_out, (int, float)):
        examples, others = hold_out(examples, held_out)
    else:
        others = read_examples(held_out, run.task)
    return examples, evenly(others, run.evaluation.num_examples)


def lora_config(run: Finetune) -> LoraConfig | None:
    if run.lora is None:
        return None
    return LoraConfig(**{"task_type": "CAUSAL_LM", "modules_to_save": ["position_bias"], **run.lora})


def train(
    run: Finetune,
    arguments: TrainingArguments,
    lora: LoraConfig | None,
    features: list[dict[str, torch.Tensor]],
    eval_features: list[dict[str, torch.Tensor]],
    tokenizer: Any,
    dtype: torch.dtype | None,
) -> None:
    """Leaves `model`, in `dtype`, whole or not at all, and before it `losses.json`."""
    output = Path(run.output_dir)
    set_seed(arguments.seed)  # where LoRA starts
    model: Any = load(run)
    if lora is not None:
        with blamed_on("lora"):  # if there are no such modules
            model = get_peft_model(model, lora)
    check_room(output, model.num_parameters(only_trainable=True), arguments)
    checkpoint = last_checkpoint(arguments.output_dir)
    arguments.eval_on_start &= checkpoint is None  # the start is step 0, not where the run goes on
    with blamed_on("training"):
        trainer = FireTrainer(
            model,
            arguments,
            train_dataset=features,
            eval_dataset=eval_features or None,
            data_collator=collate,
            bias_lr_multiplier=run.bias_lr_multiplier,
        )
    train_from(trainer, checkpoint)
    trainer.save_model(str(output / "trained"))
    if not trainer.is_world_process_zero():
        return
    losses = {
        f"{kind}_loss": {entry["step"]: entry[name] for entry in trainer.state.log_history if name in entry}
        for kind, name in (("train", "loss"), ("eval", "eval_loss"))
    }
    write_json(output / "losses.json", losses)
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    trained = str(output / "trained")
    if lora is None:
        model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.float32)
    else:
        model = PeftModel.from_pretrained(load(run), trained).merge_and_unload()
    unfinished = output / "model.unfinished"
    model.to(dtype).save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(output / "model")
    shutil.rmtree(output / "trained")


def load(run: Finetune) -> PreTrainedModel:
    """The model to start from, in float32; `training.bf16` computes in bfloat16."""
    return AutoModelForCausalLM.from_pretrained(run.model.source, revision=run.model.revision, dtype=torch.float32)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """As JSON lines, to a temporary name first."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    temporary.replace(path)


def main() -> None:
    run = settings_from_command_line(Finetune, __doc__)
    path = Path(run.output_dir) / "results.json"
    result = run_once(path, run.settings, lambda: finetune(run))
    if result is None:
        return
    counts = result["examples"]
    print(f"\n{run.task}: {counts['held_out']} held-out questions, trained on {counts['train']} at {run.data.length}")
    for length, figures in result["scores"].items():
        print(f"{length:>8} tokens" + "".join(f"  {name} {value:.2f}" for name, value in figures.items()))
    print(f"\n{Path(run.output_dir) / 'model'} is ready for the Hub; {path} has the figures.")


if __name__ == "__main__":
    main()
