"""The pretraining recipe in miniature: a run, what it promises when it is killed, what it refuses."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml
from corpus import byte_tokenizer
from disk import last_checkpoint, train_from
from grid import run_once, write_json
from helpers import ENVIRONMENT, FEW_STEPS, ROOT, random_texts, recipe_command, write_texts
from pretrain import main, pretrain
from pretrain_settings import Pretrain
from pretrain_trainer import PretrainTrainer
from safetensors.torch import load_file
from settings import changed, read_fields
from stream import held_out_windows
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from modeling_fire import FireConfig, FireForCausalLM
from modeling_fire.training import FireTrainer


SHAPE = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64}
SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder with documents of 1 to 60 words to train on, and longer ones that are held out."""
    folder = tmp_path_factory.mktemp("text")
    write_texts(folder / "train.jsonl", random_texts(120, 60))
    write_texts(folder / "held_out.jsonl", [text for text in random_texts(40, 60, seed=1) if len(text) > 65])
    (folder / "model.json").write_text(json.dumps(SHAPE))
    return folder


@pytest.fixture
def settings(text, tmp_path) -> dict:
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"config": str(text / "model.json")},
        "tokenizer": "bytes",
        "data": {
            "train": str(text / "train.jsonl"),
            "held_out": str(text / "held_out.jsonl"),
            "shuffle_buffer": 50,
        },
        "length": 32,
        "batch_size": 8,
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 0.01,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "eval_on_start": True,
            "save_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
        },
        "evaluation": {"contexts": [32, 64], "num_targets": 8, "num_windows": 4},
    }


