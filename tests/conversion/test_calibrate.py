"""Calibration: the fit against plain autograd, the alignment, and the whole of it through `convert`."""

import json
import math
from copy import deepcopy
from pathlib import Path
from unittest import mock

import checkpoints
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_fire import FireForCausalLM, FirePositionBias
from modeling_fire.conversion import CalibrationOptions, ConversionError, convert
from modeling_fire.conversion import calibrate as calibrate_module
from modeling_fire.conversion.align import align
from modeling_fire.conversion.calibrate import (
    calibrate,
    original_attention,
    original_states,
    public_name,
    repeating,
)
from modeling_fire.conversion.fit import RIDGE, decline_beyond, fit, minimise
from modeling_fire.conversion.sampling import sampled_windows
from modeling_fire.errors import FireError
from modeling_fire.evaluation import loss_by_context
from modeling_fire.positions_fire import FirePositions
from modeling_fire.text import token_windows


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


def fast_part(model, positions):
    """Of the rotation: what turns four times and more in a window."""
    model.config.rope_max_period = LENGTH / 4
    cos, sin = model.model.rotary_emb(next(model.parameters()), position_ids=positions.absolute)
    assert sin.any() and not sin.any(dim=1).all(), "some pairs turn and some do not"
    return cos, sin


def attention_probabilities(attention, inputs, positions, rotation=None):
    """By the plain formula, of shape `(windows, heads, length, length)`."""
    query, key, _ = attention.project(inputs, rotation)
    key = key.repeat_interleave(attention.num_key_value_groups, dim=1)
    scores = query @ key.transpose(-1, -2) * attention.scaling
    if attention.position_bias is not None:
        scores = scores + attention.position_bias(positions)
    return scores.masked_fill(~positions.mask(), -torch.inf).softmax(-1)


def divergence(attention, original, inputs, rotation, fast, positions):
    """Of each head: the mean KL from the original's attention, with what is kept of the rotation."""
    wanted = attention_probabilities(original, inputs, positions, rotation)
    found = attention_probabilities(attention, inputs, positions, fast)
    return torch.where(wanted > 0, wanted * (wanted.log() - found.log()), 0).sum(-1).mean((0, 2))


def bias_at(bias, distance):
    """`f` of a query before `L` at some distances: `(distances, heads)`."""
    return bias.mlp((bias.psi(distance) / bias.normalizer(torch.zeros_like(distance[:1])))[:, None]).detach()


ORIGINALS = {
    "llama": checkpoints.llama,
    "qwen2, whose queries have biases": checkpoints.qwen2,
    "qwen3, which normalises them": checkpoints.qwen3,
    "gpt_neox, partly rotated": checkpoints.gpt_neox,
    "gpt_neox, wholly rotated": lambda: checkpoints.gpt_neox(rotary=1.0),
}


@pytest.mark.parametrize("keep_fast", [False, True])
@pytest.mark.parametrize("name", ORIGINALS)
@torch.no_grad()
def test_fit_brings_the_attention_nearer(kept, name, keep_fast):
    model = kept(ORIGINALS[name]())
    attention, original, inputs, rotation, positions = layer_problem(model)
    fast = fast_part(model, positions) if keep_fast else None
    before = divergence(attention, original, inputs, rotation, fast, positions)
    reported = fit(attention, inputs, rotation, fast, positions)
    after = divergence(attention, original, inputs, rotation, fast, positions)
    # What the fit reports, from its own arithmetic, is what the changed layer does. (Every row takes part here.)
    torch.testing.assert_close(reported.float(), after, atol=1e-4, rtol=1e-3)
    # Random weights look nowhere in particular: without factors of its queries a head has little to gain.
    assert (after < (1.0 if name.startswith("qwen3") else 0.9) * before).all(), (before, after)


@torch.no_grad()
def test_fit_leaves_alone_what_no_rotation_turned(kept):
    """In float64: what rounding leaves of a gradient moves weights a thousand times as far, so small is the ridge."""
    attention, original, inputs, (cos, sin), positions = layer_problem(kept(checkpoints.llama()).double())
    still = torch.ones_like(cos), torch.zeros_like(sin)
    assert fit(attention, inputs, still, None, positions).max() < 1e-12
    assert fit(attention, inputs, (cos, sin), (cos, sin), positions).max() < 1e-12
    torch.testing.assert_close(attention.q_proj.weight, original.q_proj.weight, atol=1e-10, rtol=0)
    distance = torch.tensor([0.0, 1, LENGTH / 2, LENGTH, 2 * LENGTH, 4 * LENGTH], dtype=torch.float64)
    f = bias_at(attention.position_bias, distance)
    assert f[:3].abs().max() < 1e-10
    expected = torch.tensor([0, math.log(2), math.log(4)], dtype=torch.float64)
    assert (f[3:] + expected[:, None]).abs().max() < 0.05, "far away, each doubling of the distance weighs the same"


