"""
The Triton kernels beside the plain formula in float64: positions, heads, shapes and forms of the bias. They run on a
GPU where there is one, else in Triton's interpreter or an emulator (`conftest.py`), at small sizes.
"""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from helpers import random_ids, tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import calls, scattered
from reference import random_bias
from torch.utils._python_dispatch import TorchDispatchMode
from triton_checks import (
    DEVICE,
    POSITIONS,
    check,
    fused,
    random_inputs,
    small_tiles,  # noqa: F401
    to_device,
    triton_fire,
)

from modeling_fire.piecewise_fire import PiecewiseBias
from modeling_fire.positions_fire import FirePositions


LAST_FAR = pytest.importorskip("modeling_fire.triton_tiles_fire").LAST_FAR

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", POSITIONS)
def test_positions(name):
    positions = POSITIONS[name]
    check(positions, batch=max(positions.query.shape[0], positions.first.shape[0]), L=20.0)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
def test_groups_of_heads(heads, kv_heads):
    check(FirePositions.arange(33), heads=heads, kv_heads=kv_heads, batch=2)


@pytest.mark.parametrize("head_dim", [1, 48, 128])
def test_head_dims(head_dim):
    check(FirePositions.arange(33), head_dim=head_dim, scaling=head_dim**-0.5)


@pytest.mark.parametrize("memory", ["heads first", "scattered"])
def test_strides(memory):
    positions = FirePositions.arange(20)
    inputs = random_inputs(positions, batch=2)
    if memory == "heads first":
        inputs = [tensor.contiguous() for tensor in inputs]
    else:
        inputs = [tensor.transpose(-1, -2).contiguous().transpose(-1, -2) for tensor in inputs]
    gradients = check(positions, inputs=inputs)[2]
    # What `torch.compile` is told beforehand.
    assert all(grad.stride() == tensor.stride() for grad, tensor in zip(gradients, inputs[:3], strict=False))


def test_rows_far_apart():
    """Further than 32 bits count within a tile."""
    far = torch.empty(1, 1, 3, 16, device="meta").as_strided((1, 1, 3, 16), (0, 0, 2**24, 1))
    assert triton_fire.dense_rows(far).is_contiguous()
    near = torch.empty(1, 1, 3, 16, device="meta")
    assert triton_fire.dense_rows(near) is near


def test_no_bias():
    positions = FirePositions.arange(33, past=7)
    inputs = random_inputs(positions)
    bias = PiecewiseBias.straight(torch.zeros(2), "none", positions.query)
    check(positions, bias, inputs=inputs)
    few = FirePositions.arange(1, past=39)
    check(few, PiecewiseBias.straight(torch.zeros(2), "none", few.query))


@pytest.mark.parametrize("transform", ["log", "power", "identity"])
@pytest.mark.parametrize("per_head", [False, True])
def test_transforms(transform, per_head):
    positions = FirePositions.arange(50)
    bias = random_bias(2, positions, transform=transform, dtype=torch.float32)
    if per_head:
        bias = bias._replace(c=torch.tensor([0.2, 0.7]), row_scale=0.3 * bias.row_scale)
    check(positions, bias)


@pytest.mark.parametrize("knots", [0, 1, 64])
def test_numbers_of_knots(knots):
    check(FirePositions.arange(40), width=knots)


@pytest.mark.parametrize(
    "positions", [FirePositions.arange(35), FirePositions.arange(2, past=60)], ids=["long", "decode"]
)
def test_duplicate_and_infinite_knots(positions):
    knots = torch.tensor([-torch.inf, -torch.inf, -0.5, 0.0, 0.3, 0.3, 0.6, 1.0, torch.inf])
    generator = torch.Generator().manual_seed(1)
    slope = torch.randn(2, 10, generator=generator)
    slope[:, 6] = slope[:, 5]
    # Continuous at the finite knots; between two equal ones nothing is seen of the segment.
    offset = torch.zeros(2, 10)
    for segment in range(1, 10):
        jump = (slope[:, segment - 1] - slope[:, segment]) * knots[segment - 1]
        offset[:, segment] = offset[:, segment - 1] + (jump if knots[segment - 1].isfinite() else 0.0)
    template = random_bias(2, positions, L=20.0, dtype=torch.float32)
    check(positions, template._replace(knots=knots, slope=slope, offset=offset))


def test_far_tiles():
    """With gentle slopes tiles are expanded near enough that a short sequence has some."""
    positions = FirePositions.arange(24, past=180)
    bias = random_bias(1, positions, L=100.0, slope=0.02, dtype=torch.float32)
    inputs = random_inputs(positions, heads=1)
    rows = triton_fire.Rows.of(bias.to(DEVICE), to_device(positions))
    query, key = (tensor.to(DEVICE) for tensor in inputs[:2])
    plan = triton_fire.make_plan(query, key, bias, rows, triton_fire.Blocks(16, 16, 4, 1), False)
    fields = plan.tensors[2]
    assert 50 < fields[0, 0, 0, LAST_FAR.value] < 100
    check(positions, bias, inputs=inputs)
    check(positions, heads=1, c=1e-4, L=1000.0)


