"""
What the rotation of a converted model did moves into its bias, all or the slow part of it, layer by layer: nothing is
trained end to end.

`fit` finds the `f` whose attention is nearest to the original's; `align` then lets queries, keys and `f` imitate the
layer's output. Both work on the hidden states of the original.
"""

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..configuration_fire import FireConfig
from ..evaluation import loss_by_context
from ..modeling_fire import FireAttention, FireDecoderLayer, FireForCausalLM
from ..positions_fire import FirePositions
from ..text import check_tokens, read_texts, token_windows
from .align import align
from .family import ConversionError
from .fit import fit
from .sampling import sampled_windows, start_token
from .weights import replace_weights


# Tokens that go through a layer at once: what a step of the alignment sees, in windows of so many or less.
BATCH_TOKENS = 2048
# A bias knows the distances that it was fitted at. So windows are as long as the original's texts, within reason.
MAX_LENGTH = 8192
# Windows that `fit` looks at, which has few parameters, and as many that are held out: so many of short ones, and of
# long ones so many tokens.
FEW_WINDOWS, FEW_TOKENS = 16, 2**15
# Bytes that the KV cache may take while text is sampled, and texts that are sampled at once.
SAMPLE_BYTES, MAX_SAMPLE_BATCH = 2**33, 64
# Tokens that a window repeats in one piece, or less in a short one.
PIECE = 128
SAMPLE = "sample"
GIVEN = "texts given"  # in the record, which would otherwise hold them


@dataclass(frozen=True)
class CalibrationOptions:
    """
    How to calibrate.

    Args:
        text (`str` or `Sequence[str]`):
            A file (plain text, or jsonl, json, csv or parquet with a column `text`), the name of a dataset (its
            configuration after a colon), the documents themselves, or `"sample"`: what the model writes.
        tokens (`int`, *optional*, defaults to 307200):
            How many of the text to calibrate on, at most. The alignment of a layer sees each of them once, up to 2048
            at a time; the fit some of them, `length` at a time.
        length (`int`, *optional*):
            Of a window, in tokens: the training length of the original, but no more than 8192, if not given. Beyond
            it `f` falls about like `-log(distance)`; beyond the training length the original is no model to follow.
        align (`bool`, *optional*):
            Whether to align, after the fit; if not given, where windows have no more than 2048 tokens. Longer ones are
            aligned in parts, which undid some of the fit where it was measured.
        repeat (`bool`, *optional*):
            Whether half of the windows that `f` is fitted to repeat in their second half what stands in their first.
            Some heads are there to find what a text repeats, and in most text have little to do: fitted to that alone,
            they look no further than it does. If not given, where windows have more than 2048 tokens.
        seed (`int`, *optional*, defaults to 0): of the order of the windows and pieces, and of sampled text.
    """

    text: str | Sequence[str]
    tokens: int = 307_200
    length: int | None = None
    align: bool | None = None
    repeat: bool | None = None
    seed: int = 0

    def __post_init__(self):
        if self.length is not None and self.length < 2:
            raise ConversionError(f"`length` must be at least 2, got {self.length}.")
        if not -(2**63) <= self.seed < 2**64:
            raise ConversionError(f"`seed` must fit into 64 bits, got {self.seed}.")


@dataclass(frozen=True)
class Calibration:
    """
    What came of it.

    Args:
        text (`str`): the file, the dataset, or `"sample"`.
        tokens (`int`): calibrated on.
        length (`int`): tokens in a window of it.
        repeat (`bool`): whether half of what was fitted to repeated itself.
        seed (`int`): see [`CalibrationOptions`].
        perplexity (`dict[str, float]`):
            Of the second half of held-out windows of that length, computed in float32: `"original"`, `"dropped"`
            (neither the rotation that goes nor a bias), `"fitted"`, and `"aligned"` if it was.
    """

    text: str
    tokens: int
    length: int
    repeat: bool
    seed: int
    perplexity: dict[str, float]

    def __str__(self) -> str:
        steps = ", ".join(f"{name} {value:.2f}" for name, value in self.perplexity.items())
        return f"perplexity at {self.length} tokens: {steps}"


def window_length(options: CalibrationOptions, config: FireConfig) -> int:
    """Tokens in a window of calibration. None stands past `L`, where distances shrink."""
    length = min(config.max_position_embeddings, MAX_LENGTH) if options.length is None else options.length
    return min(length, int(config.fire_init_L))


