"""
What is downloaded and run is little, and does nothing but compute; what could run code unasked is refused. That it
contacts nothing is tested in `test_remote_code.py`, where it runs.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import llama, save_tokenizer
from clients import files_of
from helpers import tiny_model
from typer.testing import CliRunner

from modeling_fire.cli import app
from modeling_fire.conversion import ConversionError, convert
from modeling_fire.errors import EvaluationError
from modeling_fire.evaluation.loading import Checkpoint


LIBRARIES = {"torch", "transformers", "huggingface_hub"}  # the last is what transformers itself is built on
STANDARD_LIBRARY = {"collections", "functools", "inspect", "itertools", "math", "os", "re", "typing"}
BUILT_IN = {"__import__", "breakpoint", "compile", "eval", "exec", "input", "open"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("safety") / "model"
    tiny_model().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def code(folder) -> dict[str, ast.Module]:
    """What a stranger runs, by the names of the files."""
    return {path.name: ast.parse(path.read_text()) for path in folder.glob("*.py")}


def imports(node: ast.AST, guarded: bool = False):
    """Import statements, and whether they are inside a `try:` or an `if`, where a library may be missing."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, guarded
        else:
            yield from imports(child, guarded or isinstance(child, ast.Try | ast.If))


def test_the_code_imports_little(code):
    assert {"configuration_fire.py", "modeling_fire.py"} <= code.keys()
    for name, tree in code.items():
        for statement, guarded in imports(tree):
            if isinstance(statement, ast.ImportFrom) and statement.level:
                assert statement.level == 1 and f"{statement.module}.py" in code, name
                continue
            aliases = isinstance(statement, ast.Import)
            modules = [alias.name for alias in statement.names] if aliases else [statement.module]
            allowed = LIBRARIES | STANDARD_LIBRARY | ({"triton"} if guarded else set())
            assert {module.split(".")[0] for module in modules} <= allowed, name


def test_the_code_only_computes(code):
    """It opens no file, runs no text as code, and of the operating system reads variables only."""
    for name, tree in code.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                assert node.id not in BUILT_IN, name
            if isinstance(node, ast.Attribute):
                owner = ast.unparse(node.value)
                assert owner == "tl" or node.attr not in {"load", "save", "hub", "from_file"}, name
                if owner == "os":
                    assert node.attr == "environ", name


def test_bandit_finds_nothing(folder):
    pytest.importorskip("bandit", reason="needs bandit")
    command = [sys.executable, "-m", "bandit", "--quiet", "--recursive", str(folder)]
    bandit = subprocess.run(command, capture_output=True, text=True)
    assert bandit.returncode == 0, bandit.stdout


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_saved_weights_are_no_pickles(tmp_path, max_shard_size):
    tiny_model().save_pretrained(tmp_path, max_shard_size=max_shard_size)
    for name, content in files_of(tmp_path).items():
        assert name.endswith((".safetensors", ".json", ".py")), name
        assert not content.startswith((b"PK", b"\x80")), name  # as torch.save and pickle begin


class Attack:
    """As it is read, it makes a file."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.fixture(params=["archive", "before PyTorch 1.6"])
def attack(request, tmp_path) -> Path:
    """A LLaMA whose weights run code; `trace` beside it appears if they could."""
    model = llama()
    folder = tmp_path / "attack"
    model.config.save_pretrained(folder)
    save_tokenizer(folder)
    weights = {**model.state_dict(), "model.norm.weight": Attack(tmp_path / "trace")}
    archive = request.param == "archive"
    torch.save(weights, folder / "pytorch_model.bin", _use_new_zipfile_serialization=archive)
    return folder


def test_code_in_weights_is_not_run(attack, tmp_path):
    trace = tmp_path / "trace"
    with pytest.raises(ConversionError, match=re.escape("pytorch_model.bin is refused")):
        convert(attack, tmp_path / "out")
    with pytest.raises(EvaluationError, match=f"The weights of {re.escape(str(attack))} are refused"):
        Checkpoint.open(str(attack), "attack").load()
    assert not trace.exists() and not (tmp_path / "out").exists()
    torch.load(attack / "pytorch_model.bin", weights_only=False)
    assert trace.exists()  # nothing but the refusals stood in its way


def test_the_command_says_so_in_one_line(attack, tmp_path):
    result = CliRunner().invoke(app, ["convert", str(attack), str(tmp_path / "out")])
    assert result.exit_code == 1
    assert result.stderr.startswith("Error: pytorch_model.bin is refused") and result.stderr.count("\n") == 1


def test_weights_of_old_versions_are_read(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "safe")
    model.config.save_pretrained(tmp_path / "old")
    torch.save(model.state_dict(), tmp_path / "old" / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    for name in ("safe", "old"):
        convert(tmp_path / name, tmp_path / f"{name}-fire", verify=False)
    written = [files_of(tmp_path / f"{name}-fire")["model.safetensors"] for name in ("safe", "old")]
    assert written[0] == written[1]


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_weights_that_end_too_early_are_named(tmp_path, name):
    model = llama()
    model.save_pretrained(tmp_path / "source")
    torch.save(model.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    if name == "pytorch_model.bin":
        (tmp_path / "source" / "model.safetensors").unlink()
    path = tmp_path / "source" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ConversionError, match=f"{name} cannot be read"):
        convert(tmp_path / "source", tmp_path / "out")
