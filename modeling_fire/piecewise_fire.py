"""
The piecewise-linear form of a position bias: what the fused paths compute with.

A hidden layer of ReLU units makes `f` piecewise linear in its one input, with a knot where each unit switches. So for
the pair of a query `i` and a key `j`

    b_h(i, j) = slope[h, s] x + offset[h, s],    x = psi(|i - j|) row_scale[i],    s = number of knots below x.

KERPLE and ALiBi are the case of one segment. Nothing of the size of queries x keys appears here.
"""

from typing import NamedTuple

import torch


class PiecewiseBias(NamedTuple):
    """
    A position bias as straight pieces. Float32 or wider; gradients flow through `slope`, `offset`, `c` and
    `row_scale` (a moving knot changes nothing at first order, because `f` is continuous).

    Args:
        knots (`torch.Tensor` of shape `(segments - 1,)`): Ascending, possibly infinite, without gradient.
        slope (`torch.Tensor` of shape `(heads, segments)`): Slope of each piece.
        offset (`torch.Tensor` of shape `(heads, segments)`): Value of each piece, continued to `x = 0`.
        c (`torch.Tensor` of shape `(1,)` or `(heads,)`):
            Non-negative parameter of `psi`; unused by `"identity"` and `"none"`.
        row_scale (`torch.Tensor` of shape `(batch or 1, queries)`): One over the normaliser of each query.
        shared (`torch.BoolTensor` of shape `(batch or 1, queries)`):
            Queries whose `row_scale` is one and the same number: of their gradients only the sum has a meaning.
        transform (`str`):
            `psi(d)`: `"log"` is `log(1 + c d)`, `"power"` is `d ** c`, `"identity"` is `d`, and `"none"` stands for a
            bias of 0, which kernels leave out.
        table (`torch.Tensor` of shape `(heads, distances)`, *optional*):
            The bias by distance, the largest first and 0 last, where the queries are one token, or one for each item
            of a batch, and `shared`. A shortcut for inference on CPU, where it serves one token after the other;
            nothing else changes with it.
        eps (`float`, *optional*):
            If given, `row_scale`, of shape `(1, 1)`, is an upper limit: that of a query is the lesser of it and
            `1 / (psi(absolute) + eps)`. So the same tensors serve one token after the other in inference on a GPU,
            where the kernel works it out.
    """

    knots: torch.Tensor
    slope: torch.Tensor
    offset: torch.Tensor
    c: torch.Tensor
    row_scale: torch.Tensor
    shared: torch.Tensor
    transform: str
    table: torch.Tensor | None = None
    eps: float | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """The tensors that every bias has, in the order in which the operator takes them."""
        return self[:6]

    @classmethod
    def straight(
        cls, slope: torch.Tensor, transform: str, query: torch.Tensor, c: torch.Tensor | None = None
    ) -> "PiecewiseBias":
        """
        `slope_h psi(d)`: a bias without knots and normaliser.

        Args:
            slope (`torch.Tensor` of shape `(heads,)`): Slope of each head.
            transform (`str`): `psi`.
            query (`torch.Tensor` of shape `(batch or 1, queries)`): any tensor of the queries.
            c (`torch.Tensor` of shape `(1,)` or `(heads,)`, *optional*): parameter of `psi`, if it has one.
        """
        row_scale = torch.ones_like(query, dtype=slope.dtype)
        shared = torch.ones_like(query, dtype=torch.bool)
        c = slope.new_ones(1) if c is None else c
        slope = slope[:, None]
        return cls(slope.new_empty(0), slope, torch.zeros_like(slope), c, row_scale, shared, transform)

    def to(self, device: torch.device) -> "PiecewiseBias":
        """The same bias on another device."""
        knots, slope, offset, c, row_scale, shared = (tensor.to(device) for tensor in self.tensors)
        return PiecewiseBias(knots, slope, offset, c, row_scale, shared, self.transform, eps=self.eps)

    def heads(self, start: int, stop: int) -> "PiecewiseBias":
        """The heads from `start` to `stop`."""
        c = self.c if self.c.shape[0] == 1 else self.c[start:stop]
        table = None if self.table is None else self.table[start:stop]
        return self._replace(slope=self.slope[start:stop], offset=self.offset[start:stop], c=c, table=table)


def relu_pieces(
    hidden_weight: torch.Tensor, hidden_bias: torch.Tensor, output_weight: torch.Tensor, output_bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    The pieces of `f(x) = output_weight relu(hidden_weight x + hidden_bias) + output_bias`.

    Args:
        hidden_weight (`torch.Tensor` of shape `(width, 1)`): and `hidden_bias` of shape `(width,)`.
        output_weight (`torch.Tensor` of shape `(heads, width)`): and `output_bias` of shape `(heads,)`.

    Returns:
        `knots` of shape `(width,)`, `slope` and `offset` of shape `(heads, width + 1)`; see [`PiecewiseBias`].
    """
    weight = hidden_weight[:, 0]
    with torch.no_grad():
        # A unit without a slope never switches: its knot goes where no x is, so that it is always or never active.
        never = torch.where(hidden_bias > 0, -torch.inf, torch.inf)
        knots, order = torch.where(weight == 0, never, -hidden_bias / weight).sort(stable=True)
        rank = order.argsort()
        segments = torch.arange(len(knots) + 1, device=knots.device)[:, None]
        # By rank rather than by value: two knots in one place stay consistent.
        active = torch.where(weight >= 0, rank < segments, rank >= segments)
    # In float64, where devices have it: large units cancel, and GPUs may round what they multiply in float32 (TF32).
    wide = torch.float64 if weight.device.type in ("cpu", "cuda") else weight.dtype
    wide_output, active = output_weight.to(wide), active.to(wide)
    slope = wide_output @ (active * weight.to(wide)).T
    # A softmax ignores a shift of all scores: the gradient of `output_bias` is 0, not the rounding errors of a sum,
    # which Adam would blow up.
    shift = output_bias.detach() + 0.0 * output_bias
    offset = wide_output @ (active * hidden_bias.to(wide)).T + shift.to(wide)[:, None]
    return knots, slope.to(weight.dtype), offset.to(weight.dtype)


def psi(distance: torch.Tensor, c: torch.Tensor, transform: str) -> torch.Tensor:
    """The monotone transform of a float tensor of distances `>= 0`; `c` is non-negative and broadcasts."""
    match transform:
        case "identity" | "none":
            return distance
        case "log":
            return torch.log1p(c * distance)  # log(1 + c x) loses every digit when c x is below float spacing at 1
        case "power":
            # x ** c has no finite gradient in c at x = 0, where it is 0 for every c.
            return torch.where(distance > 0, torch.where(distance > 0, distance, 1).log().mul(c).exp(), 0)
        case _:
            raise ValueError(f"`transform` must be 'log', 'identity' or 'power', got {transform!r}.")


def psi_slope_in_c(distance: torch.Tensor, c: torch.Tensor, transform: str) -> torch.Tensor:
    """`d psi / d c` of a float tensor of distances `>= 0`."""
    match transform:
        case "log":
            return distance / (1 + c * distance)
        case "power":
            return psi(distance, c, transform) * torch.where(distance > 0, distance, 1).log()
        case _:
            return torch.zeros_like(distance)
