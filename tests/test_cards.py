"""Model cards of every kind, of tiny runs: metadata, figures, and the code, which a stranger executes."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml
from checkpoints import llama, save_tokenizer
from helpers import FEW_STEPS, ROOT, random_ids, tiny_model
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import TrainerState, TrainingArguments
from typer.testing import CliRunner

from modeling_fire import FireForCausalLM, FireForQuestionAnswering, FireForSequenceClassification
from modeling_fire.cards import Base, write_card
from modeling_fire.cli import app
from modeling_fire.conversion import CalibrationOptions, convert
from modeling_fire.evaluation.report import EvaluationOptions, evaluate
from modeling_fire.training import FireTrainer


CONVERTED = ["converted", "calibrated", "fast", "fast-calibrated"]
KINDS = [*CONVERTED, "pretrained", "finetuned", "adapter", "classifier", "answerer", "bare", "llama"]


def train(model, folder: Path, **card) -> None:
    data = [{"input_ids": row, "labels": row} for row in random_ids(8, 12)]
    arguments = TrainingArguments(
        str(folder), **FEW_STEPS | {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    )
    tokenizer = save_tokenizer(folder)
    trainer = FireTrainer(model, arguments, train_dataset=data, eval_dataset=data[:2], processing_class=tokenizer)
    trainer.train()
    trainer.save_model()
    if card:
        trainer.create_model_card(**card)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with what the tools leave, cards included."""
    work = tmp_path_factory.mktemp("runs")
    llama().save_pretrained(work / "source")
    save_tokenizer(work / "source")
    (work / "source" / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Original\n")
    convert(work / "source", work / "converted")
    convert(work / "source", work / "calibrated", calibrate=CalibrationOptions("sample", tokens=64))
    convert(work / "source", work / "fast", rotation="fast")
    sample = CalibrationOptions("sample", tokens=64, align=False)
    convert(work / "source", work / "fast-calibrated", rotation="fast", calibrate=sample)
    train(tiny_model(), work / "pretrained", dataset="A Text", dataset_tags="someone/text", language="de", tags="tiny")
    train(FireForCausalLM.from_pretrained(work / "calibrated"), work / "finetuned")
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["position_bias"], task_type="CAUSAL_LM")
    train(get_peft_model(FireForCausalLM.from_pretrained(work / "calibrated"), lora), work / "adapter")
    for name, model_class in (("classifier", FireForSequenceClassification), ("answerer", FireForQuestionAnswering)):
        tiny_model(model_class).save_pretrained(work / name)
        save_tokenizer(work / name)
        write_card(work / name)
    tiny_model(position_bias="alibi").save_pretrained(work / "bare")
    llama().save_pretrained(work / "llama")  # which the recipes train as well
    for name in ("bare", "llama"):
        write_card(work / name)
    return work


def card_of(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


@pytest.mark.parametrize("name", KINDS)
def test_a_card_says_nothing_of_the_machine_and_nothing_empty(runs, name):
    card = card_of(runs / name)
    assert str(runs) not in card.content and "/tmp" not in card.content
    assert not re.search(r"\bNone\b|Undefined|\[\]|\{\}|More Information|\n\n\n", card.content)
    for link in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
        assert (runs / name / link).read_bytes().startswith(b"\x89PNG")
    assert card.data.to_dict() == yaml.safe_load(card.content.split("---\n")[1])


def test_metadata(runs):
    tasks = {"classifier": "text-classification", "answerer": "question-answering"}
    for name in KINDS:
        data = card_of(runs / name).data
        assert data.pipeline_tag == tasks.get(name, "text-generation")
        assert data.library_name == ("peft" if name == "adapter" else "transformers")
        ours = [tag for tag in data.tags or [] if tag in ("fire", "custom_code")]
        assert ours == {"adapter": ["fire"], "llama": []}.get(name, ["fire", "custom_code"])
        assert data.base_model is None  # which is on no Hub
        inherits = name in (*CONVERTED, "finetuned", "adapter")
        assert data.license == ("apache-2.0" if inherits else None), name
    trained = card_of(runs / "pretrained").data
    assert trained.datasets == ["someone/text"] and trained.language == ["de"]
    assert trained.tags == ["fire", "custom_code", "tiny", "generated_from_trainer"]
    assert "lora" in card_of(runs / "adapter").data.tags


PROGRAM = """
import re, sys
sys.modules["modeling_fire"] = None  # a stranger has not installed it
for name in sys.argv[1:]:
    text = open(f"{name}/README.md").read()
    blocks = re.findall(r"```python\\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 1 and f'"{name}"' in blocks[0], name
    exec(compile(blocks[0], name, "exec"), {})
    print("done:", name)
"""


def test_the_code_of_every_card_runs_as_written(runs):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(runs / "modules"), "PYTHONPATH": ""}
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *KINDS], capture_output=True, text=True, env=environment, cwd=runs
    )
    assert ran.returncode == 0, ran.stderr
    assert re.findall("done: (.*)", ran.stdout) == KINDS


