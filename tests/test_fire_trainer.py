"""Trainer's additions for FIRE: optimiser groups, distillation and annealing of the rotation."""

import math
from unittest import mock

import pytest
import torch
from helpers import FEW_STEPS, random_ids, tiny_model
from torch.nn import functional
from transformers import TrainerCallback, TrainingArguments

from modeling_fire import FireForCausalLM
from modeling_fire.evaluation import learned_scales
from modeling_fire.modeling_fire import FireModel
from modeling_fire.training import FireTrainer, RotationAnnealing


ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def rows(count: int, length: int = 16, masked: bool = False) -> list[dict]:
    """Random tokens; if `masked`, ever fewer labels count, so that a mean of means would differ."""
    ids = random_ids(count, length)
    labels = ids.clone()
    for number, row in enumerate(labels):
        row[: masked * number % length] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]


def build_trainer(model, folder, data=None, callbacks=None, teacher=None, **changes) -> FireTrainer:
    own = ("bias_lr_multiplier", "bias_weight_decay", "distillation_weight", "compute_loss_func")
    fields = FEW_STEPS | {name: value for name, value in changes.items() if name not in own}
    return FireTrainer(
        model,
        TrainingArguments(str(folder), **fields),
        train_dataset=data or rows(8),
        eval_dataset=rows(4),
        callbacks=callbacks,
        teacher=teacher,
        **{name: value for name, value in changes.items() if name in own},
    )


def losses(trainer: FireTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_lora(model):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["position_bias"])
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("changes", [{}, {"position_bias": "t5"}, {"position_bias": "kerple_log"}], ids=str)
@pytest.mark.parametrize("lora", [False, True], ids=["all_parameters", "lora"])
def test_the_bias_has_optimizer_groups_of_its_own(tmp_path, changes, lora):
    model = tiny_model(attention_bias=True, **changes)
    model = with_lora(model) if lora else model
    fields = {"learning_rate": 1e-3, "weight_decay": 0.1, "bias_lr_multiplier": 10, "bias_weight_decay": 0.01}
    groups = build_trainer(model, tmp_path, **fields).create_optimizer().param_groups
    assert all(group["params"] for group in groups)
    by_parameter = {id(parameter): group for group in groups for parameter in group["params"]}
    assert len(by_parameter) == sum(len(group["params"]) for group in groups)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in trained.values()} == by_parameter.keys()
    for name, parameter in trained.items():
        group = by_parameter[id(parameter)]
        of_bias = "position_bias" in name
        decay = 0.0 if parameter.ndim == 1 else 0.01 if of_bias else 0.1
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(1e-2 if of_bias else 1e-3), decay), name


def test_c_and_L_move_with_the_learning_rate_of_the_bias(tmp_path):
    """Adam's first step is the learning rate, whatever the gradient: decay would add to it."""
    model = tiny_model()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fields = {"max_steps": 1, "weight_decay": 0.5, "bias_lr_multiplier": 3, "max_grad_norm": 0}
    build_trainer(model, tmp_path, rows(4, 32), **fields).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("position_bias.c", "L_multiplier")):
            assert (parameter - before[name]).abs().item() == pytest.approx(0.03, rel=1e-3), name


def test_c_and_L_are_kept_by_step(tmp_path):
    model = tiny_model()
    trainer = build_trainer(model, tmp_path, rows(4, 32), logging_steps=1, max_steps=2)
    trainer.train()
    entries = [entry for entry in trainer.state.log_history if "L" in entry]
    assert [entry["step"] for entry in entries] == [1, 2] and entries[0]["c"] != entries[1]["c"]
    last = {name: [scale[name] for scale in learned_scales(model)] for name in ("c", "L")}
    assert entries[-1] == {"step": 2, **last}
    tiny = build_trainer(tiny_model(position_bias="alibi"), tmp_path, rows(4, 32), max_steps=1)
    tiny.train()
    assert not any("c" in entry for entry in tiny.state.log_history)


