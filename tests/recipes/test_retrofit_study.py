"""The study of retrofits in miniature: the YAML, what is run and what is not, the table and the plots."""

import json
import math
import subprocess
from statistics import mean

import pytest
import yaml
from checkpoints import llama, save_tokenizer
from grid import run_grid
from helpers import ROOT, execute, recipe_command
from retrofit import load
from retrofit_study import Study
from safetensors.torch import load_file
from settings import read_fields

from modeling_fire.evaluation import loss_by_context


def run(study: dict, *changes: str) -> subprocess.CompletedProcess:
    return execute(*recipe_command("retrofit_study", study, *changes))


@pytest.fixture
def study(tmp_path) -> dict:
    llama().save_pretrained(tmp_path / "source")
    save_tokenizer(tmp_path / "source")
    (tmp_path / "text.txt").write_text("".join(f"The {number}th fox ran through the woods. " for number in range(200)))
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True, "disable_tqdm": True}
    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    return {
        "output_dir": str(tmp_path / "out"),
        "base": {
            "model": {"source": str(tmp_path / "source")},
            "data": {"text": "changed on the command line", "length": 32, "held_out": 0.2},
            "training": {**training, **evaluation},
            "evaluation": {"contexts": [32, 64], "num_targets": 8, "num_windows": 2},
        },
        "control": "RoPE",
        "seeds": [0, 1],
        "variants": {
            "RoPE as PI": {"from": "RoPE", "config": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}},
            "RoPE": {"model": {"rotation": "keep", "config": {"position_bias": "none"}}},
            "FIRE": {"heal.bias_lr_multiplier": 2},
        },
    }


def test_run_resume_and_result(study, tmp_path):
    out, text = tmp_path / "out", f"base.data.text={tmp_path / 'text.txt'}"
    first = run(study, text)
    assert first.returncode == 0, first.stderr
    folders = {f"{variant}-seed{seed}" for variant in study["variants"] for seed in study["seeds"]}
    assert {path.name for path in out.iterdir()} == folders | {"results.json", "perplexity.png", "recovery.png"}
    results = json.loads((out / "results.json").read_text())
    means = results["mean_loss"]
    assert list(means) == list(study["variants"]), "in the order of the YAML"
    table = {line.split("  ")[0]: line for line in first.stdout.splitlines()}
    for variant, loss in means.items():
        ratio = math.exp(loss["32"] - means["RoPE"]["32"]), math.exp(loss["64"] - loss["32"])
        assert table[variant].split()[-2:] == [f"{value:.3f}" for value in ratio]
    # Not trained, but neither is it the control: at least one of the contexts says so.
    assert means["RoPE as PI"] != means["RoPE"]
    assert list(results["loss_by_tokens"]) == ["RoPE", "FIRE"]
    assert list(results["loss_by_tokens"]["FIRE"]) == ["0", "64", "128"]
    seeds = [json.loads((out / f"FIRE-seed{seed}" / "results.json").read_text()) for seed in (0, 1)]
    assert seeds[0]["train_loss"] == seeds[1]["train_loss"] == {} and seeds[0]["loss"] != seeds[1]["loss"]
    assert means["FIRE"]["32"] == pytest.approx(mean(mean(result["loss"]["32"]) for result in seeds))
    assert results["loss_by_tokens"]["FIRE"]["128"] == pytest.approx(means["FIRE"]["32"], rel=1e-5)

    written = {path: path.stat().st_mtime_ns for path in out.glob("*/results.json")}
    study["variants"]["DroPE"] = {"model": {"config": {"position_bias": "none"}}}
    second = run(study, text, "seeds=[0]")
    assert second.returncode == 0, second.stderr
    assert "DroPE, seed 0" in second.stdout and "FIRE, seed 0" not in second.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written, "what is finished is not run again"


def test_what_was_sampled_is_measured_on_again(study, tmp_path):
    """By what is not trained: the text lies with the model."""
    study["base"]["data"] = {"text": "sample", "length": 32, "tokens": 640}
    study["base"]["evaluation"]["contexts"] = [32]
    study["seeds"] = [0]
    results = run_grid(read_fields(Study, study).jobs())
    trained, tested = (results[variant][0]["loss"]["32"] for variant in ("RoPE", "RoPE as PI"))
    assert len(trained) == len(tested) == 2 and trained != tested
    folder = tmp_path / "out" / "RoPE-seed0"
    windows = load_file(folder / "sampled" / "windows.safetensors")["held_out"]
    again = loss_by_context(load(folder / "model"), windows, [32], 8)[32]
    assert again == pytest.approx(trained, rel=1e-5)


def test_a_variant_of_a_variant_that_is_not_trained_is_refused(study):
    with pytest.raises(ValueError, match="'ROPE' is not among the variants that are trained: RoPE, FIRE"):
        read_fields(Study, {**study, "control": "ROPE"})
    study["variants"]["RoPE as YaRN"] = {"from": "RoPE as PI", "config": {}}
    with pytest.raises(ValueError, match="'RoPE as PI' is not among"):
        read_fields(Study, study)
    study["variants"]["RoPE as YaRN"] = {"from": "RoPE", "config": {}, "data": {"length": 3}}
    with pytest.raises(ValueError, match="'RoPE as YaRN' is not trained: it has `from` and `config`, and no other"):
        read_fields(Study, study)


@pytest.mark.parametrize("name", ["study", "distill", "smollm2-study", "smollm2-cpu"])
def test_the_shipped_studies_load(name):
    study = read_fields(Study, yaml.safe_load((ROOT / "recipes" / "retrofit" / f"{name}.yaml").read_text()))
    for variant in study.variants:
        study.run(variant, 0)
