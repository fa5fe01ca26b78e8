"""What studies add to FIRE that is not in the paper."""

import math

import pytest
import torch
from additions import line, log_scores
from helpers import random_ids, tiny_model

from modeling_fire import FirePositions
from modeling_fire.evaluation import loss_by_context


IDS = random_ids(2, 12)
ONE_LAYER = {"attn_implementation": "eager", "num_hidden_layers": 1}


def attentions(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, output_attentions=True).attentions[0]


def test_log_scores():
    """Scores times `s` are attention to the power of `s`, normalised: the bias is among them."""
    plain = attentions(tiny_model(**ONE_LAYER))
    model = tiny_model(**ONE_LAYER)
    log_scores(model, length=8)
    scale = torch.log(torch.arange(1.0, 13)) / math.log(8)
    expected = plain ** scale[:, None] * plain.gt(0)  # unseen keys stay at 0, those of the first query too
    torch.testing.assert_close(attentions(model), expected / expected.sum(-1, keepdim=True))


@pytest.mark.parametrize("add", [line, log_scores])
def test_in_chunks_with_a_cache_as_at_once(add):
    model, ids = tiny_model(), random_ids(2, 25)
    add(model, length=8)
    at_once, in_chunks = (loss_by_context(model, ids, [24], 24, chunk_size=size)[24] for size in (24, 7))
    assert in_chunks == pytest.approx(at_once, rel=1e-5)


def test_line():
    model = tiny_model(**ONE_LAYER)
    plain, bias = attentions(model), model.model.layers[0].self_attn.position_bias
    line(model, length=8)
    torch.testing.assert_close(attentions(model), plain)

    added = model.model.layers[0].self_attn.position_bias
    positions = FirePositions.arange(12)
    with torch.no_grad():
        added.r.copy_(torch.arange(4.0))
        change = added(positions) - bias(positions)
        psi = bias.psi(positions.distance().float())[:, None]
    torch.testing.assert_close(change, -added.r.detach()[:, None, None] * psi)
