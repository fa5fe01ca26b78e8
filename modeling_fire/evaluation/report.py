"""What `fire evaluate` and `fire plot` do: measure, and leave figures and plots in a folder."""

import importlib.util
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch

from ..configuration_fire import FireConfig
from ..conversion import library_versions
from ..errors import EvaluationError
from .attention import attention_by_distance, attention_entropy, learned_scales
from .loading import Checkpoint, distinct_names, shared_tokens
from .passkey import has_room, passkey_accuracy
from .perplexity import bin_positions, loss_by_context, loss_by_position
from .plots import (
    plot_attention_by_distance,
    plot_learned_bias,
    plot_passkey,
    plot_perplexity_by_context,
    plot_perplexity_by_position,
    plot_scales_by_step,
)


@dataclass(frozen=True)
class EvaluationOptions:
    """
    What to measure.

    Args:
        text (`str`): file or dataset, see [`~modeling_fire.text.read_texts`]. Its beginning is used.
        contexts (`Sequence[int]`, *optional*):
            Lengths in tokens. By default 1, 2, 4 and 8 times the shortest `max_position_embeddings` of the models (or
            512), as far as the text goes.
        num_targets (`int`, *optional*, defaults to 64): tokens at the end of each window whose loss counts.
        num_windows (`int`, *optional*, defaults to 16): windows of the text, each a little longer than the contexts.
        sliding (`bool`, *optional*, defaults to `False`):
            Whether each window begins `num_targets` tokens after the one before, so that the targets are the text
            without gaps. If not, windows do not overlap.
        by_position (`bool`, *optional*, defaults to `False`): whether to measure every token of the windows as well.
        passkey (`bool`, *optional*, defaults to `False`):
            Whether to measure retrieval as well, at the contexts that keys and question fill to no more than half.
        num_keys (`int`, *optional*, defaults to 1): keys in a text, one of which is asked for.
        num_trials (`int`, *optional*, defaults to 10): texts for each length and each of five places of the key.
        dtype (`str`, *optional*, defaults to `"auto"`): of the weights; `"auto"` is that of the checkpoint.
    """

    text: str
    contexts: Sequence[int] | None = None
    num_targets: int = 64
    num_windows: int = 16
    sliding: bool = False
    by_position: bool = False
    passkey: bool = False
    num_keys: int = 1
    num_trials: int = 10
    dtype: str = "auto"


def evaluate(
    models: Sequence[str], options: EvaluationOptions, out: Path | None = None, trust_remote_code: bool = False
) -> dict[str, Any]:
    """
    Measures how causal language models get on with ever longer contexts, all on the same tokens.

    A perplexity per token means something only beside others of the same tokens. A model that cuts the text into other
    tokens than the first one is therefore refused.

    Args:
        models (`Sequence[str]`): folders or Hub ids, of any architecture that `AutoModelForCausalLM` loads.
        options ([`EvaluationOptions`]): what to measure.
        out (`Path`, *optional*):
            Folder for `evaluation.json`, which holds what is returned, and for the plots `perplexity.png`,
            `position.png` and `passkey-<model>.png`.
        trust_remote_code (`bool`, *optional*, defaults to `False`): whether code that comes with a model may run.

    Returns:
        `dict[str, Any]`: `settings`, `versions`, `device`, and under `models`, by name, `loss_by_context` and
        `loss_by_position` (nats per token, the mean of each window) and `passkey` (from 0 to 1, by length and depth).

    Raises:
        [`EvaluationError`], [`~modeling_fire.errors.TextError`]: before anything is measured, if a model or
            the text cannot be read, or the settings do not fit them.
    """
    names = distinct_names(models)
    checkpoints = [Checkpoint.open(model, name, trust_remote_code) for model, name in zip(models, names, strict=True)]
    contexts, windows = contexts_and_windows(checkpoints, options)
    lengths = passkey_lengths(checkpoints[0], contexts, options) if options.passkey else []
    if out is not None:
        prepare_folder(out)
    for checkpoint in checkpoints[1:]:  # what does not load is found out before the first is measured
        checkpoint.load(options.dtype, contexts[-1])

    text = Path(options.text).name if Path(options.text).is_file() else options.text
    result = {
        "settings": asdict(options) | {"text": text, "contexts": contexts},
        "versions": library_versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "models": {c.name: measure(c, options, contexts, windows, lengths) for c in checkpoints},
    }
    if out is not None:
        write_json(out / "evaluation.json", result)
        draw(result, out, train_lengths={checkpoint.train_length for checkpoint in checkpoints})
    return result


