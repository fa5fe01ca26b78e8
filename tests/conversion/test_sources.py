"""The files that a conversion reads, from a folder or the Hub, and what is refused of them."""

import fnmatch
import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoints import (
    assert_same_state,
    bloom,
    change_config,
    change_weights,
    gpt_neox,
    llama,
    mistral,
    mpt,
    reads,
    save_tokenizer,
)
from helpers import random_ids
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BloomModel, LlamaForCausalLM, LlamaModel

from modeling_fire import FireForCausalLM, conversion
from modeling_fire.conversion import ConversionError, convert
from modeling_fire.conversion.proof import PROMPT
from modeling_fire.errors import FireError


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
    with pytest.raises(ConversionError, match=r"config\.json of source cannot be read"):
        convert(source, tmp_path / "out")
    (source / "config.json").unlink()
    with pytest.raises(ConversionError, match="source has no config"):
        convert(source, tmp_path / "out")


def test_a_tensor_under_two_names(tmp_path):
    """`torch.save` keeps them one; nothing says that the model has them tied."""
    model = llama()
    folder = tmp_path / "source"
    model.config.save_pretrained(folder)
    state = model.state_dict()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    convert(folder, tmp_path / "out")
    converted = reads(tmp_path / "out")
    assert torch.equal(converted["lm_head.weight"], converted["model.embed_tokens.weight"])


