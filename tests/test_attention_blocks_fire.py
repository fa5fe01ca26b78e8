"""Attention in blocks of queries: nothing changes but the memory, of any bias, with gradients and without."""

import math
from unittest import mock

import pytest
import torch
from helpers import LargestTensor, random_ids, tiny_model
from scenarios import LENGTH, SCENARIOS, logits_and_gradients, model_and_logits
from transformers import StaticCache

from modeling_fire import attention_fire
from modeling_fire.positions_fire import FirePositions


# Biases that are not piecewise linear.
GENERAL = [{"position_bias": "t5"}, {"fire_activation": "gelu"}, {"fire_mlp_depth": 2}]


def limit_rows(monkeypatch, rows: int, keys: int = LENGTH, batch: int = 1, width: int = 32) -> None:
    """Allows the bias of `rows` queries at a time: 4 heads, and a hidden layer before and after its activation."""
    monkeypatch.setattr(attention_fire, "MAX_BLOCK_ELEMENTS", rows * keys * batch * (4 + 2 * width))


def hidden_width(changes: dict) -> int:
    return 0 if changes.get("position_bias") == "t5" else 32


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("changes", GENERAL)
def test_what_is_not_piecewise_linear_takes_blocks(monkeypatch, scenario, changes):
    expected = logits_and_gradients("eager", scenario, **changes)
    limit_rows(monkeypatch, 3, width=hidden_width(changes))
    monkeypatch.setattr(attention_fire, "fused_attention", None)
    with mock.patch.object(attention_fire, "checkpoint", wraps=attention_fire.checkpoint) as checkpoint:
        actual = logits_and_gradients("fire", scenario, **changes)
    assert checkpoint.call_count >= 2 * math.ceil(LENGTH / 3), "two layers, each in blocks of three at most"
    for key, wanted in expected.items():
        torch.testing.assert_close(actual[key], wanted, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("rows", [1, 3, 12])
@torch.no_grad()
def test_blocks_of_queries_change_nothing(monkeypatch, scenario, rows):
    expected = model_and_logits("sdpa", scenario)[1]
    limit_rows(monkeypatch, rows, batch=2 if scenario in ("left padding", "right padding", "packed") else 1)
    with mock.patch.object(FirePositions, "block", autospec=True, side_effect=FirePositions.block) as block:
        torch.testing.assert_close(model_and_logits("sdpa", scenario)[1], expected, rtol=1e-10, atol=1e-12)
    assert block.call_count == 2 * math.ceil(LENGTH / rows), "two layers, each in blocks of `rows`"


@torch.no_grad()
def test_blocks_of_queries_in_a_static_cache(monkeypatch):
    model, ids = tiny_model(attn_implementation="sdpa", norm_type="layer_norm").double(), random_ids(2, LENGTH)
    expected = model(ids).logits
    limit_rows(monkeypatch, 3, keys=20)
    cache = StaticCache(config=model.config, max_cache_len=20)
    chunks = [model(chunk, past_key_values=cache).logits for chunk in ids.split([8, 5], dim=1)]
    torch.testing.assert_close(torch.cat(chunks, dim=1), expected, rtol=1e-10, atol=1e-12)


def gradients_of_blocks(monkeypatch, rows: int, dropout: float) -> dict[str, torch.Tensor]:
    limit_rows(monkeypatch, rows)
    model = tiny_model(attn_implementation="sdpa", attention_dropout=dropout).double().train()
    ids = random_ids(1, LENGTH)
    model(ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_blocks_of_queries_leave_gradients_alone(monkeypatch):
    expected = gradients_of_blocks(monkeypatch, LENGTH, dropout=0.0)
    with mock.patch.object(attention_fire, "checkpoint", wraps=attention_fire.checkpoint) as checkpoint:
        found = gradients_of_blocks(monkeypatch, 3, dropout=0.0)
    assert checkpoint.call_count == 2 * math.ceil(LENGTH / 3), "two layers, each in blocks of three"
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_block_that_is_computed_twice_drops_the_same_twice(monkeypatch):
    found = gradients_of_blocks(monkeypatch, 3, dropout=0.3)
    monkeypatch.setattr(attention_fire, "checkpoint", lambda function, *args, use_reentrant: function(*args))
    torch.testing.assert_close(found, gradients_of_blocks(monkeypatch, 3, dropout=0.3), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("scenario", ["causal", "left padding"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("name", "changes"), [("sdpa", {}), *(("fire", changes) for changes in GENERAL)])
def test_no_tensor_of_queries_keys_and_heads_exists(monkeypatch, scenario, training, name, changes):
    length = 256
    model, ids = tiny_model(attn_implementation=name, **changes), random_ids(1, length)
    mask = torch.ones(1, length, dtype=torch.long)
    mask[0, : 9 if scenario == "left padding" else 0] = 0

    def largest_tensor() -> int:
        with LargestTensor() as kept, torch.set_grad_enabled(training):
            output = model(ids, attention_mask=mask, labels=ids)
            if training:
                output.loss.backward()
        return kept.numel

    assert largest_tensor() >= 4 * length * length, "one block, or this test measures nothing"
    limit_rows(monkeypatch, 7, keys=length, width=hidden_width(changes))
    assert largest_tensor() <= max(attention_fire.MAX_BLOCK_ELEMENTS, length * length) < 4 * length * length