@pytest.mark.parametrize("length", [2048, 512])
def test_far_distances_decline_from_the_length_of_the_fit_on(length):
    bias = FirePositionBias(2, init_c=1.0, init_L=64 * 2048, train_length=2048)
    distance = torch.tensor([0.0, 1, 100, length, 8192, 16384])
    before = bias_at(bias, distance)
    decline_beyond(bias, length)
    change = bias_at(bias, distance) - before
    assert change[:4].abs().max() < 1e-3
    step = math.exp(math.log1p(2048) / 31)  # from knot to knot
    assert (math.log(8192 / length / step) < -change[4]).all() and (-change[4] < math.log(8192 / length) + 1e-3).all()
    torch.testing.assert_close(change[4] - change[5], torch.full((2,), math.log(2.0)), atol=1e-3, rtol=0)


def test_what_was_fitted_beyond_the_last_knot_does_not_decline():
    bias = FirePositionBias(2, init_c=1.0, init_L=64 * 2048, train_length=2048)
    before = deepcopy(bias.state_dict())
    decline_beyond(bias, 3000)
    assert all(torch.equal(value, before[name]) for name, value in bias.state_dict().items())


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


def alignment(model, copies=1, windows=64, keep_fast=False):
    """Aligns a copy of the first layer; returns it, its original, and the error."""
    ids = torch.randint(3, 99, (windows, LENGTH), generator=torch.Generator().manual_seed(1)).repeat(copies, 1)
    positions = FirePositions.arange(LENGTH)
    rotation = model.model.rotary_emb(next(model.parameters()), position_ids=positions.absolute)
    fast = fast_part(model, positions) if keep_fast else None
    layer = deepcopy(model.model.layers[0])
    original = original_attention(layer)
    hidden_states = model.model.embed_tokens(ids).detach()
    error = align(layer, original, hidden_states, rotation, fast, positions, 4, torch.Generator().manual_seed(0))
    return layer, original, error


def test_alignment_learns_in_place_and_leaves_the_original(kept):
    model = kept(checkpoints.llama())
    layer, original, error = alignment(model)
    assert alignment(model, copies=8)[2] < 0.7 * error, "more text, less error"
    assert alignment(model, keep_fast=True)[2] < 0.7 * error, "more of the rotation, less error"
    model.config.rope_max_period = None
    before = model.model.layers[0].state_dict()
    changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in changed} == {"q_proj", "k_proj", "position_bias"}
    for name, value in original.state_dict().items():
        assert torch.equal(value, before[f"self_attn.{name}"]), name
    assert original.v_proj is layer.self_attn.v_proj, "shared: copies of all layers exist at once"


def test_a_layer_that_gives_nothing_stays_finite(kept):
    model = kept(checkpoints.llama())
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    layer, _, error = alignment(model)
    assert error == 0 and all(value.isfinite().all() for value in layer.state_dict().values())