def test_the_schedule_scales_both_learning_rates(tmp_path):
    trainer = build_trainer(tiny_model(), tmp_path, bias_lr_multiplier=3, lr_scheduler_type="linear", max_steps=4)
    trainer.train()
    rates = {group["lr"] for group in trainer.optimizer.param_groups}
    assert rates == {0.0}
    assert sorted({group["initial_lr"] for group in trainer.optimizer.param_groups}) == [0.01, pytest.approx(0.03)]


def expected_loss(student, teacher, data: list[dict], weight: float) -> float:
    """Token by token, in float64."""
    divergences, next_tokens = [], []
    for row in data:
        with torch.no_grad():
            student_logits, teacher_logits = (
                model(row["input_ids"][None]).logits[0].double() for model in (student, teacher)
            )
        for position, label in enumerate(row["labels"][1:]):
            if label == -100:
                continue
            ours, theirs = student_logits[position].log_softmax(-1), teacher_logits[position].log_softmax(-1)
            divergences.append((theirs.exp() * (theirs - ours)).sum())
            next_tokens.append(-ours[label])
    return (weight * sum(divergences) / len(divergences) + (1 - weight) * sum(next_tokens) / len(next_tokens)).item()


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_distillation_loss(tmp_path, weight):
    student, teacher = tiny_model(), tiny_model(seed=1)
    data = rows(4, masked=True)
    expected = expected_loss(student, teacher, data, weight)
    trainer = build_trainer(student, tmp_path, data, teacher=teacher, distillation_weight=weight, max_steps=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)
    # Evaluation knows no teacher, before training or after.
    plain = expected_loss(trainer.model.eval(), teacher, data, 0.0)
    assert trainer.evaluate(data)["eval_loss"] == pytest.approx(plain, rel=1e-5)


def test_a_model_diverges_not_from_itself(tmp_path):
    trainer = build_trainer(tiny_model(), tmp_path, teacher=tiny_model(), max_steps=1, learning_rate=0.0)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(0.0, abs=1e-6)


def test_distillation_accumulates_as_one_large_batch(tmp_path):
    """Rows with unequal numbers of labels, so that a mean of means would differ."""
    fields = {"teacher": tiny_model(seed=1), "distillation_weight": 0.7, "optim": "sgd", "learning_rate": 0.1}
    large, small = tiny_model(), tiny_model()
    one = build_trainer(large, tmp_path, rows(16, masked=True), per_device_train_batch_size=8, **fields)
    one.train()
    parts = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    several = build_trainer(small, tmp_path, rows(16, masked=True), **parts, **fields)
    several.train()
    assert losses(several) == pytest.approx(losses(one), rel=1e-5)
    torch.testing.assert_close(small.state_dict(), large.state_dict(), rtol=1e-4, atol=1e-5)


def test_distillation_learns_the_teacher_with_lora_and_a_teacher_in_bfloat16(tmp_path):
    teacher = tiny_model(seed=1).to(torch.bfloat16)
    teacher.train()
    trainer = build_trainer(with_lora(tiny_model()), tmp_path, teacher=teacher, max_steps=20, learning_rate=0.02)
    assert not teacher.training
    trainer.train()
    assert losses(trainer)[-1] < 0.8 * losses(trainer)[0]
    assert teacher.dtype == torch.bfloat16
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("field", ["bias_lr_multiplier", "bias_weight_decay", "distillation_weight"])
def test_what_is_out_of_range_is_refused(tmp_path, field):
    with pytest.raises(ValueError, match=f"`{field}` must be .*, got -1.0"):
        build_trainer(tiny_model(), tmp_path, **{field: -1.0})


