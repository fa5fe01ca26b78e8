"""The extrapolation recipe in miniature, from the YAML to the folder that a stranger loads; corpus."""

import json
import math
import subprocess

import pytest
import torch
import yaml
from corpus import as_tokens, byte_tokenizer, corpus, evaluation_windows, training_blocks
from extrapolate import load_changed
from extrapolate_settings import Study
from grid import half_interval
from helpers import ROOT, execute, recipe_command, tiny_model
from rows import at_random_positions, in_documents
from safetensors.torch import load_file
from transformers import AutoTokenizer, TrainingArguments, set_seed

from modeling_fire import FireConfig, FireForCausalLM


def test_corpus_parts_whole_files():
    train, held_out = corpus()
    assert len(train) > 100 and len(held_out) > 10
    assert not set(train) & set(held_out)
    assert corpus()[1] == held_out, "the parting is the same in every process"
    assert all(bytes(as_tokens(file).tolist()) == file for file in held_out[:3])


def test_corpus_of_ones_own_files(tmp_path):
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text(f"file {i}")
    train, held_out = corpus(str(tmp_path / "*.txt"))
    assert len(train) == 3 and len(held_out) == 1 and {*train, *held_out} == {b"file %d" % i for i in range(4)}
    with pytest.raises(ValueError, match="names 1 files: one to train on and one to test are the least"):
        corpus(str(tmp_path / "0*"))


def test_confidence_interval():
    # scipy.stats.t.interval(0.95, 2, 2, scipy.stats.sem([1, 2, 3])) = (-0.484, 4.484)
    assert half_interval([1.0, 2.0, 3.0]) == pytest.approx(2.4841, abs=1e-3)


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


def run(study: dict) -> subprocess.CompletedProcess:
    return execute(*recipe_command("extrapolate", study))


@pytest.fixture
def study(tmp_path):
    """Of two small files: what Python comes with takes seconds to read."""
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text("A fire needs three things: fuel, heat and air.\n" * 100)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {
        "output_dir": str(tmp_path / "out"),
        "text": str(tmp_path / "*.txt"),
        "model": {"vocab_size": 256, "bos_token_id": None, "eos_token_id": None, **shape},
        "variants": {"FIRE": {}, "RoPE": {"position_bias": "none", "rope_parameters": {"rope_type": "default"}}},
        "length": 16,
        "contexts": [16, 32],
        "num_windows": 3,
        "num_targets": 8,
        "training": {"max_steps": 2, "per_device_train_batch_size": 2, "use_cpu": True},
        "show": "FIRE",
    }


def test_run_resume_and_result(study, tmp_path):
    out = tmp_path / "out"
    (out / "FIRE-seed0.unfinished").mkdir(parents=True)  # what a killed run leaves
    del study["text"]
    first = run(study)
    assert first.returncode == 0, first.stderr
    assert {path.name for path in out.iterdir()} == {
        "FIRE-seed0",
        "RoPE-seed0",
        "results.json",
        "perplexity.png",
        "learned_bias.png",
    }
    result = json.loads((out / "results.json").read_text())
    assert result["command"].startswith("python ") and result.keys() >= {"machine", "date", "versions"}
    means = result["mean_loss"]
    assert f"{math.exp(means['FIRE']['32']):.3f}" in first.stdout, "the table is what was measured"
    assert "'def ':\n\ndef " in first.stdout, "a process without the package wrote on"
    assert FireConfig.from_pretrained(out / "FIRE-seed0").max_position_embeddings == 16

    written = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    study["variants"]["ALiBi"] = {"position_bias": "alibi"}
    second = run(study)
    assert second.returncode == 0, second.stderr
    assert "ALiBi, seed 0" in second.stdout and "RoPE, seed 0" not in second.stdout
    assert {path: path.stat().st_mtime_ns for path in written} == written, "what is finished is not run again"

    third = run({**study, "num_windows": 4})
    assert third.returncode == 1 and "was made with other settings: delete it, or choose another" in third.stderr
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_another_variant_with_other_fields_in_the_test(study, tmp_path):
    study["text"] = str(tmp_path / "*.txt")
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"Text number {i}, of some length. " * 20)
    rope = {"rope_type": "linear", "factor": 2.0}
    study["variants"] = {"PI": {"from": "RoPE", "rope_parameters": rope}, **study["variants"]}
    study["seeds"] = [0, 1]
    result = run(study)
    assert result.returncode == 0, result.stderr
    assert "mean of 2 seeds with its 95% confidence interval" in result.stdout
    out = tmp_path / "out"
    assert {path.name for path in (out / "PI-seed1").iterdir()} == {"loss_by_context.json"}, "it is not trained"
    means = json.loads((out / "results.json").read_text())["mean_loss"]
    by_seed = json.loads((out / "results.json").read_text())["loss_by_seed"]["PI"]
    assert means["PI"]["32"] == pytest.approx((by_seed["0"]["32"] + by_seed["1"]["32"]) / 2)
    assert list(means) == ["PI", "FIRE", "RoPE"] and means["PI"]["32"] != means["RoPE"]["32"]