def few_windows(length: int) -> int:
    """Of windows of `length` tokens: how many are enough to fit, and to measure on."""
    return max(1, min(FEW_WINDOWS, FEW_TOKENS // length))


def calibration_windows(
    options: CalibrationOptions, tokenizer: PreTrainedTokenizerBase | None, config: FireConfig
) -> torch.Tensor | None:
    """
    Reads the text, so that what is wrong with it shows before anything is converted.

    Returns:
        `torch.LongTensor` of shape `(windows, length + 1)`, or `None` for text that is still to be sampled.
    """
    if options.length is not None and options.length > config.fire_init_L:
        raise ConversionError(
            f"`length={options.length}` is beyond `L` ({config.fire_init_L:g}), where distances shrink: take a "
            "smaller one, or a larger `max_length`."
        )
    length = window_length(options, config)
    if length < 2:
        raise ConversionError("`max_length` must be at least 2 to calibrate.")
    count = options.tokens // length
    if count < 1:
        raise ConversionError(
            f"`tokens={options.tokens}` is less than one window of {length} tokens: take more, or a smaller `length`."
        )
    if options.text == SAMPLE:
        start_token(config)
        return None
    if tokenizer is None:
        raise ConversionError("The source has no tokenizer for the text to calibrate on: use 'sample'.")
    windows = token_windows(read_texts(options.text), tokenizer, length + 1, count + few_windows(length))
    if len(windows) < 2:
        raise ConversionError(
            f"The text to calibrate on has less than two windows of {length + 1} tokens: use more, or a smaller "
            "`length`."
        )
    check_tokens(windows, config.vocab_size)
    return windows


def calibrate_folder(
    folder: Path,
    config: FireConfig,
    options: CalibrationOptions,
    windows: torch.Tensor | None,
    max_period: float | None = None,
) -> Calibration:
    """
    Calibrates a converted model where it lies, on a GPU if there is one, in float32: memory holds the whole model, its
    queries and keys once more, and the hidden states of the text.

    Args:
        folder (`Path`): of the model, whose weights are replaced.
        config ([`FireConfig`]): with the rotation.
        options ([`CalibrationOptions`]): how.
        windows (`torch.LongTensor` of shape `(windows, length + 1)`, *optional*): of [`calibration_windows`].
        max_period (`float`, *optional*): `rope_max_period` of what is kept of the rotation; by default nothing.

    Raises:
        [`ConversionError`]: if it went wrong.
    """
    model: Any = FireForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    if windows is None:
        length = window_length(options, config)
        count = options.tokens // length + few_windows(length)
        # Keys and values of one text, in float32.
        cache_bytes = 8 * length * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        batch_size = min(max(1, SAMPLE_BYTES // cache_bytes), MAX_SAMPLE_BATCH)
        windows = sampled_windows(model, length + 1, count, options.seed, batch_size)
    length = windows.shape[1] - 1
    # Of a text that is too short half is held out.
    count = min(options.tokens // length, max(len(windows) - few_windows(length), len(windows) // 2))
    text = windows[:count, :-1]
    do_align = length <= BATCH_TOKENS if options.align is None else options.align
    repeat = length > BATCH_TOKENS if options.repeat is None else options.repeat
    perplexity = calibrate(model, text, windows[count:], do_align, options.seed, max_period, repeat)
    if not all(math.isfinite(value) for value in perplexity.values()):
        raise ConversionError(f"The calibration failed: perplexities {perplexity}. Nothing was written.")
    replace_weights(folder, model.state_dict())
    return Calibration(public_name(options.text), text.numel(), length, repeat, options.seed, perplexity)


def public_name(text: str | Sequence[str]) -> str:
    """What may be said of a text to calibrate on: of a file or a folder its name, and nothing of this machine."""
    if not isinstance(text, str):
        return GIVEN
    name, colon, configuration = text.partition(":")
    return f"{Path(name).resolve().name}{colon}{configuration}" if Path(name).exists() else text


def calibrate(
    model: FireForCausalLM,
    windows: torch.Tensor,
    held_out: torch.Tensor,
    do_align: bool = True,
    seed: int = 0,
    max_period: float | None = None,
    repeat: bool = False,
) -> dict[str, float]:
    """
    Removes the rotation of a model, or the slow part of it, in place.

    Args:
        model ([`FireForCausalLM`]): with a rotation and a bias of 0, in float32.
        windows (`torch.LongTensor` of shape `(windows, length)`): tokens to calibrate on.
        held_out (`torch.LongTensor` of shape `(held-out windows, length + 1)`): tokens to measure on.
        do_align (`bool`, *optional*, defaults to `True`): whether to align, after the fit.
        seed (`int`, *optional*, defaults to 0): of the order of the windows.
        max_period (`float`, *optional*): see [`calibrate_folder`].
        repeat (`bool`, *optional*, defaults to `False`): see [`CalibrationOptions`].

    Returns:
        `dict[str, float]`: see [`Calibration`].
    """
    model.eval()
    length = windows.shape[1]
    positions = FirePositions.arange(length, model.device)
    rotary = model.model.rotary_emb
    rotation = rotary(next(model.parameters()), position_ids=positions.absolute)
    originals = [original_attention(layer) for layer in model.model.layers]

    def perplexity() -> float:
        losses = loss_by_context(model, held_out, [length], num_targets=length // 2, tokens_per_batch=BATCH_TOKENS)
        return math.exp(sum(losses[length]) / len(losses[length]))

    measured = {"original": perplexity()}
    kept = None
    if max_period is None:
        model.model.rotary_emb = model.config.rope_parameters = None
    else:
        model.config.rope_max_period = max_period
        kept = rotary(next(model.parameters()), position_ids=positions.absolute)
    measured["dropped"] = perplexity()

    few = windows[: few_windows(length)]
    if repeat:
        few = repeating(few, seed)
    for layer, _, hidden_states in original_states(model, originals, few, rotation, positions, "Fitting"):
        fit(layer.self_attn, layer.input_layernorm(hidden_states.to(model.device)), rotation, kept, positions)
    measured["fitted"] = perplexity()
    if do_align:
        short = length // math.ceil(length / BATCH_TOKENS)
        windows = windows[:, : length // short * short].reshape(-1, short)
        positions, rotation = FirePositions.arange(short, model.device), cut(rotation, short)
        kept = None if kept is None else cut(kept, short)
        generator = torch.Generator().manual_seed(seed)
        states = original_states(model, originals, windows, rotation, positions, "Aligning")
        for layer, original, hidden_states in states:
            align(layer, original, hidden_states, rotation, kept, positions, BATCH_TOKENS // short, generator)
        measured["aligned"] = perplexity()
    return measured


def repeating(windows: torch.Tensor, seed: int) -> torch.Tensor:
    """
    Windows of shape `(windows, length)`, of which every second one, and an only one, has in its second half the pieces
    of its first, in random order.
    """
    windows, generator = windows.clone(), torch.Generator().manual_seed(seed)
    half = windows.shape[1] // 2
    size = min(PIECE, half)
    count = half // size
    for window in windows[min(1, len(windows) - 1) :: 2]:
        pieces = window[: count * size].view(count, size)
        window[-count * size :] = pieces[torch.randperm(count, generator=generator)].flatten()
    return windows


def cut(rotation: tuple[torch.Tensor, torch.Tensor], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """That of the first positions."""
    cos, sin = rotation
    return cos[:, :length], sin[:, :length]


def original_attention(layer: FireDecoderLayer) -> FireAttention:
    """A copy of what changes, queries and keys. The rest is shared; there is no bias, which is 0."""
    attention = layer.self_attn
    shared = (attention.v_proj, attention.o_proj, attention.config, attention.position_bias)
    original = deepcopy(attention, {id(part): part for part in shared})
    original.position_bias = None
    return original


@torch.no_grad()
def original_states(
    model: FireForCausalLM,
    originals: list[FireAttention],
    windows: torch.Tensor,
    rotation: tuple[torch.Tensor, torch.Tensor],
    positions: FirePositions,
    description: str,
) -> Iterator[tuple[FireDecoderLayer, FireAttention, torch.Tensor]]:
    """
    Walks through the layers: each with its original attention and the hidden states that it was given, on the CPU. The
    layer's own attention may be changed meanwhile.
    """
    device, batch_size = model.device, max(1, BATCH_TOKENS // windows.shape[1])
    hidden_states = torch.cat(
        [model.model.embed_tokens(batch.to(device)).cpu() for batch in windows.split(batch_size)]
    )
    layers = logging.tqdm(list(zip(model.model.layers, originals, strict=True)), desc=description, unit=" layers")
    for layer, original in layers:
        yield layer, original, hidden_states
        changed, layer.self_attn = layer.self_attn, original
        for batch in hidden_states.split(batch_size):
            batch.copy_(layer(batch.to(device), positions=positions, position_embeddings=rotation))
        layer.self_attn = changed