def test_what_a_conversion_says(runs):
    for name in CONVERTED:
        text, record = card_of(runs / name).text, json.loads((runs / name / "conversion.json").read_text())
        assert f"{record['proof']['absolute']:.2e}" in text and f"bound: {record['proof']['bound']:.1e}" in text
        assert "It needs training." in text and "`source` with [FIRE]" in text
        if record["calibration"] is not None:
            last, perplexity = list(record["calibration"]["perplexity"].items())[-1]
            assert f"{last} {perplexity:.2f}" in text and "bias.png" in text and "how far behind the source" in text
    assert not (runs / "converted" / "bias.png").exists(), "there is nothing learned to draw"
    assert "FIRE's bias is still 0" in card_of(runs / "converted").text


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_what_a_conversion_that_keeps_part_of_the_rotation_says(runs, tmp_path, calibrated, trained):
    name = "fast-calibrated" if calibrated else "fast"
    folder = shutil.copytree(runs / name, tmp_path / name)
    if trained:
        train(FireForCausalLM.from_pretrained(folder), folder)
    text = card_of(folder).text
    assert "beside rotary position embeddings (RoPE) as its position encoding" in text
    assert "the fast part is kept beside FIRE's bias" in text and "With the whole rotation kept, the weights" in text
    says = {
        "the bias took over what those did, as far as it could: perplexity": calibrated,
        "Training recovers the rest.": calibrated and not trained,
        "the training began with a bias of 0": trained and not calibrated,
        "FIRE's bias is still 0": not trained and not calibrated,
        "It was not trained since part of its rotation went": not trained,
        "only calibrated: the perplexities above": not trained and calibrated,
        "what it writes is not what the source writes": not trained and not calibrated,
        "ALiBi": False,
        "the rotation (RoPE) is still there": False,
    }
    assert {sentence: sentence in text for sentence in says} == says


def test_what_a_training_says(runs):
    trained = card_of(runs / "finetuned").text
    assert "`calibrated`, fine-tuned" in trained and "for 2 steps" in trained
    assert re.search(r"\| step \| training loss \| held-out loss \|\n\|---\|---\|---\|\n\| 1 \| \d", trained)
    with safe_open(runs / "finetuned" / "model.safetensors", "pt") as file:
        count = sum(file.get_tensor(name).numel() for name in file.keys() if "init_L" not in name)  # noqa: SIM118
        learned = abs(file.get_tensor("model.layers.0.self_attn.position_bias.c").item())
    assert (
        f"{count:,} parameters" in trained
        and count == FireForCausalLM.from_pretrained(runs / "finetuned").num_parameters()
    )
    assert f"| c, by layer | {learned:.5g}," in trained
    adapter = card_of(runs / "adapter").text
    assert "An adapter for `calibrated`" in adapter and "| rank | 8 |" in adapter and "`position_bias`" in adapter
    scratch = card_of(runs / "pretrained").text
    assert "A Text" in scratch and "trained from scratch" in scratch
    assert not list(runs.glob("*/training_args.bin"))


def test_a_model_trained_on_in_place_is_not_from_scratch(model):
    train(FireForCausalLM.from_pretrained(model), model)
    text = card_of(model).text
    assert "fine-tuned" in text and "from scratch" not in text


def test_a_plain_trainer_says_nothing_of_where_it_began(model):
    """Nor does a folder without `results.json`: a fine-tuned model looks like one that was trained from scratch."""
    state = TrainerState(global_step=7, log_history=[{"step": 7, "loss": 2.0}])
    state.save_to_json(str(model / "trainer_state.json"))
    text = ModelCard.load(write_card(model)).text
    assert "from scratch" not in text and "Trained for 7 steps" in text


def test_what_is_not_known_is_left_out(runs):
    card = card_of(runs / "bare")
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags"}
    headings = re.findall("## (.*)", card.text)
    assert headings == ["Use", "Limits"] and "ALiBi" in card.text and "bibtex" not in card.text


