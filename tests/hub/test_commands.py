"""The `fire` commands with models of the Hub."""

import json

import pytest
import torch
from checkpoints import llama, save_tokenizer
from clients import run_program
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def work(hub, tmp_path_factory):
    """A LLaMA is converted from a tag, and measured beside what became of it."""
    work = tmp_path_factory.mktemp("commands")
    model = llama()
    model.save_pretrained(work / "llama")
    save_tokenizer(work / "llama")
    torch.save(model.state_dict(), work / "llama" / "pytorch_model.bin")  # many have both
    hub.add("owner/llama", work / "llama")
    repo = hub.repos["models/owner/llama"]
    repo.tags["v1"] = repo.resolve("main")
    repo.commit("main", "Something else", {})
    hub.add("owner/whole", work / "llama")
    (work / "text.txt").write_text("A fire needs fuel, heat and air. " * 20)
    out, text = str(work / "out"), str(work / "text.txt")
    convert = ["convert", "owner/llama", out, "--revision", "v1"]
    evaluate = ["evaluate", "owner/whole", out, "--text", text, "--contexts", "16", "--targets", "8", "--windows", "2"]
    evaluate += ["--out", str(work / "evaluation")]
    run_program("commands.py", json.dumps([convert, evaluate]), environment=hub.environment(work / "home"))
    return work


def test_a_tag_is_converted(hub, work):
    record = json.loads((work / "out" / "conversion.json").read_text())
    assert record["source"] == "owner/llama"
    assert record["revision"] == hub.repos["models/owner/llama"].tags["v1"]
    assert record["proof"]["relative"] <= record["proof"]["bound"]
    original, converted = (load_file(work / name / "model.safetensors") for name in ("llama", "out"))
    assert torch.equal(original["lm_head.weight"], converted["lm_head.weight"])


def test_only_what_is_needed_is_fetched(hub, work):
    asked_for = {request.split("/")[-1] for request in hub.requests if "/owner/llama/resolve/" in request}
    assert "model.safetensors" in asked_for and "pytorch_model.bin" not in asked_for


def test_a_model_of_the_hub_is_measured(work):
    models = json.loads((work / "evaluation" / "evaluation.json").read_text())["models"]
    assert list(models) == ["owner/whole", "out"]
