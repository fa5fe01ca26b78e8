"""Programs that are run as clients of a Hub, each in a process of its own: huggingface_hub reads its settings once."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from helpers import random_ids

from modeling_fire import (
    FireForCausalLM,
    FireForQuestionAnswering,
    FireForSequenceClassification,
    FireForTokenClassification,
    FireModel,
)


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# AutoModel last: from then on it knows the folder's FireModel, and that a head needs it would go unseen.
AUTO_CLASSES = {
    "AutoModelForCausalLM": FireForCausalLM,
    "AutoModelForSequenceClassification": FireForSequenceClassification,
    "AutoModelForTokenClassification": FireForTokenClassification,
    "AutoModelForQuestionAnswering": FireForQuestionAnswering,
    "AutoModel": FireModel,
}
IDS = random_ids(2, 12)


def run_program(program: str, *arguments: str, environment: dict[str, str]) -> None:
    """
    Runs a file beside this one to its end. `stranger.py` cannot import anything of this project; the
    others find the package and what tests share.
    """
    isolated = ["-I"] if program == "stranger.py" else []  # leaves out PYTHONPATH and the working directory
    command = [sys.executable, *isolated, str(HERE / program), *arguments]
    paths = os.pathsep.join(str(ROOT / path) for path in ("", "tests", "tests/conversion"))
    child = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr


def run_stranger(work: Path, jobs: dict[str, dict[str, Any]], environment: dict[str, str]) -> dict[str, dict]:
    """What `stranger.py` found, by the names of the `jobs`."""
    torch.save(jobs, work / "jobs.pt")
    run_program("stranger.py", str(work), environment=environment)
    return torch.load(work / "results.pt")


def observe(model, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """What a stranger must find to the last bit."""
    with torch.no_grad():
        outputs = model.eval()(IDS, attention_mask=mask, output_hidden_states=True)
        found = {"hidden": outputs.hidden_states[-1], "output": outputs[0]}
        if model.can_generate():
            found["generated"] = model.generate(IDS, attention_mask=mask, max_new_tokens=4, do_sample=False)
    return found


def assert_same(found: dict, expected: dict, *names: str) -> None:
    assert "error" not in found, found["message"]
    for name in names or expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)


def files_of(folder: Path) -> dict[str, bytes]:
    """The contents of all files under a folder, by path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
