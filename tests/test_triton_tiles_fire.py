"""The Triton kernels with the tiles that are shipped, beside the plain formula in float64."""

import os

import pytest
import torch
from layouts import padded, scattered
from reference import random_bias
from triton_checks import check, check_low_precision, random_inputs, triton_fire

from modeling_fire.positions_fire import FirePositions


# The compute capability whose code runs, times ten; of the interpreter, which has none, any.
ARCHITECTURE = os.environ.get("EMULATED_SM", "")
if torch.cuda.is_available():
    ARCHITECTURE = "{}{}".format(*torch.cuda.get_device_capability())

POSITIONS = {
    "causal": FirePositions.arange(300),
    "continued": FirePositions.arange(130, past=170),
    "long": FirePositions.arange(130, past=1400),  # with tiles so far away that `psi` is expanded
    "window": FirePositions.arange(300, window=90),
    "bidirectional": FirePositions.arange(280, causal=False),
    "packed": FirePositions.packed(torch.tensor([0, 5, 24, 24, 152, 300]), 300),
    "left padding": padded([0, 119], 300),
    "anywhere": scattered(263),
    "hidden keys": FirePositions.arange(300)._replace(visible=torch.arange(300)[None] % 160 < 90),
    "far": FirePositions.arange(200)._replace(absolute=FirePositions.arange(200).absolute + 10**6),
    "decode": FirePositions.arange(1, past=299),
    "decode, anywhere": scattered(300).block(298, 300, 300),
}


def check_tiles(positions, dtype, head_dim, capability, monkeypatch, **sizes):
    """Of one capability, whatever the GPU is, as far as it can run them."""
    if ARCHITECTURE and ARCHITECTURE[:-1] != str(capability):
        pytest.skip("Tiles for another GPU than this one.")
    monkeypatch.setattr(triton_fire, "capability_and_processors", lambda device: (capability, 4))
    inputs = random_inputs(positions, **sizes, head_dim=head_dim, dtype=dtype)
    bias = random_bias(inputs[0].shape[1], positions, dtype=torch.float32)
    if dtype == torch.float32:
        check(positions, bias, inputs=inputs, scaling=0.1)
    else:
        check_low_precision(inputs, bias, positions, 0.1)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability"),
    [
        (torch.float32, 32, 8),
        (torch.float32, 256, 8),
        (torch.bfloat16, 64, 8),
        (torch.bfloat16, 64, 9),
        (torch.bfloat16, 128, 9),
        (torch.bfloat16, 256, 8),
        (torch.bfloat16, 64, 10),
    ],
)
@pytest.mark.parametrize(("queries", "past"), [(140, 9), (2, 300)], ids=["forward", "decode"])
def test_shipped_tiles(dtype, head_dim, capability, queries, past, monkeypatch):
    check_tiles(FirePositions.arange(queries, past=past), dtype, head_dim, capability, monkeypatch, heads=1)


@pytest.mark.skipif(not ARCHITECTURE, reason="The interpreter takes minutes; `make emulate` runs it.")
@pytest.mark.parametrize("name", POSITIONS)
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (torch.bfloat16, 64),
        (torch.bfloat16, 32),
        (torch.bfloat16, 80),
        (torch.bfloat16, 128),
        (torch.bfloat16, 256),
        (torch.float16, 64),
        (torch.float32, 64),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_every_layout(dtype, head_dim, name, monkeypatch):
    positions = POSITIONS[name]
    sizes = {"heads": 4, "kv_heads": 2, "batch": max(positions.query.shape[0], positions.first.shape[0])}
    check_tiles(positions, dtype, head_dim, int(ARCHITECTURE[:-1]), monkeypatch, **sizes)
