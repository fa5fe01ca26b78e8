"""
Trains a FIRE model from scratch on a stream of text, and measures it by context length on the way.

    accelerate launch --config_file configuration/accelerate/cpu.yaml recipes/pretrain.py recipes/pretrain/tiny.yaml

Fields of the YAML may be changed on the command line. Under the output folder: `model` (as it would go to the Hub),
`results.json` and `checkpoints`. A run that was killed goes on from its last checkpoint, also on other machines; a
finished one is not run again.
"""

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from disk import check_room, last_checkpoint, train_from
from estimate import on_meta
from grid import origin, print_perplexities, read_finished, run_once, write_json
from pretrain_settings import Pretrain, check_shape
from pretrain_trainer import PretrainTrainer
from settings import settings_from_command_line
from stream import PackedStream, held_out_windows
from transformers import PreTrainedTokenizerBase, default_data_collator, set_seed

from modeling_fire import FireForCausalLM


def pretrain(run: Pretrain) -> dict[str, Any]:
    """Does what is not done yet; returns the result, which is empty on all processes but the main one."""
    # 1. What is wrong with the settings or the text shows before any work.
    output = Path(run.output_dir)
    arguments = run.arguments()
    read_finished(output / "settings.json", run.settings)
    tokenizer = run.load_tokenizer()
    config = run.config(tokenizer)
    check_room(output, on_meta(config).num_parameters(), arguments)
    checkpoint, state = last_checkpoint(arguments.output_dir), None
    if checkpoint is not None:
        check_shape(config, checkpoint)
        state = json.loads((Path(checkpoint) / "stream.json").read_text())
    data, evaluation = run.data, run.evaluation
    stream = PackedStream(
        data.train, data.column, tokenizer, run.length, data.shuffle_buffer, arguments.seed, run.batch_size, state
    )
    windows = windows_of(run, tokenizer)
    if arguments.process_index == 0:
        if state is None:
            next(islice(stream, run.batch_size - 1, None))  # one step; raises if there is not so much text
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "settings.json", {"settings": run.settings})

    # 2. Train, in float32; `training.bf16` computes in bfloat16.
    set_seed(arguments.seed)
    arguments.eval_on_start &= checkpoint is None  # the start is step 0, not where the run goes on
    trainer = PretrainTrainer(
        FireForCausalLM(config),
        arguments,
        train_dataset=stream,
        eval_dataset=windows,
        contexts=evaluation.contexts,
        num_targets=evaluation.num_targets,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        bias_lr_multiplier=run.bias_lr_multiplier,
    )
    train_from(trainer, checkpoint)

    # 3. Measure and save.
    if arguments.max_steps not in eval_losses(trainer):
        trainer.evaluate()
    unfinished = output / "model.unfinished"
    trainer.save_model(str(unfinished))
    if not trainer.is_world_process_zero():
        return {}
    shutil.rmtree(output / "model", ignore_errors=True)
    unfinished.rename(output / "model")
    trainer.state.save_to_json(str(output / "trainer_state.json"))
    by_step = eval_losses(trainer)
    return {
        "loss": by_step[arguments.max_steps],
        "train_loss": {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry},
        "eval_loss": by_step,
        "processes": arguments.world_size,
        **origin(),
    }


def windows_of(run: Pretrain, tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """What is held out: the main process reads it, as all text, and the others get it from there."""
    windows: Any = None
    if PartialState().is_main_process:
        data, evaluation = run.data, run.evaluation
        longest = max(evaluation.contexts) + 1
        windows = held_out_windows(data.held_out, data.column, tokenizer, longest, evaluation.num_windows)
    [windows] = broadcast_object_list([windows])
    return windows


def eval_losses(trainer: PretrainTrainer) -> dict[int, dict[int, float]]:
    """What was measured so far, by step and context."""
    losses: dict[int, dict[int, float]] = {}
    for entry in trainer.state.log_history:
        for context in trainer.contexts:
            if f"eval_loss_{context}" in entry:
                losses.setdefault(int(entry["step"]), {})[context] = entry[f"eval_loss_{context}"]
    return losses


def main() -> None:
    run = settings_from_command_line(Pretrain, __doc__)
    path = Path(run.output_dir) / "results.json"
    result = run_once(path, run.settings, lambda: pretrain(run))
    if result is None:
        return
    losses = {int(context): loss for context, loss in result["loss"].items()}
    print(f"\nPerplexity of the same held-out tokens, trained at {run.length}, by context")
    print_perplexities({Path(run.output_dir).name: {0: losses}})
    print(f"\n{Path(run.output_dir) / 'model'} is ready for the Hub; {path} has the figures.")


if __name__ == "__main__":
    main()