@torch.no_grad()
def test_the_walk_gives_each_layer_what_it_had_in_the_original(kept):
    model = kept(checkpoints.gpt_neox())
    ids = torch.randint(3, 99, (5, LENGTH))
    wanted = model(ids, output_hidden_states=True).hidden_states
    positions = FirePositions.arange(LENGTH)
    rotation = model.model.rotary_emb(next(model.parameters()), position_ids=positions.absolute)
    originals = [original_attention(layer) for layer in model.model.layers]
    walk = original_states(model, originals, ids, rotation, positions, "Walking")
    for i, (layer, original, hidden_states) in enumerate(walk):
        assert original is originals[i] and layer is model.model.layers[i]
        torch.testing.assert_close(hidden_states, wanted[i], atol=1e-5, rtol=1e-5)
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
    for name, measured_model in {"original": teacher, "dropped": dropped, "aligned": model}.items():
        losses = loss_by_context(measured_model, ids[:20], [LENGTH], num_targets=LENGTH // 2)[LENGTH]
        assert measured[name] == pytest.approx(math.exp(sum(losses) / 20)), "measured on what is held out"
    other = deepcopy(teacher)
    calibrate(other, ids[20:, :-1], ids[:20], seed=1)
    weights = (m.model.layers[0].self_attn.q_proj.weight for m in (model, other))
    assert not torch.equal(*weights), "the seed is that of the order"
    assert model.config.rope_parameters is None and model.model.rotary_emb is None
    fast = deepcopy(teacher)
    assert calibrate(fast, ids[20:, :-1], ids[:20], max_period=LENGTH / 4)["original"] == measured["original"]
    assert fast.config.rope_max_period == LENGTH / 4 and distance(fast) < 0.9 * distance(model)
    # What alignment adds shows with weights that are not random: in the last test of this file.
    assert distance(fitted) < 0.9 * distance(dropped) and distance(model) < 0.9 * distance(dropped)


@pytest.mark.parametrize("max_period", [None, LENGTH / 4])
def test_long_windows_are_fitted_whole_and_aligned_in_parts(kept, max_period, monkeypatch):
    monkeypatch.setattr(calibrate_module, "BATCH_TOKENS", LENGTH // 4)
    monkeypatch.setattr(calibrate_module, "FEW_TOKENS", 3 * LENGTH)
    model = kept(checkpoints.llama())
    ids = torch.randint(3, 99, (10, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    with (
        mock.patch.object(calibrate_module, "fit", wraps=fit) as fitted,
        mock.patch.object(calibrate_module, "align", wraps=align) as aligned,
    ):
        measured = calibrate(model, ids[2:, :-1], ids[:2], max_period=max_period)
    assert fitted.call_args.args[1].shape[:2] == (3, LENGTH)
    _, _, hidden_states, rotation, kept_of_it, positions, batch_size, _ = aligned.call_args.args
    assert (hidden_states.shape[:2], batch_size) == ((8 * 4, LENGTH // 4), 1)
    assert positions.absolute.shape[1] == LENGTH // 4 == rotation[0].shape[1]
    assert (kept_of_it is None) == (max_period is None)
    assert list(measured) == ["original", "dropped", "fitted", "aligned"]


@pytest.mark.parametrize("length", [2, 32, 100])
def test_windows_that_repeat_themselves(length, monkeypatch):
    monkeypatch.setattr(calibrate_module, "PIECE", 8)
    windows = torch.arange(5 * length).view(5, length)
    repeated = repeating(windows, seed=0)
    assert torch.equal(repeated[::2], windows[::2]) and torch.equal(windows.flatten(), torch.arange(5 * length))
    half, size = length // 2, min(8, length // 2)
    for window, original in zip(repeated[1::2], windows[1::2], strict=True):
        count = half // size * size
        assert torch.equal(window[: length - count], original[: length - count])
        pieces, first = window[length - count :].view(-1, size), original[:count].view(-1, size)
        assert sorted(pieces.tolist()) == first.tolist()
        assert len(first) < 3 or not torch.equal(pieces, first)
    assert torch.equal(repeating(windows, seed=0), repeated)
    assert length == 2 or not torch.equal(repeating(windows[:1], seed=0), windows[:1]), "an only one repeats itself"


def test_the_fit_sees_what_repeats_itself(kept, monkeypatch):
    """And the alignment sees the text as it is."""
    monkeypatch.setattr(calibrate_module, "PIECE", 8)
    ids = torch.randint(3, 99, (10, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    with mock.patch.object(calibrate_module, "original_states", wraps=original_states) as walked:
        calibrate(kept(checkpoints.llama()), ids[2:, :-1], ids[:2], repeat=True)
    fitted, aligned = (call.args[2] for call in walked.call_args_list)
    assert torch.equal(fitted, repeating(ids[2:, :-1], seed=0)) and torch.equal(aligned, ids[2:, :-1])


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

    longer = CalibrationOptions(str(tmp_path / "text.txt"), tokens=1000, length=48, align=False)
    assert convert(source, tmp_path / "longer", calibrate=longer).calibration.length == 48
    with mock.patch.object(calibrate_module, "BATCH_TOKENS", 31):  # longer windows are aligned only if asked to
        unasked = convert(source, tmp_path / "long", calibrate=options).calibration
    assert list(unasked.perplexity) == ["original", "dropped", "fitted"]
    assert unasked.repeat and not calibration.repeat, "as long ones repeat themselves"

    convert(source, tmp_path / "again", calibrate=options)
    for name, value in load_file(tmp_path / "again" / "model.safetensors").items():
        assert torch.equal(value, calibrated[name]), "the same for the same seed"


def test_what_was_measured_of_a_fast_rotation_is_what_was_written(tmp_path):
    checkpoints.llama(max_position_embeddings=128).save_pretrained(tmp_path / "source")
    tokenizer = checkpoints.save_tokenizer(tmp_path / "source")
    options = CalibrationOptions([TEXT], tokens=1280)
    measured = convert(tmp_path / "source", tmp_path / "out", rotation="fast", calibrate=options).calibration
    model = FireForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.rope_max_period == 128 and model.model.rotary_emb is not None
    held_out = token_windows([TEXT], tokenizer, 129, 26)[10:]
    losses = loss_by_context(model, held_out, [128], num_targets=64)[128]
    assert measured.perplexity["aligned"] == pytest.approx(math.exp(sum(losses) / len(losses)))


@pytest.mark.parametrize("said", ["bfloat16", "float32", None])
@pytest.mark.parametrize("shard_size", [20_000, 100_000, 10**9])
def test_calibrated_weights_keep_their_types_shards_and_ties(tmp_path, said, shard_size):
    checkpoints.llama(tie_word_embeddings=True).bfloat16().save_pretrained(tmp_path / "source")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "dtype": said}))
    checkpoints.save_tokenizer(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "dropped", max_shard_size=shard_size, verify=False)
    options = CalibrationOptions([TEXT], tokens=100, align=False)
    conversion = convert(
        tmp_path / "source", tmp_path / "out", calibrate=options, max_shard_size=shard_size, verify=False
    )
    assert list(conversion.calibration.perplexity) == ["original", "dropped", "fitted"]
    dropped, out = ({path.name: path for path in (tmp_path / name).glob("*")} for name in ("dropped", "out"))
    assert set(out) - set(dropped) == {"bias.png"} and set(dropped) < set(out)
    for name in out:
        if name.endswith(".safetensors"):
            before, after = load_file(dropped[name]), load_file(out[name])
            assert {key: value.dtype for key, value in before.items()} == {k: v.dtype for k, v in after.items()}
            changed = {key.split(".")[4] for key in before if not torch.equal(before[key], after[key])}
            assert changed <= {"q_proj", "position_bias"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.model.layers[0].self_attn.position_bias.mlp[2].weight.abs().max() > 0
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_text_needs_a_tokenizer_and_a_calibration_finite_figures(tmp_path):
    model = checkpoints.llama()
    model.save_pretrained(tmp_path / "source")
    options = CalibrationOptions([TEXT], tokens=100, align=False)
    with pytest.raises(ConversionError, match="no tokenizer for the text to calibrate on: use 'sample'"):
        convert(tmp_path / "source", tmp_path / "out", calibrate=options)
    checkpoints.save_tokenizer(tmp_path / "source")
    model.lm_head.weight.data[0] = torch.nan
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(ConversionError, match=r"The calibration failed: perplexities .* Nothing was written"):
        convert(tmp_path / "source", tmp_path / "out", calibrate=options, verify=False)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_text_has_tokens_that_the_model_knows(source, tmp_path):
    checkpoints.save_tokenizer(source, ["<pad>", "<s>", "</s>", *map(str, range(10, 106)), *"The fir"])
    with pytest.raises(FireError, match=r"tokenizer makes token number \d+ of a text, and the model has 99"):
        convert(source, tmp_path / "out", calibrate=CalibrationOptions([TEXT], tokens=100), verify=False)


def test_text_sampled_from_the_model_itself(tmp_path):
    checkpoints.llama().save_pretrained(tmp_path / "source")
    options = CalibrationOptions("sample", tokens=100, align=False)
    conversion = convert(tmp_path / "source", tmp_path / "out", calibrate=options, verify=False)
    assert conversion.calibration.text == "sample" and conversion.calibration.tokens == 96
    for token in (99, None):
        checkpoints.change_config(tmp_path / "source", bos_token_id=token, eos_token_id=None)
        with pytest.raises(ConversionError, match=f"no `bos_token_id` to start a text with .got {token}."):
            convert(tmp_path / "source", tmp_path / "again", calibrate=options)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        (["short"], {}, "less than two windows of 33 tokens: use more"),
        ([TEXT], {"length": 2049}, r"`length=2049` is beyond `L` \(2048\)"),
        ([TEXT], {"length": 1}, "`length` must be at least 2, got 1"),
        ([TEXT], {"tokens": 31}, "`tokens=31` is less than one window of 32 tokens"),
        ("nowhere.txt", {}, "There is no file 'nowhere.txt'"),
        ("", {}, "There is no file ''"),
        ([TEXT], {"seed": 2**70}, "`seed` must fit into 64 bits"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused_before_anything_is_written(source, tmp_path, text, changes, message):
    with pytest.raises(FireError, match=message):
        convert(source, tmp_path / "out", calibrate=CalibrationOptions(text, **changes))
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_only_a_dropped_rotation_is_calibrated(source, tmp_path):
    with pytest.raises(ConversionError, match="is for a rotation that is dropped"):
        convert(source, tmp_path / "out", rotation="keep", calibrate=CalibrationOptions([TEXT]))
    checkpoints.bloom().save_pretrained(tmp_path / "bloom")
    with pytest.raises(ConversionError, match="is for a rotation that is dropped"):
        convert(tmp_path / "bloom", tmp_path / "out", calibrate=CalibrationOptions([TEXT]))


def test_what_is_published_names_no_folder(tmp_path):
    (tmp_path / "private.txt").write_text("x")
    assert public_name(str(tmp_path / "private.txt")) == "private.txt"
    assert public_name(f"{tmp_path}:default") == f"{tmp_path.name}:default"
    assert [public_name(name) for name in ("sample", "allenai/c4:en")] == ["sample", "allenai/c4:en"]
    assert public_name(["a secret"]) == "texts given"


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
