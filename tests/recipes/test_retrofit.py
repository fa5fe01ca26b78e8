"""The retrofit recipe in miniature: from a LLaMA checkpoint and a text to a model that AutoModel loads."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from checkpoints import bloom, llama, save_tokenizer
from helpers import ENVIRONMENT, execute
from retrofit import load
from retrofit_runs import (
    TEXT,
    command,
    run,
    sampling_settings,  # noqa: F401
    small_settings,  # noqa: F401
    small_source,  # noqa: F401
)
from retrofit_settings import Retrofit
from safetensors.torch import load_file
from sampled import sample, with_sampled
from settings import changed, read_fields
from test_sources import write_gguf
from training_arguments import training_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer
from windows import Windows, as_dataset, read_windows, split

from modeling_fire.conversion import CalibrationOptions, convert
from modeling_fire.conversion.sampling import sampled_windows


def test_gguf_whose_tokenizer_has_a_token_too_many(settings, tmp_path):
    """transformers adds one, which no text has."""
    write_gguf(tmp_path / "gguf", tied=True)
    model = {"source": str(tmp_path / "gguf"), "gguf_file": "model.gguf", "calibrate": {"tokens": 640}}
    result = run(settings, model=model, heal__distill=0.5, training__max_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert max(tokenizer.get_vocab().values()) >= load(tmp_path / "out" / "model").config.vocab_size
    assert all(math.isfinite(loss) for losses in result["loss"].values() for loss in losses)


def test_what_is_held_out_is_calibrated_on_by_nobody(settings, source, monkeypatch):
    def spy(source, out, calibrate, **kwargs):
        text = (Path(source) / "text.txt").read_text()
        assert "".join(calibrate.text) == text[: round(0.8 * len(text))] and calibrate.seed == 5
        raise InterruptedError

    monkeypatch.setattr("retrofit.convert", spy)
    with pytest.raises(InterruptedError):
        run(settings, model__calibrate={}, training__seed=5)


def test_windows(source):
    assert split(["abc", "defg", "hij"], 0.5) == (["abc", "de"], ["fg", "hij"])
    assert split(["abcd"], 0.25) == (["abc"], ["d"])
    tokenizer = AutoTokenizer.from_pretrained(source)
    windows = read_windows(str(source / "text.txt"), tokenizer, 32, 0.2, 65, 3)
    text = (source / "text.txt").read_text()
    assert "".join(windows.train_texts) == text[: round(0.8 * len(text))]
    assert windows.train.shape == (round(0.8 * len(text)) // 32, 32)
    assert windows.train[:2].flatten().tolist() == tokenizer(text).input_ids[:64]
    assert windows.held_out.shape == (3, 65)
    assert windows.held_out[0].tolist() == tokenizer(text[round(0.8 * len(text)) :]).input_ids[:65]
    labels = as_dataset(windows.held_out, 8)["labels"][:]
    assert (labels[:, :-8] == -100).all() and torch.equal(labels[:, -8:], windows.held_out[:, -8:])


def test_documents_have_the_special_tokens_of_the_tokenizer(source, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(20)))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_bos_token = True
    windows = read_windows(str(tmp_path / "text.jsonl"), tokenizer, 16, 0.5, 17, 2, documents=10)
    assert len(windows.train_texts) == 5
    assert windows.train.flatten().tolist()[: len(TEXT)] == tokenizer(TEXT).input_ids[: len(TEXT)]


def test_from_the_command_line_to_a_model_for_the_hub(settings, tmp_path):
    settings["model"]["calibrate"] = {"tokens": 640}
    out = tmp_path / "out"
    first = execute(*command(settings, "heal.bias_lr_multiplier=3"))
    assert first.returncode == 0, first.stderr
    assert {path.name for path in out.iterdir()} == {
        "checkpoints",
        "converted",
        "model",
        "results.json",
        "settings.json",
        "trainer_state.json",
    }
    result = json.loads((out / "results.json").read_text())
    assert result["settings"]["heal"]["bias_lr_multiplier"] == 3
    means = {context: sum(losses) / len(losses) for context, losses in result["loss"].items()}
    assert f"{math.exp(means['64']):.3f}" in first.stdout, "the table is what was measured"
    card = (out / "model" / "README.md").read_text()
    assert f"| {math.exp(means['64']):.3f} |" in card and "for 6 steps" in card and "Proof of the conversion" in card
    # What is evaluated on the way is what is measured in the end.
    assert list(result["eval_loss"]) == ["0", "3", "6"]
    assert result["eval_loss"]["6"] == pytest.approx(means["32"], rel=1e-5)
    assert result["tokens_per_step"] == 4 * 32

    stranger = "import sys; sys.modules['modeling_fire'] = None; from transformers import AutoModelForCausalLM as A; "
    stranger += "print(A.from_pretrained(sys.argv[1], trust_remote_code=True).config.rope_parameters)"
    loaded = execute("-c", stranger, str(out / "model"))
    assert loaded.stdout.strip() == "None", loaded.stderr

    written = (out / "results.json").stat().st_mtime_ns
    second = execute(*command(settings, "heal.bias_lr_multiplier=3"))
    assert second.returncode == 0 and second.stdout == first.stdout[first.stdout.index("\nPerplexity") :]
    assert (out / "results.json").stat().st_mtime_ns == written, "what is finished is not run again"


HEAL = {
    "distillation": {"anneal": 0.5, "distill": 0.5},
    "LoRA": {"lora": {"r": 2, "target_modules": ["q_proj", "k_proj"], "lora_dropout": 0.1}, "bias_lr_multiplier": 3},
}


@pytest.mark.parametrize("heal", HEAL.values(), ids=HEAL)
def test_a_killed_run_goes_on_as_if_it_had_not_been(settings, tmp_path, monkeypatch, heal):
    """Killed while it trains, with half a checkpoint beside a whole one; later after its last step."""
    changes = {"heal": heal, "training.max_steps": 60}
    undisturbed = run(settings, output_dir=str(tmp_path / "whole"), **changes)

    arguments = command(changed(settings, changes))
    process = subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    checkpoints = tmp_path / "out" / "checkpoints"
    deadline = time.monotonic() + 60
    while not (checkpoints / "checkpoint-4" / "trainer_state.json").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "model").exists(), "killed too late to test anything"
    (checkpoints / "checkpoint-59").mkdir()
    assert run(changed(settings, changes)) == undisturbed
    assert not (tmp_path / "out" / "trained").exists()

    # Trainer, resumed from the checkpoint of the last step, would take one more.
    monkeypatch.setattr("retrofit.FireTrainer.training_step", None)
    assert run(changed(settings, changes)) == undisturbed


def test_a_killed_conversion_goes_on(settings, tmp_path):
    """Killed while it calibrates; what that left goes."""
    settings["model"]["calibrate"] = {"tokens": 4800}
    undisturbed = run(settings, output_dir=str(tmp_path / "whole"))
    process = subprocess.Popen([sys.executable, *command(settings)], env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    out, deadline = tmp_path / "out", time.monotonic() + 60
    while not any(out.glob("**/*.partial-*/**/config.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert any(out.glob("**/*.partial-*")) and not (out / "converted").exists(), "killed too late to test anything"
    assert run(settings) == undisturbed
    assert {path.name for path in out.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}
    assert not any(out.glob("**/*.partial-*"))


def test_the_teacher_may_be_on_another_device(settings, tmp_path):
    one = run(settings, output_dir=str(tmp_path / "one"), heal={"distill": 0.5})
    assert run(settings, heal={"distill": 0.5, "teacher_device": "cpu"}) == one


def test_bfloat16_with_distillation_and_annealing(settings, tmp_path):
    heal = {"distill": 0.5, "anneal": 0.5}
    one = run(settings, output_dir=str(tmp_path / "one"), heal=heal)
    two = run(settings, heal=heal, training__bf16=True)
    assert two["train_loss"] != one["train_loss"], "it is computed in another type"
    for name in ("train_loss", "eval_loss"):
        assert list(two[name].values()) == pytest.approx(list(one[name].values()), rel=0.02), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.rope_parameters is None and model.dtype == torch.float32


# Text that the source writes


def test_the_source_writes_the_text(sampling, source, tmp_path, monkeypatch):
    """Once: a run that was killed goes on with the same."""
    undisturbed = run(
        sampling, output_dir=str(tmp_path / "whole"), heal__distill=0.5, model__calibrate={"tokens": 640}
    )
    windows = with_sampled(Windows([], torch.empty(0), torch.empty(0)), tmp_path / "whole")
    assert windows.train.shape == (40, 32) and windows.held_out.shape == (8, 33)
    assert (windows.train[:, 0] == 1).all() and (windows.held_out[:, 0] == 1).all()  # its `bos_token_id`
    assert not (windows.train[:8] == windows.held_out[:, :32]).all(-1).any(), "it is not what is trained on"
    # It is the source's: nothing that one reads is as likely to it.
    model, text = AutoModelForCausalLM.from_pretrained(source), (source / "text.txt").read_text()
    read = AutoTokenizer.from_pretrained(source)(text, return_tensors="pt").input_ids[:, :1280].view(40, 32)
    with torch.no_grad():
        assert model(windows.train, labels=windows.train).loss < model(read, labels=read).loss - 0.5

    changes = {"heal__distill": 0.5, "model__calibrate": {"tokens": 640}}
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr("retrofit.convert", None)
        run(sampling, **changes)
    assert not (tmp_path / "out" / "converted").exists()
    with monkeypatch.context() as patch:
        patch.setattr("sampled.sampled_windows", None)
        assert run(sampling, **changes) == undisturbed
    with pytest.raises(SystemExit, match="out/sampled was made with other settings"):
        run(sampling, data__tokens=1400, **changes)
    with pytest.raises(SystemExit, match="out/sampled was made with other settings"):
        run(sampling, training__seed=7, **changes)


def test_what_is_sampled_is_written_in_parts(sampling, source, tmp_path, monkeypatch):
    """Which two processes share, and a killed run has not to write again."""
    monkeypatch.setattr("sampled.PART_TOKENS", 500)  # 40 windows of 32 tokens are three parts, 8 of 33 are one
    settings = read_fields(Retrofit, sampling)
    written = []

    def take_turns(model, length, count, seed, batch_size):
        written.append((length, count))
        return sampled_windows(model, length, count, seed, batch_size)

    monkeypatch.setattr("sampled.sampled_windows", take_turns)
    arguments = training_arguments(tmp_path / "out", settings.training)

    def sample_as(rank: int, output: Path, processes: int = 2) -> None:
        run = replace(settings, output_dir=str(output))
        which = SimpleNamespace(
            process_index=rank,
            world_size=processes,
            main_process_first=arguments.main_process_first,
            device=arguments.device,
            seed=arguments.seed,
            per_device_eval_batch_size=arguments.per_device_eval_batch_size,
        )
        sample(run, which, lambda: AutoModelForCausalLM.from_pretrained(source))

    sample_as(0, tmp_path / "one", processes=1)
    assert written == [(32, 15), (32, 15), (32, 10), (33, 8)]
    written.clear()
    (tmp_path / "two" / "sampled.unfinished").mkdir(parents=True)
    sample_as(1, tmp_path / "two")
    assert written == [(32, 15), (33, 8)]
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("sampled.load_file", mock.Mock(side_effect=InterruptedError))
        sample_as(0, tmp_path / "two")
    written.clear()
    sample_as(0, tmp_path / "two")
    assert not written, "all parts were there"
    one, two = (load_file(tmp_path / name / "sampled" / "windows.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert len(one["train"].unique(dim=0)) == 40
    assert {path.name for path in (tmp_path / "two" / "sampled").iterdir()} == {"settings.json", "windows.safetensors"}


def test_another_text_is_evaluated_on(settings, sampling, source, tmp_path, monkeypatch):
    """At any length beside one that is sampled; of one that is read nothing is held out then."""
    text = str(source / "text.txt")
    read = run(settings, data__held_out=None, evaluation__text=text, output_dir=str(tmp_path / "read"))
    evaluation = {**settings["evaluation"], "text": text}
    result = run(sampling, evaluation=evaluation)
    assert result["eval_loss"][0] == read["eval_loss"][0], "the same tokens"
    assert [len(losses) for losses in result["loss"].values()] == [4, 4]

    def spy(source, out, calibrate, **kwargs):
        assert "".join(calibrate.text) == Path(text).read_text()
        raise InterruptedError

    monkeypatch.setattr("retrofit.convert", spy)
    settings["output_dir"] = str(tmp_path / "spied")
    with pytest.raises(InterruptedError):
        run(settings, data__held_out=None, evaluation__text=text, model__calibrate={})


def test_two_processes_do_what_one_does(settings, sampling, source, tmp_path):
    heal = {"distill": 0.5, "anneal": 0.5}
    settings = {**sampling, "evaluation": {**settings["evaluation"], "text": str(source / "text.txt")}}
    one = run(settings, output_dir=str(tmp_path / "one"), heal=heal)
    both = changed(settings, {"heal": heal, "training.per_device_train_batch_size": 2, "training.ddp_backend": "gloo"})
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    launched = execute(*launch, *command(both))
    assert launched.returncode == 0, launched.stderr
    two = json.loads((tmp_path / "out" / "results.json").read_text())
    for name in ("train_loss", "eval_loss"):
        assert list(two[name].values()) == pytest.approx(list(one[name].values()), rel=1e-4), name
    for context, losses in one["loss"].items():
        assert two["loss"][str(context)] == pytest.approx(losses, rel=1e-4)
    assert two["tokens_per_step"] == one["tokens_per_step"]


def test_lora_is_merged(settings, tmp_path):
    lora = {"r": 2, "target_modules": ["q_proj", "k_proj"]}
    result = run(settings, heal={"lora": lora, "anneal": 0.5}, training__learning_rate=0.01)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert model.config.rope_parameters is None
    start = load(tmp_path / "out" / "converted").state_dict()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert {name.split(".self_attn.")[-1].split(".")[0] for name in moved} == {"q_proj", "k_proj", "position_bias"}
    assert sum(result["loss"][32]) / 4 == pytest.approx(result["eval_loss"][6], rel=1e-4)


def test_rotation_and_config(settings, tmp_path):
    """Trained on as it was, and with other RoPE parameters, of which those that are not named stay."""
    kept = {"position_bias": "none", "rope_parameters": {"rope_type": "linear", "factor": 2.0}}
    run(settings, model__rotation="keep", model__config=kept, training__max_steps=2)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model").config
    assert config.position_bias == "none"
    assert config.rope_parameters["factor"] == 2.0 and config.rope_parameters["rope_theta"] == 10000.0


def test_what_is_converted_is_healed_as_its_source_is(settings, source, tmp_path):
    def same(converted: dict, original: dict):
        first = run(settings, output_dir=str(tmp_path / "original"), **original)
        fire = {"output_dir": str(tmp_path / "converted"), "model__source": str(tmp_path / "fire")}
        second = run(settings, **fire, **converted)
        for name in ("loss", "train_loss", "eval_loss"):
            assert second[name] == first[name]
        for folder in ("fire", "original", "converted"):
            shutil.rmtree(tmp_path / folder)

    convert(source, tmp_path / "fire")
    same({}, {})
    convert(source, tmp_path / "fire", rotation="keep")
    same({"heal": {"anneal": 0.5, "distill": 0.5}}, {"heal": {"anneal": 0.5, "distill": 0.5}})
    text = (source / "text.txt").read_text()
    calibrate = {"tokens": 640, "seed": 0, "text": [text[: round(0.8 * len(text))]]}
    convert(source, tmp_path / "fire", calibrate=CalibrationOptions(**calibrate))
    same({}, {"model__calibrate": calibrate})


def test_what_was_alibi_is_a_teacher(settings, tmp_path):
    """It was converted exactly, and is what it was made of."""
    bloom().save_pretrained(tmp_path / "bloom")
    save_tokenizer(tmp_path / "bloom")
    convert(tmp_path / "bloom", tmp_path / "fire")
    source, heal = str(tmp_path / "fire"), {"distill": 1, "bias_lr_multiplier": 2}
    result = run(settings, model__source=source, heal=heal, training__max_steps=2)
    # The student begins as the teacher: but for rounding there is nothing to learn.
    assert result["train_loss"][1] == pytest.approx(0.0, abs=1e-5)


def test_weights_keep_the_type_of_the_source(settings, source, tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    save_tokenizer(tmp_path / "bfloat16")
    run(settings, model__source=str(tmp_path / "bfloat16"), training__max_steps=2)
    healed = tmp_path / "out" / "model"
    run(settings, output_dir=str(tmp_path / "again"), model__source=str(healed), training__max_steps=2)
    for folder in (healed, tmp_path / "again" / "model"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.lm_head.weight.dtype == torch.bfloat16
        assert model.model.layers[0].self_attn.position_bias.c.dtype == torch.float32
