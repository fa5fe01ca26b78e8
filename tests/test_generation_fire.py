"""
Generation: every way of decoding that transformers offers agrees with recomputing the whole text for each token.
Models are compiled and exported as one graph.
"""

import os
from shutil import which
from unittest import mock

import pytest
import torch
import transformers
from helpers import random_ids, tiny_model
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import CompileConfig, ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache

from modeling_fire import FireModel, FirePositionBias, attention_fire
from modeling_fire.positions_fire import FirePositions


LENGTH = 24


def greedy_without_cache(model, ids, attention_mask, new_tokens):
    for _ in range(new_tokens):
        next_ids = model(ids, attention_mask=attention_mask, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, next_ids], dim=1)
        attention_mask = torch.cat([attention_mask, torch.ones_like(next_ids)], dim=1)
    return ids


@pytest.fixture(scope="module")
def prompt():
    """Two prompts of which the first is padded on the left, and their mask."""
    ids, mask = random_ids(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


NEW_TOKENS = 12
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 4},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["dynamic", "none", "static", "chunked-prefill", "prompt-lookup"],
)
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "fire"])
def test_greedy_generation(options, attn_implementation, prompt):
    model = tiny_model(attn_implementation=attn_implementation)
    if "prompt_lookup_num_tokens" in options:
        prompt = {name: tensor[1:] for name, tensor in prompt.items()}  # takes one prompt at a time
    expected = greedy_without_cache(model, *prompt.values(), NEW_TOKENS)
    assert torch.equal(model.generate(**prompt, **GREEDY, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "fire"])
def test_layers_on_disk(attn_implementation, prompt, tmp_path):
    """Their weights are there during a call of their module only."""
    model = tiny_model(attn_implementation=attn_implementation)
    model.save_pretrained(tmp_path / "model")
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    loaded = type(model).from_pretrained(
        tmp_path / "model",
        attn_implementation=attn_implementation,
        device_map={**devices, "lm_head": "disk"},
        offload_folder=tmp_path / "offloaded",
    )
    assert loaded.model.layers[1].self_attn.position_bias.c.is_meta
    assert torch.equal(loaded.generate(**prompt, **GREEDY), model.generate(**prompt, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=["beam", "sampling"])
def test_search_and_sampling_do_not_depend_on_the_cache(options, prompt):
    model = tiny_model()
    outputs = []
    for cache_options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
        torch.manual_seed(0)
        outputs.append(model.generate(**prompt, **{**GREEDY, **options}, **cache_options))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


@torch.no_grad()
def test_assisted_generation_equals_greedy():
    model, assistant = tiny_model(), tiny_model(seed=1)
    ids = random_ids(1, 9)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)
    # An assistant that is sometimes right, so that the cache is both kept and cropped.
    assistant.load_state_dict(model.state_dict())
    with torch.no_grad():
        assistant.lm_head.weight[::2] += 0.3
    assert torch.equal(model.generate(ids, assistant_model=assistant, **GREEDY), expected)


@torch.no_grad()
def test_a_model_that_assists_itself_with_its_first_layer():
    model, ids = tiny_model(), random_ids(1, 9)
    assert torch.equal(model.generate(ids, assistant_early_exit=1, **GREEDY), model.generate(ids, **GREEDY))


@torch.no_grad()
def test_prefix_reuse_and_cropping():
    model = tiny_model().double()
    ids = random_ids(1, LENGTH)
    expected = model(ids).logits
    cache = DynamicCache(config=model.config)
    model(ids[:, :16], past_key_values=cache)
    cache.crop(-4)
    actual = model(ids[:, 12:], past_key_values=cache).logits
    torch.testing.assert_close(actual, expected[:, 12:], rtol=0, atol=1e-9)
    # `generate` goes on from a cached prefix.
    cache.crop(-10)
    assert torch.equal(model.generate(ids, past_key_values=cache, **GREEDY), model.generate(ids, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}])
