"""The retrofit recipe in miniature: from a LLaMA checkpoint and a text to a model that AutoModel loads."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import bloom, llama, save_tokenizer
from helpers import ENVIRONMENT, ROOT, execute, recipe_command
from retrofit import load, retrofit
from retrofit_plan import with_sampled
from retrofit_settings import FREE, Retrofit
from settings import SettingsError, changed, parse_changes, read_fields
from test_sources import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from windows import Windows, as_dataset, read_windows, split

from modeling_fire.conversion import CalibrationOptions, ConversionError, convert


TEXT = "Once upon a time there was a little fox. It ran through the woods, and the woods were dark and deep. "


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A random LLaMA with its tokenizer, and a text of some 6000 letters, one token each."""
    folder = tmp_path_factory.mktemp("source")
    llama().save_pretrained(folder)
    save_tokenizer(folder)
    (folder / "text.txt").write_text("".join(f"{TEXT}{number} " for number in range(60)))
    return folder


@pytest.fixture
def settings(source, tmp_path) -> dict:
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"source": str(source)},
        "data": {"text": str(source / "text.txt"), "length": 32, "held_out": 0.2},
        "training": {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1.0e-3,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "eval_on_start": True,
            "save_strategy": "steps",
            "save_steps": 2,
            "disable_tqdm": True,
            "use_cpu": True,
        },
        "evaluation": {"contexts": [32, 64], "num_targets": 8, "num_windows": 4},
    }


