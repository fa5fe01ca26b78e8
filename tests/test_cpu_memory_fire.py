"""The CPU path and memory: however its inputs lie there, and how much of it is taken."""

import pytest
import torch
from cpu_checks import LAYOUTS, NAMES, cast, fused, inputs, set_sizes
from helpers import LargestTensor
from reference import random_bias

from modeling_fire.positions_fire import FirePositions


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_memory_layouts(dtype):
    """Whatever the layout of the inputs: gradients have that of `empty_like`, which `torch.compile` relies on."""
    positions = LAYOUTS["causal"]
    bias = random_bias(4, positions)
    transposed = [tensor.to(dtype) for tensor in inputs(positions)]
    sliced = [torch.cat([tensor, tensor], dim=2)[:, :, :83] for tensor in transposed]
    apart = [tensor.mT.contiguous().mT for tensor in transposed]  # the entries of a vector
    expected = fused(transposed, bias, positions)
    # The gradient of a sum has one number for all its entries.
    ones = [*transposed[:3], torch.ones(1, 1, 1, 1, dtype=dtype).expand_as(transposed[3])]
    for left, right in zip(
        fused(ones, bias, positions), fused([*ones[:3], ones[3].contiguous()], bias, positions), strict=True
    ):
        torch.testing.assert_close(left, right)
    for tensors in (transposed, [tensor.contiguous() for tensor in transposed], sliced, apart):
        actual = fused(tensors, bias, positions)
        assert actual[0].transpose(1, 2).is_contiguous()
        assert actual[1].is_contiguous()
        for tensor, grad in zip(tensors[:3], actual[2:5], strict=True):
            assert grad.stride() == torch.empty_like(tensor).stride()
        for left, right in zip(actual, expected, strict=True):
            torch.testing.assert_close(left, right)


@pytest.mark.parametrize("layout", ["causal", "decoding", "scattered"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_whose_entries_are_not_neighbours(layout, dtype):
    positions = LAYOUTS[layout]
    bias = cast(random_bias(4, positions), torch.float32)
    tensors = [tensor.to(dtype) for tensor in inputs(positions, kv_heads=2)]
    ways = [
        lambda x: x.mT.contiguous().mT,  # from a convolution
        lambda x: torch.stack((x, x), dim=-1)[..., 0],  # keys and values in one tensor
        lambda x: x[..., :1].expand(x.shape),
    ]
    for way in ways:
        for changed in range(3):
            given = [way(x) if i == changed else x for i, x in enumerate(tensors)]
            expected = fused([x.contiguous() for x in given], bias, positions)
            for name, left, right in zip(NAMES, fused(given, bias, positions), expected, strict=True):
                torch.testing.assert_close(left, right, msg=name)


@pytest.mark.parametrize("kind", ["shared", "scaled", "pairwise"])
def test_memory_is_linear(kind, monkeypatch):
    set_sizes(monkeypatch, 16, 1)

    def largest(length: int) -> int:
        positions = FirePositions.arange(length)._replace(consecutive=kind != "pairwise")
        bias = cast(random_bias(2, positions, L=length if kind == "shared" else 1.0), torch.float32)
        tensors = [tensor.float() for tensor in inputs(positions, heads=2, batch=1, head_dim=8)]
        with LargestTensor() as mode:
            fused(tensors, bias, positions)
        return mode.numel

    assert largest(1024) < 2.2 * largest(512)
