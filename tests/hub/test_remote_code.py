"""
A saved folder carries its code: it loads with `trust_remote_code=True` where this package cannot be imported.

One process without the package (`stranger.py`) loads everything that the `saved` fixture wrote, and the tests look at
what it found. With the package installed the same folders load its own classes, and the code in them is not run.
"""

import filecmp
from pathlib import Path

import pytest
import torch
import transformers
from clients import AUTO_CLASSES, IDS, assert_same, observe, run_stranger
from helpers import tiny_model
from peft import LoraConfig, get_peft_model

import modeling_fire
from modeling_fire import FireForCausalLM


HEADS = {
    "AutoModel": set(),
    "AutoModelForCausalLM": {"lm_head.weight"},
    "AutoModelForSequenceClassification": {"score.weight"},
    "AutoModelForTokenClassification": {"score.weight", "score.bias"},
    "AutoModelForQuestionAnswering": {"qa_outputs.weight", "qa_outputs.bias"},
}
VARIANTS = {
    "fire": {},
    "fire_two_hidden_layers": {"fire_mlp_depth": 2, "fire_transform": "power"},
    "fire_s": {"fire_share_layers": True, "tie_word_embeddings": True},
    "t5": {"position_bias": "t5"},
    "kerple": {"position_bias": "kerple_log"},
    "rope": {"position_bias": "none", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "rope_beside_fire": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "rope_angle_scale": 0.5},
    "fast_rope_beside_fire": {"rope_parameters": {"rope_type": "default", "rope_theta": 10.0}, "rope_max_period": 9.0},
    "gpt_neox": {"norm_type": "layer_norm", "mlp_gated": False, "parallel_residual": True, "embedding_norm": True},
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
LENGTHS = torch.tensor([[12], [9]])  # the second row is padded on the left
MASK = (torch.arange(12) >= 12 - LENGTHS).long()


def variant_name(variant: str, dtype: str) -> str:
    return f"{variant}-{dtype}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict:
    """The `folders` that this process saved, what its models computed (`expected`) and what others' did (`found`)."""
    work = tmp_path_factory.mktemp("remote")
    folders, expected, jobs = {}, {}, {"alone": {"kind": "alone"}}

    def load(auto_class, folder, **more):
        job = {"kind": "model", "auto_class": auto_class, "source": folder, "ids": IDS, "mask": MASK}
        return {**job, "trust_remote_code": True, **more}

    def save(name, model, auto_classes=("AutoModelForCausalLM",), again=None):
        folder = folders[name] = str(work / name)
        if model is not None:
            model.save_pretrained(folder)
            expected[name] = observe(model, MASK)
        for auto_class in auto_classes:
            jobs[auto_class, folder] = load(auto_class, folder, save=again)
        jobs["config", folder] = {"kind": "config", "source": folder, "trust_remote_code": True}

    for variant, changes in VARIANTS.items():
        for dtype in DTYPES:
            name = variant_name(variant, dtype)
            again = str(work / name / "again")
            save(name, tiny_model(**changes, dtype=dtype), again=again)
            jobs["AutoModelForCausalLM", again] = load("AutoModelForCausalLM", again)
    for auto_class, model_class in AUTO_CLASSES.items():
        save(f"saved_by_{auto_class}", tiny_model(model_class), auto_classes=AUTO_CLASSES)
    save("trainer/checkpoint-1", None)
    expected["trainer/checkpoint-1"] = observe(train_one_step(work / "trainer"), MASK)
    base, adapter = folders["fire-float32"], work / "adapter"
    expected["adapter"] = save_adapter(base, adapter)
    jobs["adapter"] = load("AutoModelForCausalLM", base, adapter=str(adapter))
    jobs["attempts"] = {"kind": "attempts"}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "home")}
    return {"folders": folders, "expected": expected, "found": run_stranger(work, jobs, offline)}


