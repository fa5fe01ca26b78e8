"""Losses by context and by position count the tokens that they say; plots draw what they are given."""

from unittest import mock

import pytest
import torch
from helpers import LargestTensor, random_ids, tiny_config, tiny_model
from matplotlib.figure import Figure
from peft import LoraConfig, get_peft_model
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutput

from modeling_fire import FireModel
from modeling_fire.cache_fire import CACHE
from modeling_fire.errors import EvaluationError
from modeling_fire.evaluation import (
    bin_positions,
    loss_by_context,
    loss_by_position,
    plot_attention_by_distance,
    plot_learned_bias,
    plot_passkey,
    plot_perplexity_by_context,
    plot_perplexity_by_position,
)


def llama(**changes):
    config = tiny_config()
    shape = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    return LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in shape}, **changes))


def mamba():
    return MambaForCausalLM(MambaConfig(vocab_size=tiny_config().vocab_size, hidden_size=32, num_hidden_layers=2))


def bloom():
    return BloomForCausalLM(BloomConfig(vocab_size=tiny_config().vocab_size, hidden_size=32, n_layer=2, n_head=4))


class Plain(PreTrainedModel):
    """A causal language model that takes token ids and gives logits, and does nothing else."""

    config_class = PreTrainedConfig

    def __init__(self):
        super().__init__(PreTrainedConfig())
        self.embed = torch.nn.Embedding(99, 16)
        self.head = torch.nn.Linear(16, 99)

    def forward(self, input_ids, use_cache=False):
        return CausalLMOutput(logits=self.head(self.embed(input_ids).cumsum(dim=1)))


@pytest.mark.parametrize("build", [tiny_model, llama, mamba], ids=["fire", "llama", "mamba"])
@pytest.mark.parametrize("chunk_size", [5, 16, 100])
@torch.no_grad()
def test_loss_of_the_same_targets_by_context(build, chunk_size):
    model = build().train()
    windows = random_ids(5, 33)
    losses = loss_by_context(model, windows, [8, 20, 32], num_targets=8, tokens_per_batch=50, chunk_size=chunk_size)
    assert model.training, "the mode is left as it was"
    model.eval()
    for context, by_window in losses.items():
        for window, loss in zip(windows, by_window, strict=True):
            logits = model(window[None, -context - 1 : -1]).logits[0, -8:]
            expected = torch.nn.functional.cross_entropy(logits, window[-8:]).item()
            assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("contexts", [[7, 20], [20, 33]], ids=["shorter-than-the-targets", "longer-than-the-windows"])
def test_impossible_contexts_are_refused(contexts):
    with pytest.raises(ValueError, match=r"between `num_targets` \(8\) and .* \(32\)"):
        loss_by_context(tiny_model(), random_ids(1, 33), contexts, num_targets=8)


@torch.no_grad()
def test_overlapping_windows_are_a_sliding_window():
    model, tokens = tiny_model(), random_ids(61)
    [losses] = loss_by_context(model, tokens.unfold(0, 21, 8), [20], num_targets=8).values()
    counted = []
    for start in range(0, 41, 8):
        logits = model(tokens[None, start : start + 20]).logits[0, -8:]
        counted += torch.nn.functional.cross_entropy(
            logits, tokens[start + 13 : start + 21], reduction="none"
        ).tolist()
    assert len(counted) == 48, "all tokens from 13 on, once"
    assert sum(losses) / len(losses) == pytest.approx(sum(counted) / 48, rel=1e-5)


@pytest.mark.parametrize("build", [tiny_model, llama, mamba], ids=["fire", "llama", "mamba"])
@pytest.mark.parametrize("chunk_size", [7, 16, 100])
@torch.no_grad()
def test_loss_of_every_token_in_chunks_is_that_of_one_forward(build, chunk_size):
    model = build().train()
    windows = random_ids(3, 49)
    losses = loss_by_position(model, windows, chunk_size)
    assert model.training, "the mode is left as it was"
    logits = model.eval()(windows[:, :-1]).logits
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