def test_a_model_tested_in_float64_is_so_throughout(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    model = load_changed(tmp_path, {"dtype": "float64", "fire_progressive": False})
    assert {each.dtype for each in model.parameters()} == {torch.float64}
    assert not model.config.fire_progressive


def test_a_variant_trained_otherwise(study, tmp_path):
    own = {"length": 32, "training": {"max_steps": 3}, "random_positions": 40, "bias_lr_multiplier": 10}
    own["addition"] = "line"
    study["variants"] = {"other": {"fire_init_c": 0.5, **own}}
    study |= {"show": None, "contexts": [32]}
    result = run(study)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "out" / "other-seed0"
    config = FireConfig.from_pretrained(folder)
    assert (config.fire_init_c, config.max_position_embeddings) == (0.5, 32)
    assert "model.layers.0.self_attn.position_bias.r" in load_file(folder / "model.safetensors")
    assert json.loads((folder / "trainer_state.json").read_text())["global_step"] == 3


def test_what_variants_have_for_themselves_is_not_mixed(study):
    """Both kinds of numbers in one run would be refused."""
    study["variants"] = {kind: {"training": {kind: True}} for kind in ("bf16", "fp16")}
    read = Study(**{**study, "show": None})
    assert read.of("fp16").training == {**study["training"], "fp16": True}
    assert read.training == study["training"]


def test_random_positions():
    rows = [{"input_ids": torch.zeros(5, dtype=torch.long)}] * 200
    positions = at_random_positions(rows, reach=9)["position_ids"]
    assert positions.shape == (200, 5) and (positions.diff() > 0).all()
    assert positions.unique().tolist() == list(range(9))


def seen_by(row: dict[str, torch.Tensor]) -> list[list[int]]:
    """Which tokens of a row each of them depends on."""
    set_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = FireForCausalLM(FireConfig(vocab_size=8, **shape, fire_init_f="uniform"))  # far keys have weight
    embeds = model.model.embed_tokens(row.pop("input_ids")).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, **row).logits[0].double()
    gradients = [torch.autograd.grad(each.square().sum(), embeds, retain_graph=True)[0] for each in logits]
    return [each[0].abs().sum(-1).nonzero()[:, 0].tolist() for each in gradients]


def test_at_random_positions_all_that_is_before_is_seen():
    ids = torch.arange(8)
    row = at_random_positions([{"input_ids": ids, "labels": ids}], reach=100)
    assert seen_by(row) == [list(range(end + 1)) for end in range(8)]


def test_documents_of_a_row_do_not_see_each_other():
    set_seed(0)
    ids = torch.arange(8)
    row = in_documents([{"input_ids": ids, "labels": ids}], mean_length=3)
    [positions], [labels] = row["position_ids"].tolist(), row["labels"].tolist()
    assert positions.count(0) > 1
    assert labels == [-100 if position == 0 else i for i, position in enumerate(positions)]
    assert seen_by(row) == [list(range(i - position, i + 1)) for i, position in enumerate(positions)]
    rows = in_documents([{"input_ids": torch.zeros(100), "labels": torch.zeros(100).long()}] * 100, mean_length=10)
    assert 850 < (rows["position_ids"] == 0).sum() < 1250, "one of ten, and the first of each row"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"show": "FIER"}, "'FIER' is not among the variants that are trained: FIRE, RoPE"),
        (
            {"variants": {"FIRE": {}, "PI": {"from": "RoPE"}}},
            "'RoPE' is not among the variants that are trained: FIRE",
        ),
        ({"variants": {"FIRE": {"addition": "line"}}}, "'FIRE' cannot be loaded again"),
        ({"variants": {"FIRE": {"documents": 8, "random_positions": 40}}}, "'FIRE' has both documents and random_pos"),
        ({"variants": {"FIRE": {}, "x": {"addition": "lines"}}}, "'lines' is no addition: there are log scores, line"),
        (
            {"model": {"hiden_size": 8}},
            r"FireConfig has no field `hiden_size` \(in `model`\). Did you mean `hidden_size`",
        ),
        ({"variants": {"FIRE": {"fire_treshold": False}}}, "no field `fire_treshold` .in `variants.FIRE`"),
        ({"training": {"learning_rate": -1}}, "`training`: Invalid learning rate: -1"),
        (
            {"training": {"max_step": 3}},
            r"TrainingArguments has no field `max_step` \(in `training`\). Did you mean `max_steps`",
        ),
        ({"training": {"seed": 3}}, "Leave out `training.seed`: the study sets it"),
        ({"num_targets": 33}, r"`num_targets` \(33\) do not fit into contexts of"),
        ({"model": {"vocab_size": 255}}, "`model.vocab_size` must be 256 or more"),
    ],
)
def test_wrong_settings_are_refused(study, changes, message):
    with pytest.raises(ValueError, match=message):
        Study(**{**study, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lenght": 3}, "There is no field `lenght`. Known are output_dir, model"),
        ({"text": "nowhere/*.txt"}, "Error: 'nowhere/*.txt' names 0 files: one to train on"),
        ({"length": 10**9}, "Error: The training text is shorter than the 1000000000 bytes"),
        ({"num_windows": 10**6}, "Error: The held-out files hold only"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(study, tmp_path, changes, message):
    result = run({**study, **changes})
    assert result.returncode in (1, 2) and message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


STUDIES = ["demo/demo", "defaults/study", "defaults/drift", "defaults/regime", "compare/compare", "ablate/ablate"]


@pytest.mark.parametrize("path", STUDIES)
def test_shipped_studies_load(path):
    study = Study(**yaml.safe_load((ROOT / "recipes" / f"{path}.yaml").read_text()))
    TrainingArguments("unused", **study.training)
