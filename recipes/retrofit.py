"""
Makes a FIRE model of a model with rotation: convert, calibrate, train on a little, and measure by context length.

    accelerate launch recipes/retrofit.py recipes/retrofit/stories260k.yaml model.source=... data.text=...

The source may also be what `fire convert` made of such a model.

Fields of the YAML may be changed on the command line. Under the output folder: `model` (as it would go to the Hub) and
`results.json`. A run that was killed goes on from its last checkpoint; a finished one is not run again.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from disk import check_room, last_checkpoint, train_from
from grid import losses_by_context, origin, print_perplexities, read_finished, run_once, write_json
from peft import PeftModel, get_peft_model
from pretrained import copy_pretrained
from retrofit_plan import Plan, changed_config
from retrofit_settings import Retrofit
from sampled import check_sampled, sample, with_sampled
from settings import SettingsError, settings_from_command_line
from training_arguments import blamed_on
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from windows import Windows, as_dataset

from modeling_fire import FireConfig, FireForCausalLM
from modeling_fire.conversion import check_out, convert
from modeling_fire.evaluation import loss_by_context
from modeling_fire.training import FireTrainer


def retrofit(run: Retrofit) -> dict[str, Any]:
    """Does what is not done yet; returns the result, which is empty on all processes but the main one."""
    # 1. What is wrong with the settings or the text shows before any work.
    plan = Plan.of(run)
    arguments, output = plan.arguments, Path(run.output_dir)
    converted, settings, checkpoint = output / "converted", "settings.json", last_checkpoint(arguments.output_dir)
    # What is there is gone on with only if it was made with these settings. What was refused left nothing to describe.
    check_sampled(run)
    read_finished(converted / settings, run.conversion)
    begun = None if checkpoint is None else read_finished(output / settings, run.settings)
    if begun is not None and begun["windows_per_step"] != plan.windows_per_step:
        raise SettingsError(
            f"{output} was begun with {begun['windows_per_step']} windows a step, not {plan.windows_per_step}: go on "
            "with as many processes as then, or choose another `output_dir`."
        )

    # 2. Sample, convert and calibrate, as far as that is not done: the last two once, while other processes wait.
    if run.data.is_sampled:
        sample(run, arguments, lambda: original(run, arguments))
    with arguments.main_process_first(local=False):
        if not (converted / settings).exists():
            make_converted(run, plan, converted)
    windows = with_sampled(plan.windows, output)

    # 3. Heal, in float32; `training.bf16` computes in bfloat16.
    changes = run.changes
    set_seed(arguments.seed)  # where LoRA starts
    model: Any = load(converted, changes)
    if plan.lora is not None:
        model = get_peft_model(model, plan.lora)
    check_room(output, model.num_parameters(only_trainable=True), arguments)
    distillation: dict[str, Any] = {}
    if run.heal.distill is not None:
        teacher = original(run, arguments).to(run.heal.teacher_device or arguments.device)
        distillation = {"teacher": teacher, "distillation_weight": run.heal.distill}
    arguments.eval_on_start &= checkpoint is None  # the start is step 0, not where the run goes on
    with blamed_on("training"):
        trainer = FireTrainer(
            model,
            arguments,
            train_dataset=as_dataset(windows.train),
            # The tokens and contexts that the training length is measured with in the end.
            eval_dataset=as_dataset(windows.held_out[:, -run.data.length - 1 :], run.evaluation.num_targets),
            data_collator=default_data_collator,
            callbacks=None if plan.annealing is None else [plan.annealing],
            bias_lr_multiplier=run.heal.bias_lr_multiplier,
            **distillation,
        )
    if trainer.is_world_process_zero():
        write_json(output / settings, {"settings": run.settings, "windows_per_step": plan.windows_per_step})
    train_from(trainer, checkpoint)
    trainer.save_model(str(output / "trained"))
    if not trainer.is_world_process_zero():
        return {}

    # 4. Save in the type of the source, adapters merged, and measure what was saved.
    if plan.lora is None:
        model = load(output / "trained")
    else:
        if run.heal.anneal is not None:
            changes = {**changes, "rope_parameters": None}
        model = PeftModel.from_pretrained(load(converted, changes), str(output / "trained")).merge_and_unload()
    save(model.to(FireConfig.from_pretrained(converted).dtype), plan.tokenizer, output / "model")
    shutil.rmtree(output / "trained")
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    history = trainer.state.log_history
    return {
        "loss": measure(run, model.to(arguments.device), windows),
        "train_loss": {entry["step"]: entry["loss"] for entry in history if "loss" in entry},
        "eval_loss": {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry},
        "tokens_per_step": plan.windows_per_step * run.data.length,
        **origin(),
    }


def make_converted(run: Retrofit, plan: Plan, converted: Path) -> None:
    """As `converted`, once it is whole and says what it was made with. All that a killed run leaves of it goes."""
    check_out(converted, run.model.source, overwrite=False)
    unfinished = converted.with_name(f"{converted.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    folder = unfinished / converted.name
    if plan.is_fire:
        copy_pretrained(run.model.source, folder, run.model.revision)
    else:
        options = {"rotation": run.rotation, "max_length": run.model.max_length, **run.source}
        convert(run.model.source, folder, calibrate=plan.calibrate, **options)
    write_json(folder / "settings.json", {"settings": run.conversion})
    folder.rename(converted)
    unfinished.rmdir()


def original(run: Retrofit, arguments: TrainingArguments) -> Any:
    """The source, in the type that is computed in."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float32
    return AutoModelForCausalLM.from_pretrained(run.model.source, dtype=dtype, **run.source)


def load(folder: Path, changes: dict[str, Any] | None = None) -> FireForCausalLM:
    """The model in `folder`, in float32, with `changes` to its config; those to `rope_parameters` go by name."""
    config = changed_config(FireConfig.from_pretrained(folder), changes or {})
    return FireForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """As `folder`, once it is whole."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)


def measure(run: Retrofit, model: PreTrainedModel, windows: Windows) -> dict[int, list[float]]:
    """The loss of each held-out window, by context."""
    return loss_by_context(model, windows.held_out, run.evaluation.contexts, run.evaluation.num_targets)


def main() -> None:
    run = settings_from_command_line(Retrofit, __doc__)
    path = Path(run.output_dir) / "results.json"
    result = run_once(path, run.settings, lambda: retrofit(run))
    if result is None:
        return
    name = Path(run.output_dir).name
    print(f"\nPerplexity of the same held-out tokens, trained at {run.data.length}, by context")
    print_perplexities(losses_by_context({name: {0: result}}))
    print(f"\n{Path(run.output_dir) / 'model'} is ready for the Hub; {path} has the figures.")


if __name__ == "__main__":
    main()
