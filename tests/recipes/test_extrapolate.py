"""The extrapolation recipe in miniature, from the YAML to the folder that a stranger loads; corpus."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer, TrainingArguments

from modeling_fire import FireConfig


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "recipes"))

from corpus import as_tokens, byte_tokenizer, evaluation_windows, python_corpus, training_blocks  # noqa: E402
from extrapolate import Study  # noqa: E402


def test_corpus_parts_whole_files():
    train, held_out = python_corpus()
    assert len(train) > 100 and len(held_out) > 10
    assert not set(train) & set(held_out)
    assert python_corpus()[1] == held_out, "the parting is the same in every process"
    assert all(bytes(as_tokens(file).tolist()) == file for file in held_out[:3])


def test_blocks_and_windows():
    blocks = training_blocks([b"abcde", b"fghij", b"klm"], 4)
    assert [bytes(block.tolist()) for block in blocks["input_ids"]] == [b"abcd", b"efgh", b"ijkl"]
    assert torch.equal(blocks[0]["labels"], blocks[0]["input_ids"])
    windows = evaluation_windows([b"0123456", b"abc", b"ABCD"], 3, 4)
    assert sorted(bytes(window.tolist()) for window in windows) == [b"012", b"345", b"ABC", b"abc"]
    with pytest.raises(ValueError, match="only 4 windows of 3 tokens, not 5"):
        evaluation_windows([b"0123456", b"abc", b"ABCD"], 3, 5)


def test_tokens_are_bytes(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "def f(x):\n    return 'Grüße, 世界'\t\r\n"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 256


def run(study: dict, folder: Path) -> subprocess.CompletedProcess:
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "extrapolate.py"), str(folder / "study.yaml")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture
def study(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, **shape},
        "variants": {"FIRE": {}, "RoPE": {"position_bias": "none", "rope_parameters": {"rope_type": "default"}}},
        "contexts": [16, 32],
        "num_windows": 3,
        "num_targets": 8,
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True},
        "show": "FIRE",
    }


def test_run_resume_and_result(study, tmp_path):
    out = tmp_path / "out"
    (out / "FIRE-seed0.unfinished").mkdir(parents=True)  # what a killed run leaves
    first = run(study, tmp_path)
    assert first.returncode == 0, first.stderr
    assert {path.name for path in out.iterdir()} == {
        "FIRE-seed0",
        "RoPE-seed0",
        "results.json",
        "perplexity.png",
        "learned_bias.png",
    }
    means = json.loads((out / "results.json").read_text())["mean_loss"]
    assert f"{math.exp(means['FIRE']['32']):.3f}" in first.stdout, "the table is what was measured"
    assert "'def ':\n\ndef " in first.stdout, "a process without the package wrote on"
    assert FireConfig.from_pretrained(out / "FIRE-seed0").max_position_embeddings == 16

    written = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    study["variants"]["ALiBi"] = {"position_bias": "alibi"}
    second = run(study, tmp_path)
    assert second.returncode == 0, second.stderr
    assert "ALiBi, seed 0" in second.stdout and "RoPE, seed 0" not in second.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written, "what is finished is not run again"

    third = run({**study, "num_windows": 4}, tmp_path)
    assert third.returncode == 1 and "was made with other settings: delete it, or choose another" in third.stderr
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_an_unknown_variant_to_show_is_refused_before_training(study, tmp_path):
    result = run({**study, "show": "FIER"}, tmp_path)
    assert result.returncode == 2 and "'FIER', which is not among the variants: FIRE, RoPE" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", ["demo/demo.yaml", "defaults/study.yaml"])
def test_shipped_studies_load(path):
    study = Study(**yaml.safe_load((ROOT / "recipes" / path).read_text()))
    for changes in study.variants.values():
        fields = {name: value for name, value in changes.items() if not name.startswith("bias_")}
        FireConfig(**{**study.model, **fields})
    TrainingArguments("unused", **study.training)
    assert study.show in study.variants
