"""Examples as tokens: to train on, with labels on the answer alone, and as prompts that a model answers."""

from array import array
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from questions import Example
from settings import SettingsError
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from modeling_fire.borrowed import plain_generation
from modeling_fire.text import MAX_CHARACTERS


# Between the document and the answer.
CUE = "\n\nAnswer:"
# What each feature is padded with. No token is, so that the tokenizer needs none for padding.
PADDING = {"input_ids": 0, "attention_mask": 0, "labels": -100}


class Prompts:
    """
    Question, blank line, document, [`CUE`], answer, and the end token, if the tokenizer knows one; at the beginning
    what the tokenizer begins texts with.

    The question comes first, as SCROLLS has it (arXiv 2201.03533, section 3), so that a causal model reads the
    document knowing what it is asked. Only the document is cut, and only its end, as SCROLLS's baselines do it: half a
    question or half an answer would teach something else. The parts are tokenised each by itself, so that cutting one
    changes no token of another, and a prompt is to the letter what stood before the answer in training.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the model.
        longest (`int`): no prompt will have more tokens than these.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, longest: int):
        self.tokenizer = tokenizer
        self.longest = longest
        special = tokenizer("").input_ids[:1]
        self.start = special if special == [tokenizer.bos_token_id] else []
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.cue = self.tokens(CUE)
        self.documents: dict[str, array] = {}  # many questions are on the same one

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids

    def document(self, text: str) -> array:
        """The first `longest` tokens."""
        if text not in self.documents:
            # Of a text much longer than that, the rest need not be looked at.
            self.documents[text] = array("i", self.tokens(text[: MAX_CHARACTERS * self.longest])[: self.longest])
        return self.documents[text]

    def prompt(self, example: Example, length: int) -> list[int]:
        """
        Args:
            example (`Example`): what is asked.
            length (`int`): tokens of the prompt, at most.

        Raises:
            SettingsError: if the question leaves no room for a token of the document.
        """
        question = [*self.start, *(self.tokens(f"{example.question}\n\n") if example.question else [])]
        room = length - len(question) - len(self.cue)
        if room < 1:
            raise SettingsError(
                f"The question {example.id} and its answer leave no room for the document, by {1 - room} tokens: "
                "raise `data.length` and `evaluation.lengths`, or lower `evaluation.max_new_tokens`."
            )
        return [*question, *self.document(example.document)[:room], *self.cue]

    def training(self, example: Example, length: int) -> dict[str, torch.Tensor]:
        """
        `input_ids` and `labels` of at most `length` tokens each; the labels of all before the answer are -100.

        Where several answers are right, the first is trained on: which one does then not depend on how often a run was
        resumed or on the number of processes.

        Raises:
            SettingsError: if question and answer leave no room for a token of the document.
        """
        answer = [*self.tokens(f" {example.answers[0]}"), *self.end]
        prompt = self.prompt(example, length - len(answer))
        return {
            "input_ids": torch.tensor([*prompt, *answer], dtype=torch.int32),
            "labels": torch.tensor([-100] * len(prompt) + answer, dtype=torch.int32),
        }


def collate(features: list[dict[str, torch.Tensor]], padding_side: str = "right") -> dict[str, torch.Tensor]:
    """A batch of `int64` tensors of shape `(len(features), longest)`, with its `attention_mask`."""
    masked = [{**feature, "attention_mask": torch.ones_like(feature["input_ids"])} for feature in features]
    return {
        name: pad_sequence([each[name] for each in masked], True, value, padding_side).long()
        for name, value in PADDING.items()
        if name in masked[0]
    }


@torch.no_grad()
def answer(
    model: Any,
    prompts: Prompts,
    examples: list[Example],
    length: int,
    max_new_tokens: int,
    batch_size: int,
) -> list[str]:
    """
    What the model answers, greedily. The processes share the examples, and each gets all answers.

    Args:
        model (`PreTrainedModel`): any causal language model of transformers.
        prompts ([`Prompts`]): for its tokenizer.
        examples (`list[Example]`): what is asked.
        length (`int`): of prompt and answer, in tokens, as in training.
        max_new_tokens (`int`): of an answer.
        batch_size (`int`): how many a process answers side by side.

    Returns:
        `list[str]`: without white space around it, one for each example.
    """
    tokenizer: Any = prompts.tokenizer
    model.eval()
    state, texts = PartialState(), []
    with (
        plain_generation(model),
        state.split_between_processes(examples) as mine,
        tqdm(total=len(mine), desc=f"Answering from {length} tokens", disable=not state.is_main_process) as bar,
    ):
        for start in range(0, len(mine), batch_size):
            part = [prompts.prompt(each, length - max_new_tokens) for each in mine[start : start + batch_size]]
            batch = collate([{"input_ids": torch.tensor(ids)} for ids in part], padding_side="left")
            output = model.generate(
                **{name: value.to(model.device) for name, value in batch.items()},
                do_sample=False,
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id or 0,  # comes only after an end
            )
            for ids in output[:, batch["input_ids"].shape[1] :].tolist():
                if tokenizer.eos_token_id in ids:
                    ids = ids[: ids.index(tokenizer.eos_token_id)]
                texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
            bar.update(len(part))
    # Where there are fewer examples than processes, some releases of Accelerate give the last one to several.
    return gather_object(texts)[: len(examples)]
