"""The model as a whole: a cache, padding, packing or a position scheme never changes what it computes."""

from unittest import mock

import pytest
import torch
import transformers
from helpers import random_ids, tiny_config, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from transformers import (
    CompileConfig,
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    QuantizedCache,
    StaticCache,
    cache_utils,
)

from modeling_fire import (
    FireForCausalLM,
    FireForSequenceClassification,
    FireForTokenClassification,
    FireModel,
    FirePositionBias,
    attention_fire,
)


LENGTH = 24
PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.position_bias", "lm_head")


@pytest.fixture(scope="module", params=["fire", "t5"])
def model(request) -> FireForCausalLM:
    return tiny_model(position_bias=request.param).double()


def make_cache(kind: str, config):
    if kind == "dynamic":
        return DynamicCache(config=config)
    if kind == "offloaded":
        with mock.patch("torch.Stream"):  # its copies run on a stream, which the CPU has not
            return DynamicCache(config=config, offloading=True)
    return StaticCache(config=config, max_cache_len=LENGTH + 20)


def run_in_chunks(model, ids, bounds, cache, attention_mask=None, position_ids=None):
    """Logits of `ids` fed in chunks that end at `bounds`, each with the cache of the ones before."""
    logits, start = [], 0
    for stop in [*bounds, ids.shape[1]]:
        mask = None if attention_mask is None else attention_mask[:, :stop]
        positions = None if position_ids is None else position_ids[:, start:stop]
        output = model(ids[:, start:stop], attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(output.logits)
        start = stop
    return torch.cat(logits, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dynamic", "offloaded", "static"])
@pytest.mark.parametrize("bounds", [(), (1,), (10, 11, 12, 20)], ids=["whole", "one-then-rest", "chunks"])
def test_cached_equals_uncached(model, kind, bounds):
    ids = random_ids(2, LENGTH)
    expected = model(ids, use_cache=False).logits
    with mock.patch("torch.cuda.default_stream"):
        actual = run_in_chunks(model, ids, bounds, make_cache(kind, model.config))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_quantized_cache(monkeypatch):
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this version of transformers has no FP8 cache")
    model = tiny_model()
    ids = random_ids(2, LENGTH)
    expected = model(ids).logits
    error = (run_in_chunks(model, ids, (10, 11), QuantizedCache("fp8", model.config)) - expected).abs().mean()
    assert 1e-3 < error < 0.2
    # With a storage type that loses nothing only the positions could differ.
    monkeypatch.setattr(cache_utils.Fp8QuantizedLayer, "fp8_dtype", torch.float32)
    actual = run_in_chunks(model, ids, (10, 11), QuantizedCache("fp8", model.config))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-4)


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(
    pads=st.lists(st.integers(0, 8), min_size=1, max_size=3),
    bounds=st.lists(st.integers(9, LENGTH + 7), max_size=3, unique=True).map(sorted),
    kind=st.sampled_from(["dynamic", "static"]),
    explicit=st.booleans(),
)
def test_left_padding_changes_nothing(pads, bounds, kind, explicit):
    model = tiny_model().double()
    ids = random_ids(len(pads), LENGTH)
    expected = model(ids).logits
    width = LENGTH + 8
    padded = torch.zeros(len(pads), width, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, pad in enumerate(pads):  # `pad` tokens on the left, the rest of the width on the right
        padded[row, pad : pad + LENGTH] = ids[row]
        mask[row, pad : pad + LENGTH] = 1
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0) if explicit else None
    actual = run_in_chunks(model, padded, bounds, make_cache(kind, model.config), mask, position_ids)
    uncached = model(padded, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
    for row, pad in enumerate(pads):
        torch.testing.assert_close(actual[row, pad : pad + LENGTH], expected[row], rtol=0, atol=1e-9)
        torch.testing.assert_close(uncached[row, pad : pad + LENGTH], expected[row], rtol=0, atol=1e-9)


@torch.no_grad()
def test_right_padded_prompts_can_be_continued(model):
    ids = random_ids(2, LENGTH)
    expected = model(ids).logits
    prompt = torch.cat([ids[:, :15], torch.zeros(2, 4, dtype=torch.long)], dim=1)
    mask = torch.ones(2, 19 + LENGTH - 15, dtype=torch.long)
    mask[:, 15:19] = 0
    cache = DynamicCache(config=model.config)
    first = model(prompt, attention_mask=mask[:, :19], past_key_values=cache).logits[:, :15]
    rest = model(ids[:, 15:], attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(torch.cat([first, rest], dim=1), expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "flex_attention", "fire"])
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("told_by", ["position_ids", "cu_seq_lens"])
@torch.compiler.set_stance("force_eager")  # compiling FlexAttention takes a minute
def test_packed_documents_equal_separate_ones(attn_implementation, use_cache, told_by):
    model = tiny_model(attn_implementation=attn_implementation)
    documents = [random_ids(1, n, seed=n) for n in (5, 13, 1, 9)]
    packed = torch.cat(documents, dim=1)
    where = {"position_ids": torch.cat([torch.arange(d.shape[1]) for d in documents])[None]}
    if told_by == "cu_seq_lens":  # as `DataCollatorWithFlattening` does if asked
        starts = torch.tensor([0, 5, 18, 19, 28], dtype=torch.int32)
        where = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 13, "max_length_k": 13}
    actual = model(packed, **where, use_cache=use_cache).logits
    expected = torch.cat([model(d).logits for d in documents], dim=1)
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


@torch.no_grad()
def test_randomised_positions():
    model = tiny_model().double()
    ids = random_ids(2, LENGTH)
    positions = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:LENGTH].sort()[0][None]
    actual = model(ids, position_ids=positions, key_position_ids=positions).logits
    # The same tokens at the same places of a long text whose other tokens are masked.
    long_ids = torch.full((2, 200), 5)
    long_ids[:, positions[0]] = ids
    mask = torch.zeros_like(long_ids)
    mask[:, positions[0]] = 1
    expected = model(long_ids, attention_mask=mask, position_ids=torch.arange(200)[None]).logits[:, positions[0]]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)
    # A mask says as well that the gaps do not part documents.
    masked = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=False).logits
    torch.testing.assert_close(masked, expected, rtol=0, atol=1e-9)
    # A cache does not know the keys' positions: they are told.
    cache = DynamicCache(config=model.config)
    logits = [
        model(
            ids[:, start:stop],
            position_ids=positions[:, start:stop],
            key_position_ids=positions[:, :stop],
            past_key_values=cache,
        ).logits
        for start, stop in ((0, 9), (9, LENGTH))
    ]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=0, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "fire"])
