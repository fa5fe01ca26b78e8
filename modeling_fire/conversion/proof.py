"""The proof that no weight was misplaced: with the rotation on and `f = 0`, the logits are the original's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..configuration_fire import FireConfig
from ..modeling_fire import FireForCausalLM
from ..text import check_tokens
from .family import ConversionError
from .source import Source


# Tokens of the prompt, at most. A weight in the wrong place shows in any handful.
LENGTH = 256
# Of them distinct, at least: a token alone attends to itself, and equal ones have equal values, whatever queries, keys
# and rotation are.
FEWEST = 4
# How far rounding moves logits depends on the model: 1e-6 of the largest logit is usual, outliers can make it 1e-3. So
# the original is asked: moving its embeddings by one unit in the last place moved its logits, in every model tried,
# further than the conversion did, and than another implementation of attention does. 10 times that passes.
SLACK = 10.0
# A smaller bound would be luck; and the smallest mistake measured, an epsilon 10 times too small, makes 8e-5.
LOWEST_BOUND = 1e-5
# A larger one would prove nothing: a tensor in the wrong place makes 1e-1 and more.
HIGHEST_BOUND = 1e-2

PROMPT = """\
A fire needs three things: fuel, heat and air. Take one of them away and it goes out. People learned this long before
they could say why, and for most of their history they carried embers from one place to the next, because to keep a
fire was easier than to make one. "Who looks after it tonight?" they would ask, and somebody always did.

In 1826 a chemist called John Walker stirred a pot of chemicals with a wooden stick, found a dry lump at its end, and
tried to scrape it off on the floor. It burst into flame. A year later he sold 23 of his matches for a shilling. He
never took out a patent; others did, and grew rich.

What burns is rarely the wood itself. Heated to about 250 degrees, wood gives off a gas, and the gas burns: that is the
flame. What is left is charcoal, which glows at 600 degrees and more, without any flame, until only ash remains. So the
best way to feed a fire is slowly, one log after another, each laid close enough to catch from the last.
"""


@dataclass(frozen=True)
class Proof:
    """
    How far the logits of two models are apart.

    Args:
        tokens (`int`): length of the prompt.
        absolute (`float`): the largest difference.
        relative (`float`): the same, in units of the largest logit of the original.
        rounding (`float`): how far, in these units, the original's logits move with the rounding of its embeddings.
        bound (`float`): what `relative` may be.
    """

    tokens: int
    absolute: float
    relative: float
    rounding: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.relative <= self.bound  # a NaN does not hold

    def __str__(self) -> str:
        return (
            f"largest difference of the logits over {self.tokens} tokens: {self.absolute:.2e}, that is "
            f"{self.relative:.1e} of the largest logit (bound: {self.bound:.1e})"
        )


def prompt_ids(tokenizer: PreTrainedTokenizerBase | None, prompt: str | None, config: FireConfig) -> torch.Tensor:
    """
    Token ids of shape `(1, length)`, no more than the model was trained on: of the `prompt`, of a default text, or
    random ones where there is no tokenizer, or none that tells the letters of that text apart.

    Args:
        tokenizer (`PreTrainedTokenizerBase`, *optional*): of the source.
        prompt (`str`, *optional*): the user's.
        config ([`FireConfig`]): that computes what the original does. Beside a rotation its bias is 0; ALiBi is exact
            up to `L`.

    Raises:
        [`ConversionError`]: if they are too few, or too much alike, to say anything.
        [`~modeling_fire.errors.TextError`]: if some are none of the model's.
    """
    length = min(LENGTH, config.max_position_embeddings)
    if config.rope_parameters is None:
        length = min(length, int(config.fire_init_L))
    if prompt is not None and tokenizer is None:
        raise ConversionError("The source has no tokenizer for the `prompt`.")
    ids = torch.empty(1, 0)
    if tokenizer is not None:
        text = PROMPT if prompt is None else prompt
        ids = tokenizer(text, truncation=True, max_length=length, return_tensors="pt").input_ids
    check_tokens(ids, config.vocab_size)
    if prompt is None and len(ids.unique()) < FEWEST:
        ids = torch.randint(config.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    if (distinct := len(ids.unique())) < FEWEST:
        raise ConversionError(
            f"The `prompt` has {distinct} distinct tokens among the first {length}, beyond which none is read. A "
            f"proof takes {FEWEST}: with fewer, wrong queries, keys or rotations may go unnoticed."
        )
    return ids.long()


@torch.no_grad()
def prove(source: Source, folder: Path, config: FireConfig, ids: torch.Tensor) -> Proof:
    """
    Compares the original with the converted model, in float32 and one after the other: memory holds one of them.

    Args:
        source ([`Source`]): the original.
        folder (`Path`): the converted model.
        config ([`FireConfig`]): what to load it with, the rotation included.
        ids (`torch.Tensor` of shape `(1, length)`): tokens.
    """
    expected, moved = logits_and_moved_logits(source.model(), ids)
    model = FireForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    absolute = largest_difference(model(ids, use_cache=False).logits, expected)
    largest = float(expected.abs().max())
    rounding = largest_difference(moved, expected) / largest
    bound = min(max(SLACK * rounding, LOWEST_BOUND), HIGHEST_BOUND)
    return Proof(ids.shape[1], absolute, absolute / largest, rounding, bound)


def logits_and_moved_logits(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of a model in float32, and those with its embeddings moved by up to one unit in the last place."""
    embeddings = model.get_input_embeddings()(ids)
    units = torch.randint(-1, 2, embeddings.shape, generator=torch.Generator().manual_seed(0))
    moved = embeddings * (1 + torch.finfo(torch.float32).eps * units)
    return model(ids, use_cache=False).logits, model(inputs_embeds=moved, use_cache=False).logits


def largest_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual - expected).abs().max())
