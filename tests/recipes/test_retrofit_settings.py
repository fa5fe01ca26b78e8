"""Settings of the retrofit recipe: how they are changed, which are refused and when, and what they decide."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import bloom, llama, save_tokenizer
from helpers import ROOT
from retrofit import load
from retrofit_runs import (
    run,
    sampling_settings,  # noqa: F401
    small_settings,  # noqa: F401
    small_source,  # noqa: F401
)
from retrofit_settings import FREE, Retrofit
from settings import SettingsError, changed, parse_changes, read_fields
from transformers import TrainingArguments

from modeling_fire.conversion import CalibrationOptions, ConversionError, convert


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


def test_a_run_is_not_continued_with_other_settings(settings, monkeypatch):
    run(settings)
    with pytest.raises(SystemExit, match="was made with other settings"):
        run(settings, data__held_out=0.3)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    with pytest.raises(
        SettingsError, match="out was begun with 4 windows a step, not 8: go on with as many processes"
    ):
        run(settings)


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


@pytest.mark.parametrize("name", ["stories260k", "smollm2"])
def test_shipped_runs_load(name):
    run = read_fields(Retrofit, yaml.safe_load((ROOT / "recipes" / "retrofit" / f"{name}.yaml").read_text()))
    TrainingArguments("unused", **{**run.training, "bf16": False})  # which needs a GPU
    CalibrationOptions(text="unused", **run.model.calibrate)