def test_randomised_positions_in_a_static_cache(attn_implementation):
    model = tiny_model(attn_implementation=attn_implementation).double()
    ids, positions = random_ids(2, LENGTH), 3 * torch.arange(LENGTH)[None]
    expected = model(ids, position_ids=positions, key_position_ids=positions).logits
    cache = make_cache("static", model.config)
    actual = model(ids, position_ids=positions, key_position_ids=positions, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-9)


@torch.no_grad()
def test_inputs_embeds_and_logits_to_keep(model):
    ids = random_ids(2, LENGTH)
    expected = model(ids).logits
    actual = model(inputs_embeds=model.get_input_embeddings()(ids), logits_to_keep=3).logits
    torch.testing.assert_close(actual, expected[:, -3:], rtol=0, atol=1e-12)
    actual = model(ids, logits_to_keep=torch.tensor([1, 5])).logits
    torch.testing.assert_close(actual, expected[:, [1, 5]], rtol=0, atol=1e-12)


def test_bad_input_is_refused():
    model = tiny_model(FireModel)
    ids = random_ids(1, 4)
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model()
    with pytest.raises(ValueError, match="exactly one of `input_ids` and `inputs_embeds`"):
        model(ids, inputs_embeds=model.embed_tokens(ids))
    with pytest.raises(ValueError, match="`position_ids` beside them"):
        model(ids, key_position_ids=torch.arange(4)[None])
    for length in (3, 5):
        with pytest.raises(ValueError, match=f"of {length} keys: give those of all 4"):
            model(ids, position_ids=torch.arange(4)[None], key_position_ids=torch.arange(length)[None])


# Generation: every way of decoding that transformers offers agrees with recomputing the whole text for each token.


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


@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_reads_no_values(packed, monkeypatch):
    """None that lies on a device, for which it would wait: on "meta" there are none."""
    monkeypatch.setenv("FIRE_BACKEND", "cpu")  # the operator is not entered, but asked for
    model = tiny_model(attn_implementation="fire").train().to("meta")
    ids = torch.zeros(2, 16, dtype=torch.long, device="meta")
    position_ids = torch.zeros_like(ids) if packed else None
    with mock.patch.object(attention_fire, "fused_attention", wraps=attention_fire.fused_attention) as fused:
        model(ids, position_ids=position_ids, labels=ids).loss.backward()
    assert fused.called and all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}])
def test_the_bias_is_prepared_once_for_all_steps(options):
    model, ids = tiny_model(), random_ids(1, 9)
    model.generate(ids, **GREEDY, **options)
    biases = [layer.self_attn.position_bias for layer in model.model.layers]
    kept = [bias.memory["constants"] for bias in biases]
    with mock.patch.object(
        FirePositionBias, "constants", autospec=True, side_effect=FirePositionBias.constants
    ) as work:
        model.generate(ids, **GREEDY, **options)
    assert work.call_count == 2 * len(biases)  # once more for steps that are compiled
    assert all(bias.memory["constants"] is not before for bias, before in zip(biases, kept, strict=True))


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


