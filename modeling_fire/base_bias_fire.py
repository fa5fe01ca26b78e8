"""What every position bias is: a function that adds to the attention scores of a block of queries.

A position bias is a function, not a tensor: called with [`FirePositions`] it returns one dense block of float32
biases, of shape `(batch or 1, num_heads, queries, keys)`, to be added to `q k / sqrt(head_dim)` before the softmax. A
caller that works through a long sequence in blocks of queries asks for one block at a time.
"""

import torch
from torch import nn
from transformers.utils.generic import maybe_autocast

from .piecewise_fire import PiecewiseBias
from .positions_fire import FirePositions


def in_function_transform() -> bool:
    """Whether a transform of `torch.func` is at work."""
    return torch._C._are_functorch_transforms_active()


def is_observed() -> bool:
    """Whether operators are not only executed, but compiled, traced, counted or without values."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0


class PositionBias(nn.Module):
    """
    Base of the position biases. A subclass implements `compute`; this class sees to its precision.

    Parameters are created in float32 and stay at least float32 through `model.to(torch.bfloat16)`, `half()` and the
    like: a bias rounded to bfloat16 is off by 0.1 and more. The computation runs in float32 with autocast off.
    """

    # Scalars that `compute` holds for each pair of query and key beside its result: what a caller sizes blocks by.
    hidden_width = 1

    def compute(self, positions: FirePositions, dtype: torch.dtype) -> torch.Tensor:
        """Biases of shape `(batch or 1, queries, keys, num_heads)`, computed in `dtype`."""
        raise NotImplementedError

    @property
    def is_piecewise(self) -> bool:
        """Whether there is a piecewise-linear form, which the fused paths ask for."""
        return type(self).pieces is not PositionBias.pieces

    def pieces(self, positions: FirePositions, dtype: torch.dtype, backend: str) -> PiecewiseBias:
        """The piecewise-linear form, computed in `dtype`, if `is_piecewise`."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialises the parameters of this module, not those of its children; the default has none."""

    def forward(self, positions: FirePositions, backend: str | None = None) -> torch.Tensor | PiecewiseBias:
        """
        Args:
            positions ([`FirePositions`]): the queries and keys of the block.
            backend (`str`, *optional*):
                `"cpu"` or `"triton"`, for the form that this fused path takes; see `operator_fire.choose_backend`.

        Returns:
            `torch.Tensor` of shape `(batch or 1, num_heads, queries, keys)`, of type float32 or wider; or a
            [`PiecewiseBias`].
        """
        with maybe_autocast(device_type=positions.query.device.type, enabled=False):
            dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)
            dtype = torch.promote_types(dtype, torch.float32)
            if backend is not None:
                return self.pieces(positions, dtype, backend)
            return self.compute(positions, dtype).permute(0, 3, 1, 2)

    def _apply(self, fn, recurse=True):
        def keep_precision(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if moved.is_floating_point() and moved.dtype.itemsize < min(tensor.dtype.itemsize, 4):
                moved = tensor.to(moved.device)
            return moved

        return super()._apply(keep_precision, recurse)
