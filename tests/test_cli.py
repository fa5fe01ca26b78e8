"""The `fire` command."""

import json
from unittest import mock

import pytest
from corpus import byte_tokenizer
from helpers import tiny_model
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from modeling_fire import FireForCausalLM
from modeling_fire.cli import app
from modeling_fire.evaluation.passkey import continues


@pytest.fixture
def source(tmp_path):
    config = LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def fire(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_help_lists_the_commands():
    result = fire("--help")
    assert result.exit_code == 0
    assert all(f"  {command} " in result.output for command in ("convert", "evaluate", "plot"))


def test_help_of_convert_shows_a_complete_example():
    result = fire("convert", "--help")
    assert result.exit_code == 0
    assert "fire convert HuggingFaceTB/SmolLM2-135M smollm2-fire --calibrate sample" in result.output
    assert 'AutoModelForCausalLM.from_pretrained("smollm2-fire", trust_remote_code=True)' in result.output


def test_convert_prints_the_proof(source, tmp_path):
    result = fire("convert", source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "Proof: largest difference of the logits over 16 tokens: " in result.output
    assert f"Wrote {tmp_path / 'out'}" in result.output
    assert FireForCausalLM.from_pretrained(tmp_path / "out").config.rope_parameters is None


def test_the_options_of_convert(source, tmp_path):
    arguments = ("convert", source, tmp_path / "out", "--rotation", "keep", "--max-length", "100", "--no-verify")
    result = fire(*arguments)
    assert result.exit_code == 0, result.output
    assert "Proof" not in result.output
    config = FireForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.rope_parameters is not None and config.fire_init_L == 100
    assert fire(*arguments).exit_code == 1
    assert fire(*arguments, "--overwrite").exit_code == 0


def test_convert_calibrates(source, tmp_path):
    arguments = ("--calibrate", "sample", "--calibration-tokens", "64", "--seed", "3")
    result = fire("convert", source, tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    assert "Calibration: perplexity at 16 tokens: original " in result.output and ", aligned " in result.output
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())["calibration"]
    assert (record["text"], record["tokens"], record["seed"]) == ("sample", 64, 3)
    assert "aligned" not in fire("convert", source, tmp_path / "out1", *arguments, "--no-align").output
    result = fire("convert", source, tmp_path / "out2", "--calibrate", tmp_path / "missing.txt")
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and not (tmp_path / "out2").exists()
    result = fire("convert", source, tmp_path / "out2", "--calibrate", "sample", "--seed", 2**70)
    assert (
        result.exit_code == 1
        and result.stderr.startswith("Error: `seed` must fit")
        and not (tmp_path / "out2").exists()
    )


def test_what_cannot_be_converted_is_one_line_and_exit_status_1(source, tmp_path):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "model_type": "mixtral"}))
    result = fire("convert", source, tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: The architecture 'mixtral' is not supported. Supported are llama, ")
    assert len(result.stderr.splitlines()) == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [("--rotation", "half"), ("--max-length", "0")])
def test_wrong_options_are_refused(source, tmp_path, wrong):
    result = fire("convert", source, tmp_path / "out", *wrong)
    assert result.exit_code == 2 and wrong[0] in result.output


@pytest.mark.parametrize(
    ("option", "idle", "missing"),
    [
        ("--calibration-tokens", ("--calibration-tokens", "64"), "--calibrate"),
        ("--align/--no-align", ("--align",), "--calibrate"),
        ("--align/--no-align", ("--no-align",), "--calibrate"),
        ("--seed", ("--seed", "0"), "--calibrate"),
        ("--prompt", ("--no-verify", "--prompt", "A fire"), "--verify"),
    ],
)
def test_options_that_would_do_nothing_are_refused(source, tmp_path, option, idle, missing):
    result = fire("convert", source, tmp_path / "out", *idle)
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert f"`{option}` does nothing without `{missing}`" in result.output


def test_numbers_without_passkeys_are_refused(tmp_path):
    for option in ("--keys", "--trials"):
        result = fire("evaluate", tmp_path, "--text", "text.txt", option, "3")
        assert result.exit_code == 2 and f"`{option}` does nothing without `--passkey`" in result.output


