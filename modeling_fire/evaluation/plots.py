"""Plots of what was measured and of what was learned. Needs matplotlib: `pip install "modeling-fire[plots]"`."""

import math
import os
from typing import Any

import torch
from transformers import PreTrainedModel

from ..positions_fire import FirePositions
from .attention import position_biases


OFF_THE_PLOT = 6.0


def mark_train_length(axes: Any, train_length: int) -> None:
    """A dotted line at the length of the training texts."""
    axes.axvline(train_length, color="gray", linestyle=":", linewidth=1.2)
    axes.annotate(
        "trained here",
        (train_length, 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, -12),
        textcoords="offset points",
        color="gray",
    )


def perplexity_axes(losses: dict[str, dict[int, float]], xlabel: str, ylabel: str, title: str) -> tuple[Any, Any]:
    """
    Figure and axes with a line of perplexities for each model, on a logarithmic axis. Only what is less than
    `OFF_THE_PLOT` times the lowest is in sight, or one model that fails would press all others together.
    """
    from cycler import cycler
    from matplotlib import rcParams
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.set_prop_cycle(cycler(linestyle=["-", "--", ":"]) * rcParams["axes.prop_cycle"])
    values = [math.exp(loss) for by_x in losses.values() for loss in by_x.values()]
    for name, by_x in losses.items():
        perplexities = [math.exp(loss) for loss in by_x.values()]
        axes.plot(list(by_x), perplexities, marker="o", label=name, linewidth=2.8 if name == "FIRE" else 1.6)
    axes.set_yscale("log")
    axes.set_ylim(min(values) / 1.05, min(max(values) * 1.05, OFF_THE_PLOT * min(values)))
    axes.yaxis.set_minor_locator(LogLocator(subs=(1.5, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.grid(alpha=0.3, which="both")
    figure.legend(loc="outside right upper")
    return figure, axes


def plot_perplexity_by_context(
    losses: dict[str, dict[int, float]], path: str | os.PathLike, train_length: int | None = None, title: str = ""
) -> None:
    """
    Perplexity of several models against the length of their context, both on logarithmic axes.

    Args:
        losses (`dict[str, dict[int, float]]`): for each model the mean loss by context, in nats per token.
        path (`str` or `os.PathLike`): the image to write; its ending chooses the format.
        train_length (`int`, *optional*): marked in the plot, in tokens.
        title (`str`, *optional*): above the plot.
    """
    figure, axes = perplexity_axes(losses, "context length (tokens)", "perplexity of the same tokens", title)
    if train_length is not None:
        mark_train_length(axes, train_length)
    contexts = sorted({context for by_context in losses.values() for context in by_context})
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [str(context) for context in contexts])
    figure.savefig(path, dpi=150)


def plot_perplexity_by_tokens(losses: dict[str, dict[int, float]], path: str | os.PathLike, title: str = "") -> None:
    """
    Perplexity of several models while they train, on a logarithmic axis.

    Args:
        losses (`dict[str, dict[int, float]]`): for each model the mean loss after so many tokens, in nats per token.
        path (`str` or `os.PathLike`): the image to write; its ending chooses the format.
        title (`str`, *optional*): above the plot.
    """
    figure, axes = perplexity_axes(losses, "tokens trained on", "perplexity", title)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g} M")
    figure.savefig(path, dpi=150)


def plot_perplexity_by_position(
    losses: dict[str, dict[int, float]], path: str | os.PathLike, train_length: int | None = None, title: str = ""
) -> None:
    """
    Perplexity of several models over the positions of a long text, both on logarithmic axes.

    Args:
        losses (`dict[str, dict[int, float]]`):
            For each model the mean loss by position, as [`bin_positions`] names them, in nats per token.
        path (`str` or `os.PathLike`): the image to write; its ending chooses the format.
        train_length (`int`, *optional*): marked in the plot, in tokens.
        title (`str`, *optional*): above the plot.
    """
    figure, axes = perplexity_axes(losses, "tokens before the one that is predicted", "perplexity", title)
    if train_length is not None:
        mark_train_length(axes, train_length)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=150)


