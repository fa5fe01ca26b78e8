"""Plots of what was measured and of what was learned. Needs matplotlib: `pip install "modeling-fire[plots]"`."""

import math
import os

import torch
from transformers import PreTrainedModel

from ..position_bias_fire import PositionBias
from ..positions_fire import FirePositions


def plot_perplexity_by_context(
    losses: dict[str, dict[int, float]], path: str | os.PathLike, train_length: int, title: str = ""
) -> None:
    """
    Perplexity of several models against the length of their context, both on logarithmic axes.

    Args:
        losses (`dict[str, dict[int, float]]`): for each model the mean loss by context, in nats per token.
        path (`str` or `os.PathLike`): the image to write; its ending chooses the format.
        train_length (`int`): marked in the plot, in tokens.
        title (`str`, *optional*): above the plot.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, by_context in losses.items():
        perplexities = [math.exp(loss) for loss in by_context.values()]
        axes.plot(list(by_context), perplexities, marker="o", label=name, linewidth=2.8 if name == "FIRE" else 1.6)
    contexts = sorted({context for by_context in losses.values() for context in by_context})
    axes.axvline(train_length, color="gray", linestyle=":", linewidth=1.2)
    axes.annotate(
        "trained here",
        (train_length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -12),
        textcoords="offset points",
        color="gray",
    )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(contexts, [str(context) for context in contexts])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("context length (tokens)")
    axes.set_ylabel("perplexity of the same tokens")
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)


def plot_perplexity_by_tokens(losses: dict[str, dict[int, float]], path: str | os.PathLike, title: str = "") -> None:
    """
    Perplexity of several models while they train, on a logarithmic axis.

    Args:
        losses (`dict[str, dict[int, float]]`): for each model the mean loss after so many tokens, in nats per token.
        path (`str` or `os.PathLike`): the image to write; its ending chooses the format.
        title (`str`, *optional*): above the plot.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, by_tokens in losses.items():
        axes.plot(list(by_tokens), [math.exp(loss) for loss in by_tokens.values()], label=name, linewidth=1.6)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("perplexity")
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=150)


@torch.no_grad()
def plot_learned_bias(model: PreTrainedModel, path: str | os.PathLike, query_positions: list[int]) -> None:
    """
    The bias of every head by distance, a row of plots a layer and a column a query position.

    Args:
        model (`PreTrainedModel`): a FIRE model, with or without a head; with shared layers there is one row.
        path (`str` or `os.PathLike`): the image to write; its ending chooses the format.
        query_positions (`list[int]`): where the queries stand, in tokens.

    Raises:
        ValueError: if the model has no position bias.
    """
    from matplotlib.figure import Figure

    # PEFT keeps what it trains beside the original.
    biases = [m for name, m in model.named_modules() if isinstance(m, PositionBias) and "original_module" not in name]
    if not biases:
        raise ValueError("The model has no position bias to plot (`position_bias='none'` in its config).")

    size = (3.2 * len(query_positions), 2.2 * len(biases))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(biases), len(query_positions), squeeze=False, sharey="row")
    for row, (bias, row_axes) in enumerate(zip(biases, grid, strict=True)):
        for position, axes in zip(query_positions, row_axes, strict=True):
            keys = torch.arange(position + 1, device=model.device)[None]
            query = keys[:, -1:]
            # A softmax ignores a constant: what counts is the difference to the query's own key.
            values = bias(FirePositions(query, query, keys))[0, :, 0].float().cpu()
            for head, value in enumerate(values - values[:, -1:]):
                axes.plot(torch.arange(position, -1, -1), value, label=f"head {head}", linewidth=1.3)
            axes.set_xscale("symlog", linthresh=1)
            axes.grid(alpha=0.3)
            if row == 0:
                axes.set_title(f"query at {position}")
            if row == len(biases) - 1:
                axes.set_xlabel("distance (tokens)")
        row_axes[0].set_ylabel(f"layer {row}: bias" if len(biases) > 1 else "bias")
    if values.shape[0] <= 16:
        grid[0, -1].legend(fontsize="x-small")
    figure.savefig(path, dpi=150)
