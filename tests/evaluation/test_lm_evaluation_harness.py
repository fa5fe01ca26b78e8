"""EleutherAI's lm-evaluation-harness runs on a saved model, with local tasks: `pip install lm_eval` opts in."""

import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from corpus import byte_tokenizer
from helpers import tiny_model


pytest.importorskip("lm_eval", reason="pip install lm_eval to run EleutherAI's harness on a saved model")

DOCUMENTS = ["One bottle hangs on the wall.", "Two bottles hang on the wall, and a third one is on its way."]
QUESTIONS = [("two and two make", " four", " five"), ("the sky is", " green", " blue"), ("a", "b", " longer one")]
TASKS = [
    {
        "task": "fire_text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "text.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    },
    {
        "task": "fire_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "choice.jsonl"}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
]


@torch.no_grad()
def log_likelihood(model, prompt: list[int], text: str) -> float:
    ids = torch.tensor([[*prompt, *text.encode()]])
    log_probabilities = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
    return float(log_probabilities[-len(text.encode()) :].sum())


def test_harness(tmp_path):
    """Its figures are those of our own forward; it knows the model only by the folder's own code."""
    model = tiny_model(vocab_size=257, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    model.save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})  # the harness begins texts with it
    tokenizer.save_pretrained(tmp_path / "model")
    rows = {"text": [{"text": text} for text in DOCUMENTS]}
    rows["choice"] = [{"text": text, "choices": choices} for text, *choices in QUESTIONS]
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for task in TASKS:
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))

    arguments = ["--model", "hf", "--model_args", "pretrained=model,trust_remote_code=True,dtype=float32"]
    arguments += ["--tasks", "fire_text,fire_choice", "--include_path", ".", "--device", "cpu", "--batch_size", "2"]
    command = [sys.executable, "-m", "lm_eval", *arguments, "--output_path", "out.json"]
    result = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    [path] = tmp_path.glob("**/out*.json")
    figures = json.loads(path.read_text())["results"]

    losses = [-log_likelihood(model, [256], text) for text in DOCUMENTS]
    num_bytes = sum(len(text.encode()) for text in DOCUMENTS)
    bits = sum(losses) / num_bytes / torch.log(torch.tensor(2.0)).item()
    assert figures["fire_text"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    right = [
        log_likelihood(model, list(text.encode()), choices[0]) > log_likelihood(model, list(text.encode()), choices[1])
        for text, *choices in QUESTIONS
    ]
    assert figures["fire_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