def remote_tokenizer(folder):
    (folder / "tokenizer.json").unlink()
    config = {"tokenizer_class": "TheirTokenizer", "auto_map": {"AutoTokenizer": ["theirs.TheirTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def without_fields(rope_type):
    return lambda folder: change_config(folder, rope_parameters={"rope_type": rope_type, "rope_theta": 1e4})


def index(text):
    def write(folder):
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(text)

    return write


def pickled(content):
    def write(folder):
        (folder / "model.safetensors").unlink()
        torch.save(content, folder / "pytorch_model.bin")

    return write


BROKEN = {
    **{
        f"{name} rope without fields": (without_fields(name), rf"config\.json of source .*rope_parameters.*'{name}'")
        for name in ("linear", "dynamic", "yarn", "llama3")
    },
    "rope of another type": (lambda folder: change_config(folder, rope_parameters=[1]), "'rope_parameters'"),
    "heads": (
        lambda folder: change_config(folder, num_attention_heads=5),
        "hidden size .* not a multiple of .* heads",
    ),
    "a word for a number": (lambda folder: change_config(folder, hidden_size="x"), "'hidden_size' expected int"),
    "tokens that the model lacks": (
        lambda folder: save_tokenizer(folder, ["<pad>", "<s>", "</s>", *map(str, range(10, 106)), "A"]),
        "tokenizer makes token number 99 of a text, and the model has 99, from 0",
    ),
    "a tokenizer with code": (remote_tokenizer, "tokenizer of source cannot be read: .*custom code"),
    "half a tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer of source cannot be"),
    "an empty tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer of source cannot"),
    "half an index": (index("{"), r"model\.safetensors\.index\.json cannot be read"),
    "an empty index": (index("{}"), "index.json cannot be read: 'weight_map'"),
    "a list of weights": (pickled([torch.zeros(2)]), r"pytorch_model\.bin holds something else than tensors by name"),
    "a step among the weights": (pickled({"step": 3}), r"pytorch_model\.bin holds something else than tensors"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_one_error(source, tmp_path, change, message):
    change(source)
    with pytest.raises(FireError, match=message):
        convert(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_dropout_in_mpt_is_refused_by_name(tmp_path):
    """Its config has a whole number for it, and transformers refuses others."""
    mpt().save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    change_config(tmp_path / "source", attn_config={**config["attn_config"], "attn_pdrop": 0.1})
    with pytest.raises(ConversionError, match=r"'attn_pdrop' .*0\.1"):
        convert(tmp_path / "source", tmp_path / "out")


def test_a_tokenizer_in_mistrals_own_format_is_missed_aloud(tmp_path, caplog):
    mistral().save_pretrained(tmp_path / "source")
    (tmp_path / "source" / "tekken.json").write_text("{}")
    convert(tmp_path / "source", tmp_path / "out")
    assert "source has its tokenizer as tekken.json alone, which does not come along." in caplog.text


# GGUF


def write_gguf(folder: Path, tied: bool) -> LlamaForCausalLM:
    """A LLaMA in a file of llama.cpp, whose names, order of queries and keys, and vocabulary are its own."""
    gguf = pytest.importorskip("gguf")
    folder.mkdir()
    model = llama(tie_word_embeddings=tied)
    config, writer = model.config, gguf.GGUFWriter(folder / "model.gguf", "llama")
    head_dim = config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<pad>", "<s>", "</s>", *sorted(set(PROMPT)), "fi"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([*tokens, *(f"<{number}>" for number in range(len(tokens), config.vocab_size))])
    writer.add_token_merges(["f i"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # the halves of a head, interleaved
            heads = value.shape[0] // head_dim
            value = value.unflatten(0, (heads, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)
        stem, kind = name.rsplit(".", 1)
        writer.add_tensor(f"{names.get_name(stem)}.{kind}", value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_gguf(tmp_path, tied):
    model = write_gguf(tmp_path / "source", tied)
    result = convert(tmp_path / "source", tmp_path / "out", rotation="keep", gguf_file="model.gguf")
    assert result.gguf_file == "model.gguf" and result.proof.holds
    ids = random_ids(2, 12)
    fire = FireForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert fire.config.tie_word_embeddings is tied and fire.config.rope_parameters["rope_theta"] == 10000.0
    torch.testing.assert_close(fire(ids).logits, model(ids).logits, rtol=0.0, atol=1e-3)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")("fire").input_ids) == 3


def test_a_broken_gguf_file_is_one_error(tmp_path):
    write_gguf(tmp_path / "source", tied=True)
    whole = (tmp_path / "source" / "model.gguf").read_bytes()
    parts = [whole[:size] for size in (0, 8, 100, 2000, len(whole) // 2, len(whole) - 400)]
    for content in (*parts, b"something else", whole.replace(b"llama", b"llamo")):
        (tmp_path / "source" / "model.gguf").write_bytes(content)
        with pytest.raises(ConversionError, match=r"cannot be read|not supported"):
            convert(tmp_path / "source", tmp_path / "out", gguf_file="model.gguf")


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
            wanted = any(fnmatch.fnmatch(file.name, pattern) for pattern in allow_patterns)
            if wanted and not (snapshot / file.name).exists():
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
    for name in ("consolidated.safetensors", "model.onnx", "tf_model.h5", "LICENSE.md", "paper.pdf"):
        (source / name).write_text("")
    result = convert("someone/model", tmp_path / "out", revision="v1")
    assert (result.source, result.revision) == ("someone/model", COMMIT)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.base_model, card.data.license) == ("someone/model", "apache-2.0")
    suffix = ".bin" if kind == "bin" else ".safetensors"
    assert {Path(name).suffix for name in hub} <= {".json", ".jinja", ".md", suffix}
    assert "LICENSE.md" in hub and "consolidated.safetensors" not in hub


@pytest.mark.parametrize("kind", [".safetensors", ".bin"])
def test_shards_of_the_hub_have_the_names_that_their_index_gives(hub, source, tmp_path, kind):
    """Those of bigscience/bloom are called model_00001-of-00072.safetensors."""
    state = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    weight_map = {name: f"part_{i % 2}{kind}" for i, name in enumerate(state)}
    for file in (*weight_map.values(), f"model-00001-of-00002{kind}"):
        part = {name: value for name, value in state.items() if weight_map[name] == file}
        save_file(part, source / file) if kind == ".safetensors" else torch.save(part, source / file)
    index_name = "model.safetensors.index.json" if kind == ".safetensors" else "pytorch_model.bin.index.json"
    (source / index_name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    convert("someone/model", tmp_path / "out", revision="v1")
    assert {name for name in hub if name.endswith(kind)} == set(weight_map.values())
    assert reads(tmp_path / "out").keys() >= state.keys()


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
