"""The layers of FIRE's `f`: linear, in float32 whatever the model is in, and how they start."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import initialization as init


def parameter_dtype() -> torch.dtype:
    """The type of what a bias learns: the default, which `from_pretrained` sets, but no narrower than float32."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


# The starts are computed in float32 whatever PyTorch's default type is: large units cancel.
def uniform_start(shape: torch.Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias drawn as `nn.Linear` draws them."""
    bound = 1.0 / math.sqrt(shape[1])
    draw = torch.empty(shape[0], shape[1] + 1, dtype=torch.float32, device=device).uniform_(-bound, bound)
    return draw[:, :-1], draw[:, -1]


# The start of `f` as decaying curves, `f_h(x) = -d ** r_h` up to `STEEPEST`, all heads different: some near-sighted.
#
# Unit 0 of the hidden layer is `psi(d)` itself. The other units are hinges `max(0, k - psi(d))` that open towards
# *short* distances, with `k` spread evenly over those of training. So training is free to shape the bias over the
# distances that it sees, and beyond them a straight line goes on, not what no data has shaped. All units are 8 times
# as large, and their output weights as small, as that needs: Adam moves all weights alike, so they shape `f` faster.
UNIT_SCALE = 8.0
# `r` of the first head and of the last; between them it falls evenly.
EXPONENTS = (1.5, 0.3)
# Where it falls by this many units as the distance grows e-fold, a curve does not get steeper. Nothing is seen there,
# and large weights would cost precision where something is.
STEEPEST = 64.0


def hinge_start(
    span: float, gain: float, shape: torch.Size, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden layer: `psi(d)` is `gain` times its input, and `span` at the training length."""
    knots = torch.linspace(0.0, span, shape[0], dtype=torch.float32, device=device)
    scale = torch.where(knots > 0, -UNIT_SCALE, UNIT_SCALE).to(knots.dtype)
    return (scale * gain)[:, None], -scale * knots


def pass_on_start(shape: torch.Size, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """A second hidden layer: passes all units on, and mixes those that end at the training length."""
    weight = 0.01 * uniform_start(shape, device)[0]
    weight[0], weight[:, 0] = 0.0, 0.0
    return weight + torch.eye(shape[0], dtype=weight.dtype, device=device), weight.new_zeros(shape[0])


def decay_start(
    step: float, distances: list[float], shape: torch.Size, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output layer: straight lines between `distances`, `step` apart, that of each unit and one beyond."""
    exponents = torch.linspace(*EXPONENTS, shape[0], dtype=torch.float32, device=device)[:, None]
    growth = torch.tensor(distances, dtype=torch.float32, device=device) ** exponents
    curves = -STEEPEST / exponents * torch.log1p(growth * exponents / STEEPEST)
    slopes = curves.diff(dim=1) / step
    weight = torch.cat((slopes[:, -1:], slopes.diff(dim=1)), dim=1)
    at_zero = weight @ (step * torch.arange(shape[1], dtype=torch.float32, device=device))
    noise = 0.1 * uniform_start(shape, device)[0]
    noise[:, 0] = 0.0
    return (weight + noise) / UNIT_SCALE, -at_zero  # a softmax ignores constants, 16-bit numbers do not


@torch.compiler.assume_constant_result
def rounds_products() -> bool:
    """Whether GPUs are set to round what they multiply in float32 to ten bits (TF32)."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


class Float32Linear(nn.Module):
    """
    A linear layer that computes in float32 (or wider) whatever type its weights are stored in. Not an `nn.Linear`,
    which quantisers replace and adapters adapt.

    It draws its own start, so that it can be initialised alone: DeepSpeed's ZeRO-3 takes the values of every module
    away as soon as its constructor ends, and lends them again one module at a time.

    Args:
        in_features, out_features (`int`): as in `nn.Linear`.
        start (`Callable[[torch.Size, torch.device], tuple[torch.Tensor, torch.Tensor]]`):
            Given the shape and the device of the weight, returns the initial weight and bias.
    """

    def __init__(self, in_features: int, out_features: int, start: Callable):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=parameter_dtype()))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=parameter_dtype()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            values = self.start(self.weight.shape, self.weight.device)
            for parameter, value in zip((self.weight, self.bias), values, strict=True):
                if isinstance(parameter, DTensor):
                    value = distribute_tensor(value, parameter.device_mesh, parameter.placements)
                init.copy_(parameter, value)

    def forward(self, hidden_states: torch.Tensor, parameters: bool = False) -> torch.Tensor:
        """
        With `parameters`, instead of the output for `hidden_states`: a copy of the weight and, as a last column, of
        the bias. Sharded parameters have values during a call of their module, and lose them as it ends.
        """
        if parameters:
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            return torch.cat((self.weight, self.bias[:, None]), dim=1).to(dtype)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)  # FSDP may hand in bfloat16
        wide = torch.float64 if hidden_states.is_cuda and rounds_products() else dtype  # large units cancel
        return nn.functional.linear(hidden_states.to(wide), self.weight.to(wide), self.bias.to(wide)).to(dtype)
