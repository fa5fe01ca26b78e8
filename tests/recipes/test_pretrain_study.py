"""The study of models from scratch in miniature: what is run and what is not, the table, two processes, the YAMLs."""

import json
import math
import re
import shutil
import subprocess
import sys
from statistics import mean

import pytest
import yaml
from helpers import ROOT, execute, recipe_command, write_rows
from pretrain_study import Study, main, measure, train
from settings import changed, numbers, read_fields


LAUNCH = ["-m", "accelerate.commands.launch", "--config_file"]
LAYOUTS = ROOT / "configuration" / "accelerate"


def run(study: dict, *changes: str) -> subprocess.CompletedProcess:
    return execute(*recipe_command("pretrain_study", study, *changes))


@pytest.fixture
def study(tmp_path) -> dict:
    rows = [{"text": f"Once there was a fox. {number:b} times it ran. " * 3} for number in range(60)]
    shape = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64, "tie_word_embeddings": True}
    (tmp_path / "model.json").write_text(json.dumps({**shape, "num_hidden_layers": 2, "num_attention_heads": 2}))
    return {
        "output_dir": str(tmp_path / "out"),
        "base": {
            "model": {"config": str(tmp_path / "model.json")},
            "tokenizer": "bytes",
            "data": {"train": write_rows(tmp_path / "text.jsonl", rows), "held_out": str(tmp_path / "text.jsonl")},
            "length": 16,
            "batch_size": 8,
            "training": {
                "max_steps": 4,
                "per_device_train_batch_size": 4,
                "learning_rate": 0.01,
                "logging_steps": 1,
                "save_steps": 2,
                "disable_tqdm": True,
                "use_cpu": True,
            },
            "evaluation": {"contexts": [16, 64], "num_targets": 8, "num_windows": 4},
        },
        "variants": {
            "PI": {"from": "RoPE", "model.changes": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}},
            "FIRE": {},
            "RoPE": {"model": {"changes": {"position_bias": "none", "rope_parameters": {"rope_type": "default"}}}},
        },
        "seeds": [0, 1],
    }


def table(output: str) -> dict[str, list[float]]:
    """The perplexities that were printed, with their intervals, by variant."""
    lines = [line.replace("±", "").split() for line in output[output.index("\nPerplexity") :].splitlines()]
    return {
        line[0]: [float(value) for value in line[1:]] for line in lines if line and line[0] in {"FIRE", "RoPE", "PI"}
    }


def test_run_resume_and_result(study, tmp_path):
    out = tmp_path / "out"
    first = run(study)
    assert first.returncode == 0, first.stderr
    folders = {f"{variant}-seed{seed}" for variant in study["variants"] for seed in (0, 1)}
    assert {path.name for path in out.iterdir()} == folders | {"results.json", "perplexity.png"}
    assert (out / "FIRE-seed0" / "model" / "README.md").exists(), "the card"
    assert {path.name for path in (out / "PI-seed0").iterdir()} == {"results.json"}, "not trained"
    results = json.loads((out / "results.json").read_text())
    losses = results["loss_by_seed"]
    assert list(losses) == list(results["mean_loss"]) == list(study["variants"]), "in the order of the YAML"
    for variant, by_seed in losses.items():
        for seed, loss in by_seed.items():
            assert loss == json.loads((out / f"{variant}-seed{seed}" / "results.json").read_text())["loss"]
        perplexities = [[math.exp(loss[context]) for loss in by_seed.values()] for context in ("16", "64")]
        values = table(first.stdout)[variant]
        assert values[::2] == pytest.approx([mean(each) for each in perplexities], abs=1e-3)
        assert values[1::2] == pytest.approx([12.706 * abs(a - b) / 2 for a, b in perplexities], abs=1e-3)
    # Each seed and each variant is a model of its own; not trained, but neither is PI what it is made from.
    assert len({loss["64"] for by_seed in losses.values() for loss in by_seed.values()}) == 6

    # One cell is lost, and one was killed at its second checkpoint: they are run, and nothing else is.
    shutil.rmtree(out / "RoPE-seed1")
    (out / "FIRE-seed0" / "results.json").unlink()
    shutil.rmtree(out / "FIRE-seed0" / "checkpoints" / "checkpoint-4")
    kept = [*out.glob("*/results.json"), out / "FIRE-seed0" / "checkpoints" / "checkpoint-2" / "trainer_state.json"]
    written = {path: path.stat().st_mtime_ns for path in kept}
    second = run(study)
    assert second.returncode == 0, second.stderr
    started = re.findall(r"^\[\d/6\] (.*)$", second.stdout, re.MULTILINE)
    assert started == ["FIRE, seed 0", "RoPE, seed 1"]
    assert second.stdout[second.stdout.index("\nPerplexity") :] == first.stdout[first.stdout.index("\nPerplexity") :]
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert json.loads((out / "results.json").read_text()) == results