@pytest.fixture
def models(tmp_path):
    """A FIRE and a LLaMA model in a folder with a text."""
    shape = {"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=48, max_position_embeddings=256))
    for name, model in (("fire", tiny_model(vocab_size=256, eos_token_id=None)), ("llama", llama)):
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    (tmp_path / "text.txt").write_text("".join(f"{n} bottles hang on the wall.\n" for n in range(100)))
    return tmp_path


@pytest.mark.parametrize("command", ["evaluate", "plot"])
def test_help_of_the_measures_shows_a_complete_example(command):
    result = fire(command, "--help")
    assert result.exit_code == 0
    assert f"\n      fire {command} " in result.output and "--out" in result.output.split("Example, ")[1]


def test_evaluate(models):
    arguments = ["--contexts", 64, "--contexts", 512, "--targets", 32, "--windows", 4, "--by-position", "--passkey"]
    text, out = models / "text.txt", models / "out"
    with mock.patch("modeling_fire.evaluation.passkey.continues", wraps=continues) as asked:
        result = fire(
            "evaluate", models / "fire", models / "llama", "--text", text, *arguments, "--trials", 2, "--out", out
        )
    assert asked.call_count == 2 * 5 * 2, "models, depths, trials"
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "Perplexity of the same 4 x 32 tokens of text.txt, by context"
    assert [line.split()[0] for line in lines[1:4]] == ["64", "fire", "llama"]
    assert "Passkeys that llama finds, by depth and length" in lines and lines[-1] == f"Wrote {out}"
    record = json.loads((out / "evaluation.json").read_text())
    assert list(record["models"]) == ["fire", "llama"]
    for figures in record["models"].values():
        assert {context: len(losses) for context, losses in figures["loss_by_context"].items()} == {"64": 4, "512": 4}
        assert list(figures["passkey"]) == ["512"], "64 tokens have no room for a key"
    plots = ["passkey-fire.png", "passkey-llama.png", "perplexity.png", "position.png"]
    assert sorted(path.name for path in out.glob("*.png")) == plots


def test_plot(models):
    out = models / "plots"
    options = ["--out", out, "--positions", 20, "--positions", 99]
    result = fire("plot", models / "fire", *options, "--text", models / "text.txt")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[:3] == ["layer  c  L (tokens)", "0      1           7", "1      1           7"]
    assert lines[4].split() == ["layer", "21", "100"] and len(lines) == 8 and lines[-1] == f"Wrote {out}"
    assert sorted(path.name for path in out.iterdir()) == ["attention.png", "bias.png"]


def test_what_cannot_be_evaluated_or_drawn_is_one_line_and_exit_status_1(models):
    text = ("--text", models / "text.txt")
    (models / "empty.txt").write_text("")
    (models / "broken").mkdir()
    (models / "broken" / "config.json").write_text("{")
    for arguments in (
        ("evaluate", models / "fire", "--text", models / "missing.txt"),
        ("evaluate", models / "fire", "--text", models / "empty.txt"),
        ("evaluate", models / "fire", *text, "--contexts", 32),
        ("evaluate", models / "fire", models / "fire", *text),
        ("evaluate", models / "broken", *text),
        ("evaluate", models / "no-such-model", *text),
        ("plot", models / "llama", *text, "--out", models / "out", "--positions", 9),
    ):
        result = fire(*arguments)
        assert result.exit_code == 1, arguments
        lines = [line for line in result.stderr.splitlines() if not line.startswith("Loading weights")]
        assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    assert not (models / "out" / "bias.png").exists()


@pytest.mark.parametrize("wrong", [("--keys", "9"), ("--contexts", "0"), ("--dtype", "int8"), ()])
def test_wrong_options_of_evaluate_are_refused(models, wrong):
    result = fire("evaluate", models / "fire", *(("--text", "text.txt", *wrong) if wrong else ()))
    assert result.exit_code == 2 and (wrong[0] if wrong else "--text") in result.output