def train_one_step(folder: Path) -> torch.nn.Module:
    """Leaves `checkpoint-1` in `folder`."""
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=1, save_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    data = [{"input_ids": row, "labels": row} for row in IDS]
    trainer = transformers.Trainer(tiny_model(), arguments, train_dataset=data)
    trainer.train()
    return trainer.model


def save_adapter(base: str, folder: Path) -> dict:
    """Saves a LoRA adapter of `base` with a position bias of its own, all of it random."""
    config = LoraConfig(
        target_modules=["q_proj", "v_proj"], modules_to_save=["position_bias"], init_lora_weights=False
    )
    model = get_peft_model(FireForCausalLM.from_pretrained(base), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    return observe(model.merge_and_unload(), MASK)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_model_runs_from_its_folder(saved, variant, dtype):
    name = variant_name(variant, dtype)
    folder = saved["folders"][name]
    again = f"{folder}/again"
    for key in (folder, again):
        found = saved["found"]["AutoModelForCausalLM", key]
        assert found["module"].startswith("transformers_modules.")
        assert found["config_module"].startswith("transformers_modules.")
        assert found["class"] == "FireForCausalLM"
        assert not found["missing"] and not found["unexpected"]
        for parameter, parameter_dtype in found["dtypes"].items():
            expected_dtype = torch.float32 if "position_bias" in parameter else DTYPES[dtype]
            assert parameter_dtype == expected_dtype, parameter
        assert_same(found, saved["expected"][name])
    assert saved["found"]["config", folder]["module"].startswith("transformers_modules.")

    # The folder that the remote code saved: the same code, and the same model where the package is installed.
    code = sorted(path.name for path in Path(folder).glob("*.py"))
    assert code == sorted(path.name for path in Path(again).glob("*.py"))
    assert filecmp.cmpfiles(folder, again, [*code, "config.json"], shallow=False)[0] == [*code, "config.json"]
    assert_same(observe(FireForCausalLM.from_pretrained(again), MASK), saved["expected"][name])


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
@pytest.mark.parametrize("saved_by", AUTO_CLASSES)
def test_every_auto_class_loads_whatever_class_saved(saved, saved_by, auto_class):
    name = f"saved_by_{saved_by}"
    found, expected = saved["found"][auto_class, saved["folders"][name]], saved["expected"][name]
    assert found["module"].startswith("transformers_modules.")
    assert found["class"] == AUTO_CLASSES[auto_class].__name__
    assert found["missing"] == HEADS[auto_class] - HEADS[saved_by]
    assert found["unexpected"] == HEADS[saved_by] - HEADS[auto_class]
    assert_same(found, expected, *(expected if auto_class == saved_by else ["hidden"]))


def test_trainer_checkpoint_runs_from_its_folder(saved):
    name = "trainer/checkpoint-1"
    assert_same(saved["found"]["AutoModelForCausalLM", saved["folders"][name]], saved["expected"][name])


def test_adapter_loads_onto_remote_code(saved):
    assert saved["found"]["adapter"]["module"].startswith("transformers_modules.")
    assert_same(saved["found"]["adapter"], saved["expected"]["adapter"])
    base = saved["expected"]["fire-float32"]["output"]
    assert not torch.allclose(saved["found"]["adapter"]["output"], base, atol=0.1)


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}], ids=["not_given", "given"])
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_installed_package_wins_over_the_folder(saved, auto_class, trust):
    folder = saved["folders"][f"saved_by_{auto_class}"]
    model = getattr(transformers, auto_class).from_pretrained(folder, **trust)
    assert type(model) is AUTO_CLASSES[auto_class]
    assert type(transformers.AutoConfig.from_pretrained(folder, **trust)) is modeling_fire.FireConfig
    assert_same(observe(model, MASK), saved["expected"][f"saved_by_{auto_class}"])


def test_a_model_contacts_nothing(saved):
    """While all of it was loaded and run, sockets and other programs were errors, and only the test itself tried."""
    assert saved["found"]["attempts"]["attempts"] == ["socket.getaddrinfo"]