def plot_passkey(accuracies: dict[int, dict[float, float]], path: str | os.PathLike, title: str = "") -> None:
    """
    A heat map of the share of passkeys that a model finds, depths over lengths.

    Args:
        accuracies (`dict[int, dict[float, float]]`):
            By length (tokens) and depth (0 is the beginning of the text, 1 its end), from 0 to 1. All lengths have the
            same depths.
        path (`str` or `os.PathLike`): the image to write; its ending chooses the format.
        title (`str`, *optional*): above the plot.
    """
    from matplotlib.figure import Figure

    lengths, depths = list(accuracies), list(next(iter(accuracies.values())))
    grid = [[accuracies[length][depth] for length in lengths] for depth in depths]
    figure = Figure(figsize=(2.8 + 0.9 * len(lengths), 1.6 + 0.45 * len(depths)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for row, shares in enumerate(grid):
        for column, share in enumerate(shares):
            color = "white" if share < 0.6 else "black"
            axes.text(column, row, f"{share:.0%}", color=color, ha="center", va="center")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("length of the text (tokens)")
    axes.set_ylabel("depth of the key")
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label="found", format=lambda share, _: f"{share:.0%}")
    figure.savefig(path, dpi=150)


def plot_attention_by_distance(shares: dict[int, torch.Tensor], path: str | os.PathLike, title: str = "") -> None:
    """
    How far back every layer looks, a plot for each length of the text.

    Args:
        shares (`dict[int, torch.Tensor]`): by length in tokens, what [`attention_by_distance`] returns.
        path (`str` or `os.PathLike`): the image to write; its ending chooses the format.
        title (`str`, *optional*): above the plots.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4.2 * len(shares), 3.6), layout="constrained")
    grid = figure.subplots(1, len(shares), squeeze=False, sharey="row")[0]
    for (length, by_layer), axes in zip(shares.items(), grid, strict=True):
        num_layers, num_bins = by_layer.shape
        for layer, by_bin in enumerate(by_layer):
            color = colormaps["viridis"](layer / max(1, num_layers - 1))
            axes.plot(range(num_bins), by_bin, marker=".", color=color, label=f"layer {layer}")
        labels = ["0", *(str(2**i) for i in range(num_bins - 1))]
        axes.set_xticks(range(num_bins), [f"{label}–" if int(label) > 1 else label for label in labels], rotation=60)
        axes.set_xlabel("distance (tokens), up to the next mark")
        axes.set_title(f"the last of {length:,} tokens")
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("share of the attention")
    grid[0].yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    layers_legend(grid[-1])
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def plot_scales_by_step(history: list[dict[str, Any]], path: str | os.PathLike, title: str = "") -> None:
    """
    `c` and `L` of every layer while a model trained, each on a logarithmic axis.

    Args:
        history (`list[dict]`):
            `log_history` of a [`~modeling_fire.training.FireTrainer`], of which the entries with `c` or `L` are drawn.
        path (`str` or `os.PathLike`): the image to write; its ending chooses the format.
        title (`str`, *optional*): above the plots.

    Raises:
        ValueError: if there are no such entries.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    entries = [entry for entry in history if "L" in entry]
    names = {"c": "c", "L": "L (tokens)"} if entries else {}
    names = {name: label for name, label in names.items() if entries[0][name][0] is not None}
    if not names:
        raise ValueError("It has neither `c` nor `L`: only FireTrainer keeps them, of FIRE models that have them.")
    figure = Figure(figsize=(1 + 4.2 * len(names), 3.6), layout="constrained")
    grid = figure.subplots(1, len(names), squeeze=False)[0]
    for (name, label), axes in zip(names.items(), grid, strict=True):
        steps = [entry["step"] for entry in entries]
        values = [entry[name] for entry in entries]
        for layer, by_step in enumerate(zip(*values, strict=True)):
            color = colormaps["viridis"](layer / max(1, len(values[0]) - 1))
            axes.plot(steps, by_step, marker=".", color=color, label=f"layer {layer}")
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3, which="both")
    layers_legend(grid[-1])
    figure.suptitle(title)
    figure.savefig(path, dpi=150)


def layers_legend(axes: Any) -> None:
    """Names the layers; of many only the first and the last, which tell the order of the colours."""
    handles, names = axes.get_legend_handles_labels()
    shown = slice(None) if len(names) <= 8 else slice(None, None, len(names) - 1)
    axes.legend(handles[shown], names[shown], fontsize="x-small")


LOWEST_BIAS = -30.0


@torch.no_grad()
def plot_learned_bias(model: PreTrainedModel, path: str | os.PathLike, query_positions: list[int]) -> None:
    """
    The bias of every head by distance, a row of plots a layer and a column a query position. At -30 a curve ends: a
    key that lies lower has no part in the attention.

    Args:
        model (`PreTrainedModel`): a FIRE model, with or without a head; with shared layers there is one row.
        path (`str` or `os.PathLike`): the image to write; its ending chooses the format.
        query_positions (`list[int]`): where the queries stand, in tokens.

    Raises:
        ValueError: if the model has no position bias.
    """
    from matplotlib.figure import Figure

    biases = position_biases(model)
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
            values = values - values[:, -1:]
            for head, value in enumerate(values.masked_fill(values < LOWEST_BIAS, math.nan)):
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
