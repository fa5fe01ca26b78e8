"""The Triton kernels beside a cache: decoding, static caches, and requests side by side."""

import copy
from unittest import mock

import pytest
import torch
from layouts import padded, scattered
from reference import random_bias
from triton_checks import (
    DEVICE,
    NAMES,
    check,
    fused,
    random_inputs,
    small_tiles,  # noqa: F401
    to_device,
    triton_fire,
)

from modeling_fire import FirePositionBias
from modeling_fire.attention_fire import fire_attention
from modeling_fire.positions_fire import FirePositions


def test_continuous_batching():
    # Two requests side by side among the keys: 30 keys with 6 queries, then 25 with 11.
    query = torch.cat([torch.arange(24, 30), torch.arange(44, 55)])[None]
    first = torch.tensor([0] * 6 + [30] * 11)[None]
    check(FirePositions(query - first, query, torch.arange(55)[None], first, query + 1, consecutive=True), L=9.0)


@pytest.mark.parametrize("queries", [1, 20])
def test_static_cache(queries):
    """Beyond `last` a cache holds anything, which must not matter."""
    positions = FirePositions.arange(queries, past=33 - queries)
    query, key, value, grad = random_inputs(positions)
    bias = random_bias(2, positions, dtype=torch.float32)
    exact = fused(query, key, value, grad, bias, positions, 0.3)
    capacity = positions._replace(key=torch.arange(60)[None])
    junk = torch.full((1, 1, 27, 16), 3e38)
    results = [
        fused(query, torch.cat([key, fill], 2), torch.cat([value, fill], 2), grad, bias, capacity, 0.3)
        for fill in (junk, torch.full_like(junk, torch.nan))
    ]
    for output, lse, gradients in results:
        torch.testing.assert_close(output, exact[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(lse, exact[1], rtol=0, atol=1e-6)
        for name, gradient, expected in zip(NAMES, gradients, exact[2], strict=True):
            kept = gradient[:, :, :33] if name in ("key", "value") else gradient
            torch.testing.assert_close(kept, expected, rtol=0, atol=1e-5)
            if name in ("key", "value"):
                assert (gradient[:, :, 33:] == 0).all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(20, 1), (66, 2)])
def test_groups_of_more_heads_than_a_program_takes(heads, kv_heads):
    check(FirePositions.arange(2, past=50), heads=heads, kv_heads=kv_heads, batch=2, L=20.0)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("splits", [1, 3])
def test_decoding(queries, splits, monkeypatch):
    """Sequences of different lengths in one cache, heads in groups, and as many parts as there may be."""
    monkeypatch.setattr(triton_fire, "num_splits", lambda *arguments: splits)
    last = torch.tensor([70, 4])[:, None] + 1 + torch.arange(queries)
    positions = FirePositions(last - 1, last - 1, torch.arange(75)[None], last * 0, last, consecutive=True)
    bias = random_bias(4, positions, dtype=torch.float32)
    check(positions, bias, heads=4, kv_heads=2, batch=2)
    check(positions, bias._replace(c=torch.tensor([0.1, 0.2, 0.3, 0.4])), heads=4, kv_heads=2, batch=2)
    window = positions._replace(first=(last - 20).clamp(min=0))
    check(window, bias._replace(transform="power", row_scale=0.3 * bias.row_scale), heads=4, kv_heads=2, batch=2)


TOKENS = {
    "before L": FirePositions.arange(1, past=15),
    "at L": FirePositions.arange(1, past=20),
    "past L": FirePositions.arange(1, past=50),
    "one before it, one past it": padded([0, 13], 31).block(30, 31, 31),
    "room after it": FirePositions.arange(40).block(25, 26, 40),
    "anywhere": scattered(40).block(39, 40, 40),
    "a million": FirePositions.arange(1, past=30)._replace(absolute=torch.tensor([[10**6]])),
}
VARIANTS = {
    "log": {},
    "power": {"transform": "power"},
    "identity": {"transform": "identity"},
    "no threshold": {"threshold": False},
    "no progress": {"progressive": False},
}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", TOKENS)
def test_one_token_at_a_time(name, variant, monkeypatch):
    """Beside the operator, with a normaliser that the kernel works out."""
    monkeypatch.setenv("FIRE_BACKEND", "triton")
    torch.manual_seed(0)
    bias = FirePositionBias(4, init_L=20.0, init_f="uniform", **VARIANTS[variant]).eval()
    positions, inputs = TOKENS[name], random_inputs(TOKENS[name], heads=4, kv_heads=2, batch=2)[:3]
    query, key, value = (tensor.double() for tensor in inputs)
    scores = query @ key.repeat_interleave(2, 1).mT * 0.3 + copy.deepcopy(bias).double()(positions)
    expected = scores.masked_fill(~positions.mask(), -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1)
    bias, positions, inputs = bias.to(DEVICE), to_device(positions), [tensor.to(DEVICE) for tensor in inputs]
    with mock.patch.object(triton_fire, "decode_token", wraps=triton_fire.decode_token) as decode:
        actual = [fire_attention(*inputs, bias, positions, scaling=0.3) for _ in range(2)]
    assert decode.call_count == (0 if variant == "no progress" else 2)
    torch.testing.assert_close(actual[0].cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(*actual)


@torch.no_grad()
def test_a_graph_captures_the_kernels_that_ran_before_it(monkeypatch):
    """A kernel of another kind would have to be loaded, which a capture does not allow."""
    monkeypatch.setenv("FIRE_BACKEND", "triton")
    bias = FirePositionBias(4, init_L=20.0).to(DEVICE).eval()
    inputs = [x.to(DEVICE) for x in random_inputs(TOKENS["past L"], heads=4)[:3]]

    def launch() -> list[tuple]:
        with mock.patch.object(triton_fire, "_decode_kernel", mock.MagicMock()) as kernel:
            fire_attention(*inputs, bias)
        (call,) = kernel.__getitem__.return_value.call_args_list
        return [x.dtype if isinstance(x, torch.Tensor) else x for x in call.args]

    warm = launch()
    monkeypatch.setattr(FirePositionBias, "remembered", lambda self: {})  # as during a capture
    assert launch() == warm


@pytest.mark.parametrize("keys_per_query", [8, 100])
def test_requests_side_by_side(keys_per_query, monkeypatch):
    """Continuous batching: each query sees the keys of its own request, or it is one of several of a request."""
    monkeypatch.setattr(triton_fire, "KEYS_PER_QUERY", keys_per_query)
    starts, lengths = torch.tensor([[0, 30, 34, 51, 51, 60]]), torch.tensor([[30, 4, 17, 6, 9, 1]])
    query = starts + lengths - 1
    positions = FirePositions(lengths - 1, query, torch.arange(61)[None], starts, query + 1, consecutive=True)
    with mock.patch.object(triton_fire, "decode", wraps=triton_fire.decode) as decode:
        check(positions, heads=4, kv_heads=2)
    assert decode.called == (keys_per_query == 8)


@pytest.mark.parametrize(
    ("queries", "keys", "one_text", "separate"),
    [(4, 4, True, True), (16, 8192, True, True), (16, 8191, False, False), (17, 10**6, False, True)],
)
def test_what_is_taken_one_by_one(queries, keys, one_text, separate):
    assert (
        triton_fire.decodes(queries, keys, False) == one_text and triton_fire.decodes(queries, keys, True) == separate
    )


def test_decoding_with_invisible_keys():
    whole = scattered(70)
    positions = whole._replace(absolute=whole.absolute[:, -2:], query=whole.query[:, -2:])
    check(positions._replace(first=whole.first[:, -2:], last=whole.last[:, -2:]), batch=2)