def run(settings: dict, **changes) -> dict:
    """The result of a run in this process; the name of a field is written with `__` for each dot."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return retrofit(read_fields(Retrofit, changed(settings, changes)))


command = partial(recipe_command, "retrofit")


def test_changes_of_settings():
    base = {"a": {"b": 1, "c": None}, "d": [1]}
    assert changed(base, {"a.b": 2, "a.c.e": 3, "d": [2]}) == {"a": {"b": 2, "c": {"e": 3}}, "d": [2]}
    assert changed(base, {"a": {"c": {"e.f": 4}}}) == {"a": {"b": 1, "c": {"e": {"f": 4}}}, "d": [1]}
    assert base == {"a": {"b": 1, "c": None}, "d": [1]}
    assert parse_changes(["a.b=1.0e-3", "c=[1, 2]", "d=x=y"]) == {"a.b": 1e-3, "c": [1, 2], "d": "x=y"}
    assert parse_changes(["a=1e-3", "b=[2e5]", "c=e5"]) == {"a": 1e-3, "b": [2e5], "c": "e5"}
    with pytest.raises(ValueError, match="form name=value, got 'a'"):
        parse_changes(["a"])


def test_wrong_settings_are_refused(settings):
    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            run(settings, **changes)
        assert not Path(settings["output_dir"]).exists()

    refused("no field `heal.distil`. Known are anneal, distill", heal__distil=1.0)
    refused("no field `output`. Known are output_dir, model", output=1)
    refused(
        "FireConfig has no field `position_bais` .* Did you mean `position_bias`",
        model__config={"position_bais": "none"},
    )
    refused("must be 'drop', 'fast' or 'keep', got 'kept'", model__rotation="kept")
    refused(r"`data.length` \(16\) is not among", data__length=16)
    refused(r"num_targets` \(40\) do not fit", evaluation__num_targets=40)
    refused("windows of 65 tokens in the held-out 20% of .*text.txt, not 400", evaluation__num_windows=400)
    refused("num_targets` \\(0\\) do not fit", evaluation__num_targets=0)
    refused("training windows; one step takes 4000", training__per_device_train_batch_size=4000)
    refused("TrainingArguments has no field `max_step` .* `max_steps`", training__max_step=3)
    refused("`training`: `learning_rate` must be a number, got 'fast'", training__learning_rate="fast")
    refused("`training`: `learning_rate` must be a number, got None", training__learning_rate=None)
    refused("CalibrationOptions has no field `algin` .* `align`", model__calibrate={"algin": True})
    refused("`model.calibrate` has fields of its own, got True", model__calibrate=True)
    refused("`model.calibrate`: Field 'align' .* expected bool, got str .*'no'", model__calibrate={"align": "no"})
    refused(r"`model.calibrate`: Field 'tokens' expected int, got float .*320.0", model__calibrate={"tokens": 3.2e2})
    refused("`model.calibrate`: Field 'text' .* expected str, got int", model__calibrate={"text": 5})
    for length in (0, 3.5, "long", True):
        refused("`model.max_length` must be a whole number of tokens, got", model__max_length=length)
    refused("`fraction` must be in", heal__anneal=2)
    refused("`model.source`: .*/nowhere cannot be loaded", model__source=f"{settings['output_dir']}/nowhere")
    refused("`heal` has fields of its own, got None", heal=None)
    refused("`model.calibrate` is for a rotation that is dropped at once", model__calibrate={}, heal__anneal=0.5)
    refused("`model.calibrate` is for a rotation that is dropped", model__calibrate={}, model__rotation="keep")
    refused("`heal.anneal` takes the whole rotation", model__rotation="fast", heal__anneal=0.5)
    for weight in (0, 1.5, -0.5, math.nan, True, "0.5"):
        refused(r"`heal.distill` must be a number in \(0, 1\], got", heal__distill=weight)
    for multiplier in (0, -1.0, math.inf, math.nan, "3", None):
        refused("`heal.bias_lr_multiplier` must be a positive number, got", heal__bias_lr_multiplier=multiplier)
    refused("`heal.teacher_device` is for the teacher of `heal.distill`", heal__teacher_device="cpu")
    for device in ("nonsense", "meta", "cuda:99"):
        refused(f"there is no device '{device}'", heal={"distill": 0.5, "teacher_device": device})
    for rope in ({"rope_parameters": {"rope_type": "default"}}, {"rope_parameters.rope_theta": 5e5}):
        refused("`model.rotation: drop` and `model.config.rope_parameters` contradict", model__config=rope)
    refused("and `model.config.rope_max_period` contradict", model__config={"rope_max_period": 8})
    linear = {"rope_parameters": {"rope_type": "linear"}}
    refused("`model.config`: .*'factor'", model__rotation="keep", model__config=linear)
    refused("`model.config`: .*`attention_dropout` must be in", model__config={"attention_dropout": 2.0})
    refused("`heal.lora`: No modules were targeted for adaptation", heal__lora={"target_modules": ["query"]})


@pytest.mark.parametrize("where", ["data", "evaluation"])
def test_a_tokenizer_of_another_model_is_refused(settings, tmp_path, where):
    tokenizer = save_tokenizer(tmp_path / "other")
    highest = len(tokenizer) - 1
    llama(vocab_size=highest).save_pretrained(tmp_path / "other")
    (tmp_path / "text.txt").write_text(8000 * tokenizer.decode(highest))
    settings["data"]["held_out"] = None
    settings[where]["text"] = str(tmp_path / "text.txt")
    with pytest.raises(ValueError, match=f"makes token number {highest} of a text, and the model has {highest}"):
        run(settings, model__source=str(tmp_path / "other"))
    assert not Path(settings["output_dir"]).exists()


def test_gguf_whose_tokenizer_has_a_token_too_many(settings, tmp_path):
    """transformers adds one, which no text has."""
    write_gguf(tmp_path / "gguf", tied=True)
    model = {"source": str(tmp_path / "gguf"), "gguf_file": "model.gguf", "calibrate": {"tokens": 640}}
    result = run(settings, model=model, heal__distill=0.5, training__max_steps=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    assert max(tokenizer.get_vocab().values()) >= load(tmp_path / "out" / "model").config.vocab_size
    assert all(math.isfinite(loss) for losses in result["loss"].values() for loss in losses)


@pytest.mark.parametrize(
    "change",
    [
        *({"fire_init_L": 100}, {"fire_init_c": 0.1}, {"fire_init_f": "uniform"}, {"fire_transform": "power"}),
        *({"fire_activation": "gelu"}, {"fire_share_layers": True}, {"fire_mlp_width": 8}, {"num_hidden_layers": 1}),
        *({"qk_norm": True}, {"vocab_size": 98}, {"num_attention_heads": 2}, {"tie_word_embeddings": True}),
        *({"hidden_act": "gelu"}, {"dtype": "bfloat16"}),
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_config_that_is_not_of_the_converted_weights_is_refused(settings, change):
    with pytest.raises(
        SettingsError, match=f"`model.config.{next(iter(change))}` is settled by the weights that are converted"
    ):
        run(settings, model__config={"position_bias": "none", **change})
    assert not Path(settings["output_dir"]).exists()


def test_a_config_may_change_where_the_converted_weights_stay(source, tmp_path):
    convert(source, tmp_path / "fire", rotation="keep")
    converted = load(tmp_path / "fire").state_dict()
    changes = {
        "position_bias": ("alibi", "kerple_log", "kerple_power", "t5", "sandwich", "none"),
        "rope_parameters": (None, {"rope_type": "yarn", "factor": 4.0}),
        "rope_max_period": (8.0,),
        "attention_dropout": (0.1,),
        "max_position_embeddings": (64,),
        "use_cache": (False,),
        "pad_token_id": (None,),
        "bos_token_id": (2,),
        "eos_token_id": (3,),
    }
    assert list(changes) == list(FREE)
    for name, values in changes.items():
        for value in values:
            state = load(tmp_path / "fire", {name: value}).state_dict()
            names = {each for each in converted if name != "position_bias" or ".position_bias." not in each}
            assert names <= set(state) and all(torch.equal(state[each], converted[each]) for each in names)


def test_the_initial_length_is_that_of_the_conversion(settings, tmp_path):
    run(settings, model__max_length=100, training__max_steps=2)
    model = load(tmp_path / "out" / "model")
    assert model.config.fire_init_L == 100
    assert all(layer.self_attn.position_bias.init_L == 100 for layer in model.model.layers)
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    with pytest.raises(SystemExit, match="out/converted was made with other settings"):
        run(settings, model__max_length=200)


def test_what_trainer_refuses_is_one_error_and_costs_no_conversion(settings, tmp_path, monkeypatch):
    """One that calibrated for an hour serves the settings that are mended, and no others."""
    settings["model"]["calibrate"] = {"tokens": 64, "align": False}
    with pytest.raises(SettingsError, match=r"`training`: With a `teacher` there is no .*label_smoothing_factor"):
        run(settings, heal__distill=0.5, training__label_smoothing_factor=0.1)
    monkeypatch.setattr("retrofit.convert", None)
    run(settings, heal__distill=0.5, training__max_steps=2)
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    for change in ({"model__calibrate": {"tokens": 96}}, {"training__seed": 7}, {"data__held_out": 0.3}):
        with pytest.raises(SystemExit, match=f"{tmp_path}/out/converted was made with other settings: delete it"):
            run(settings, **change)


def test_what_convert_refuses_leaves_the_folder_to_other_settings(settings, tmp_path):
    with pytest.raises(ConversionError, match="`tokens=5` is less than one window"):
        run(settings, model__calibrate={"tokens": 5})
    assert not (tmp_path / "out").exists()
    convert(settings["model"]["source"], tmp_path / "out" / "converted", rotation="keep", verify=False)
    with pytest.raises(ConversionError, match="out/converted exists and is not an empty folder"):
        run(settings)  # which knows nothing of where that comes from
    convert(settings["model"]["source"], tmp_path / "fire", verify=False)
    with pytest.raises(ConversionError, match="out/converted exists and is not an empty folder"):
        run(settings, model__source=str(tmp_path / "fire"))


def test_alibi_has_no_rotation_to_anneal(settings, source, tmp_path):
    bloom().save_pretrained(tmp_path / "bloom")
    save_tokenizer(tmp_path / "bloom")
    for changes in ({"heal__anneal": 0.5}, {"model__rotation": "fast"}):
        with pytest.raises(ValueError, match="bloom has no rotation to keep or to anneal"):
            run(settings, model__source=str(tmp_path / "bloom"), **changes)


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


def test_a_run_is_not_continued_with_other_settings(settings, monkeypatch):
    run(settings)
    with pytest.raises(SystemExit, match="was made with other settings"):
        run(settings, data__held_out=0.3)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(
        SettingsError, match="out was begun with 4 windows a step, not 8: go on with as many processes"
    ):
        run(settings)


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


@pytest.fixture
def sampling(settings) -> dict:
    data = {"text": "sample", "length": 32, "tokens": 1300}
    return {**settings, "data": data, "evaluation": {"contexts": [16, 32], "num_targets": 8, "num_windows": 8}}


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
        patch.setattr("retrofit.sampled_windows", None)
        assert run(sampling, **changes) == undisturbed
    with pytest.raises(SystemExit, match="out/sampled was made with other settings"):
        run(sampling, data__tokens=1400, **changes)
    with pytest.raises(SystemExit, match="out/sampled was made with other settings"):
        run(sampling, training__seed=7, **changes)


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


def test_what_cannot_be_sampled_is_refused(settings, sampling, source, tmp_path):
    def refused(message, settings=sampling, **changes):
        with pytest.raises(ValueError, match=message):
            run(settings, **changes)
        assert not Path(settings["output_dir"]).exists()

    text = str(source / "text.txt")
    refused("`data.tokens` says how many to sample, .* got None with 'sample'", data__tokens=None)
    refused("`data.tokens` says how many to sample, a whole number: .* got 1000.0", data__tokens=1e3)
    refused("`data.tokens` .* goes with `data.text: sample`, got 99 with", settings=settings, data__tokens=99)
    refused("`data.held_out` is for a text that is read", data__held_out=0.2)
    refused("`data.held_out` is for a text .* no `evaluation.text`", settings=settings, evaluation__text=text)
    refused("`data.documents` is for texts that are read", data__documents=3)
    refused("sample has 3 training windows; one step takes 4", data__tokens=127)
    longer = {"evaluation__contexts": [32, 64]}
    refused("was trained on 32 tokens and writes no 64: lower `data.length`, or `evaluation.contexts`", **longer)
    refused("was trained on 32 tokens and writes no 64", data__length=64, evaluation__text=text, **longer)
    refused("windows of 33 tokens in .*text.txt, not 400", evaluation__text=text, evaluation__num_windows=400)
    convert(source, tmp_path / "fire")
    refused("`data.text: sample` take a `model.source` with its whole", model__source=str(tmp_path / "fire"))
    llama(bos_token_id=None, eos_token_id=None).save_pretrained(tmp_path / "endless")
    save_tokenizer(tmp_path / "endless")
    refused("has no `bos_token_id` to start a text with", model__source=str(tmp_path / "endless"))


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


def test_of_what_is_converted_is_refused_what_is_too_late(settings, source, tmp_path):
    convert(source, tmp_path / "fire")
    for message, changes in {
        ".*/fire is converted already: `model.calibrate`, `model.max_length` and": {"model__calibrate": {}},
        ".*/fire is converted already: `model.calibrate`, `model.max_length`": {"model__max_length": 100},
        "`heal.distill` and `data.text: sample` take a `model.source`": {"heal__distill": 0.5},
        ".*/fire has no rotation to keep or to anneal": {"heal__anneal": 0.5},
    }.items():
        with pytest.raises(SettingsError, match=message):
            run(settings, model__source=str(tmp_path / "fire"), **changes)
    assert not Path(settings["output_dir"]).exists()


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


@pytest.mark.parametrize("name", ["stories260k", "smollm2"])
def test_shipped_runs_load(name):
    run = read_fields(Retrofit, yaml.safe_load((ROOT / "recipes" / "retrofit" / f"{name}.yaml").read_text()))
    TrainingArguments("unused", **{**run.training, "bf16": False})  # which needs a GPU
    CalibrationOptions(text="unused", **run.model.calibrate)
