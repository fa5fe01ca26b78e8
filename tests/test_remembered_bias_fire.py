"""What a bias remembers for inference: it follows the parameters, and is shared by threads and saved by nobody."""

import copy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from layouts import padded
from reference import dense_attention
from torch import nn
from torch.nn.utils import parametrize, prune

from modeling_fire import FirePositionBias, cpu_fire, operator_fire
from modeling_fire.attention_fire import fire_attention
from modeling_fire.positions_fire import FirePositions


@torch.no_grad()
def test_what_inference_remembers_follows_the_parameters():
    torch.manual_seed(0)
    bias, other = FirePositionBias(2, init_L=9.0).eval(), FirePositionBias(2, init_L=9.0, init_f="uniform").eval()
    positions = FirePositions.arange(1, past=5)

    def pieces(module: FirePositionBias) -> list[torch.Tensor]:
        found = module(positions, backend="cpu")
        return [*found.tensors, found.table]

    assert pieces(bias)[1] is pieces(bias)[1], "worked out once"
    several = bias(FirePositions.arange(3, past=5), backend="cpu")
    assert several.slope is pieces(bias)[1] and several.table is None, "also for several tokens of a step"
    for change in (
        lambda: bias.load_state_dict(other.state_dict()),
        lambda: bias.c.mul_(2),
        lambda: bias.mlp[2].weight.add_(1),
        lambda: setattr(bias.L_multiplier, "data", bias.L_multiplier.data * 3),
        lambda: bias.mlp[0].weight.data.mul_(2),
        lambda: bias.mlp[2].bias.data.copy_(torch.ones(2)),
        lambda: bias.init_L.fill_(4.0),
        lambda: nn.utils.parametrizations.weight_norm(bias.mlp[2]),
        lambda: bias.mlp[2].parametrizations.weight.original0.mul_(2),
        lambda: parametrize.register_parametrization(bias, "c", nn.Softplus()),
        lambda: bias.parametrizations.c.original.add_(1),
        lambda: prune.custom_from_mask(bias, "L_multiplier", torch.ones(1)),
        lambda: bias.L_multiplier_mask.mul_(0.5),
    ):
        before = pieces(bias)
        change()
        after, fresh = pieces(bias), pieces(copy.deepcopy(bias).train().eval())
        changed = not all(torch.equal(a, b) for a, b in zip(before[:6], after[:6], strict=True))
        assert changed or "parametrizations" in dict(bias.mlp[2].named_children())
        assert all(torch.equal(a, b) for a, b in zip(fresh[:6], after[:6], strict=True))


@torch.no_grad()
def test_what_inference_remembers_goes_by_the_types_and_options():
    bias = FirePositionBias(2, init_L=9.0, init_f="uniform").eval()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, n, 8, generator=generator, dtype=torch.float64) for n in (1, 6, 6))

    def attend(dtype: torch.dtype) -> torch.Tensor:
        return fire_attention(query.to(dtype), key.to(dtype), value.to(dtype), bias)

    def check() -> None:
        expected = copy.deepcopy(bias).double()(FirePositions.arange(1, past=5))
        expected = (query @ key.mT * 8**-0.5 + expected).softmax(-1) @ value
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-5), (torch.bfloat16, 0.05)) * 2:
            torch.testing.assert_close(attend(dtype).double(), expected, rtol=0.0, atol=tolerance)

    for change in (bias.eval, bias.double, bias.float, lambda: setattr(bias, "eps", 0.5)):
        change()
        check()
    # What a GPU leaves, which watches versions rather than values.
    bias.memory["state"] = [(p.data_ptr(), p._version) for p in bias.parameters()]
    check()


