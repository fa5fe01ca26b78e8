"""
Every example runs as its docstring says, with arguments that make it tiny, and prints what it is there for; the
notebook executes with fewer steps, and what it stores is of a run.
"""

import importlib.util
import json
import re
import runpy
import socket
import sys
from pathlib import Path

import pytest
from checkpoints import llama
from helpers import ENVIRONMENT, ROOT, execute, tiny_model
from transformers.utils.import_utils import is_serve_available

from recipes.corpus import byte_tokenizer


EXAMPLES = ROOT / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))
NOTEBOOK = EXAMPLES / "story.ipynb"
TEXT = "The quick brown fox jumps over the lazy dog. " * 60
PERPLEXITY = r"\d+\.\d+"


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs an example as if by its name and returns what it prints; importing torch ten times would take a minute."""

    def run_here(name: str, *arguments: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capfd.readouterr().out

    return run_here


def save_tokenizer(folder: Path) -> None:
    """One of 257 tokens: the bytes, and an end."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>", "pad_token": "<end>"})
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)


@pytest.fixture
def model(tmp_path) -> Path:
    """A folder with what the examples take instead of a trained model."""
    special = {"bos_token_id": None, "eos_token_id": 256, "pad_token_id": 256}
    tiny_model(vocab_size=257, max_position_embeddings=64, **special).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 10)
    return path


def test_train_with_trainer(run, tmp_path, text):
    out = tmp_path / "out"
    printed = run("train_with_trainer", "--text", ROOT / "modeling_fire" / "*.py", "--steps", 2, "--out", out)
    assert re.search(rf"^Perplexity of held-out text: {PERPLEXITY}\ndef ", printed, flags=re.MULTILINE)
    assert {"model.safetensors", "tokenizer.json", "modeling_fire.py"} <= {path.name for path in out.iterdir()}


def test_load_and_generate(model):
    """In a process that cannot import this package."""
    program = "import sys; sys.modules['modeling_fire'] = None; exec(open(sys.argv.pop(1)).read())"
    arguments = ["The fox", "--model", str(model), "--tokens", "80"]
    child = execute("-c", program, str(EXAMPLES / "load_and_generate.py"), *arguments)
    assert child.returncode == 0, child.stderr
    assert "The most likely: 'The fox" in child.stdout
    assert re.search(r"A sample of \d+ tokens:\nThe fox", child.stdout)


def test_lora_with_peft(run, tmp_path, model, text):
    out = tmp_path / "adapter"
    printed = run("lora_with_peft", "--model", model, "--text", text, "--steps", 2, "--out", out)
    before, after = map(float, re.search(rf"({PERPLEXITY}) before, ({PERPLEXITY}) after", printed).groups())
    assert after < before
    assert (out / "adapter_model.safetensors").exists() and not (out / "model.safetensors").exists()


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_sft_with_trl(run, tmp_path, model):
    out = tmp_path / "assistant"
    printed = run("sft_with_trl", "--model", model, "--steps", 2, "--out", out)
    assert "What is str." in printed
    assert (out / "model.safetensors").exists() and (out / "chat_template.jinja").exists()


def test_long_context_evaluation(run, tmp_path, model, text):
    out = tmp_path / "evaluation"
    arguments = ["--text", text, "--windows", 2, "--out", out]
    printed = run("long_context_evaluation", model, *arguments)
    assert re.search(rf"^model( +{PERPLEXITY})+$", printed, flags=re.MULTILINE)
    assert "L (tokens)" in printed
    assert {"perplexity.png", "bias.png", "evaluation.json"} <= {path.name for path in out.iterdir()}


def test_convert_and_heal(run, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    llama(vocab_size=257, max_position_embeddings=64, eos_token_id=256).save_pretrained(source)
    save_tokenizer(source)
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(TEXT * 10)
    arguments = ["--text", tmp_path / "?.txt", "--length", 64, "--steps", 2, "--out", out]
    printed = run("convert_and_heal", source, *arguments)
    assert "largest difference of the logits" in printed
    assert re.search(rf"original {PERPLEXITY}, dropped {PERPLEXITY}, fitted {PERPLEXITY}, aligned", printed)
    for name in ("source", "out"):
        assert re.search(rf"^{name}( +{PERPLEXITY}){{4}}$", printed, flags=re.MULTILINE)
    card = (out / "README.md").read_text()
    assert "made by `fire convert` and then trained" in card and "It needs training" not in card


def test_convert_and_heal_makes_its_own_llama(run, tmp_path):
    arguments = [
        "--text",
        ROOT / "modeling_fire" / "c*_fire.py",
        "--length",
        64,
        "--steps",
        2,
        "--out",
        tmp_path / "out",
    ]
    assert re.search(rf"^out-from( +{PERPLEXITY}){{3}}$", run("convert_and_heal", *arguments), flags=re.MULTILINE)


def test_own_attention_layer(run):
    printed = run("own_attention_layer", "--steps", 120)
    shares = dict(re.findall(r"(\d+) tokens: (\d+)% of the last 32", printed))
    assert list(shares) == ["64", "256", "1024", "4096"]
    assert int(shares["64"]) > 95 and int(shares["1024"]) > 90


@pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")
@pytest.mark.skipif(importlib.util.find_spec("openai") is None, reason="needs openai")
def test_serve_and_query(run, model):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # What it answers is nonsense of the random model, but none of it is empty.
    printed = run("serve_and_query", "--model", model, "--question", "Is it hot?", "--port", port)
    assert re.search(r"^Is it hot\?\n.+", printed, flags=re.MULTILINE)


@pytest.mark.parametrize("name", ["load_and_generate", "lora_with_peft", "long_context_evaluation", "serve_and_query"])
def test_a_missing_default_model_is_one_sentence(run, capfd, name):
    with pytest.raises(SystemExit, match="2"):
        run(name)
    assert re.search(r"error: run examples/\w+\.py first", capfd.readouterr().err)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_programs_are_short_and_say_how_to_run_them(path):
    source = path.read_text()
    assert len(source.splitlines()) < 60
    assert f"\n    python examples/{path.name}" in source.partition("\nimport ")[0]
    assert f"def test_{path.stem}(" in Path(__file__).read_text()


def test_every_file_is_in_the_readme():
    readme = (EXAMPLES / "README.md").read_text()
    for path in (*PROGRAMS, NOTEBOOK):
        assert f"]({path.name})" in readme, path.name


def test_the_notebook_has_the_outputs_of_a_run():
    assert NOTEBOOK.stat().st_size < 400_000
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = json.dumps([cell["outputs"] for cell in cells])
    assert outputs.count("image/png") == 2
    assert not re.search(r'"stderr"|"error"|site-packages|[^.\w]/(home|root|tmp|usr|work|Users)/', outputs)


def test_the_notebook_executes(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    import nbformat

    for name in ("PYTHONPATH", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, ENVIRONMENT[name])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    changes = {"STEPS = 300": "STEPS = 2", ", 1024, 2048]": "]", "max_new_tokens=120": "max_new_tokens=9"}
    for old, new in changes.items():
        assert sum(old in cell.source for cell in notebook.cells) == 1, old
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    (tmp_path / "examples").mkdir()
    where = {"metadata": {"path": str(tmp_path / "examples")}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    printed = "".join(output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output)
    assert re.search(rf"^FIRE( +{PERPLEXITY}){{3}}\nRoPE( +{PERPLEXITY}){{3}}$", printed, flags=re.MULTILINE)
    assert "layer 2: c = " in printed and "\ndef " in printed
