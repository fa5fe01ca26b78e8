"""`evaluate` and `plot_model`: figures are those of the measures, and what does not fit is refused."""

import json
import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from corpus import byte_tokenizer
from helpers import tiny_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
)

from modeling_fire.errors import EvaluationError, TextError
from modeling_fire.evaluation import attention_by_distance, bin_positions, loss_by_context, loss_by_position
from modeling_fire.evaluation.loading import distinct_names
from modeling_fire.evaluation.report import EvaluationOptions, evaluate, learned_tables, plot_model, tables


TEXT = "".join(f"{n} bottles hang on the wall.\n" for n in range(400))
SHAPE = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def build(name):
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=48, max_position_embeddings=64))
    if name == "gpt2":
        config = GPT2Config(**SHAPE, n_positions=128, bos_token_id=None, eos_token_id=None)
        return GPT2LMHeadModel(config)
    return tiny_model(vocab_size=256, eos_token_id=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With a text and models of three architectures."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "text.txt").write_text(TEXT)
    for name in ("fire", "llama", "gpt2"):
        build(name).save_pretrained(folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def options(folder, **changes):
    return EvaluationOptions(str(folder / "text.txt"), **{"num_windows": 3, "num_targets": 32, **changes})


def text_windows(length, step, count):
    return torch.tensor(list(TEXT.encode())).unfold(0, length, step)[:count]


def test_figures_are_those_of_the_measures(folder, tmp_path):
    out = tmp_path / "new" / "out"
    settings = options(folder, contexts=[128, 64], by_position=True)
    result = evaluate([str(folder / "fire"), str(folder / "llama")], settings, out)
    windows = text_windows(129, 129, 3)
    for name in ("fire", "llama"):
        model, figures = build(name), result["models"][name]
        assert figures["loss_by_context"] == loss_by_context(model, windows, [64, 128], 32)
        assert figures["loss_by_position"] == bin_positions(loss_by_position(model, windows))
    written = (out / "evaluation.json").read_text()
    assert json.loads(written) == json.loads(json.dumps(result))
    assert str(folder) not in written and str(tmp_path) not in written, "nothing of this machine"
    assert result["settings"]["contexts"] == [64, 128] and result["settings"]["text"] == "text.txt"
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "perplexity.png", "position.png"]


def test_defaults_go_as_far_as_the_text(folder):
    models = [str(folder / "fire"), str(folder / "llama")]
    assert evaluate(models, options(folder))["settings"]["contexts"] == [64, 128, 256, 512]
    assert evaluate(models, options(folder, num_windows=40))["settings"]["contexts"] == [64, 128, 256]


def test_sliding_windows(folder):
    result = evaluate([str(folder / "fire")], options(folder, contexts=[64, 100], sliding=True, num_windows=5))
    expected = loss_by_context(build("fire"), text_windows(101, 32, 5), [64, 100], 32)
    assert result["models"]["fire"]["loss_by_context"] == expected


def test_weights_are_loaded_in_the_type_that_is_asked_for(folder):
    result = evaluate([str(folder / "fire")], options(folder, contexts=[64], dtype="bfloat16"))
    assert result["models"]["fire"]["dtype"] == "torch.bfloat16"


def test_tables():
    figures = {"loss_by_context": {64: [0.0, 0.0], 128: [1.0, 2.0]}, "loss_by_position": {1: [0.0], 2: [0.0]}}
    settings = {"num_windows": 2, "num_targets": 8, "text": "a.txt", "contexts": [64, 128]}
    found = {"passkey": {128: {0.0: 1.0, 1.0: 0.5}}}
    result = {"settings": settings | {"by_position": True, "passkey": True}, "models": {"A/b": figures | found}}
    assert tables(result).splitlines() == [
        "Perplexity of the same 2 x 8 tokens of a.txt, by context",
        "        64    128",
        "A/b  1.000  4.482",
        "",
        "Perplexity of all tokens, by the number of tokens before them",
        "         A/b",
        "1-1    1.000",
        "2-128  1.000",
        "",
        "Passkeys that A/b finds, by depth and length",
        "       128",
        "0%    100%",
        "100%   50%",
    ]
    lines = ["layer    c  L (tokens)", "0      0.5           -"]
    assert learned_tables({"scales": [{"c": 0.5, "L": None}]}).splitlines() == lines
    learned = {"scales": [], "entropy": {10: [0.0], 41: [math.log(20)]}}
    assert learned_tables(learned).splitlines()[1:] == ["layer   10    41", "0      1.0  20.0"]


def test_names_tell_models_apart_and_nothing_of_the_machine(tmp_path):
    folders = [tmp_path / "a" / "model", tmp_path / "b" / "model"]
    for folder in folders:
        folder.mkdir(parents=True)
    assert distinct_names([str(folder) for folder in folders]) == ["a/model", "b/model"]
    assert distinct_names([f"{folders[0]}/", "org/model"]) == ["model", "org/model"]
    assert distinct_names([*map(str, folders), "b/model"])[1].endswith("/b/model"), "longer than the Hub id"
    with pytest.raises(EvaluationError, match="given twice"):
        distinct_names([str(folders[0]), f"{folders[0]}/"])


@pytest.mark.parametrize(
    "models, changes, message",
    [
        (["fire"], {"contexts": [16, 64]}, "context of 16 tokens is too short for 32 targets"),
        (
            ["fire"],
            {"contexts": [64, 5000]},
            r"has \d+ tokens, too few for 3 windows .* 5000. Contexts up to 3\d{3} fit",
        ),
        (["fire"], {"num_windows": 1000}, "too few for 1000 windows with a context of 64. Take fewer windows"),
        (["fire"], {"contexts": [20000], "sliding": True}, r"Contexts up to 1\d{4} fit"),
        (["gpt2"], {"contexts": [64, 256]}, "gpt2 has embeddings for no more than 128 positions"),
        (["llama", "gpt2"], {"contexts": [64, 256]}, "gpt2 has embeddings for no more than 128 positions"),
        (["fire"], {"contexts": [100], "passkey": True}, "In 100 tokens 1 keys cannot be hidden"),
        (["missing"], {}, "missing cannot be loaded"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_measured(folder, tmp_path, models, changes, message):
    with mock.patch("modeling_fire.evaluation.report.loss_by_context") as measure:
        with pytest.raises(EvaluationError, match=message):
            evaluate([str(folder / model) for model in models], options(folder, **changes), tmp_path / "out")
        measure.assert_not_called()


def test_contexts_that_are_said_to_fit_do(folder):
    for sliding in (False, True):
        with pytest.raises(EvaluationError) as error:
            evaluate([str(folder / "fire")], options(folder, contexts=[20000], sliding=sliding))
        longest = int(str(error.value).split("Contexts up to ")[1].split()[0])
        evaluate([str(folder / "fire")], options(folder, contexts=[longest], sliding=sliding))
        with pytest.raises(EvaluationError, match="too few"):
            evaluate([str(folder / "fire")], options(folder, contexts=[longest + 1], sliding=sliding))


def copy_with(folder, tmp_path, model=None, tokenizer=None):
    (model or build("fire")).save_pretrained(tmp_path / "copy")
    (tokenizer or byte_tokenizer()).save_pretrained(tmp_path / "copy")
    return str(tmp_path / "copy")


def test_other_tokens_are_refused(folder, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["bottles"])
    other = copy_with(folder, tmp_path, tiny_model(vocab_size=257), tokenizer)
    with pytest.raises(EvaluationError, match="copy cuts the text into other tokens than fire"):
        evaluate([str(folder / "fire"), other], options(folder))


def test_a_tokenizer_that_does_not_fit_is_refused(folder, tmp_path):
    small = copy_with(folder, tmp_path, tiny_model(vocab_size=99))
    with pytest.raises(EvaluationError, match=r"tokenizer of copy does not fit .* token \d+, and the model has 99"):
        evaluate([small], options(folder))


def test_weights_that_are_missing_are_not_drawn_at_random(folder, tmp_path):
    small = copy_with(folder, tmp_path, build("llama").model)
    with pytest.raises(EvaluationError, match=r"lacks weights, among them lm_head.weight"):
        evaluate([small], options(folder))


def test_code_of_a_checkpoint_runs_only_if_it_may(folder, tmp_path):
    source = Path(copy_with(folder, tmp_path))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"model_type": "foreign"}))
    with pytest.raises(EvaluationError, match="trust_remote_code"):
        evaluate([str(source)], options(folder))


@pytest.mark.parametrize("text", ["missing.txt", "picture.txt"])
def test_a_text_that_cannot_be_read(folder, tmp_path, text):
    (tmp_path / "picture.txt").write_bytes(b"\x89PNG")
    with pytest.raises(TextError, match=text):
        evaluate([str(folder / "fire")], EvaluationOptions(str(tmp_path / text)))


def test_a_folder_that_cannot_be_written(folder, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(EvaluationError, match="cannot be written to"):
        evaluate([str(folder / "fire")], options(folder), tmp_path / "out")
    with mock.patch("importlib.util.find_spec", return_value=None), pytest.raises(EvaluationError, match="matplotlib"):
        evaluate([str(folder / "fire")], options(folder), tmp_path / "new")


def test_a_model_is_drawn(folder, tmp_path):
    with mock.patch("modeling_fire.evaluation.report.plot_attention_by_distance") as draw:
        learned = plot_model(str(folder / "fire"), tmp_path / "out", [40, 9], str(folder / "text.txt"))
    assert learned["scales"] == [{"c": 1.0, "L": 7.0}] * 2 and list(learned["entropy"]) == [10, 41]
    assert (tmp_path / "out" / "bias.png").read_bytes().startswith(b"\x89PNG")
    shares = draw.call_args.args[0]
    assert list(shares) == [10, 41]
    torch.testing.assert_close(shares[41], attention_by_distance(build("fire"), text_windows(41, 41, 1)))


def test_the_biases_of_mpt_have_no_end(folder, tmp_path):
    config = MptConfig(vocab_size=256, d_model=32, n_heads=4, n_layers=1, max_seq_len=32)
    MptForCausalLM(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    result = evaluate([str(tmp_path)], options(folder, by_position=True))
    assert result["settings"]["contexts"] == [32, 64, 128, 256]
    assert set(result["models"][tmp_path.name]["loss_by_context"]) == {32, 64, 128, 256}


def test_a_model_without_a_cache_is_refused_beyond_one_forward(folder, tmp_path):
    config = OpenAIGPTConfig(vocab_size=256, n_embd=32, n_layer=1, n_head=1, n_positions=4096)
    OpenAIGPTLMHeadModel(config).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    evaluate([str(tmp_path)], options(folder, contexts=[64], by_position=True))
    with pytest.raises(EvaluationError, match=r"OpenAIGPTLMHeadModel returns no KV cache .* Take contexts up to 2048"):
        evaluate([str(tmp_path)], options(folder, contexts=[2049]))


def test_a_history_is_drawn(folder, tmp_path):
    state, out = tmp_path / "trainer_state.json", tmp_path / "out"
    entries = [{"step": step, "c": [1.0, 0.5 * step], "L": [7.0, 7.0 + step]} for step in (1, 2)]
    state.write_text(json.dumps({"log_history": [{"step": 1, "loss": 3.0}, *entries]}))
    plot_model(str(folder / "fire"), out, [9], history=state)
    assert sorted(path.name for path in out.iterdir()) == ["bias.png", "scales.png"]
    state.write_text(json.dumps({"log_history": [{"step": 1, "c": [None], "L": [None]}]}))
    for path, message in ((state, "neither `c` nor `L`"), (tmp_path / "no.json", "No such file")):
        with pytest.raises(EvaluationError, match=message):
            plot_model(str(folder / "fire"), tmp_path / "new", [9], history=path)


@pytest.mark.parametrize(
    "model, positions, message",
    [("llama", [9], r"llama \(llama\) has no position bias"), ("fire", [20000], "none at position 20000")],
)
def test_what_cannot_be_drawn(folder, tmp_path, model, positions, message):
    with pytest.raises(EvaluationError, match=message):
        plot_model(str(folder / model), tmp_path / "out", positions, str(folder / "text.txt"))
