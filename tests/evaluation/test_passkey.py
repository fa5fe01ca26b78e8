"""Passkey prompts, and the counting of what a model finds of them."""

import random
from types import SimpleNamespace

import pytest
import torch
from corpus import byte_tokenizer
from transformers import GenerationConfig

from modeling_fire.evaluation import passkey_accuracy
from modeling_fire.evaluation.passkey import NAMES, has_room, passkey_prompt


TOKENIZER = byte_tokenizer()


@pytest.mark.parametrize("length", [250, 1000, 5000])
@pytest.mark.parametrize("num_keys", [1, 2])
def test_prompts_have_their_length_and_their_key(length, num_keys):
    for depth in (0.0, 0.5, 1.0):
        ids, code = passkey_prompt(TOKENIZER, length + 200 * num_keys, depth, num_keys, random.Random(0))
        text = TOKENIZER.decode(ids)
        assert 0 <= length + 200 * num_keys - len(ids) < 90
        asked = text.rsplit("Which code opens the ", 1)[1].split()[0]
        assert f"The code of the {asked} box is {code}. Remember: {code} opens the {asked} box." in text
        assert text.endswith(f"The code of the {asked} box is")
        assert len({name for name in NAMES if f"opens the {name} box." in text}) == num_keys
        if num_keys == 1:
            share = text.index("The code of") / (text.index("Which code") - 80)
            assert share == pytest.approx(depth, abs=0.35 if length < 1000 else 0.1)


def test_prompts_differ_and_repeat():
    def prompts(seed):
        generator = random.Random(seed)
        return [passkey_prompt(TOKENIZER, 400, 0.5, 1, generator) for _ in range(4)]

    assert prompts(0) == prompts(0) != prompts(1)
    assert len({code for _, code in prompts(0)}) == 4


def test_a_text_without_room_is_refused():
    with pytest.raises(ValueError, match="100 tokens have no room for 1 keys and the question"):
        passkey_prompt(TOKENIZER, 100, 0.5, 1, random.Random(0))


def test_there_is_room_where_half_of_the_text_is_filler():
    shortest = next(length for length in range(2000) if has_room(TOKENIZER, length, num_keys=2))
    assert 500 < shortest < 600
    for seed in range(20):
        passkey_prompt(TOKENIZER, shortest - 7, 0.5, 2, random.Random(seed))


def test_a_prompt_does_not_end_the_text():
    class Ending:
        all_special_ids = [256]

        def __call__(self, text):
            return SimpleNamespace(input_ids=[*TOKENIZER(text).input_ids, 256])

    ids, _ = passkey_prompt(Ending(), 400, 0.5, 1, random.Random(0))
    assert ids == passkey_prompt(TOKENIZER, 400, 0.5, 1, random.Random(0))[0]


class Reader(torch.nn.Module):
    """A model that sees only so many of the last tokens, and goes on with the code of the box that is asked for."""

    device = torch.device("cpu")

    def __init__(self, sight):
        super().__init__()
        self.sight = sight
        self.longest = 0
        self.generation_config = GenerationConfig(repetition_penalty=2.0)

    def generate(self, ids, **kwargs):
        assert self.generation_config.repetition_penalty is None, "which would forbid to repeat the code"
        text = TOKENIZER.decode(ids[0, -self.sight :])
        found = text.rsplit("The code of the ", 1)[1].split()[0]
        _, _, after = text.partition(f"The code of the {found} box is ")
        answer = TOKENIZER(f" {after[:5]}. ").input_ids if after else [33] * 7
        self.longest = max(self.longest, ids.shape[1] + kwargs["max_new_tokens"])
        return torch.cat((ids, torch.tensor([answer])), dim=1)[:, : ids.shape[1] + kwargs["max_new_tokens"]]


def test_accuracy_counts_what_is_found():
    reader = Reader(sight=700)
    accuracies = passkey_accuracy(reader, TOKENIZER, [500, 1000, 3000], [0.0, 0.5, 1.0], trials=3)
    assert accuracies == {
        500: {0.0: 1.0, 0.5: 1.0, 1.0: 1.0},
        1000: {0.0: 0.0, 0.5: 1.0, 1.0: 1.0},
        3000: {0.0: 0.0, 0.5: 0.0, 1.0: 1.0},
    }
    assert 2900 < reader.longest <= 3000, "prompt and answer"


def test_one_of_several_keys_is_asked_for():
    assert passkey_accuracy(Reader(sight=3000), TOKENIZER, [2000], [0.5], trials=5, num_keys=4) == {2000: {0.5: 1.0}}


def test_settings_come_back():
    model = Reader(sight=700)
    model.frozen = torch.nn.Dropout().eval()
    passkey_accuracy(model, TOKENIZER, [500], [0.5], trials=1)
    with pytest.raises(ValueError, match="have no room"):
        passkey_accuracy(model, TOKENIZER, [100], [0.5], trials=1)
    assert model.training and not model.frozen.training and model.generation_config.repetition_penalty == 2.0