def measure(
    checkpoint: Checkpoint,
    options: EvaluationOptions,
    contexts: list[int],
    windows: torch.Tensor,
    lengths: list[int],
) -> dict[str, Any]:
    """The figures of one model, whose memory is free again afterwards; `lengths` are those of the passkey texts."""
    model = checkpoint.load(options.dtype, contexts[-1])
    figures: dict[str, Any] = {"model_type": checkpoint.config.model_type, "dtype": str(model.dtype)}
    figures["loss_by_context"] = loss_by_context(model, windows, contexts, options.num_targets)
    if options.by_position:
        figures["loss_by_position"] = bin_positions(loss_by_position(model, windows))
    if options.passkey:
        figures["passkey"] = passkey_accuracy(
            model, checkpoint.tokenizer, lengths, trials=options.num_trials, num_keys=options.num_keys
        )
    return figures


def contexts_and_windows(
    checkpoints: Sequence[Checkpoint], options: EvaluationOptions
) -> tuple[list[int], torch.Tensor]:
    """
    The contexts to measure, ascending, and windows of shape `(num_windows, contexts[-1] + 1)` for them. Raises
    [`EvaluationError`] if the contexts are too short for the targets, or too long for the text.
    """
    count, targets = options.num_windows, options.num_targets
    shortest = min(checkpoint.train_length for checkpoint in checkpoints)
    contexts = sorted(set(options.contexts or (scale * shortest for scale in (1, 2, 4, 8))))
    if contexts[0] < targets:
        raise EvaluationError(f"A context of {contexts[0]} tokens is too short for {targets} targets.")

    overlap = (count - 1) * targets
    needed = contexts[-1] + 1 + overlap if options.sliding else (contexts[-1] + 1) * count
    tokens = shared_tokens(options.text, checkpoints, needed)
    longest = len(tokens) - overlap - 1 if options.sliding else len(tokens) // count - 1
    if not options.contexts:
        contexts = [context for context in contexts if context <= longest] or contexts[:1]
    if contexts[-1] > longest:
        fits = f"Contexts up to {longest} fit." if longest >= targets else "Take fewer windows, or more text."
        raise EvaluationError(
            f"{options.text} has {len(tokens)} tokens, too few for {count} windows with a context of {contexts[-1]}. "
            f"{fits}"
        )
    step = targets if options.sliding else contexts[-1] + 1
    return contexts, tokens.unfold(0, contexts[-1] + 1, step)[:count]


def passkey_lengths(checkpoint: Checkpoint, contexts: list[int], options: EvaluationOptions) -> list[int]:
    """The contexts that keys can be hidden in. Raises [`EvaluationError`] if there are none."""
    lengths = [context for context in contexts if has_room(checkpoint.tokenizer, context, options.num_keys)]
    if not lengths:
        raise EvaluationError(
            f"In {contexts[-1]} tokens {options.num_keys} keys cannot be hidden: take longer contexts."
        )
    return lengths


def plot_model(
    source: str,
    out: Path,
    positions: Sequence[int] | None = None,
    text: str | None = None,
    history: Path | None = None,
) -> dict[str, Any]:
    """
    Draws what a FIRE model has learned about distance.

    Args:
        source (`str`): folder or Hub id.
        out (`Path`):
            Folder for the plots: `bias.png`; with a text, `attention.png`; with a history, `scales.png`.
        positions (`Sequence[int]`, *optional*):
            Where the queries stand, in tokens. By default at the end of the training length, and of 4 times as much.
        text (`str`, *optional*):
            File or dataset, see [`~modeling_fire.text.read_texts`], in whose first tokens to observe the
            attention of the queries at, and just before, each of the positions.
        history (`Path`, *optional*):
            A `trainer_state.json` of [`~modeling_fire.training.FireTrainer`], to draw how `c` and `L` came about.

    Returns:
        `dict[str, Any]`: `scales`, see [`learned_scales`], and with a text `entropy`, by the number of tokens that are
        there to look at, see [`attention_entropy`].

    Raises:
        [`EvaluationError`], [`~modeling_fire.errors.TextError`]: if the model, the text or the history
            cannot be read, the model has no position bias, the text is shorter than the positions, or the history has
            neither `c` nor `L`.
    """
    checkpoint = Checkpoint.open(source, distinct_names([source])[0])
    config = checkpoint.config
    if not isinstance(config, FireConfig) or config.position_bias == "none":
        raise EvaluationError(f"{checkpoint.name} ({config.model_type}) has no position bias to draw.")
    positions = sorted(set(positions or (checkpoint.train_length - 1, 4 * checkpoint.train_length - 1)))
    tokens = shared_tokens(text, [checkpoint], positions[-1] + 1) if text is not None else None
    if tokens is not None and len(tokens) <= positions[-1]:
        raise EvaluationError(f"{text} has {len(tokens)} tokens, none at position {positions[-1]}: take others.")
    prepare_folder(out)
    if history is not None:
        try:
            plot_scales_by_step(json.loads(history.read_text())["log_history"], out / "scales.png", checkpoint.name)
        except (OSError, KeyError, ValueError) as error:
            raise EvaluationError(f"{history} has no history to draw: {error}") from error
    model = checkpoint.load()

    plot_learned_bias(model, out / "bias.png", positions)
    result: dict[str, Any] = {"scales": learned_scales(model)}
    if tokens is not None:
        texts = {position + 1: tokens[None, : position + 1] for position in positions}
        shares = {length: attention_by_distance(model, each) for length, each in texts.items()}
        plot_attention_by_distance(shares, out / "attention.png", checkpoint.name)
        result["entropy"] = {length: attention_entropy(model, each).tolist() for length, each in texts.items()}
    return result