@torch.no_grad()
def test_continuous_batching():
    model = tiny_model()
    prompts = [random_ids(n, seed=n).tolist() for n in (5, 9, 13)]
    expected = [model.generate(torch.tensor([p]), **GREEDY)[0, len(p) :].tolist() for p in prompts]
    config = GenerationConfig(**{**GREEDY, "eos_token_id": -1}, pad_token_id=0)
    # By default the cache takes most of the machine's memory.
    batching = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=64)
    if Version(transformers.__version__) < Version("5.23"):  # its paged SDPA takes no bias
        with pytest.raises(ValueError, match="would drop the position bias"):
            model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
        return
    fuse, prepare = attention_fire.fused_attention, FirePositionBias.constants
    with (
        mock.patch.object(attention_fire, "fused_attention", wraps=fuse) as fused,
        mock.patch.object(FirePositionBias, "constants", autospec=True, side_effect=prepare) as work,
    ):
        outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=batching)
    layers = model.config.num_hidden_layers
    assert fused.call_count > 2 * layers and work.call_count <= 2 * layers
    assert model.config._attn_implementation == "fire"
    by_prompt = {tuple(output.prompt_ids): output.generated_tokens for output in outputs.values()}
    assert [by_prompt[tuple(p)] for p in prompts] == expected


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


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="its paged SDPA takes no bias")
def test_a_manager_of_continuous_batching():
    model = tiny_model()
    model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(num_blocks=8))
    assert model.config._attn_implementation == "sdpa"


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


# The house-keeping of a transformers model.


def test_num_items_in_batch_scales_the_loss():
    model = tiny_model()
    ids = random_ids(2, LENGTH)
    plain = model(ids, labels=ids).loss
    summed = model(ids, labels=ids, num_items_in_batch=2 * (LENGTH - 1)).loss
    torch.testing.assert_close(summed, plain)
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=100).loss, plain * 2 * (LENGTH - 1) / 100)


def test_tied_embeddings(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    loaded = FireForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    loaded.resize_token_embeddings(120)
    assert loaded.lm_head.weight.shape[0] == 120


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_stays_in_float32(dtype, tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    for low in (
        FireForCausalLM.from_pretrained(tmp_path, dtype=dtype),
        FireForCausalLM._from_config(tiny_config(), dtype=dtype),
        tiny_model().to(dtype),
    ):
        for name, parameter in low.named_parameters():
            assert parameter.dtype == (torch.float32 if "position_bias" in name else dtype), name
    for name, parameter in model.named_parameters():
        if "position_bias" in name:
            loaded = FireForCausalLM.from_pretrained(tmp_path, dtype=dtype).get_parameter(name)
            assert torch.equal(loaded, parameter), name


@pytest.mark.parametrize(
    "changes",
    [
        {"fire_share_layers": True},
        {"fire_mlp_depth": 2, "fire_activation": "gelu"},
        {"fire_transform": "power", "fire_progressive": False},
        {"fire_transform": "identity", "fire_threshold": False},
        {"position_bias": "t5"},
        {"position_bias": "kerple_power"},
        {"position_bias": "none", "rope_parameters": {"rope_type": "yarn", "factor": 2.0}},
        {"norm_type": "layer_norm", "norm_bias": False, "mlp_gated": False, "parallel_residual": True},
        {"attention_bias": True, "attention_output_bias": False, "mlp_bias": True, "qk_norm": True},
        {"embedding_norm": True, "head_dim": 16, "num_key_value_heads": 1},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_every_option_survives_saving(changes, tmp_path):
    model = tiny_model(**changes)
    with torch.no_grad():  # what initialisation would not restore by chance
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = FireForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(2, LENGTH)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("changes", [{}, {"fire_share_layers": True}], ids=["fire", "fire_s"])
@torch.no_grad()
def test_device_map_with_offloading(changes, tmp_path):
    model, ids = tiny_model(**changes), random_ids(2, LENGTH)
    model.save_pretrained(tmp_path / "saved")
    device_map = {name: "disk" if name.endswith(("1", "position_bias")) else "cpu" for name in PARTS if "." in name}
    if not changes:
        device_map.pop("model.position_bias")
    loaded = FireForCausalLM.from_pretrained(
        tmp_path / "saved", device_map={**device_map, "lm_head": "cpu"}, offload_folder=tmp_path / "offloaded"
    )
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_token_classification_without_a_dropout_of_its_own():
    model = tiny_model(FireForTokenClassification, classifier_dropout=None)
    assert model.dropout.p == 0.1  # as transformers has it


def test_sequence_classification_reads_the_last_token():
    model = tiny_model(FireForSequenceClassification, num_labels=3)
    ids = random_ids(2, 10)
    expected = model(ids).logits
    padded = torch.cat([ids, torch.zeros(2, 4, dtype=torch.long)], dim=1)
    torch.testing.assert_close(model(padded, attention_mask=(padded != 0).long()).logits, expected)
