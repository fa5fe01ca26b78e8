"""transformers' Trainer for a packed stream: goes on in any layout of processes, and evaluates by context."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from stream import PackedStream
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from modeling_fire.evaluation import loss_by_context
from modeling_fire.training import FireTrainer


# Every process reads the whole state and keeps its part.
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class PretrainTrainer(FireTrainer):
    """
    [`FireTrainer`] on a [`PackedStream`].

    One process, DDP and FSDP2 write the same checkpoints, from which each of them goes on: Trainer itself would write
    other files under FSDP2, and read only those. DeepSpeed keeps its own format.

    Args:
        train_dataset ([`PackedStream`]): read by the main process, which hands the other processes their parts.
        eval_dataset (`torch.LongTensor` of shape `(num_windows, max(contexts) + 1)`): held-out windows.
        contexts (`list[int]`): lengths in tokens; `evaluate` logs `eval_loss_<context>` for each.
        num_targets (`int`): tokens of each window that count, see [`~modeling_fire.evaluation.loss_by_context`].

    The other arguments are those of [`FireTrainer`].
    """

    def __init__(
        self,
        *args,
        train_dataset: PackedStream,
        eval_dataset: torch.Tensor,
        contexts: list[int],
        num_targets: int,
        **kwargs,
    ):
        given: Any = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
        super().__init__(*args, **given, **kwargs)
        self.stream = train_dataset
        self.windows = eval_dataset
        self.contexts = contexts
        self.num_targets = num_targets

    def evaluate(self, *args, metric_key_prefix: str = "eval", **kwargs) -> dict[str, float]:
        """The mean loss of the held-out targets by context, in nats per token; the processes share the windows."""
        part = self.windows[self.args.process_index :: self.args.world_size]
        model: Any = self.model
        losses = loss_by_context(model, part, self.contexts, self.num_targets)
        metrics = {}
        for context in self.contexts:
            loss = self.accelerator.gather(torch.tensor(losses[context], device=self.args.device))
            metrics[f"{metric_key_prefix}_loss_{context}"] = loss.mean().item()
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Trainer saves these before trainer_state.json, which makes a checkpoint a whole one.
    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            windows = self.state.global_step * self.stream.windows_per_step
            (folder / "stream.json").write_text(json.dumps(self.stream.state_after(windows)))
        if self.is_deepspeed_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        optimizer = get_optimizer_state_dict(self.model, self.optimizer, options=WHOLE)
        if self.args.should_save:
            torch.save(optimizer, folder / "optimizer.pt")
            torch.save(self.lr_scheduler.state_dict(), folder / "scheduler.pt")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self.is_deepspeed_enabled or checkpoint is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        state = torch.load(Path(checkpoint) / "optimizer.pt", map_location="cpu", weights_only=True)
        set_optimizer_state_dict(self.model, self.optimizer, state, options=WHOLE)
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.is_fsdp_enabled:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        weights: Any = load_file(Path(resume_from_checkpoint) / "model.safetensors")
        # Not strict: of tied embeddings a file has one.
        set_model_state_dict(model or self.model, weights, options=replace(WHOLE, strict=False))
