"""Calibration: the fit against plain autograd, the alignment, the texts, and the whole of it through `convert`."""

import json
from copy import deepcopy
from pathlib import Path

import checkpoints
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_fire import FireForCausalLM
from modeling_fire.conversion import CalibrationOptions, ConversionError, convert
from modeling_fire.conversion.align import align
from modeling_fire.conversion.calibrate import calibrate, original_attention, original_inputs
from modeling_fire.conversion.fit import RIDGE, fit, minimise
from modeling_fire.conversion.text import read_texts, sampled_windows, token_windows
from modeling_fire.positions_fire import FirePositions


LENGTH = 32


@pytest.fixture
def kept(tmp_path):
    """Given a random checkpoint, returns it as a FIRE model that keeps its rotation."""

    torch.manual_seed(0)

    def convert_and_load(original):
        original.save_pretrained(tmp_path / "source")
        convert(tmp_path / "source", tmp_path / "kept", rotation="keep", verify=False)
        return FireForCausalLM.from_pretrained(tmp_path / "kept").eval()

    return convert_and_load


def layer_problem(model, windows=6):
    """The first layer's attention, its original, its inputs on random tokens, the rotation and the positions."""
    ids = torch.randint(3, 99, (windows, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = FirePositions.arange(LENGTH)
    rotation = model.model.rotary_emb(next(model.parameters()), position_ids=positions.absolute)
    layer = model.model.layers[0]
    inputs = layer.input_layernorm(model.model.embed_tokens(ids)).detach()
    return layer.self_attn, original_attention(layer), inputs, rotation, positions


def attention_probabilities(attention, inputs, positions, rotation=None):
    """By the plain formula, of shape `(windows, heads, length, length)`."""
    query, key, _ = attention.project(inputs, rotation)
    key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
    scores = query @ key.transpose(-1, -2) * attention.scaling
    if attention.position_bias is not None:
        scores = scores + attention.position_bias(positions)
    return scores.masked_fill(~positions.mask(), -torch.inf).softmax(-1)


def divergence(attention, original, inputs, rotation, positions):
    """Of each head: the mean KL from the original's attention."""
    wanted = attention_probabilities(original, inputs, positions, rotation)
    found = attention_probabilities(attention, inputs, positions)
    return torch.where(wanted > 0, wanted * (wanted.log() - found.log()), 0).sum(-1).mean((0, 2))


ORIGINALS = {
    "llama": checkpoints.llama,
    "qwen2, whose queries have biases": checkpoints.qwen2,
    "qwen3, which normalises them": checkpoints.qwen3,
    "gpt_neox, partly rotated": checkpoints.gpt_neox,
    "gpt_neox, wholly rotated": lambda: checkpoints.gpt_neox(rotary=1.0),
}


@pytest.mark.parametrize("name", ORIGINALS)
@torch.no_grad()
def test_fit_brings_the_attention_nearer(kept, name):
    attention, original, inputs, rotation, positions = layer_problem(kept(ORIGINALS[name]()))
    before = divergence(attention, original, inputs, rotation, positions)
    reported = fit(attention, inputs, rotation, positions)
    after = divergence(attention, original, inputs, rotation, positions)
    # What the fit reports, from its own arithmetic, is what the changed layer does. (Every row takes part here.)
    torch.testing.assert_close(reported.float(), after, atol=1e-4, rtol=1e-3)
    # Random weights look nowhere in particular: without factors of its queries a head has little to gain.
    assert (after < (1.0 if name.startswith("qwen3") else 0.9) * before).all(), (before, after)


@torch.no_grad()
def test_fit_leaves_alone_what_no_rotation_turned(kept):
    attention, original, inputs, (cos, sin), positions = layer_problem(kept(checkpoints.llama()))
    still = torch.ones_like(cos), torch.zeros_like(sin)
    assert fit(attention, inputs, still, positions).max() < 1e-6
    torch.testing.assert_close(attention.q_proj.weight, original.q_proj.weight, atol=1e-6, rtol=1e-5)
    assert attention.position_bias.mlp[2].weight.abs().max() < 1e-6


def test_newton_finds_the_minimum():
    """Gradient by autograd, in float64, of the plain formula."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(3, 20, 11, 5, generator=generator, dtype=torch.float64)
    fixed, target = torch.randn(2, 3, 20, 11, generator=generator, dtype=torch.float64) * 3
    fixed[..., 7:] = target[..., 7:] = -torch.inf
    start = torch.randn(5, generator=generator, dtype=torch.float64)
    found, at_minimum = minimise(list(zip(features, fixed, target, strict=True)), start)

    parameters = found.clone().requires_grad_()
    log_p, wanted = (features @ parameters + fixed).log_softmax(-1), target.softmax(-1)
    plain = (wanted * (target.log_softmax(-1) - log_p))[..., :7].sum(-1).mean()
    torch.testing.assert_close(at_minimum, plain.detach())
    (plain + RIDGE / 2 * (parameters - start).square().sum()).backward()
    assert parameters.grad.norm() < 1e-3
    assert (
        plain
        < (target.softmax(-1) * (target.log_softmax(-1) - (features @ start + fixed).log_softmax(-1)))[..., :7]
        .sum(-1)
        .mean()
    )


def test_alignment_learns_in_place_and_leaves_the_original(kept):
    attention, original, inputs, rotation, positions = layer_problem(kept(checkpoints.llama()), windows=64)
    before = deepcopy(original.state_dict()), deepcopy(attention.state_dict())

    def aligned_error(copies):
        learner = deepcopy(attention)
        return learner, align(
            learner, original, inputs.repeat(copies, 1, 1), rotation, positions, 4, torch.Generator().manual_seed(0)
        )

    assert aligned_error(8)[1] < 0.7 * aligned_error(1)[1], "more text, less error"
    learner, _ = aligned_error(1)
    for name, value in original.state_dict().items():
        assert torch.equal(value, before[0][name]), name
    changed = {name for name, value in learner.state_dict().items() if not torch.equal(value, before[1][name])}
    assert {name.split(".")[0] for name in changed} == {"q_proj", "k_proj", "position_bias"}


@torch.no_grad()
def test_the_walk_gives_each_layer_what_it_had_in_the_original(kept):
    model = kept(checkpoints.gpt_neox())
    ids = torch.randint(3, 99, (5, LENGTH))
    wanted = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: wanted.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    model(ids)
    for layer in model.model.layers:
        layer.self_attn._forward_pre_hooks.clear()
        layer.self_attn._forward_pre_hooks_with_kwargs.clear()
    positions = FirePositions.arange(LENGTH)
    rotation = model.model.rotary_emb(next(model.parameters()), position_ids=positions.absolute)
    originals = [original_attention(layer) for layer in model.model.layers]
    for i, (layer, original, inputs) in enumerate(
        original_inputs(model, originals, ids, rotation, positions, 2, "Walking")
    ):
        assert original is originals[i] and layer is model.model.layers[i]
        torch.testing.assert_close(inputs, wanted[i], atol=1e-5, rtol=1e-5)
        layer.self_attn.q_proj.weight.zero_()  # what is done to a layer does not reach the next


def test_calibration_removes_the_rotation_and_nears_the_original(kept):
    model = kept(checkpoints.llama())
    teacher = deepcopy(model)
    ids = torch.randint(3, 99, (200, LENGTH + 1), generator=torch.Generator().manual_seed(0))

    def distance(student):
        with torch.no_grad():
            wanted, found = (m(ids[:20, :-1]).logits.log_softmax(-1) for m in (teacher, student))
        return (wanted.exp() * (wanted - found)).sum(-1).mean().item()

    dropped, fitted = deepcopy(model), deepcopy(model)
    dropped.model.rotary_emb = None
    assert list(calibrate(fitted, ids[20:, :-1], ids[:20], do_align=False)) == ["original", "dropped", "fitted"]
    measured = calibrate(model, ids[20:, :-1], ids[:20])
    assert list(measured) == ["original", "dropped", "fitted", "aligned"]
    assert model.config.rope_parameters is None and model.model.rotary_emb is None
    # What alignment adds shows with weights that are not random: in the last test of this file.
    assert distance(fitted) < 0.9 * distance(dropped) and distance(model) < 0.9 * distance(dropped)


# The whole of it.


@pytest.fixture
def source(tmp_path):
    checkpoints.llama().save_pretrained(tmp_path / "source")
    checkpoints.save_tokenizer(tmp_path / "source")
    return tmp_path / "source"


TEXT = "A fire needs three things: fuel, heat and air. Take one of them away and it goes out.\n" * 40


def test_convert_calibrates_and_says_so(source, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    options = CalibrationOptions(str(tmp_path / "text.txt"), tokens=1000)
    conversion = convert(source, tmp_path / "out", calibrate=options)
    assert conversion.proof.holds
    calibration = conversion.calibration
    assert (calibration.text, calibration.tokens, calibration.length) == ("text.txt", 31 * 32, 32)
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["calibration"]["perplexity"] == calibration.perplexity
    assert f"aligned {calibration.perplexity['aligned']:.2f}" in (tmp_path / "out" / "README.md").read_text()

    convert(source, tmp_path / "dropped")
    model, dropped = (FireForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "dropped"))
    assert model.config.to_diff_dict() == dropped.config.to_diff_dict()
    calibrated = model.state_dict()
    changed = {name for name, value in dropped.state_dict().items() if not torch.equal(value, calibrated[name])}
    assert {name.split("self_attn.")[1].split(".")[0] for name in changed} == {"q_proj", "k_proj", "position_bias"}

    convert(source, tmp_path / "again", calibrate=options)
    for name, value in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(value, calibrated[name]), "the same for the same seed"


def test_calibrated_weights_keep_their_types_shards_and_ties(tmp_path):
    checkpoints.llama(tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path / "source")
    options = CalibrationOptions([TEXT], tokens=100, align=False)
    with pytest.raises(ConversionError, match="no tokenizer for the text to calibrate on: use 'sample'"):
        convert(tmp_path / "source", tmp_path / "out", calibrate=options)
    checkpoints.save_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out", calibrate=options, max_shard_size=20_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[0].self_attn.q_proj.weight.dtype == torch.bfloat16
    assert model.model.layers[0].self_attn.position_bias.mlp[2].weight.dtype == torch.float32
    assert model.model.layers[0].self_attn.position_bias.mlp[2].weight.abs().max() > 0
    assert model.lm_head.weight is model.model.embed_tokens.weight
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, original.model.layers[0].mlp.up_proj.weight)


def test_text_sampled_from_the_model_itself(tmp_path):
    checkpoints.llama().save_pretrained(tmp_path / "source")
    options = CalibrationOptions("sample", tokens=100, align=False)
    conversion = convert(tmp_path / "source", tmp_path / "out", calibrate=options, verify=False)
    assert conversion.calibration.text == "sample" and conversion.calibration.tokens == 96


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (["short"], {}, "less than two windows of 33 tokens: use more"),
        ([TEXT], {"tokens": 31}, "`tokens=31` is less than one window of 32 tokens"),
        ("nowhere.txt", {}, "There is no file nowhere.txt"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused_before_anything_is_written(source, tmp_path, text, changes, message):
    with pytest.raises(ConversionError, match=message):
        convert(source, tmp_path / "out", calibrate=CalibrationOptions(text, **changes))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_only_a_dropped_rotation_is_calibrated(source, tmp_path):
    with pytest.raises(ConversionError, match="is for a rotation that is dropped"):
        convert(source, tmp_path / "out", rotation="keep", calibrate=CalibrationOptions([TEXT]))
    checkpoints.bloom().save_pretrained(tmp_path / "bloom")
    with pytest.raises(ConversionError, match="is for a rotation that is dropped"):
        convert(tmp_path / "bloom", tmp_path / "out", calibrate=CalibrationOptions([TEXT]))


# Texts.


def test_texts_from_files(tmp_path):
    documents = ["one", "two\nlines", "Grüße"]
    (tmp_path / "a.txt").write_text("\n".join(documents), encoding="utf-8")
    assert list(read_texts(str(tmp_path / "a.txt"))) == ["\n".join(documents)]
    rows = [{"text": document, "other": 1} for document in documents]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    assert list(read_texts(str(tmp_path / "a.jsonl"))) == documents
    Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert list(read_texts(str(tmp_path / "a.parquet"))) == documents
    (tmp_path / "dataset").mkdir()  # to `datasets` a folder is a dataset like any on the Hub
    Dataset.from_list(rows).to_parquet(tmp_path / "dataset" / "train.parquet")
    assert list(read_texts(str(tmp_path / "dataset"))) == documents
    assert list(read_texts(f"{tmp_path / 'dataset'}:default")) == documents
    with pytest.raises(ConversionError, match="cannot be read as a dataset"):
        list(read_texts(f"{tmp_path / 'dataset'}:nonesuch"))
    assert list(read_texts(documents)) == documents
    (tmp_path / "b.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(ConversionError, match="has no column 'text', but body"):
        list(read_texts(str(tmp_path / "b.jsonl")))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConversionError, match="is not text in UTF-8"):
        list(read_texts(str(tmp_path / "b.txt")))


def test_windows_are_the_documents_in_a_row(tmp_path):
    tokenizer = checkpoints.save_tokenizer(tmp_path)
    read = []

    def documents():
        for text in ("A fire", "needs", "three", "things"):
            read.append(text)
            yield text

    windows = token_windows(documents(), tokenizer, 4, 2)
    assert tokenizer.convert_ids_to_tokens(windows.flatten().tolist()) == list("A fireneeds")[:8]
    assert read == ["A fire", "needs"], "no more is read than is needed"
    assert token_windows(["A fire"], tokenizer, 4, 9).shape == (1, 4)


def test_sampled_windows(kept):
    model = kept(checkpoints.llama())
    state, generation_config = torch.get_rng_state(), model.generation_config
    first, again = (sampled_windows(model, 12, 5, seed, batch_size=2) for seed in (0, 0))
    assert first.shape == (5, 12) and torch.equal(first, again)
    assert (first[:, 0] == 1).all() and len(first[:, 1:].unique()) > 5
    assert not torch.equal(first, sampled_windows(model, 12, 5, 1, batch_size=2))
    assert torch.equal(torch.get_rng_state(), state) and model.generation_config is generation_config
    model.config.bos_token_id = model.config.eos_token_id = None
    with pytest.raises(ConversionError, match="no `bos_token_id`"):
        sampled_windows(model, 12, 5, 0, batch_size=2)


STORIES = Path(__file__).parents[3] / "shared" / "data"


@pytest.mark.skipif(
    not STORIES.exists(), reason="needs the real checkpoint stories260K, which is not part of this project"
)
def test_a_real_checkpoint(tmp_path):
    text = (STORIES / "text" / "tinystories_lowercase.txt").read_text(encoding="utf-8", errors="ignore")[:400_000]
    conversion = convert(
        STORIES / "stories260K", tmp_path / "out", calibrate=CalibrationOptions([text], tokens=50_000)
    )
    measured = conversion.calibration.perplexity
    assert measured["original"] < measured["aligned"] < measured["fitted"] < measured["dropped"] / 5
    assert measured["aligned"] < 1.25 * measured["original"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = tokenizer("Once upon a time, there was a", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=10).shape[1] > 10