def test_logits_are_never_there_for_more_than_a_chunk():
    model, lengths = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    loss_by_position(model, random_ids(1, 50), chunk_size=16)
    assert lengths[-4:] == [16, 16, 16, 1] and max(lengths) == 16
    lengths.clear()
    loss_by_context(model, random_ids(1, 50), [40, 49], num_targets=8)
    assert lengths == [8, 8]


@pytest.mark.parametrize("context, computed", [(40, [1, 1, 8]), (49, [1, 1, 7, 1])])
def test_chunks_without_targets_have_one_logit(context, computed):
    model, lengths = tiny_model(), []
    model.lm_head.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    loss_by_context(model, random_ids(1, 50), [context], num_targets=8, chunk_size=16)
    assert lengths[-len(computed) :] == computed


def test_a_rotation_that_depends_on_the_length_is_that_of_the_whole_context():
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    model, windows = llama(rope_parameters=rope, max_position_embeddings=16), random_ids(2, 50)
    assert loss_by_context(model, windows, [49], 8, chunk_size=16) == loss_by_context(model, windows, [49], 8)


@pytest.mark.parametrize(
    "build",
    [bloom, lambda: llama(attn_implementation="eager"), lambda: tiny_model(attn_implementation="eager")],
    ids=["bloom", "llama", "fire"],
)
@pytest.mark.parametrize(
    "measure",
    [
        lambda model, windows: loss_by_context(model, windows, [windows.shape[1] - 1], chunk_size=64),
        lambda model, windows: loss_by_position(model, windows, chunk_size=64),
    ],
    ids=["by-context", "by-position"],
)
def test_memory_is_linear_in_the_context_though_attention_is_not(build, measure):
    model, largest = build(), {}
    for context in (512, 1024):
        with LargestTensor() as tensors:
            measure(model, random_ids(1, context + 1))
        largest[context] = tensors.numel
    assert largest[1024] == 2 * largest[512]


@torch.no_grad()
def test_a_model_that_gives_all_logits_and_no_cache():
    model, windows = Plain(), random_ids(3, 33)
    losses = torch.nn.functional.cross_entropy(
        model(windows[:, :-1]).logits.transpose(1, 2), windows[:, 1:], reduction="none"
    )
    [by_context] = loss_by_context(model, windows, [32], num_targets=8).values()
    assert by_context == pytest.approx(losses[:, -8:].mean(dim=1).tolist())
    torch.testing.assert_close(loss_by_position(model, windows), losses)
    message = r"Plain returns no KV cache .* in chunks\. Take contexts up to 16\."
    with pytest.raises(EvaluationError, match=message):
        loss_by_context(model, windows, [32], num_targets=8, chunk_size=16)
    with pytest.raises(EvaluationError, match=message):
        loss_by_position(model, windows, chunk_size=16)


def test_a_model_whose_cache_does_not_go_on_is_refused(monkeypatch):
    model, windows = llama(initializer_range=0.3), random_ids(2, 81)
    read = model.model.forward
    forgetful = {CACHE: None, "use_cache": True}
    monkeypatch.setattr(model.model, "forward", lambda *given, **named: read(*given, **{**named, **forgetful}))
    for measure in (
        lambda: loss_by_context(model, windows, [80], num_targets=8, chunk_size=32),
        lambda: loss_by_position(model, windows, chunk_size=32),
    ):
        with pytest.raises(EvaluationError, match=r"at once, and .* in chunks: .* Take contexts up to 32\."):
            measure()
    assert loss_by_context(model, windows, [32], num_targets=8, chunk_size=32)


def test_rounding_is_not_taken_for_a_bad_cache():
    """Chunks of 11 tokens differ from 44 at once in bfloat16: here by 0.003, which float32 would not explain."""
    torch.manual_seed(0)
    model, windows = llama(initializer_range=0.3), random_ids(2, 81)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss_by_position(model, windows, chunk_size=44).isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 3, 8, 16, 100])