def test_rows_that_see_nothing():
    index = torch.arange(40)[None]
    last = index + 1
    last = torch.where((index % 5 == 2) | (index > 33), 0, last)
    first = torch.where(index == 20, 35, 0)
    positions = FirePositions(index, index, index, first, last, consecutive=True)
    output, lse, gradients = check(positions)
    blind = (last <= first)[0]
    assert (output[:, :, blind] == 0).all() and (lse[:, :, blind] == -torch.inf).all()
    assert (gradients[0][:, :, blind] == 0).all()
    invisible = torch.zeros(2, 30, dtype=torch.bool).index_fill(1, torch.tensor([19, 22]), True)
    check(scattered(30)._replace(visible=invisible), batch=2)
    check(FirePositions.arange(3)._replace(last=torch.tensor([[0, 2, 0]])))


@pytest.mark.parametrize("L", [12.0, 0.5, 500.0])
def test_threshold(L):
    """Below, at (tied with position 12) and above the positions."""
    check(FirePositions.arange(30), L=L)


def test_without_gradients_of_the_bias():
    positions = FirePositions.arange(20)
    inputs = random_inputs(positions)
    bias = random_bias(2, positions, dtype=torch.float32)
    with_bias, without = (fused(*inputs, bias, positions, 0.3, bias_grad)[2] for bias_grad in (True, False))
    assert all(torch.equal(*pair) for pair in zip(without[:3], with_bias[:3], strict=True))
    for gradient, expected in zip(without[3:], with_bias[3:], strict=True):
        assert gradient.shape == expected.shape and (gradient == 0).all()


class NoValues(TorchDispatchMode):
    """Refuses operations that would wait for a GPU, to read a value from it."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise AssertionError(f"{func} waits for the device.")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("positions", [FirePositions.arange(20), scattered(20), FirePositions.arange(1, past=20)])
def test_nothing_waits_for_the_device(positions, monkeypatch):
    """Around the kernels, which are left out: their interpreter reads values all the time."""
    for name in ("_plan_kernel", "_forward_kernel", "_decode_kernel", "_combine_kernel", "_delta_kernel"):
        monkeypatch.setattr(triton_fire, name, mock.MagicMock())
    for name in ("_query_gradient_kernel", "_key_gradient_kernel"):
        monkeypatch.setattr(triton_fire, name, mock.MagicMock())
    query, key, value, grad = random_inputs(positions, batch=2)
    bias = random_bias(2, positions, dtype=torch.float32)
    with NoValues():
        output, lse = triton_fire.forward(query, key, value, bias, positions, 0.3)
        triton_fire.backward(grad, query, key, value, output, lse, bias, positions, 0.3, True)
    with pytest.raises(AssertionError, match="waits"), NoValues():
        bool(lse.any())


@settings(
    max_examples=3 if "EMULATED_SM" in os.environ else 15,  # most examples are kernels to be compiled
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(calls(), st.integers(1, 40))
def test_anything(call, head_dim):
    bias = PiecewiseBias(*(x.float() if x.is_floating_point() else x for x in call.bias.tensors), call.bias.transform)
    sizes = {name: getattr(call, name) for name in ("heads", "kv_heads", "batch", "seed")}
    inputs = random_inputs(call.positions, **sizes, head_dim=head_dim)
    check(call.positions, bias, inputs=inputs, scaling=head_dim**-0.5)


def test_a_model_on_the_kernels(monkeypatch):
    """Loss and every gradient of a training step, and generation, are those of the plain formula."""
    monkeypatch.setenv("FIRE_BACKEND", "triton")
    ids, mask = random_ids(2, 20).to(DEVICE), torch.ones(2, 20, dtype=torch.long, device=DEVICE)
    mask[0, :5] = 0
    labels = ids.masked_fill(mask.cumsum(-1) <= 1, -100)  # not what follows padding
    results = []
    for name, dtype in (("eager", torch.float64), ("fire", torch.float32)):
        model = tiny_model(attn_implementation=name).to(DEVICE, dtype)
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        tokens = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        results.append((loss, tokens, {key: value.grad for key, value in model.named_parameters()}))
    (expected, tokens, gradients), (loss, found, actual) = results
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(found, tokens)
    for key, value in gradients.items():
        if not key.endswith("mlp.2.bias"):  # rounding errors of 0
            assert (actual[key] - value).abs().max() <= 1e-4 * value.abs().max() + 1e-7, key


@pytest.mark.skipif("EMULATED_SM" in os.environ, reason="It compiles what is emulated.")
def test_compiles_for_gpus():
    """Without a GPU: no hot loop spills registers, nothing wants more shared memory than there is."""
    command = [sys.executable, "benchmarks/offline_compile.py", "--arch", "90", "--head_dim", "64", "--dtype", "bf16"]
    command += ["--form", "fire", "general", "--processes", "1"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {line.split()[2] for line in result.stdout.splitlines()[1:]} >= {"forward", "query", "key", "decode"}
