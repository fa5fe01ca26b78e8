"""The `fire` command."""

import json

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from modeling_fire import FireForCausalLM
from modeling_fire.cli import app


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
    assert result.exit_code == 0 and "convert" in result.output


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
    result = fire("convert", source, tmp_path / "out2", "--calibrate", tmp_path / "missing.txt")
    assert result.exit_code == 1 and result.stderr.startswith("Error: ") and not (tmp_path / "out2").exists()


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