def test_bins_part_the_positions(length):
    bins = bin_positions(torch.arange(1.0, length + 1).expand(2, -1))
    starts = list(bins)
    assert starts[0] == 1
    for start, end in zip(starts, [*starts[1:], length + 1], strict=True):
        assert bins[start] == [(start + end - 1) / 2] * 2, "the mean of the positions from start to end"
    if length == 100:
        assert starts == [1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91]


@pytest.mark.parametrize("changes", [{}, {"fire_share_layers": True}, {"position_bias": "t5"}], ids=str)
def test_learned_bias_is_drawn(tmp_path, changes):
    plot_learned_bias(tiny_model(FireModel, **changes), tmp_path / "bias.png", [5, 50])
    assert (tmp_path / "bias.png").read_bytes().startswith(b"\x89PNG")


def test_a_bias_that_peft_trains_is_drawn_once(tmp_path):
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["position_bias"]))
    with mock.patch("matplotlib.figure.Figure.subplots", autospec=True, side_effect=Figure.subplots) as subplots:
        plot_learned_bias(adapted, tmp_path / "bias.png", [5])
    assert subplots.call_args.args[1:] == (2, 1), "a row a layer"


def test_a_model_without_a_bias_has_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no position bias"):
        plot_learned_bias(tiny_model(position_bias="none"), tmp_path / "bias.png", [5])
    assert not any(tmp_path.iterdir())


def test_perplexity_is_drawn(tmp_path):
    losses = {"FIRE": {8: 1.0, 16: 1.1}, "RoPE": {8: 1.0, 16: 2.0}}
    axes = drawn_axes(lambda: plot_perplexity_by_context(losses, tmp_path / "perplexity.png", train_length=8))[0]
    assert [line.get_label() for line in axes.lines[:2]] == ["FIRE", "RoPE"] and len(axes.lines) == 3
    assert (tmp_path / "perplexity.png").read_bytes().startswith(b"\x89PNG")
    plot_perplexity_by_context(losses, tmp_path / "unmarked.png")


def drawn_axes(draw):
    """The axes of the figure that `draw` saves."""
    with mock.patch("matplotlib.figure.Figure.savefig", autospec=True, side_effect=Figure.savefig) as savefig:
        draw()
    return savefig.call_args.args[0].axes


def test_perplexity_by_position_is_drawn(tmp_path):
    losses = {"FIRE": {1: 2.0, 2: 1.5, 4: 1.1}, "RoPE": {1: 2.0, 2: 1.5, 4: 3.0}}
    axes = drawn_axes(lambda: plot_perplexity_by_position(losses, tmp_path / "position.png", train_length=2))[0]
    assert list(axes.lines[1].get_ydata()) == pytest.approx([7.389056, 4.481689, 20.085537])
    assert (tmp_path / "position.png").read_bytes().startswith(b"\x89PNG")


def test_passkeys_are_a_heat_map_of_depth_over_length(tmp_path):
    accuracies = {512: {0.0: 1.0, 1.0: 0.9}, 1024: {0.0: 0.2, 1.0: 0.8}, 2048: {0.0: 0.0, 1.0: 0.7}}
    axes = drawn_axes(lambda: plot_passkey(accuracies, tmp_path / "passkey.png"))[0]
    assert axes.images[0].get_array().tolist() == [[1.0, 0.2, 0.0], [0.9, 0.8, 0.7]]
    assert [text.get_text() for text in axes.texts] == ["100%", "20%", "0%", "90%", "80%", "70%"]
    assert (tmp_path / "passkey.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("num_layers", [1, 2, 30])
def test_attention_by_distance_is_drawn(tmp_path, num_layers):
    shares = {8: torch.full((num_layers, 4), 0.25), 9: torch.full((num_layers, 5), 0.2)}
    axes = drawn_axes(lambda: plot_attention_by_distance(shares, tmp_path / "attention.png"))
    assert [len(a.lines) for a in axes] == [num_layers] * 2
    assert [label.get_text() for label in axes[1].get_xticklabels()] == ["0", "1", "2–", "4–", "8–"]
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