def test_the_bias_is_prepared_once_for_all_steps(options):
    model, ids = tiny_model(), random_ids(1, 9)
    biases = [layer.self_attn.position_bias for layer in model.model.layers]
    with mock.patch.object(
        FirePositionBias, "constants", autospec=True, side_effect=FirePositionBias.constants
    ) as work:
        model.generate(ids, **GREEDY, **options)
    assert work.call_count == 2 * len(biases)  # once more for steps that are compiled
    assert not any(bias.memory or bias.prepared for bias in biases), "which would take memory for nothing"


@torch.no_grad()
@pytest.mark.parametrize("changes", [{"fire_mlp_depth": 2}, {"position_bias": "alibi"}])
def test_generation_prepares_no_bias_that_has_no_pieces(changes):
    model = tiny_model(**changes)
    model.generate(random_ids(1, 9), **GREEDY)
    for bias in model.biases():
        bias.prepare()
        assert bias.prepared is None


def test_generation_beside_adapters_in_the_place_of_f():
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])).eval()
    assert model.generate(input_ids=random_ids(1, 9), **GREEDY).shape == (1, 9 + GREEDY["max_new_tokens"])


def test_gradients_within_generation():
    """A loss that is taken while `generate` runs has the gradients that it has elsewhere."""
    model, ids = tiny_model(), random_ids(1, 9)
    losses = []

    def process(input_ids, scores):
        with torch.enable_grad():
            losses.append(model(ids, labels=ids).loss)
        return scores

    model.generate(ids, **GREEDY, logits_processor=[process])
    losses[0].backward()
    assert all(bias.c.grad.abs() > 0 for bias in model.biases())


@torch.no_grad()
def test_autocast_leaves_what_is_prepared_alone():
    bias = FirePositionBias(2, init_L=9.0).eval()
    bias.prepare()
    expected = bias.prepared
    with torch.autocast("cpu", torch.bfloat16):
        bias.prepare()
    assert all(torch.equal(*pair) for pair in zip(bias.prepared, expected, strict=True))


PROMPTS = [random_ids(n, seed=n).tolist() for n in (5, 9, 13)]
# Of continuous batching, whose cache by default takes most of the machine's memory.
BATCHING = {
    "generation_config": GenerationConfig(**{**GREEDY, "eos_token_id": -1}, pad_token_id=0),
    "continuous_batching_config": ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64),
}
no_paged_bias = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"), reason="its paged SDPA takes no bias"
)


def one_by_one(model) -> dict[tuple, list[int]]:
    return {tuple(p): model.generate(torch.tensor([p]), **GREEDY)[0, len(p) :].tolist() for p in PROMPTS}


def side_by_side(model) -> dict[tuple, list[int]]:
    outputs = model.generate_batch(PROMPTS, **BATCHING)
    return {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}


@torch.no_grad()
def test_continuous_batching():
    model = tiny_model()
    if Version(transformers.__version__) < Version("5.23"):  # its paged SDPA takes no bias
        with pytest.raises(ValueError, match="would drop the position bias"):
            side_by_side(model)
        return
    expected = one_by_one(model)
    fuse, prepare = attention_fire.fused_attention, FirePositionBias.constants
    with (
        mock.patch.object(attention_fire, "fused_attention", wraps=fuse) as fused,
        mock.patch.object(FirePositionBias, "constants", autospec=True, side_effect=prepare) as work,
    ):
        found = side_by_side(model)
    layers = model.config.num_hidden_layers
    assert fused.call_count > 2 * layers and work.call_count <= 2 * layers
    assert model.config._attn_implementation == "fire"
    assert found == expected