def test_a_teacher_that_cannot_be_imitated_is_refused(tmp_path):
    with pytest.raises(ValueError, match="The teacher has 100 tokens and the student 99"):
        build_trainer(tiny_model(), tmp_path, teacher=tiny_model(vocab_size=100))
    with pytest.raises(ValueError, match="no `label_smoothing_factor`"):
        build_trainer(tiny_model(), tmp_path, teacher=tiny_model(), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="no `compute_loss_func`"):
        build_trainer(tiny_model(), tmp_path, teacher=tiny_model(), compute_loss_func=functional.cross_entropy)
    with mock.patch.object(TrainingArguments, "n_gpu", 2), pytest.raises(ValueError, match="takes one process a GPU"):
        build_trainer(tiny_model(), tmp_path, teacher=tiny_model())


def scales_of(model) -> list[float]:
    """Filled with the scale of every forward that trains."""
    scales: list[float] = []
    decoder = next(module for module in model.modules() if isinstance(module, FireModel))
    decoder.register_forward_pre_hook(
        lambda module, _: scales.append(module.config.rope_angle_scale) if module.training else None
    )
    return scales


@pytest.mark.parametrize("lora", [False, True], ids=["all_parameters", "lora"])
def test_annealing_ends_in_a_model_without_rotation(tmp_path, lora):
    model = tiny_model(**ROPE)
    model = with_lora(model) if lora else model
    scales = scales_of(model)
    trainer = build_trainer(model, tmp_path, callbacks=[RotationAnnealing(0.5)], max_steps=8)
    trainer.train()
    assert scales == [1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0, 0.0]

    trained = model.merge_and_unload() if lora else model
    trained.save_pretrained(tmp_path / "model")
    reloaded = FireForCausalLM.from_pretrained(tmp_path / "model")
    assert reloaded.config.rope_parameters is None and reloaded.config.rope_angle_scale == 1.0
    assert reloaded.model.rotary_emb is None
    trained.eval()
    torch.testing.assert_close(reloaded(random_ids(2, 20)).logits, trained(random_ids(2, 20)).logits, rtol=0, atol=0)


def test_the_rotation_goes_only_where_its_scale_is_0(tmp_path):
    """With `fraction=1` that is after the last step; a training that is stopped earlier still needs the rotation."""
    whole, stopped = tiny_model(**ROPE), tiny_model(**ROPE)
    build_trainer(whole, tmp_path, callbacks=[RotationAnnealing(1.0)], max_steps=4).train()
    assert whole.config.rope_parameters is None

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = build_trainer(stopped, tmp_path, callbacks=[RotationAnnealing(1.0), Stop()], max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 2
    assert stopped.config.rope_parameters is not None and stopped.config.rope_angle_scale == 0.5


def test_resuming_an_annealing_is_not_stopping(tmp_path):
    fields = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 1}

    def build(model):
        return build_trainer(model, tmp_path, rows(24), [RotationAnnealing(0.75)], **fields)

    whole = build(tiny_model(**ROPE))
    whole.train()
    # A checkpoint has the scale that goes with its step, and is a model in itself.
    config = FireForCausalLM.from_pretrained(tmp_path / "checkpoint-2").config
    assert config.rope_angle_scale == pytest.approx(1 - 2 / 6)

    resumed = build(tiny_model(seed=1, **ROPE))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    evaluations = [
        [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        for trainer in (whole, resumed)
    ]
    assert evaluations[0] == evaluations[1] and len(evaluations[0]) == 8
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_annealing_refuses_what_it_cannot_do(tmp_path):
    for fraction in (0.0, 1.5, math.nan):
        with pytest.raises(ValueError, match="`fraction` must be in"):
            RotationAnnealing(fraction)
    with pytest.raises(ValueError, match="has no rotation to anneal"):
        build_trainer(tiny_model(), tmp_path, callbacks=[RotationAnnealing(0.5)]).train()
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 1}
    trainer = build_trainer(tiny_model(**ROPE), tmp_path, callbacks=[RotationAnnealing(0.5)], save_steps=1, **best)
    with pytest.raises(ValueError, match="`load_best_model_at_end` may bring back"):
        trainer.train()