def prepare_folder(out: Path) -> None:
    """Raises [`EvaluationError`] if plots cannot be drawn, or not be written to `out`."""
    if importlib.util.find_spec("matplotlib") is None:
        raise EvaluationError('Plots need matplotlib: pip install "modeling-fire[plots]".')
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"{out} cannot be written to: {error}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes to a temporary name first, so that a killed run leaves no half-written file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def mean_losses(result: dict[str, Any], kind: str) -> dict[str, dict[int, float]]:
    """For each model the mean over the windows, by context or position."""
    return {
        name: {length: mean(losses) for length, losses in figures[kind].items()}
        for name, figures in result["models"].items()
    }


def draw(result: dict[str, Any], out: Path, train_lengths: set[int]) -> None:
    """The plots of what [`evaluate`] measured; the training length is marked if the models share it."""
    settings, contexts = result["settings"], result["settings"]["contexts"]
    in_view = len(train_lengths) == 1 and contexts[0] <= min(train_lengths) <= contexts[-1]
    train_length = min(train_lengths) if in_view else None
    losses = mean_losses(result, "loss_by_context")
    plot_perplexity_by_context(losses, out / "perplexity.png", train_length, settings["text"])
    if settings["by_position"]:
        losses = mean_losses(result, "loss_by_position")
        plot_perplexity_by_position(losses, out / "position.png", train_length, settings["text"])
    if settings["passkey"]:
        for name, figures in result["models"].items():
            plot_passkey(figures["passkey"], out / f"passkey-{name.replace('/', '-')}.png", name)


def tables(result: dict[str, Any]) -> str:
    """What [`evaluate`] measured, to be read in a terminal."""
    settings, names = result["settings"], list(result["models"])
    losses = mean_losses(result, "loss_by_context")
    parts = [
        f"Perplexity of the same {settings['num_windows']} x {settings['num_targets']} tokens of {settings['text']}, "
        "by context",
        table(["", *settings["contexts"]], ([name, *map(perplexity, losses[name].values())] for name in names)),
    ]
    if settings["by_position"]:
        losses = mean_losses(result, "loss_by_position")
        starts = list(losses[names[0]])
        rows = (
            [f"{start}-{end}", *(perplexity(losses[name][start]) for name in names)]
            for start, end in zip(
                starts, [*(start - 1 for start in starts[1:]), settings["contexts"][-1]], strict=True
            )
        )
        parts += ["\nPerplexity of all tokens, by the number of tokens before them", table(["", *names], rows)]
    if settings["passkey"]:
        for name in names:
            found = result["models"][name]["passkey"]
            rows = (
                [f"{depth:.0%}", *(f"{found[n][depth]:.0%}" for n in found)] for depth in next(iter(found.values()))
            )
            parts += [f"\nPasskeys that {name} finds, by depth and length", table(["", *found], rows)]
    return "\n".join(parts)


def learned_tables(result: dict[str, Any]) -> str:
    """What [`plot_model`] returns, to be read in a terminal."""
    parts = []
    if result["scales"]:
        rows = (
            [layer, *("-" if value is None else f"{value:.5g}" for value in scale.values())]
            for layer, scale in enumerate(result["scales"])
        )
        parts.append(table(["layer", "c", "L (tokens)"], rows))
    if "entropy" in result:
        by_layer = zip(*result["entropy"].values(), strict=True)
        rows = ([layer, *(f"{math.exp(entropy):.1f}" for entropy in by_n)] for layer, by_n in enumerate(by_layer))
        parts.append("Keys that would share the attention evenly (exp of its entropy), by length of the text")
        parts.append(table(["layer", *result["entropy"]], rows))
    return "\n".join(parts)


def perplexity(loss: float) -> str:
    return f"{math.exp(loss):.3f}"


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]]) -> str:
    """Columns as wide as they need to be; the first one to the left, the others to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