@pytest.fixture
def model(tmp_path) -> Path:
    """A model as the recipes leave it, in `run/model`."""
    folder = tmp_path / "run" / "model"
    tiny_model().save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def test_figures_are_those_of_the_files(model, tmp_path):
    (tmp_path / "text.txt").write_text("A fire needs three things: fuel, heat and air. " * 30)
    llama().save_pretrained(tmp_path / "rival")
    save_tokenizer(tmp_path / "rival")
    options = EvaluationOptions(str(tmp_path / "text.txt"), contexts=[32, 128], num_targets=8, num_windows=2)
    result = evaluate([str(model), str(tmp_path / "rival")], options, model.parent)
    card = ModelCard.load(write_card(model, name="someone/run"))
    by_context = result["models"]["model"]["loss_by_context"]
    perplexities = {context: math.exp(sum(losses) / len(losses)) for context, losses in by_context.items()}
    assert {each.metric_args["context"]: each.metric_value for each in card.data.eval_results} == pytest.approx(
        perplexities
    )
    assert {each.dataset_name for each in card.data.eval_results} == {"text.txt"} and card.data.model_name == "run"
    row = " | ".join(f"{value:.3f}" for value in perplexities.values())
    assert f"| **run** | {row} |" in card.text and "| rival |" in card.text and "measured up to 128" in card.text
    assert '"someone/run"' in card.text and (model / "perplexity.png").exists()

    index = card.data.to_dict()["model-index"]
    name, results = model_index_to_eval_results(index)
    assert results == card.data.eval_results and eval_results_to_model_index(name, results) == index


def recipe(**changes) -> dict:
    data = {"train": "someone/data:small:train", "length": 64, "held_out": 0.1}
    return {"settings": {"model": {"source": "source"}, "data": data, "training": {"max_steps": 5}, **changes}}


def test_what_the_recipes_leave(model):
    losses = {"train_loss": {"1": 2.5, "5": 2.25}, "eval_loss": {"5": {"64": 2.125}}, "versions": {"torch": "2.13"}}
    pretrained = {"model": {"config": "a.json"}, "length": 64, "evaluation": {"num_windows": 4, "num_targets": 8}}
    card = ModelCard.load(write_card(model, results={**recipe(**pretrained), **losses, "loss": {64: 2.125}}))
    assert card.data.datasets == ["someone/data"] and card.data.eval_results[0].metric_value == math.exp(2.125)
    assert (card.data.eval_results[0].dataset_type, card.data.eval_results[0].dataset_split) == ("someone/data", None)
    assert "the same held-out 4 x 8 tokens of [someone/data]" in card.text
    assert "| 5 | 2.2500 | 2.1250 |" in card.text and "trained from scratch" in card.text and "torch 2.13" in card.text

    study = {
        "contexts": [64],
        "text": None,
        "length": 64,
        "num_windows": 2,
        "num_targets": 8,
        "training": {"max_steps": 3},
    }
    (model / "loss_by_context.json").write_text(json.dumps({"settings": study, "loss": {"64": [2.0, 2.5]}}))
    card = ModelCard.load(write_card(model))
    assert card.data.eval_results[0].metric_value == math.exp(2.25) and "Python's standard library, in" in card.text

    scores = {"scores": {"64": {"f1": 25.5}, "128": {"f1": 24.25}}}
    card = ModelCard.load(write_card(model, results={**recipe(task="narrative_qa"), **scores}))
    assert [each.metric_value for each in card.data.eval_results] == [25.5, 24.25]
    assert "| narrative_qa | f1 | 25.5000 | 64 |" in card.text and "`source`, fine-tuned for narrative_qa" in card.text

    measured = {"measured": {"validation": {"metrics": {"accuracy": 0.75}, "majority": {"accuracy": 0.5}}}}
    settings = {"task": "rte", "model": "source", "data": {"train": "t.jsonl", "validation": "v.jsonl"}}
    card = ModelCard.load(write_card(model, results={**recipe(**settings), **measured}))
    assert card.data.eval_results[0].metric_value == 0.75 and card.data.eval_results[0].dataset_name == "v.jsonl"
    assert "| rte, validation | accuracy | 0.7500 | 0.5000 |" in card.text and card.data.datasets is None


def test_a_base_on_the_hub(model, runs):
    record = json.loads((runs / "converted" / "conversion.json").read_text())
    (model / "conversion.json").write_text(json.dumps(record | {"source": "someone/model", "revision": "0" * 40}))
    data = ModelCard.load(write_card(model)).data
    assert (data.base_model, data.base_model_relation) == ("someone/model", "finetune")


