"""Training with transformers' Trainer, PEFT and TRL, on the bytes of a source file: what they promise holds here."""

import argparse
from pathlib import Path

import pytest
import torch
from helpers import FEW_STEPS, tiny_model
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments, default_data_collator

from modeling_fire import (
    FireForCausalLM,
    FireForSequenceClassification,
    FireForTokenClassification,
    attention_fire,
)


TEXT = Path(argparse.__file__).read_bytes()


def byte_model(**changes) -> FireForCausalLM:
    return tiny_model(vocab_size=256, **changes)


def documents(*lengths: int) -> list[dict]:
    """Consecutive stretches of `TEXT`."""
    stops = torch.tensor(lengths).cumsum(0).tolist()
    pieces = [list(TEXT[stop - length : stop]) for length, stop in zip(lengths, stops, strict=True)]
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def pad_batch(features: list[dict]) -> dict[str, torch.Tensor]:
    ids = [torch.tensor(feature["input_ids"]) for feature in features]
    padded = pad_sequence(ids, batch_first=True, padding_value=-1)
    mask = padded.ne(-1)
    return {"input_ids": padded.where(mask, 0), "attention_mask": mask.long(), "labels": padded.where(mask, -100)}


def build_trainer(model, folder, data, collator=pad_batch, **arguments) -> Trainer:
    arguments = TrainingArguments(str(folder), **FEW_STEPS | arguments)
    return Trainer(model, arguments, train_dataset=data, data_collator=collator)


