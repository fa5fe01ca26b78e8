"""What Trainer pushes while it trains: every checkpoint loads by its commit, and a training goes on from one."""

import os
import re
import subprocess
import sys

import pytest
import torch
from clients import IDS, assert_same, files_of, observe, run_program, run_stranger

from modeling_fire import FireForCausalLM


STEP = "Training in progress, step {}"
CODE = {"configuration_fire.py", "modeling_fire.py", "position_bias_fire.py"}


@pytest.fixture(scope="module")
def work(hub, tmp_path_factory):
    """What the trainings left on the machine that they ran on."""
    folder = tmp_path_factory.mktemp("trainers")
    run_program("trainers.py", str(folder), environment=hub.environment(folder / "home"))
    return folder


@pytest.fixture(scope="module")
def found(hub, work, tmp_path_factory):
    jobs = {}
    for name in ("trainer", "fire-trainer"):
        job = {"kind": "model", "auto_class": "AutoModelForCausalLM", "source": f"owner/{name}", "ids": IDS}
        for commit, content in hub.repos[f"models/owner/{name}"].commits.items():
            jobs[name, content.title] = {**job, "revision": commit, "trust_remote_code": True}
    folder = tmp_path_factory.mktemp("stranger")
    return run_stranger(folder, jobs, hub.environment(folder / "home"))


def expected(folder) -> dict[str, torch.Tensor]:
    return observe(FireForCausalLM.from_pretrained(folder), mask=None)


def test_what_is_pushed_when(hub, work):
    titles = hub.repos["models/owner/trainer"].titles()
    assert titles == ["initial commit", STEP.format(2), STEP.format(4), "End of training"]
    with_checkpoints = [title for step in (2, 4) for title in (STEP.format(step), f"{STEP.format(step)}, checkpoint")]
    titles = hub.repos["models/owner/fire-trainer"].titles()
    assert titles == ["initial commit", *with_checkpoints, "End of training"]


@pytest.mark.parametrize("name", ["trainer", "fire-trainer"])
def test_in_the_end_the_repository_is_the_folder(hub, work, name):
    repo = hub.repos[f"models/owner/{name}"]
    assert repo.private == (name == "fire-trainer")
    contents = {path: content for path, content in repo.contents().items() if not path.startswith("last-checkpoint")}
    if name == "fire-trainer":
        del contents["training_args.bin"]  # which transformers adds to what it pushes on the way
    folder = files_of(work / name)
    assert contents == {path: content for path, content in folder.items() if not path.startswith("checkpoint-")}
    assert contents.keys() >= {"README.md", "model.safetensors", "tokenizer.json", *CODE}


@pytest.mark.parametrize("name", ["trainer", "fire-trainer"])
def test_the_trained_model_loads(work, found, name):
    assert_same(found[name, "End of training"], expected(work / name))


def test_our_trainer_pushes_models_that_load_on_the_way(hub, work, found):
    """Trainer leaves the code to the push at the end; in the folder of a checkpoint it is in any case."""
    for step in (2, 4):
        assert_same(found["fire-trainer", STEP.format(step)], expected(work / "fire-trainer" / f"checkpoint-{step}"))
    assert "configuration_fire.py" in found["trainer", STEP.format(2)]["message"]
    assert {f"last-checkpoint/{name}" for name in CODE} <= hub.repos["models/owner/fire-trainer"].contents().keys()


def test_the_card_of_our_trainer_runs_as_written(hub, tmp_path):
    """From the training run to a stranger who copies what the card says."""
    card = hub.repos["models/owner/fire-trainer"].contents()["README.md"].decode()
    [code] = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert 'from_pretrained("owner/fire-trainer"' in code
    (tmp_path / "stranger.py").write_text(f'import sys\nsys.modules["modeling_fire"] = None\n{code}')
    environment = {**os.environ, **hub.environment(tmp_path / "home")}  # the repository is private
    ran = subprocess.run(
        [sys.executable, "-I", tmp_path / "stranger.py"], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip()


def test_a_training_goes_on_from_a_checkpoint_on_the_hub(work):
    torch.testing.assert_close(
        FireForCausalLM.from_pretrained(work / "resumed").state_dict(),
        FireForCausalLM.from_pretrained(work / "fire-trainer").state_dict(),
        rtol=0,
        atol=0,
    )