def run(settings: dict, **changes) -> dict:
    """The result of a run in this process; the name of a field is written with `__` for each dot."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return pretrain(read_fields(Pretrain, changed(settings, changes)))


def test_a_run(settings, tmp_path):
    result = run(settings)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"checkpoints", "model", "settings.json", "trainer_state.json"}
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "L" in entry] == [1, 2, 3, 4, 5, 6], "for `fire plot --history`"
    assert list(result["train_loss"]) == [1, 2, 3, 4, 5, 6] and list(result["eval_loss"]) == [0, 3, 6]
    assert result["train_loss"][6] < result["train_loss"][1]
    assert result["eval_loss"][6] == result["loss"] and list(result["loss"]) == [32, 64]

    # The losses are those of what was saved, and of the tokens that they name.
    model, tokenizer = (kind.from_pretrained(out / "model") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.max_position_embeddings == 32 and model.config.eos_token_id is None
    windows = held_out_windows(settings["data"]["held_out"], "text", tokenizer, 65, 4)
    for context, loss in result["loss"].items():
        with torch.no_grad():
            logits = model(windows[:, -context - 1 : -1]).logits[:, -8:]
        assert cross_entropy(logits.flatten(0, 1), windows[:, -8:].flatten()).item() == pytest.approx(loss, rel=1e-4)

    # Batches are divided anew for other machines, and the losses stay.
    other = run(settings, output_dir=str(tmp_path / "other"), training__per_device_train_batch_size=2)
    assert list(other["train_loss"].values()) == pytest.approx(list(result["train_loss"].values()), rel=1e-5)


def test_bfloat16_and_learning_rate_of_the_bias(settings):
    """Options of Trainer reach it; nothing of them is in this recipe."""
    result = run(settings, training__bf16=True, training__max_steps=2, bias_lr_multiplier=3.0)
    assert all(math.isfinite(loss) for loss in result["train_loss"].values())


def test_a_tokenizer_with_an_end_token(settings, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings["tokenizer"] = str(tmp_path / "tokenizer")
    run(settings, model__changes={"vocab_size": 257}, training__max_steps=1)
    model = FireForCausalLM.from_pretrained(tmp_path / "out" / "model")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert model.config.eos_token_id == model.generation_config.eos_token_id == saved.eos_token_id == 256
    assert saved("a</s>").input_ids == [97, 256]


def test_a_run_that_was_killed_after_its_last_step(settings, tmp_path, monkeypatch):
    """With one checkpoint, that of the last step: nothing is trained again, and what was left to do is done."""
    settings = changed(settings, {"training": {"save_total_limit": 1, "eval_steps": 4}})
    result = run(settings)
    out = tmp_path / "out"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["checkpoint-6"]
    weights = load_file(out / "model" / "model.safetensors")
    shutil.rmtree(out / "model")
    monkeypatch.setattr(PretrainTrainer, "training_step", mock.Mock(side_effect=AssertionError("a further step")))
    again = run(settings)
    assert {**again, "versions": 0} == {**result, "versions": 0}
    torch.testing.assert_close(load_file(out / "model" / "model.safetensors"), weights, rtol=0, atol=0)


def test_a_training_that_ends_within_an_epoch_takes_no_step_more(tmp_path):
    """`train_from` with rows that Trainer counts, of which `max_steps` are no whole number of passes."""
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    arguments = {**FEW_STEPS, "save_strategy": "steps", "save_steps": 3, "output_dir": str(tmp_path)}

    def trained() -> FireTrainer:
        torch.manual_seed(0)
        trainer = FireTrainer(FireForCausalLM(FireConfig(**SHAPE)), TrainingArguments(**arguments), train_dataset=rows)
        train_from(trainer, last_checkpoint(str(tmp_path)))
        return trainer

    first, second = trained(), trained()
    assert first.state.global_step == second.state.global_step == 3
    torch.testing.assert_close(second.model.state_dict(), first.model.state_dict(), rtol=0, atol=0)


def test_a_compiled_model_trains_alike(settings, tmp_path):
    """In a process of its own, because Trainer turns compilation on for all of it."""
    plain = run(settings, training__max_steps=2, output_dir=str(tmp_path / "plain"))
    changes = ("training.max_steps=2", "training.torch_compile=true", "training.torch_compile_backend=aot_eager")
    environment = {**ENVIRONMENT, "TORCH_LOGS": "graph_code"}
    ended = subprocess.run(command(settings, *changes), env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and "TRACED GRAPH" in ended.stderr, ended.stderr
    compiled = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [*compiled["train_loss"].values()] == pytest.approx([*plain["train_loss"].values()], rel=1e-6)


def command(settings: dict, *changes: str) -> list[str]:
    return [sys.executable, *recipe_command("pretrain", settings, *changes)]


def test_killed_and_continued_from_the_command_line(settings, tmp_path):
    """SIGKILL with half a checkpoint beside a whole one; then the losses, to the last bit, of a run left alone."""
    settings = changed(settings, {"training": {"max_steps": 40, "save_total_limit": 3}})
    undisturbed = run(settings, output_dir=str(tmp_path / "whole"))
    process = subprocess.Popen(command(settings), env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "out" / "checkpoints"
    deadline = time.monotonic() + 60
    while not (checkpoints / "checkpoint-4" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "model").exists(), "killed too late to test anything"
    (checkpoints / "checkpoint-39").mkdir()

    environment = {**ENVIRONMENT, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    arguments = command(settings, "training.report_to=wandb", "training.disable_tqdm=false")
    resumed = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "40/40" in resumed.stderr, "a progress bar"
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("loss", "train_loss", "eval_loss"):
        assert result[name] == json.loads(json.dumps(undisturbed[name])), name
    weights = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("out", "whole")]
    torch.testing.assert_close(*weights, rtol=0, atol=0)
    assert f"{math.exp(undisturbed['loss'][64]):.3f}" in resumed.stdout, "the table is what was measured"
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert f"| {math.exp(undisturbed['loss'][64]):.3f} |" in card and "for 40 steps" in card

    # What is finished is not run again, and a folder is for one run.
    written = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    again = subprocess.run(command(settings), env=ENVIRONMENT, capture_output=True, text=True)
    assert again.returncode == 0 and again.stdout == resumed.stdout[resumed.stdout.index("\nPerplexity") :]
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns == written
    with pytest.raises(SystemExit, match="was made with other settings"):
        run(settings, length=16)
    (tmp_path / "out" / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-.* is of another model \(fire_mlp_width, vocab_size differ\)"):
        run(settings, model__changes={"vocab_size": 300, "fire_mlp_width": 8}, training__max_steps=50)


def test_a_disk_that_fills_costs_no_checkpoint(settings, tmp_path):
    """Files that may not grow stand for a full disk: the run ends, and goes on from the last whole checkpoint."""
    undisturbed = run(settings, output_dir=str(tmp_path / "whole"))
    code = """if True:
        import resource, runpy, sys, transformers
        class Full(transformers.TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 3:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        start = transformers.Trainer.__init__
        def watched(self, *args, **kwargs):
            start(self, *args, **kwargs)
            self.add_callback(Full())
        transformers.Trainer.__init__ = watched
        sys.argv = sys.argv[1:]
        sys.path.insert(0, sys.argv[0].rpartition("/")[0])
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    arguments = command(settings)
    failed = subprocess.run(
        [arguments[0], "-c", code, *arguments[1:]], env=ENVIRONMENT, capture_output=True, text=True
    )
    *_, last = failed.stderr.strip().splitlines()
    assert failed.returncode == 1
    assert re.fullmatch(r"Error: the disk takes no more \(.*\)\. What was .* run the same command again\.", last), last
    folder = tmp_path / "out"
    assert last_checkpoint(str(folder / "checkpoints")) == str(folder / "checkpoints" / "checkpoint-2")
    (folder / "checkpoints" / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4')  # half of it
    assert run(settings)["train_loss"] == undisturbed["train_loss"]


def test_a_disk_without_room_is_found_out_before_any_work(settings, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: mock.Mock(free=2**20))
    with pytest.raises(ValueError, match=r"has room for 0.0 GiB, and the model with 2 checkpoints takes .* free some"):
        run(settings, model__changes={"intermediate_size": 6400})
    assert not Path(settings["output_dir"]).exists()
    run(settings, training__save_strategy="no", training__max_steps=1)


def test_wrong_settings_are_refused(settings, text, tmp_path):
    """Before anything is written."""

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            run(settings, **changes)
        assert not Path(settings["output_dir"]).exists()

    refused("no field `data.tran`. Known are train, held_out", data__tran="x")
    refused("no field `seed`", seed=1)
    refused("no field `position_bais` .* Did you mean `position_bias`", model__changes={"position_bais": "none"})
    refused("TrainingArguments has no field `learning_rat` .* Did you mean `learning_rate`", training__learning_rat=1)
    refused("`training`: `learning_rate` must be a number, got 'abc'", training__learning_rate="abc")
    refused("`training`: foo is not a valid SchedulerType", training__lr_scheduler_type="foo")
    refused("`training`: `report_to`: foo is not installed, or not known", training__report_to="foo")
    refused("`training`: Invalid learning rate: -1", training__learning_rate=-1)
    refused("`training`: `save_only_model` keeps nothing that a killed run", training__save_only_model=True)
    refused("whole number, 1 or more, got 2.5", training__max_steps=2.5)
    refused("per_device_train_batch_size` must be a whole number, at least 1", training__per_device_train_batch_size=0)
    refused("There is no tokenizer in .*nowhere", tokenizer=str(text / "nowhere"))
    refused("`model`: `hidden_size` must be at least 1, got 0", model__changes={"hidden_size": 0})
    refused("`model`: Field 'position_bias' expected one of", model__changes={"position_bias": "fir"})
    for name, content, message in (
        ("broken", '{"hidden_size": ', r"broken.json \(`model.config`\) is not the JSON of a model: Expecting value"),
        ("typo", '{"hiden_size": 8}', r"no field `hiden_size` \(in `.*typo.json`\). Did you mean `hidden_size`"),
    ):
        (tmp_path / f"{name}.json").write_text(content)
        refused(message, model__config=str(tmp_path / f"{name}.json"))
    refused("Leave out `training.gradient_accumulation_steps`", training__gradient_accumulation_steps=2)
    refused("Leave out `training.dataloader_num_workers`", training__dataloader_num_workers=2)
    refused(r"`batch_size` \(6\) must be a multiple of .* x processes \(4 x 1\)", batch_size=6)
    refused(r"num_targets` \(40\) do not fit", evaluation__num_targets=40)
    refused("no file .*fire-0b.json", model__config="configuration/models/fire-0b.json")
    refused("256 tokens and the model only 100: set `model.changes.vocab_size`", model__changes={"vocab_size": 100})
    refused("There is no file .*other.jsonl", data__train=str(text / "other.jsonl"))
    refused("names no file, and cannot be read as a dataset", data__train=str(text / "other"))
    (tmp_path / "nothing.jsonl").write_text("")
    refused("nothing.jsonl has no rows", data__train=str(tmp_path / "nothing.jsonl"))
    refused("has no column 'body', but text: set `data.column`", data__column="body")
    refused(r"has \d+ windows of 65 tokens within one document, not 4000", evaluation__num_windows=4000)
    refused(r"holds \d+ windows of 32 tokens; one step takes 8000", batch_size=8000)
    refused("holds 0 windows of 32 tokens", data__train=write_texts(tmp_path / "empty.jsonl", ["", ""]))
    mixed = [str(text / "train.jsonl"), write_texts(tmp_path / "rows.csv", [])]
    refused(r"files of several kinds \(csv, json\)", data__train=mixed)
    del settings["training"]["max_steps"]
    refused("Set `training.max_steps` to a whole number, 1 or more, got None")
    del settings["length"]
    refused("The field `length` is missing")


def test_one_process_with_several_gpus_is_refused(settings, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", 8)
    with pytest.raises(ValueError, match="One process has 8 GPUs: start with `accelerate launch`"):
        run(settings)


def test_a_finished_run_is_shown_by_one_process(tmp_path, monkeypatch):
    """Which keeps its result; the other processes of a later launch have nothing to say."""
    path, settings = tmp_path / "results.json", {"length": 64}
    write_json(path, {"settings": settings, "loss": 1.0})
    assert run_once(path, settings, run=None)["loss"] == 1.0
    monkeypatch.setenv("RANK", "1")
    assert run_once(path, settings, run=None) is None


def test_errors_take_one_line(settings, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", command(settings, "data.column=body")[1:])
    with pytest.raises(SystemExit, match=r"^Error: .* has no column 'body', but text: set `data.column`.$"):
        main()
    monkeypatch.setattr(sys, "argv", command(settings, "tokenizer=no/such")[1:])
    with pytest.raises(SystemExit, match=r"^Error: There is no tokenizer in no/such \(`tokenizer`\): [^\n]*$"):
        main()
    monkeypatch.setattr(sys, "argv", command(settings, "lenght=64")[1:])
    with pytest.raises(SystemExit):
        main()
    assert "error: There is no field `lenght`. Known are output_dir, model," in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tiny", "fire-125m"])
def test_shipped_runs_load(name):
    settings = yaml.safe_load((ROOT / "recipes" / "pretrain" / f"{name}.yaml").read_text())
    loaded = read_fields(Pretrain, settings)
    TrainingArguments("unused", **{**loaded.training, "use_cpu": True})
    fields = json.loads((ROOT / loaded.model.config).read_text())
    config = FireConfig.from_dict({**fields, **loaded.model.changes})
    assert loaded.length == config.max_position_embeddings