def train(model, folder, data, **arguments) -> list[float]:
    """Trains `model` in place; returns the loss of each step."""
    trainer = build_trainer(model, folder, data, **arguments)
    trainer.train()
    return losses(trainer)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def copy_of_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def backward(model, data: list[dict], collator=pad_batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of a training-mode forward, with the same dropout in every call."""
    model.train().zero_grad()
    torch.manual_seed(0)
    loss = model(**collator(data)).loss
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bfloat16_autocast"])
def test_loss_falls(tmp_path, bf16):
    model = byte_model(initializer_range=0.05)
    before = copy_of_state(model)
    dtypes = {"lm_head": set(), "position_bias": set()}
    model.lm_head.register_forward_hook(lambda *hook: dtypes["lm_head"].add(hook[-1].dtype))
    for layer in model.model.layers:
        layer.self_attn.position_bias.register_forward_hook(
            lambda *hook: dtypes["position_bias"].add(hook[-1].slope.dtype)
        )

    history = train(model, tmp_path, documents(*[64] * 40), max_steps=30, per_device_train_batch_size=8, bf16=bf16)
    assert history[-1] < 0.65 * history[0]
    assert dtypes == {"lm_head": {torch.bfloat16 if bf16 else torch.float32}, "position_bias": {torch.float32}}
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name]) == name.endswith(("init_L", "mlp.2.bias")), name


def test_the_fused_path_trains_as_the_plain_formula_does(tmp_path):
    """200 steps, well past where rounding is amplified: losses and learned biases stay together."""
    runs = {}
    for name in ("eager", "fire"):
        model = byte_model(attn_implementation=name, initializer_range=0.05, num_key_value_heads=1)
        history = train(model, tmp_path, documents(*[48] * 60), max_steps=200, learning_rate=0.003)
        runs[name] = history, {key: value for key, value in model.state_dict().items() if "position_bias" in key}
    (expected, expected_bias), (actual, actual_bias) = runs.values()
    assert expected[-1] < 0.5 * expected[0]
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)
    start = copy_of_state(byte_model(initializer_range=0.05, num_key_value_heads=1))
    for key, value in expected_bias.items():
        if key.endswith(("init_L", "mlp.2.bias")):  # nothing moves them but, in the plain formula, rounding
            assert torch.equal(actual_bias[key], start[key]), key
            continue
        moved = (value - start[key]).abs().max()
        assert (actual_bias[key] - value).abs().max() <= 0.05 * moved, key


@pytest.mark.parametrize("changes", [{}, {"fire_share_layers": True}], ids=["fire", "fire_s"])
def test_gradient_accumulation_is_the_large_batch(tmp_path, changes):
    """Documents of unequal lengths, so that a mean of means would differ: `num_items_in_batch` reaches the loss."""
    data = documents(*[10, 60, 20, 45, 33, 12, 50, 27] * 2)
    arguments = {"optim": "sgd", "learning_rate": 0.1}
    large, small = byte_model(**changes), byte_model(**changes)
    losses_large = train(large, tmp_path, data, per_device_train_batch_size=8, **arguments)
    losses_small = train(
        small, tmp_path, data, per_device_train_batch_size=2, gradient_accumulation_steps=4, **arguments
    )
    assert losses_small == pytest.approx(losses_large, rel=1e-5)
    torch.testing.assert_close(small.state_dict(), large.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", [FireForSequenceClassification, FireForTokenClassification])
def test_gradient_accumulation_of_a_classifier_is_the_large_batch(tmp_path, head):
    data = documents(*[16] * 4)
    for number, row in enumerate(data):
        row["labels"] = number % 2 if head is FireForSequenceClassification else [byte % 2 for byte in row["labels"]]
    by_batch = {}
    for batch in (4, 2):
        model = tiny_model(head, vocab_size=256, num_labels=2, classifier_dropout=0.0)
        arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": 4 // batch}
        trainer = build_trainer(model, tmp_path, data, default_data_collator, **arguments)
        trainer.train()
        by_batch[batch] = losses(trainer)
    assert by_batch[2] == pytest.approx(by_batch[4], rel=1e-4)


def test_smoothed_labels_are_those_of_the_next_token(tmp_path):
    """Trainer shifts them itself where it smooths, for the classes that it knows to be causal."""
    model, ids = tiny_model(), torch.arange(24).view(2, 12)
    arguments = TrainingArguments(tmp_path, use_cpu=True, label_smoothing_factor=0.1, report_to="none")
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    predictions, next_ids = model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    expected = torch.nn.functional.cross_entropy(predictions, next_ids, label_smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("lora", [False, True], ids=["all_parameters", "lora"])
@pytest.mark.parametrize("changes", [{}, {"fire_share_layers": True}], ids=["fire", "fire_s"])
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non_reentrant", "reentrant"])
def test_gradient_checkpointing_leaves_gradients_alone(use_reentrant, changes, lora):
    model = byte_model(attention_dropout=0.2, **changes)
    if lora:
        model = with_lora(model)
        model.enable_input_require_grads()
    data = documents(17, 23)
    loss, expected = backward(model, data)
    expected = {name: gradient.clone() for name, gradient in expected.items()}

    calls = []
    first_layer = (model.get_base_model() if lora else model).model.layers[0]
    first_layer.mlp.register_forward_pre_hook(lambda *hook: calls.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    loss_checkpointed, found = backward(model, data)
    assert len(calls) == 2  # once more in the backward
    torch.testing.assert_close(loss_checkpointed, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_resuming_is_not_stopping(tmp_path):
    data = documents(*[32] * 24)
    arguments = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    whole = byte_model()
    losses_whole = train(whole, tmp_path, data, **arguments)

    resumed = build_trainer(byte_model(seed=1), tmp_path, data, **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses(resumed) == losses_whole  # those of the first steps come from the checkpoint
    torch.testing.assert_close(resumed.model.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}, {"attn_implementation": "eager"}],
    ids=["sdpa", "rope", "eager"],
)
def test_packed_documents_train_as_separate_ones(tmp_path, changes):
    data = documents(19, 5, 30, 11, 8, 26, 14, 40)
    arguments = {"optim": "sgd", "learning_rate": 0.1}
    separate, packed = byte_model(**changes), byte_model(**changes)
    losses_separate = train(separate, tmp_path, data, **arguments)
    losses_packed = train(packed, tmp_path, data, collator=DataCollatorWithFlattening(), **arguments)
    assert losses_packed == pytest.approx(losses_separate, rel=1e-5)
    torch.testing.assert_close(packed.state_dict(), separate.state_dict(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fire_share_layers": True},
        {"fire_mlp_depth": 2, "fire_activation": "gelu", "fire_transform": "power", "fire_init_c": 0.5},
        {"fire_progressive": False},
    ],
    ids=["fire", "fire_s", "two_hidden_layers_power", "not_progressive"],
)
def test_every_parameter_of_fire_learns(changes):
    """All but the output bias, which shifts every score of a row alike: its gradient is rounding error at most."""
    model = byte_model(**changes)
    _, found = backward(model, documents(40, 25))
    biases = [module for module in model.modules() if hasattr(module, "L_multiplier")]
    assert len(biases) == (1 if changes.get("fire_share_layers") else 2)
    for bias in biases:
        output = bias.mlp[-1]
        for name, parameter in bias.named_parameters():
            if parameter is output.bias:
                assert parameter.grad.abs().max() < 1e-4 * output.weight.grad.abs().max()
            else:
                assert parameter.grad.abs().max() > 1e-6, name
    assert all(gradient.abs().max() > 0 for name, gradient in found.items() if not name.endswith("mlp.2.bias"))


def test_tied_embeddings_stay_tied(tmp_path):
    model = byte_model(tie_word_embeddings=True)
    train(model, tmp_path, documents(*[32] * 12))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    reloaded = FireForCausalLM.from_pretrained(tmp_path)
    assert reloaded.lm_head.weight is reloaded.model.embed_tokens.weight
    torch.testing.assert_close(reloaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("position_bias", ["fire", "kerple_log", "t5"])
def test_trainer_decays_no_position_bias(tmp_path, position_bias):
    """Trainer leaves out parameters with "bias" in their name, and so all of `position_bias`: documented behaviour."""
    model = byte_model(position_bias=position_bias)
    optimizer = build_trainer(model, tmp_path, documents(8), weight_decay=0.1).create_optimizer()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if "position_bias" in name or "norm" in name else 0.1), name


def with_lora(model: FireForCausalLM):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["position_bias"])
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize("changes", [{}, {"fire_share_layers": True}], ids=["fire", "fire_s"])
def test_lora_beside_a_trained_position_bias(tmp_path, monkeypatch, changes):
    base = byte_model(**changes)
    before = copy_of_state(base)
    model = with_lora(base)
    start = copy_of_state(model)
    train(model, tmp_path, documents(*[32] * 12))
    for name, value in model.state_dict().items():
        trained = "lora_" in name or "modules_to_save" in name
        assert torch.equal(value, start[name]) != (trained and not name.endswith(("init_L", "mlp.2.bias"))), name

    # The base below the adapter is what it was.
    data = pad_batch(documents(20, 33))
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(**data).logits, byte_model(**changes)(**data).logits, rtol=0, atol=0)

    model.save_pretrained(tmp_path / "adapter")
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(byte_model(**changes), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = model(**data).logits
        torch.testing.assert_close(loaded(**data).logits, expected, rtol=0, atol=0)
        monkeypatch.setattr(attention_fire, "MAX_BLOCK_ELEMENTS", 20_000)  # several blocks of queries
        torch.testing.assert_close(loaded(**data).logits, expected)
        monkeypatch.undo()
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**data).logits, expected, rtol=1e-4, atol=1e-4)

    assert type(merged) is FireForCausalLM
    assert merged.state_dict().keys() == before.keys()
    merged.save_pretrained(tmp_path / "merged")
    reloaded = FireForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(reloaded.state_dict(), merged.state_dict(), rtol=0, atol=0)


def byte_tokenizer():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(special + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def test_sft_trainer_packs_without_leaks(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    tokenizer = byte_tokenizer()
    lines = [line for line in TEXT.decode().splitlines() if 4 < len(line) < 40][:60]
    assert tokenizer.decode(tokenizer(lines[0])["input_ids"]) == lines[0]

    model = tiny_model(vocab_size=len(tokenizer))
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        max_steps=4,
        per_device_train_batch_size=2,
        packing=True,
        max_length=64,
        logging_steps=1,
        learning_rate=0.01,
        bf16=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
    )
    dataset = datasets.Dataset.from_dict({"text": lines})
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=dataset, processing_class=tokenizer)
    batches = []
    model.register_forward_pre_hook(lambda _, args, kwargs: batches.append(kwargs), with_kwargs=True)
    trainer.train()
    history = losses(trainer)
    assert len(history) == 4 and torch.tensor(history).isfinite().all()
    assert history[-1] < history[0]

    batch = batches[-1]
    # What makes FireModel see separate documents: positions that start again, no mask, no cache.
    assert batch.get("attention_mask") is None and batch["use_cache"] is False
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    assert len(starts) > 2
    model.eval()
    with torch.no_grad():
        together = model(**{name: value for name, value in batch.items() if name not in ("labels", "fused_lm_head")})
        for start, stop in zip(starts, [*starts[1:], batch["input_ids"].shape[1]], strict=True):
            alone = model(batch["input_ids"][:, start:stop])
            torch.testing.assert_close(together.logits[:, start:stop], alone.logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("module", ["position_bias", "mlp.2", "mlp"])
def test_adapters_of_the_bias_are_switched_in_inference(module):
    """Also those of parts of it, named by a suffix that the decoder's own modules share."""
    peft = pytest.importorskip("peft")
    ids = torch.tensor([list(TEXT[:12])])
    plain = byte_model()
    expected = plain(ids).logits
    model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=["q_proj"], modules_to_save=[module])).eval()
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.add_(1)
    for tokens in (ids, ids[:, :1]):
        adapted = model(tokens).logits
        with model.disable_adapter():
            torch.testing.assert_close(model(tokens).logits, expected[:, : tokens.shape[1]], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model(tokens).logits, adapted, rtol=1e-5, atol=1e-5)


def test_hooks_on_every_module_see_tensors():
    model, shapes = byte_model(), []
    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(lambda _, given, output: shapes.append((given[0].shape, output.shape)))
    model(torch.tensor([list(TEXT[:12])]))
    assert shapes
