"""The Triton kernels beside a cache: decoding, static caches, and requests side by side."""

from unittest import mock

import pytest
import torch
from layouts import scattered
from reference import random_bias
from triton_checks import (
    NAMES,
    check,
    fused,
    random_inputs,
    small_tiles,  # noqa: F401
    triton_fire,
)

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