@no_paged_bias
@torch.no_grad()
@pytest.mark.parametrize("changes", [{"position_bias": "t5"}, {"fire_activation": "gelu"}, {"fire_mlp_depth": 2}])
def test_continuous_batching_in_blocks_of_queries(changes, monkeypatch):
    model = tiny_model(**changes)
    expected, block = one_by_one(model), FirePositions.block
    monkeypatch.setattr(attention_fire, "MAX_BLOCK_ELEMENTS", 1000)
    with mock.patch.object(FirePositions, "block", autospec=True, side_effect=block) as blocks:
        assert side_by_side(model) == expected
    assert blocks.call_count > 2 * model.config.num_hidden_layers, "27 tokens of prompts in several blocks"


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "fire"])
def test_a_static_cache_knows_of_gaps(attn_implementation):
    """Right-padded prompts: what is generated stands after the padding."""
    model, ids = tiny_model(attn_implementation=attn_implementation), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    assert torch.equal(model.generate(**inputs, cache_implementation="static"), model.generate(**inputs))


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 4])
def test_generation_with_a_static_cache_compiles_once(padding):
    """As `generate` does by itself on a GPU: one graph serves every token, and knows of no mask if there is none."""
    model, ids = tiny_model(), random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = CompileConfig(fullgraph=True, backend=backend, mode=None)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with mock.patch.object(FireModel, "forward", autospec=True, side_effect=FireModel.forward) as forward:
        model.generate(**inputs, cache_implementation="static")
    assert all((call.kwargs["attention_mask"] is None) == (not padding) for call in forward.call_args_list)
    found = model.generate(**inputs, cache_implementation="static", compile_config=compiled)
    assert torch.equal(found, model.generate(**inputs))
    # Again with other parameters of the bias: no step works out for itself what they decide, and none keeps it.
    for bias in model.biases():
        bias.c.mul_(3)
        bias.mlp[2].weight.mul_(-4)
    found = model.generate(**inputs, cache_implementation="static", compile_config=compiled)
    assert torch.equal(found, model.generate(**inputs))
    assert all(bias.prepared is None for bias in model.biases())
    assert len(graphs) == torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not any("sort" in str(node.target) for node in graphs[0].graph.nodes)


@no_paged_bias
@pytest.mark.parametrize("attn_implementation", ["fire", "eager", "sdpa"])
def test_a_manager_of_continuous_batching(attn_implementation):
    model = tiny_model(attn_implementation=attn_implementation)
    manager = model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(num_blocks=8))
    assert model.config._attn_implementation == "sdpa"
    manager.start()
    manager.stop(block=True)
    assert model.config._attn_implementation == attn_implementation
    with pytest.raises(TypeError, match="nonsense"):
        model.init_continuous_batching(nonsense=1)
    assert model.config._attn_implementation == attn_implementation


@torch.no_grad()
def test_compiles_as_one_graph_with_a_static_cache():
    model = tiny_model()
    ids = random_ids(2, LENGTH)
    expected = model(ids).logits
    cache = StaticCache(config=model.config, max_cache_len=LENGTH)
    model(ids[:, :16], past_key_values=cache)
    torch._dynamo.reset()
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    for t in range(16, LENGTH):
        logits = step(ids[:, t : t + 1], position_ids=torch.tensor([[t]]), past_key_values=cache).logits
        torch.testing.assert_close(logits[:, 0], expected[:, t], rtol=0, atol=1e-4)


@pytest.mark.skipif(not which(os.environ.get("CXX", "g++")), reason="Inductor needs a C++ compiler on the PATH")
def test_a_training_step_through_inductor(monkeypatch, tmp_path):
    """By PyTorch's own compiler, which the other tests leave out to save time: loss and every gradient."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    model, ids = tiny_model(num_hidden_layers=1).train(), random_ids(2, LENGTH)
    results = []
    for step in (model, torch.compile(model, fullgraph=True)):
        loss = step(ids, labels=ids, use_cache=False).loss
        results.append([loss, *torch.autograd.grad(loss, list(model.parameters()))])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [LENGTH, LENGTH + 7])
def test_export(length):
    model = tiny_model()
    ids = random_ids(2, LENGTH)
    dynamic_shapes = {"input_ids": {1: torch.export.Dim.AUTO}, "use_cache": None}
    program = torch.export.export(
        model, (), {"input_ids": ids, "use_cache": False}, dynamic_shapes=dynamic_shapes, strict=False
    )
    ids = random_ids(2, length, seed=1)
    actual = program.module()(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(actual, model(ids).logits, rtol=0, atol=1e-4)