def test_two_processes_make_the_same_table(study, tmp_path):
    alone = run(changed(study, {"output_dir": str(tmp_path / "alone"), "seeds": [0]}))
    assert alone.returncode == 0, alone.stderr
    study = changed(study, {"seeds": [0], "base.training.per_device_train_batch_size": 2})
    command = recipe_command("pretrain_study", study)
    both = execute(*LAUNCH, str(LAYOUTS / "two_cpu_processes.yaml"), *command)
    assert both.returncode == 0, both.stderr
    assert both.stdout.count("Perplexity of the same") == 1 and both.stdout.count("FIRE, seed 0") == 1
    result = json.loads((tmp_path / "out" / "FIRE-seed0" / "results.json").read_text())
    assert result["processes"] == 2
    expected = table(alone.stdout)
    assert list(table(both.stdout)) == list(expected) == list(study["variants"])
    for variant, values in table(both.stdout).items():
        assert values == pytest.approx(expected[variant], rel=2e-3), variant


def test_what_is_not_trained_is_measured_as_what_is(study):
    """Without a change it is the same model, also in bfloat16."""
    study["variants"] = {"FIRE": {}, "again": {"from": "FIRE", "model.changes": {}}}
    read = read_fields(Study, changed(study, {"base.training": {"max_steps": 1, "bf16": True}}))
    trained, again = train(read.run("FIRE", 0)), measure(read.run("again", 0), read.folder("FIRE", 0) / "model")
    assert again["loss"] == pytest.approx(trained["loss"], rel=1e-6)


def test_a_run_for_each_cell_at_wandb(study, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    del study["variants"]["PI"]
    read = read_fields(Study, changed(study, {"seeds": [0], "base.training": {"max_steps": 1, "report_to": "wandb"}}))
    for job in read.jobs():
        job.do()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 2


def test_wrong_settings_are_refused(study, tmp_path, monkeypatch, capsys):
    """In one line, before anything is written."""

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            read_fields(Study, {**study, "variants": {**study["variants"], **changes}})

    refused("'Rope' is not among the trained variants: FIRE, RoPE", YaRN={"from": "Rope", "model.changes": {}})
    refused("'PI' is not among the trained variants", YaRN={"from": "PI", "model.changes": {}})
    refused("'YaRN' is not trained: it has `from` and `model.changes`", YaRN={"from": "RoPE", "length": 8})
    refused("The variant 'ALiBi': There is no field `lenght`", ALiBi={"lenght": 8})
    refused(
        "The variant 'ALiBi': FireConfig has no field `position_bais` .* Did you mean `position_bias`",
        ALiBi={"model.changes": {"position_bais": 1}},
    )
    refused("The variant 'ALiBi': .*got alibaba", ALiBi={"model.changes": {"position_bias": "alibaba"}})
    refused("'ALiBi' would be measured on other tokens", ALiBi={"evaluation.contexts": [16]})
    for argument, message in {
        "variants.PI.from=Rope": "error: 'Rope' is not among the trained variants: FIRE, RoPE.",
        "base.batch_size=6": "Error: `batch_size` (6) must be a multiple of",
        "base.data.train=nothing.jsonl": "Error: There is no file nothing.jsonl.",
    }.items():
        monkeypatch.setattr(sys, "argv", recipe_command("pretrain_study", study, argument))
        with pytest.raises(SystemExit) as raised:
            main()
        said = capsys.readouterr().err if raised.value.code == 2 else raised.value.code
        assert message in said.splitlines()[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["compare/tiny", "compare/one-gpu", "compare/c4", "ablate/tiny", "ablate/c4", "defaults/one-gpu"]
)
def test_the_shipped_studies_load(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = read_fields(Study, numbers(yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())))
    jobs = study.jobs()
    assert len(jobs) == len(study.variants) * len(study.seeds)
    contexts, length = study.base["evaluation"]["contexts"], study.base["length"]
    assert min(contexts) <= length and max(contexts) == 16 * length


@pytest.mark.parametrize("name, full", [("compare", "c4"), ("compare", "one-gpu"), ("ablate", "c4")])
def test_at_full_scale_are_the_variants_of_the_small_one(name, full):
    small, full = (
        yaml.safe_load((ROOT / "recipes" / name / f"{each}.yaml").read_text())["variants"] for each in (name, full)
    )
    # L at the length of the training; and the small one has our start throughout.
    beyond = {"L 128", "L 2048", "our start", "FIRE x10"}
    assert set(small) - beyond == set(full) - beyond
    for variant in set(small) & set(full):
        changes = full[variant].get("model.changes", {})
        own = {key: value for key, value in full[variant].items() if key != "model.changes"}
        for field, value in {**changes, **own}.items():
            expected = small[variant][field]
            if isinstance(value, dict):
                value = {"rope_theta": 10000.0, **value}
            assert value == expected, (variant, field)
        assert set(small[variant]) == set(changes) | set(own)
