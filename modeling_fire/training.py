"""
What training a FIRE model, or making one of a model with rotation, adds to transformers' Trainer.

Nothing of this travels with saved models.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.dynamic_module_utils import custom_object_save
from transformers.modelcard import TrainingSummary
from transformers.trainer import TRAINING_ARGS_NAME

from .cards import Base, Training, write_card
from .conversion import RECORD_NAME
from .evaluation.attention import learned_scales
from .modeling_fire import FireModel


class FireTrainer(Trainer):
    """
    transformers' Trainer with optimiser groups for the position bias, and with distillation from a teacher.

    Trainer makes the optimiser as ever, so that any `optim` that goes by groups will do; so will FSDP, and DeepSpeed
    if its own configuration names no optimiser. Vectors and scalars, `c` and `L_multiplier` among them, never decay.

    Whenever a loss is logged, `state.log_history` gets an entry with `c` and `L` of every layer as well: `fire plot
    --history trainer_state.json` draws them.

    Args:
        bias_lr_multiplier (`float`, *optional*, defaults to 1.0):
            Learning rate of the position bias, as a multiple of `learning_rate`. The schedule is the same.
        bias_weight_decay (`float`, *optional*, defaults to 0.0): Weight decay of the matrices of the position bias.
        teacher (`PreTrainedModel`, *optional*):
            A causal language model with the same vocabulary. It stays on its device, which need not be the student's,
            and in its dtype.
        distillation_weight (`float`, *optional*, defaults to 1.0):
            With a teacher, the training loss is `w KL(teacher || student) + (1 - w)` times the next-token loss. Both
            are means over the tokens whose label is not -100, in nats, and are accumulated over batches and processes
            as Trainer does. The evaluation loss is always the next-token loss.

    The other arguments are those of `Trainer`.

    Raises:
        ValueError: if a factor or a weight is out of its range; with a teacher, if its vocabulary is of another size
            than the student's, if Trainer is asked for another loss as well, or if one process has several GPUs.
    """

    def __init__(
        self,
        *args,
        bias_lr_multiplier: float = 1.0,
        bias_weight_decay: float = 0.0,
        teacher: PreTrainedModel | None = None,
        distillation_weight: float = 1.0,
        **kwargs,
    ):
        if not 0 < bias_lr_multiplier < math.inf:
            raise ValueError(f"`bias_lr_multiplier` must be positive and finite, got {bias_lr_multiplier}.")
        if not 0 <= bias_weight_decay < math.inf:
            raise ValueError(f"`bias_weight_decay` must be finite and not negative, got {bias_weight_decay}.")
        if not 0 <= distillation_weight <= 1:
            raise ValueError(f"`distillation_weight` must be in [0, 1], got {distillation_weight}.")
        super().__init__(*args, **kwargs)
        self.bias_lr_multiplier = bias_lr_multiplier
        self.bias_weight_decay = bias_weight_decay
        self.teacher = teacher
        self.distillation_weight = distillation_weight
        if teacher is None:
            return
        student: Any = self.model
        if teacher.config.vocab_size != student.config.vocab_size:
            raise ValueError(
                f"The teacher has {teacher.config.vocab_size} tokens and the student {student.config.vocab_size}: "
                "distillation compares the probabilities of the same tokens."
            )
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise ValueError("With a `teacher` there is no `compute_loss_func` and no `label_smoothing_factor`.")
        if self.args.n_gpu > 1:
            raise ValueError(
                "Distillation takes one process a GPU: start with `accelerate launch`, or set CUDA_VISIBLE_DEVICES."
            )
        teacher.eval()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's. The folder of the outputs, where no other is named, gets the card as well."""
        super().save_model(output_dir, _internal_call)
        if output_dir is None and not _internal_call and not self.args.push_to_hub:  # which writes it
            self.create_model_card()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Trainer's, without its pickle of the arguments: nothing reads it, and on the Hub pickles are warned of."""
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            (Path(output_dir or self.args.output_dir) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def init_hf_repo(self, *args, **kwargs) -> None:
        """Trainer's. From then on what is pushed on the way has the model's code, which Trainer pushes at the end."""
        super().init_hf_repo(*args, **kwargs)
        model: Any = self.model
        if self.is_world_process_zero() and isinstance(model, PreTrainedModel) and model._auto_class is not None:
            Path(self.args.output_dir).mkdir(parents=True, exist_ok=True)
            custom_object_save(model, self.args.output_dir)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """
        Trainer's, which `push_to_hub` calls as well, with the card of [`~modeling_fire.cards.write_card`]. Of a model
        on the Hub, or of a folder, that this one was loaded from, `finetuned_from` need not be told.
        """
        if not self.is_world_process_zero():
            return
        summary = TrainingSummary.from_trainer(
            self,
            language=language,
            license=license,
            tags=tags,
            model_name=model_name,
            finetuned_from=finetuned_from,
            tasks=tasks,
            dataset_tags=dataset_tags,
            dataset=dataset,
            dataset_args=dataset_args,
        )
        model: Any = self.accelerator.unwrap_model(self.model)
        is_adapter = isinstance(model, PeftModel)
        base = model.get_base_model() if is_adapter else model
        start = finetuned_from or base.config._name_or_path
        folder = Path(self.args.output_dir)
        if start and Path(start).resolve() == folder.resolve() and (folder / RECORD_NAME).is_file():
            start = ""  # a conversion, trained in place: its record has what it was made of
        training = Training(
            config={**base.config.to_dict(), "architectures": [type(base).__name__]},
            adapter=model.active_peft_config.to_dict() if is_adapter else None,
            base=Base.of(start, known=finetuned_from is not None) if start else None,
            state={"log_history": self.state.log_history, "global_step": self.state.global_step},
            arguments=self.args.to_dict() | ({"num_train_epochs": None} if self.args.max_steps > 0 else {}),
            summary=summary,
        )
        write_card(self.args.output_dir, name=self.hub_model_id or summary.model_name, training=training)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimiser, with the position bias in groups of its own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        # By name: ZeRO-3 takes the shapes away. Only weights and T5's table are matrices.
        decay = {
            parameter: self.bias_weight_decay if name.endswith((".weight", ".table")) else 0.0
            for name, parameter in (self.model if model is None else model).named_parameters()
            if "position_bias" in name
        }
        groups = []
        for group in optimizer.param_groups:
            groups.append({**group, "params": [p for p in group["params"] if p not in decay]})
            for weight_decay in sorted(set(decay.values())):
                parameters = [p for p in group["params"] if decay.get(p) == weight_decay]
                lr = group["lr"] * self.bias_lr_multiplier
                groups.append({**group, "params": parameters, "lr": lr, "weight_decay": weight_decay})
        optimizer.param_groups = [group for group in groups if group["params"]]
        return optimizer

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log(logs, *args, **kwargs)
        scales = learned_scales(self.model) if "loss" in logs else []
        if scales:
            # Into the history alone: a number a layer is more than a progress bar should print.
            entry: Any = {name: [scale[name] for scale in scales] for name in ("c", "L")}
            self.state.log_history.append({"step": self.state.global_step, **entry})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        if self.teacher is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad():
            teacher_logits = self.teacher(**send_to_device(given, self.teacher.device), use_cache=False).logits
        # Trainer asks this function instead of the model, and scales both losses alike for accumulation and processes.
        self.compute_loss_func = partial(distillation_loss, teacher_logits, weight=self.distillation_weight)
        try:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        finally:
            self.compute_loss_func = None


def distillation_loss(
    teacher_logits: torch.Tensor,
    outputs: Any,
    labels: torch.LongTensor,
    num_items_in_batch: torch.Tensor | int | None = None,
    weight: float = 1.0,
) -> torch.Tensor:
    """
    `weight KL(teacher || student) + (1 - weight)` times the next-token loss, computed in float32.

    Args:
        teacher_logits (`torch.Tensor` of shape `(batch, length, vocab_size)`): on any device.
        outputs (`CausalLMOutputWithPast`): of the student; `logits` have the same shape.
        labels (`torch.LongTensor` of shape `(batch, length)`): not shifted yet; -100 does not count.
        num_items_in_batch (`torch.Tensor` or `int`, *optional*):
            What the sum over tokens is divided by; by default the number of tokens that count.
        weight (`float`, *optional*, defaults to 1.0): of the divergence.

    Returns:
        `torch.Tensor` of shape `()`: nats per token.
    """
    targets = functional.pad(labels[:, 1:], (0, 1), value=-100)
    counted = targets != -100
    # Picked before they are moved and widened: of these tensors each copy counts.
    teacher = teacher_logits[counted.to(teacher_logits.device)].to(labels.device).float().log_softmax(-1)
    student = outputs.logits[counted].float().log_softmax(-1)
    divergence = functional.kl_div(student, teacher, reduction="sum", log_target=True)
    next_token = functional.nll_loss(student, targets[counted], reduction="sum")
    total = counted.sum() if num_items_in_batch is None else num_items_in_batch
    return (weight * divergence + (1 - weight) * next_token) / total


class RotationAnnealing(TrainerCallback):
    """
    Scales the angles of the rotation from 1 to 0 during the first part of the training, and removes it at the end.

    A checkpoint on the way has the rotation at the scale it had reached, and resuming goes on from there. A training
    that ends before the scale is 0 leaves the rotation in the model.

    Args:
        fraction (`float`): part of the training steps after which nothing is rotated any more, in (0, 1].

    Raises:
        ValueError: if `fraction` is out of range; and as training begins, if the model has no rotation or if
            `load_best_model_at_end` could bring back weights that were trained with one.
    """

    def __init__(self, fraction: float):
        if not 0.0 < fraction <= 1.0:
            raise ValueError(f"`fraction` must be in (0, 1], got {fraction}.")
        self.fraction = fraction

    def angle_scale(self, progress: float) -> float:
        """The scale of the angles after the share `progress` of the steps: a straight line."""
        return max(0.0, 1.0 - progress / self.fraction)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        if not any(decoder.rotary_emb is not None for decoder in decoders(kwargs["model"])):
            raise ValueError("The model has no rotation to anneal: convert it with `rotation='keep'`.")
        if args.load_best_model_at_end:
            raise ValueError("`load_best_model_at_end` may bring back weights that need the rotation: turn it off.")
        self.set_scale(kwargs["model"], state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        # At the end of a step rather than at the beginning of the next, so that evaluation and checkpoints in between
        # have the scale that goes with their step.
        self.set_scale(kwargs["model"], state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs):
        for decoder in decoders(kwargs["model"]):
            if decoder.config.rope_angle_scale == 0.0:
                decoder.rotary_emb = None
                decoder.config.rope_parameters = None
                decoder.config.rope_angle_scale = 1.0

    def set_scale(self, model: nn.Module, state: TrainerState) -> None:
        for decoder in decoders(model):
            decoder.config.rope_angle_scale = self.angle_scale(state.global_step / state.max_steps)


def decoders(model: nn.Module) -> list[FireModel]:
    """The FIRE decoders in `model`, whatever wraps them."""
    return [module for module in model.modules() if isinstance(module, FireModel)]


__all__ = ["FireTrainer", "RotationAnnealing"]
