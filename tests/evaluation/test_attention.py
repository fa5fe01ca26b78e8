"""Attention by distance against the probabilities of one eager forward; the scales that FIRE learned."""

import pytest
import torch
from helpers import random_ids, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_fire import FireModel
from modeling_fire.evaluation import attention_by_distance, attention_entropy, learned_scales


@pytest.mark.filterwarnings("error:.*past_key_values")
@pytest.mark.parametrize("length, num_queries", [(50, 10), (64, 64), (33, 100), (1, 5)])
@pytest.mark.parametrize("changes", [{}, {"fire_share_layers": True}, {"position_bias": "none"}], ids=str)
@torch.no_grad()
def test_attention_by_distance(length, num_queries, changes):
    model, ids = tiny_model(**changes).train(), random_ids(2, length)
    implementation = model.config._attn_implementation
    shares = attention_by_distance(model, ids, num_queries)
    assert model.training and model.config._attn_implementation == implementation, "all is left as it was"
    assert not any(module._forward_hooks for module in model.modules())

    attentions = tiny_model(attn_implementation="eager", **changes)(ids, output_attentions=True).attentions
    assert shares.shape[0] == len(attentions) == 2
    torch.testing.assert_close(shares.sum(1), torch.ones(2))
    first = max(0, length - num_queries)
    for by_bin, attention in zip(shares, attentions, strict=True):
        expected = [0.0] * len(by_bin)
        for query in range(first, length):
            for key in range(query + 1):
                share = float(attention[:, :, query, key].mean())
                expected[(query - key).bit_length()] += share / (length - first)
        torch.testing.assert_close(by_bin, torch.tensor(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_attention_entropy():
    model, ids = tiny_model(), random_ids(2, 40)
    entropies = attention_entropy(model, ids, num_queries=10)
    attentions = tiny_model(attn_implementation="eager")(ids, output_attentions=True).attentions
    for entropy, attention in zip(entropies, attentions, strict=True):
        rows = attention[:, :, -10:].flatten(0, 2)
        expected = sum(float(torch.distributions.Categorical(row[row > 0]).entropy()) for row in rows) / len(rows)
        assert float(entropy) == pytest.approx(expected, rel=1e-4)


def test_a_model_without_a_head_will_do():
    shares = attention_by_distance(tiny_model(FireModel), random_ids(1, 20), num_queries=4)
    torch.testing.assert_close(shares.sum(1), torch.ones(2))


def test_other_models_have_no_attention_of_ours():
    model = LlamaForCausalLM(LlamaConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(ValueError, match="LlamaForCausalLM is not a FIRE model"):
        attention_by_distance(model, random_ids(1, 20))


@torch.no_grad()
def test_learned_scales():
    model = tiny_model()
    bias = model.model.layers[1].self_attn.position_bias
    bias.c.fill_(-0.5)
    bias.L_multiplier.fill_(-3.0)
    assert learned_scales(model) == [{"c": 1.0, "L": 7.0}, {"c": 0.5, "L": 21.0}], "both count by their absolute value"
    assert learned_scales(tiny_model(fire_share_layers=True)) == [{"c": 1.0, "L": 7.0}]
    bare = {"c": None, "L": None}
    assert learned_scales(tiny_model(fire_transform="identity", fire_threshold=False)) == [bare, bare]
    assert learned_scales(tiny_model(position_bias="kerple_log")) == []