@torch.no_grad()
def test_what_a_device_without_cheap_comparisons_remembers(monkeypatch):
    # Not on a GPU, but told apart by the versions of the parameters all the same.
    bias = FirePositionBias(2, init_L=9.0).to("meta").eval()
    assert bias.remembered() is not None
    bias.memory["constants"] = "kept"
    assert bias.remembered() is not None and "constants" in bias.memory
    for change in (lambda: bias.c.mul_(2), lambda: setattr(bias, "eps", 0.5), lambda: bias.init_L.fill_(4.0)):
        change()
        assert bias.remembered() is not None and "constants" not in bias.memory
        bias.memory["constants"] = "kept"
    bias.c.data.mul_(2)  # shows in no version
    assert bias.remembered() is not None and "constants" in bias.memory
    bias(FirePositions.arange(2, "meta"), backend="cpu")
    assert bias.memory["constants"] != "kept", "a text that begins is read anew"
    bias.eval()
    assert "constants" not in bias.memory
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert bias.remembered() == {}, "a CUDA graph would keep the addresses of what may be dropped"
    bias.to_empty(device="cpu")
    assert bias.remembered() is not None


def test_threads_share_what_inference_remembers():
    """Texts that begin and steps that go on, side by side, as in a server."""
    bias = FirePositionBias(2, init_L=9.0).eval()
    calls = FirePositions.arange(5), FirePositions.arange(1, past=5), FirePositions.arange(1, past=20)
    with torch.no_grad():
        expected = [bias(positions, backend="cpu").slope for positions in calls]

    @torch.no_grad()
    def work(number: int) -> bool:
        turns = [(number + turn) % 3 for turn in range(300)]
        return all(torch.equal(bias(calls[turn], backend="cpu").slope, expected[turn]) for turn in turns)

    before = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(before)


TOKENS = {
    "one": FirePositions.arange(1, past=6),
    "window": FirePositions.arange(1, past=6, window=3),
    "left padding": padded([0, 3], 7).block(6, 7, 7),
    "room after it": FirePositions.arange(7).block(4, 5, 7),
    "ends of their own": FirePositions.arange(1, past=6)._replace(last=torch.tensor([[7], [3]])),
    "another place": FirePositions.arange(1, past=6)._replace(query=torch.tensor([[7]])),
}
OTHERWISE = {
    "sees nothing": FirePositions.arange(1, past=6)._replace(first=torch.tensor([[0], [7]])),
    "two places": FirePositions.arange(1, past=6)._replace(query=torch.tensor([[6], [5]]), last=torch.tensor([[5]])),
    "far away": FirePositions.arange(1, past=6)._replace(query=torch.tensor([[40]])),
    "keys ahead": FirePositions.arange(1, past=6)._replace(query=torch.tensor([[4]])),
    "holes": FirePositions.arange(1, past=6)._replace(visible=torch.tensor([[True, False, *[True] * 5]])),
    "past L": FirePositions.arange(1, past=6)._replace(absolute=torch.tensor([[9]])),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("name", [*TOKENS, *OTHERWISE])
def test_one_token_by_the_table_of_inference(name, kv_heads, dtype, monkeypatch):
    torch.manual_seed(0)
    positions, served = {**TOKENS, **OTHERWISE}[name], []
    bias = FirePositionBias(4, init_L=9.0, init_f="uniform").eval()
    query, key, value = (torch.randn(2, heads, n, 8) for heads, n in ((4, 1), (kv_heads, 7), (kv_heads, 7)))
    expected = dense_attention(
        query, key, value, copy.deepcopy(bias).train()(positions, backend="cpu"), positions, 0.3
    )

    def decode(*args):
        served.append(cpu_fire.decode(*args))
        return served[-1]

    monkeypatch.setattr(operator_fire, "cpu_decode", decode)
    actual = fire_attention(*(x.to(dtype) for x in (query, key, value)), bias, positions, scaling=0.3)
    tolerance = 1e-6 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(actual.double(), expected[0].double(), rtol=tolerance, atol=tolerance)
    assert (len(served) == 1 and served[0] is not None) == (name in TOKENS)


@torch.no_grad()
def test_the_table_of_inference_is_the_dense_bias():
    bias = FirePositionBias(2, init_L=9.0).double().eval()
    table = bias(FirePositions.arange(1, past=5), backend="cpu").table
    torch.testing.assert_close(table[:, -6:], bias(FirePositions.arange(1, past=5))[0, :, 0], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_what_inference_remembers_is_not_saved():
    bias = FirePositionBias(2, init_L=9.0).eval()
    bias(FirePositions.arange(1, past=5), backend="cpu")
    assert bias.memory and not copy.deepcopy(bias).memory