def test_a_base_that_was_loaded_from_the_hub(model, runs, monkeypatch):
    """The cache of the Hub tells ids from paths; of a model of one's own counts what that was made of."""
    cached = {"someone/model": str(runs / "source" / "config.json")}
    monkeypatch.setattr("modeling_fire.cards.facts.try_to_load_from_cache", lambda name, *_, **__: cached.get(name))
    own = model.parent / "own"
    tiny_model().save_pretrained(own)
    (own / "README.md").write_text("---\nbase_model: someone/base\n---\n")
    for source, base in (("someone/model", "someone/model"), ("outputs/gone", None), (str(own), "someone/base")):
        data = ModelCard.load(write_card(model, results=recipe(model={"source": source}))).data
        assert (data.base_model, data.get("base_model_relation")) == (base, base and "finetune")


def test_what_a_person_adds_to_the_metadata_stays(model):
    path = write_card(model)
    path.write_text(path.read_text().replace("---\n", "---\nlicense: mit\nlanguage: fr\n", 1))
    data = ModelCard.load(write_card(model)).data
    assert (data.license, data.language) == ("mit", "fr")


@pytest.mark.parametrize(
    ("base", "link"), [("someone/base", "https://huggingface.co/someone/base/blob/main/LICENSE"), (None, None)]
)
def test_the_link_to_a_licence_that_is_elsewhere(model, base, link):
    licence = "license: other\nlicense_name: own\nlicense_link: LICENSE\n"
    (model / "README.md").write_text(f"---\n{licence}---\n")
    given = None if base is None else Base(base, True, None)
    data = ModelCard.load(write_card(model, base=given)).data
    assert (data.license, data.get("license_name"), data.get("license_link")) == ("other", "own", link)
    (model / "README.md").write_text(f"---\n{licence}---\n")
    (model / "LICENSE").write_text("As you like.\n")
    assert ModelCard.load(write_card(model, base=given)).data.get("license_link") == "LICENSE"


def test_without_matplotlib_there_are_no_plots(model, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "![" not in ModelCard.load(write_card(model)).text and not list(model.glob("*.png"))


def fire_card(*arguments):
    return CliRunner().invoke(app, ["card", *map(str, arguments)])


def test_the_command(model, tmp_path):
    result = fire_card(model, "--name", "someone/else", "--out", tmp_path / "card.md")
    assert result.exit_code == 0 and result.output == f"Wrote {tmp_path / 'card.md'}\n"
    assert "# else" in (tmp_path / "card.md").read_text() and (tmp_path / "bias.png").exists()
    assert "fire card outputs/mine/model --name someone/mine" in fire_card("--help").output


def test_what_has_no_card_is_one_line_and_exit_status_1(model, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"models": {"another": {}}}))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    (model / "README.md").write_text("# By hand\n")
    for arguments, message in (
        ((tmp_path,), "has no config.json and no adapter_config.json"),
        ((model,), "`--overwrite` replaces it"),
        ((model, "--overwrite", "--results", tmp_path / "missing.json"), "There is no file"),
        ((model, "--overwrite", "--results", tmp_path / "broken.json"), "is broken"),
        ((model, "--overwrite", "--results", tmp_path / "list.json"), "it holds a list"),
        ((model, "--overwrite", "--out", tmp_path), "give the file"),
        ((model, "--overwrite", "--out", tmp_path / "missing" / "card.md"), "in a folder that exists"),
        ((model, "--overwrite", "--evaluation", tmp_path / "other.json"), "but of another"),
    ):
        result = fire_card(*arguments)
        assert result.exit_code == 1 and result.stderr.startswith("Error: ") and message in result.stderr, (
            result.stderr
        )
        assert len(result.stderr.splitlines()) == 1
    assert (model / "README.md").read_text() == "# By hand\n" and not list(model.glob("*.png"))
    assert fire_card(model, "--overwrite").exit_code == 0 and fire_card(model).exit_code == 0


def test_a_wheel_holds_every_module_and_the_templates(tmp_path):
    pytest.importorskip("setuptools", reason="setuptools builds the wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "modeling_fire", "hub_cards"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index"]
    built = subprocess.run([*command, "-w", tmp_path / "wheel", tmp_path], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    [wheel] = (tmp_path / "wheel").glob("*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("modeling_fire/")}
    modules = {str(path.relative_to(ROOT)) for path in ROOT.glob("modeling_fire/**/*.py")}
    assert held == modules | {f"modeling_fire/hub_cards/{path.name}" for path in ROOT.glob("hub_cards/*.jinja")}
