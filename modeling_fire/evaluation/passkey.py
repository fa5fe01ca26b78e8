"""
Whether a language model finds a number that stands somewhere in a long text.

The test is that of Mohtashami and Jaggi (Landmark Attention, arXiv 2305.16300), with words of our own: a number with
filler around it, and at the end the beginning of the sentence that the number completes. With several keys only the
one that is asked for counts.
"""

import random
from collections.abc import Sequence
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..borrowed import evaluating, plain_generation


BEGINNING = "Somewhere in this long text the code of a box is hidden. Remember it.\n"
FILLER = "Rain fell on the hills. The river was slow. A boat went by. Then it was quiet again.\n"
NEEDLE = "The code of the {name} box is {code}. Remember: {code} opens the {name} box.\n"
QUESTION = "Which code opens the {name} box? The code of the {name} box is"
NAMES = ("red", "green", "blue", "black", "white", "brown", "pink", "grey")
DIGITS = 5
ANSWER_TOKENS = DIGITS + 2  # a digit may be a token of its own, after one of white space


def passkey_prompt(
    tokenizer: PreTrainedTokenizerBase, length: int, depth: float, num_keys: int, generator: random.Random
) -> tuple[list[int], str]:
    """
    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        length (`int`): tokens of the prompt, at most; it falls short of it by less than a line of filler.
        depth (`float`): where the key stands: 0 is the beginning of the text, 1 its end.
        num_keys (`int`): how many keys there are; the others stand anywhere.
        generator (`random.Random`): of the codes, names and places.

    Returns:
        `tuple[list[int], str]`: token ids, and the code to be found.

    Raises:
        ValueError: if the text has no room for the keys.
    """
    names = generator.sample(NAMES, num_keys)
    codes = generator.sample(range(10 ** (DIGITS - 1), 10**DIGITS), num_keys)
    needles = [NEEDLE.format(name=name, code=code) for name, code in zip(names, codes, strict=True)]
    question = QUESTION.format(name=names[0])

    def ids(num_lines: int) -> list[int]:
        lines = [FILLER] * num_lines
        for needle in needles[1:]:
            lines.insert(places.randrange(len(lines) + 1), needle)
        lines.insert(round(depth * len(lines)), needles[0])
        tokens = tokenizer(BEGINNING + "".join(lines) + question).input_ids
        while tokens[-1] in tokenizer.all_special_ids:  # the end of a text, after which nothing is to come
            tokens.pop()
        return tokens

    def fits(num_lines: int) -> bool:
        places.setstate(state)
        return len(ids(num_lines)) <= length

    places = random.Random(generator.random())
    state = places.getstate()
    if not fits(0):
        raise ValueError(f"{length} tokens have no room for {num_keys} keys and the question.")
    low, high = 0, length  # a line has more than one token
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    places.setstate(state)
    return ids(low), str(codes[0])


def has_room(tokenizer: PreTrainedTokenizerBase, length: int, num_keys: int) -> bool:
    """Whether keys and question fill no more than half of so many tokens: less would hardly be a search."""
    try:
        passkey_prompt(tokenizer, length // 2, 0.5, num_keys, random.Random(0))
    except ValueError:
        return False
    return True


@torch.no_grad()
def passkey_accuracy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    lengths: Sequence[int],
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    trials: int = 10,
    num_keys: int = 1,
    seed: int = 0,
) -> dict[int, dict[float, float]]:
    """
    The share of prompts whose code the model goes on with, greedily.

    Args:
        model (`PreTrainedModel`): any causal language model of transformers.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        lengths (`Sequence[int]`): of prompt and answer, in tokens.
        depths (`Sequence[float]`, *optional*): where the code stands: 0 is the beginning, 1 the end.
        trials (`int`, *optional*, defaults to 10): prompts for each length and depth.
        num_keys (`int`, *optional*, defaults to 1): codes in a prompt, at most 8; one of them is asked for.
        seed (`int`, *optional*, defaults to 0): of the prompts. All models get the same.

    Returns:
        `dict[int, dict[float, float]]`: by length and depth.

    Raises:
        ValueError: if a length has no room for the keys.
    """
    generator = random.Random(seed)
    accuracies: dict[int, dict[float, float]] = {}
    with (
        evaluating(model),
        plain_generation(model),
        tqdm(total=len(lengths) * len(depths) * trials, desc="passkeys", unit="prompt", leave=False) as progress,
    ):
        for length in lengths:
            accuracies[length] = {}
            for depth in depths:
                found = 0
                for _ in range(trials):
                    ids, code = passkey_prompt(tokenizer, length - ANSWER_TOKENS, depth, num_keys, generator)
                    found += continues(model, tokenizer, ids, code)
                    progress.update()
                accuracies[length][depth] = found / trials
    return accuracies


def continues(model: Any, tokenizer: Any, ids: list[int], code: str) -> bool:
    """Whether the model goes on with `code`."""
    prompt = torch.tensor([ids], device=model.device)
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=ANSWER_TOKENS
    )
    return tokenizer.decode(output[0, len(ids) :]).strip().startswith(code)
