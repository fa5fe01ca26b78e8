"""The shipped models, and the estimates of memory and work against what torch holds and counts."""

import dataclasses
import json
import sys

import estimate
import pytest
import torch
from helpers import ROOT
from torch.utils.flop_counter import FlopCounterMode

from modeling_fire import FireConfig, FireForCausalLM


MODELS = ROOT / "configuration" / "models"
SHAPE = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    "name, parameters",
    [("tiny", 825_240), ("50m", 50_932_816), ("125m", 123_592_872), ("350m", 353_565_616), ("1b", 1_100_073_068)],
)
def test_shipped_models(name, parameters):
    path = MODELS / f"fire-{name}.json"
    config = FireConfig.from_pretrained(path)
    assert estimate.on_meta(config).num_parameters() == parameters
    known = {each.name for each in dataclasses.fields(FireConfig)} | {"model_type"}
    assert set(json.loads(path.read_text())) <= known


SHAPES = pytest.mark.parametrize(
    "changes",
    [{}, {"mlp_gated": False, "hidden_act": "gelu"}, {"num_key_value_heads": 1, "tie_word_embeddings": False}],
    ids=str,
)


@SHAPES
def test_estimated_state_is_what_training_holds(changes):
    config = FireConfig(**{**SHAPE, **changes})
    model = FireForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    optimizer.step()

    def bytes_of(tensors) -> int:
        return sum(each.nbytes for each in tensors)

    assert estimate.bytes_of_state(config) == {
        "weights": bytes_of(model.parameters()),
        "gradients": bytes_of(each.grad for each in model.parameters()),
        "optimizer": bytes_of(state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")),
    }


@SHAPES
def test_estimated_activations_are_about_what_a_forward_keeps(changes):
    config = FireConfig(**{**SHAPE, "hidden_size": 128, "intermediate_size": 344, **changes})
    model, ids = FireForCausalLM(config), torch.arange(256)[None]
    weights = {each.untyped_storage().data_ptr() for each in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # the tensor, so that its memory is not used again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(ids, labels=ids)
    found = sum(each.untyped_storage().nbytes() for each in kept.values()) / 256
    assert estimate.bytes_per_token(config, bf16=False) == pytest.approx(found, rel=0.2)


@SHAPES
def test_estimated_operations_are_those_that_torch_counts(changes):
    config = FireConfig(**{**SHAPE, "position_bias": "alibi", **changes}, attn_implementation="eager")
    model, ids = FireForCausalLM(config), torch.arange(64)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    assert counter.get_total_flops() == 64 * estimate.flops_per_token(config, 64)


def test_estimate_from_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["estimate.py", str(MODELS / "fire-125m.json"), "--batch-size", "4"])
    estimate.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("fire-125m.json: 123,592,872 parameters")
    assert [line.split()[0] for line in lines[1:4]] == ["0.46", "0.46", "0.92"], "16 bytes a parameter, in GiB"
    assert "activations of 4 x 2048 tokens" in lines[4]
