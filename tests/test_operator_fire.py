"""The operator pair under PyTorch's machinery; what it computes is tested for each backend."""

import pytest
import torch
from reference import dense_attention, double, random_bias
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.testing_utils import CaptureLogger
from transformers.utils import logging

from modeling_fire import FirePositionBias
from modeling_fire.attention_fire import fire_attention
from modeling_fire.operator_fire import attention, attention_backward, choose_backend, fused_attention
from modeling_fire.other_biases_fire import AlibiPositionBias, KerplePositionBias, SandwichPositionBias, T5PositionBias
from modeling_fire.positions_fire import FirePositions


def random_qkv(queries: int, keys: int, *, batch=2, heads=4, kv_heads=2, head_dim=8, dtype=torch.float64, seed=0):
    """Query, key and value that ask for gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, heads, queries, head_dim)] + [(batch, kv_heads, keys, head_dim)] * 2
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


@pytest.fixture(params=["cpu", "triton"])
def backend(request, monkeypatch):
    """Each backend in turn: the GPU kernels in Triton's interpreter."""
    if request.param == "triton":
        pytest.importorskip("triton", reason="Triton is not installed.")
        if torch.cuda.is_available():
            pytest.skip("Triton compiles for the GPU, and these tensors are on the CPU.")
    monkeypatch.setenv("FIRE_BACKEND", request.param)
    return request.param


def operator_arguments(queries=11, keys=17, dtype=torch.float32):
    positions = FirePositions.arange(queries, past=keys - queries)
    bias = random_bias(4, positions, L=5.0, dtype=torch.promote_types(dtype, torch.float32))
    for tensor in (bias.slope, bias.offset, bias.c, bias.row_scale):
        tensor.requires_grad_()
    where = (positions.query, positions.key, positions.first, positions.last, None)
    return (*random_qkv(queries, keys, dtype=dtype), *bias.tensors, *where, bias.transform, True, False, 0.3)


def test_opcheck(backend):
    arguments = operator_arguments()
    torch.library.opcheck(attention._opoverload, arguments)
    with torch.no_grad():
        output, lse = attention(*arguments)
    torch.library.opcheck(
        attention_backward._opoverload,
        (
            torch.randn_like(output),
            *arguments[:3],
            output,
            lse,
            *(t.detach() for t in arguments[3:9]),
            *arguments[9:-2],
            arguments[-1],
            True,
        ),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_gradcheck_through_the_parameters():
    torch.manual_seed(0)
    bias = FirePositionBias(4, 6, init_L=5.0, init_c=0.4, init_f="uniform").double()
    parameters = dict(bias.named_parameters())

    def attend(query, key, value, *values):
        changed = dict(zip(parameters, values, strict=True))
        pieces = torch.func.functional_call(bias, changed, (FirePositions.arange(7, past=2),), {"backend": "cpu"})
        return fused_attention(query, key, value, pieces, FirePositions.arange(7, past=2), 0.3)

    # Half a token off the queries: at L = 5 the formula has a kink, and finite differences have no say.
    with torch.no_grad():
        bias.L_multiplier.fill_(1.1)
    inputs = (*random_qkv(7, 9, batch=1), *(p.detach().requires_grad_() for p in parameters.values()))
    torch.autograd.gradcheck(attend, inputs, nondet_tol=0.0)


@pytest.mark.parametrize(
    ("backend", "dynamic"), [("cpu", False), ("cpu", True), ("triton", False)], indirect=["backend"]
)
def test_compiles_to_one_graph(backend, dynamic):
    torch.manual_seed(0)
    bias = FirePositionBias(4, init_L=5.0)

    def loss(query, key, value):
        return fire_attention(query, key, value, bias).square().sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")):
        inputs = random_qkv(9, 9, dtype=torch.float32)
        value = function(*inputs)
        gradients.append([value, *torch.autograd.grad(value, (*inputs, *bias.parameters()))])
    for expected, actual in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_checkpointing_and_repetition_give_the_same_bits():
    torch.manual_seed(0)
    bias = FirePositionBias(4, init_L=5.0)
    inputs = random_qkv(23, 23, dtype=torch.float32)
    results = []
    for attend in (
        fire_attention,
        fire_attention,
        lambda *args: checkpoint(fire_attention, *args, use_reentrant=False),
    ):
        output = attend(*inputs, bias)
        results.append([output, *torch.autograd.grad(output.square().sum(), (*inputs, *bias.parameters()))])
    for other in results[1:]:
        assert all(torch.equal(actual, expected) for actual, expected in zip(other, results[0], strict=True))


def test_autocast_keeps_the_bias_in_float32():
    torch.manual_seed(0)
    bias, inputs = FirePositionBias(4, init_L=5.0), random_qkv(23, 23, dtype=torch.float32)
    low = [tensor.detach().bfloat16() for tensor in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        output = fire_attention(*inputs, bias)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, fire_attention(*low, bias))
    output.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in bias.parameters())
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs)


BIASES = [
    lambda: FirePositionBias(4, init_L=9.0),
    lambda: FirePositionBias(4, init_L=9.0, mlp_depth=2),
    lambda: FirePositionBias(4, init_L=9.0, activation="gelu", init_f="uniform"),
    lambda: FirePositionBias(4, init_L=9.0, transform="power", init_c=0.5),
    lambda: FirePositionBias(4, init_L=9.0, transform="identity"),
    lambda: FirePositionBias(4, progressive=False, init_L=9.0),
    lambda: FirePositionBias(4, threshold=False),
    lambda: AlibiPositionBias(4),
    lambda: KerplePositionBias(4, "log"),
    lambda: KerplePositionBias(4, "power"),
    lambda: T5PositionBias(4),
    lambda: SandwichPositionBias(4),
]


@pytest.mark.parametrize("build", BIASES)
@pytest.mark.parametrize("scenario", ["causal", "cached", "window", "bidirectional", "packed"])
def test_any_bias_in_ones_own_layer(build, scenario):
    """Values and every gradient against the dense formula in float64; the mask is written out here."""
    torch.manual_seed(0)
    bias, length = build().double(), 19
    past = 6 if scenario == "cached" else 0
    index = torch.arange(past + length)
    distance = index[past:, None] - index
    seen, options = distance >= 0, {}
    if scenario == "window":
        seen, options = seen & (distance < 4), {"window": 4}
    elif scenario == "bidirectional":
        seen, options = torch.ones_like(seen), {"causal": False}
    elif scenario == "packed":
        document = torch.bucketize(index, torch.tensor([5, 6]), right=True)
        seen, options = seen & (document[:, None] == document), {"cu_seqlens": torch.tensor([0, 5, 6, length])}
    absolute = index[None, past:] - (torch.tensor([0, 5, 6])[document] if scenario == "packed" else 0)
    positions = FirePositions(absolute, index[None, past:], index[None], causal=scenario != "bidirectional")

    query, key, value = inputs = random_qkv(length, past + length)
    scores = query @ key.repeat_interleave(2, 1).mT * 8**-0.5 + bias(positions)
    probabilities = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = probabilities @ value.repeat_interleave(2, 1)
    actual = fire_attention(*inputs, bias, **options)
    # Sandwich has no parameters to tell the precision: it is float32 (and so is ALiBi, but exactly).
    tolerance = (
        {"rtol": 1e-9, "atol": 1e-9} if type(bias) is not SandwichPositionBias else {"rtol": 1e-4, "atol": 1e-5}
    )
    torch.testing.assert_close(actual, expected, **tolerance)
    wanted = (*inputs, *bias.parameters())
    weights = torch.randn(expected.shape, dtype=torch.float64)
    for got, want in zip(*(torch.autograd.grad(o, wanted, weights) for o in (actual, expected)), strict=True):
        torch.testing.assert_close(got, want, **tolerance)


def test_cu_seqlens_of_32_bits():
    """As flash attention takes them."""
    bias, inputs, bounds = FirePositionBias(4, init_L=5.0).double(), random_qkv(19, 19), torch.tensor([0, 5, 6, 19])
    narrow, wide = (fire_attention(*inputs, bias, cu_seqlens=starts) for starts in (bounds.int(), bounds))
    assert torch.equal(narrow, wide)


def test_bad_shapes_are_refused():
    bias, (query, key, value) = FirePositionBias(4), random_qkv(9, 7)
    with pytest.raises(ValueError, match="cannot be the last of 7 keys"):
        fire_attention(query, key, value, bias)
    with pytest.raises(ValueError, match="no multiple of 3"):
        fire_attention(query, *(torch.randn(2, 3, 9, 8).double() for _ in range(2)), bias)
    with pytest.raises(ValueError, match="Types differ"):
        fire_attention(query, key.float(), value, bias)
    with pytest.raises(ValueError, match="Shapes do not fit"):
        fire_attention(query, key, value[..., :4], bias)
    with pytest.raises(ValueError, match="cu_seqlens"):
        fire_attention(query, query, query, bias, cu_seqlens=torch.tensor([0, 9]), window=3)
    for bounds in ([3, 7], [0, 6]):
        with pytest.raises(ValueError, match="must begin with 0 and end with 7"):
            fire_attention(key, key, value, bias, cu_seqlens=torch.tensor(bounds))
    with pytest.raises(ValueError, match="`window` counts the query itself"):
        fire_attention(key, key, value, bias, window=0)
    for heads in (3, 8):
        with pytest.raises(ValueError, match="another number of heads than the 4"):
            fire_attention(query, query, query, FirePositionBias(heads))


def test_positions_that_do_not_fit_are_refused():
    bias, (query, key, value) = FirePositionBias(4).double(), random_qkv(9, 9)
    right = FirePositions.arange(9)
    for changes in ({"causal": False}, {"window": 3}, {"cu_seqlens": torch.tensor([0, 9])}):
        with pytest.raises(ValueError, match="`positions` say who sees whom"):
            fire_attention(query, key, value, bias, right, **changes)
    for length in (8, 10):
        with pytest.raises(ValueError, match=rf"`positions.absolute` has shape \(1, {length}\)"):
            fire_attention(query, key, value, bias, FirePositions.arange(length))
        with pytest.raises(ValueError, match=rf"`positions.key` has shape \(1, {length}\)"):
            fire_attention(query, key, value, bias, right._replace(key=torch.arange(length)[None]))
    with pytest.raises(ValueError, match=r"`positions.last` has shape \(3, 9\)"):
        fire_attention(query, key, value, bias, right._replace(last=right.last.expand(3, -1)))
    with pytest.raises(ValueError, match="need `first` and `last`"):
        fire_attention(query, key, value, bias, right._replace(first=None, last=None))
    fire_attention(query, key, value, bias, right._replace(visible=torch.ones(2, 9, dtype=torch.bool)))


@pytest.mark.parametrize("build", [lambda: FirePositionBias(4).double(), lambda: T5PositionBias(4).double()])
def test_no_queries(build):
    query, key, value = random_qkv(9, 9)
    output = fire_attention(query[:, :, :0], key, value, build())
    assert output.shape == (2, 4, 0, 8)
    output.sum().backward()


@torch.no_grad()
def test_positions_say_themselves_whether_they_are_causal(monkeypatch):
    """In blocks, which cut off what a causal layer does not see."""
    bias, inputs = T5PositionBias(4).double(), random_qkv(9, 9)
    expected = fire_attention(*inputs, bias, causal=False)
    monkeypatch.setattr("modeling_fire.attention_fire.MAX_BLOCK_ELEMENTS", 100)
    torch.testing.assert_close(fire_attention(*inputs, bias, FirePositions.arange(9, causal=False)), expected)


@pytest.mark.parametrize("gradients", [True, False])
def test_forward_mode_derivatives_are_refused(gradients):
    bias, (query, key, value) = FirePositionBias(4), (x.detach() for x in random_qkv(9, 9, dtype=torch.float32))
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(p.detach(), torch.ones_like(p)) for name, p in bias.named_parameters()}
        positions = FirePositions.arange(9)
        pieces = bias.eval()(positions, backend="cpu")
        with torch.set_grad_enabled(gradients):
            bias(FirePositions.arange(1, past=8), backend="cpu")
            of_parameters = torch.func.functional_call(bias, dual, (positions,), {"backend": "cpu"})
        for at, found in ((forward_ad.make_dual(key, key), pieces), (key, of_parameters)):
            with pytest.raises(NotImplementedError, match="forward-mode"):
                fused_attention(query, at, value, found, positions, 0.3)


@pytest.mark.parametrize("build", [FirePositionBias, T5PositionBias])
def test_transforms_of_functions(build):
    bias, inputs = build(4).double(), [x.detach() for x in random_qkv(9, 12)]
    parameters = {name: p.detach() for name, p in bias.named_parameters()}
    positions = FirePositions.arange(9, past=3)

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = bias

        def forward(self, *inputs):
            return fire_attention(*inputs, self.bias, positions).square().sum()

    layer = Layer()

    def loss(parameters, *inputs):
        named = {f"bias.{name}": p for name, p in parameters.items()}
        return torch.func.functional_call(layer, named, tuple(inputs))

    def of_item(parameters, *inputs):
        return loss(parameters, *(x[None] for x in inputs))

    layer(*inputs).backward()
    expected = {name: p.grad for name, p in bias.named_parameters()}
    grad = torch.func.grad(loss)(parameters, *inputs)
    of_items = torch.func.vmap(torch.func.grad(of_item), in_dims=(None, 0, 0, 0))(parameters, *inputs)
    for name in expected:
        torch.testing.assert_close(grad[name], expected[name])
        torch.testing.assert_close(of_items[name].sum(0), expected[name])
    direction = {name: torch.ones_like(p) for name, p in parameters.items()}
    _, slope = torch.func.jvp(lambda parameters: loss(parameters, *inputs), (parameters,), (direction,))
    torch.testing.assert_close(slope, sum(gradient.sum() for gradient in expected.values()))

    torch._dynamo.reset()
    compiled = torch.compile(torch.func.grad(loss), fullgraph=True, backend="eager")(parameters, *inputs)
    for name in expected:
        torch.testing.assert_close(compiled[name], expected[name])


def test_the_choice_of_a_backend(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    with pytest.raises(ValueError, match="FIRE_BACKEND must be"):
        choose_backend(cpu, "fast", False)
    with pytest.raises(ValueError, match="FIRE_BACKEND=triton, but the tensors are on cpu"):
        choose_backend(cpu, "triton", False)
    with pytest.raises(ValueError, match="FIRE_BACKEND=cpu, but the tensors are on cuda"):
        choose_backend(gpu, "cpu", False)
    monkeypatch.setattr("modeling_fire.operator_fire.is_triton_available", lambda: True)
    choose = choose_backend.__wrapped__
    assert choose(cpu, "triton", True) == "triton"
    for capability, expected in (((7, 5), "none"), ((8, 0), "triton"), ((12, 1), "triton")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert choose(gpu, "", False) == choose(gpu, "triton", False) == expected
    monkeypatch.setattr(torch.version, "hip", "7.0")  # whose devices call themselves "cuda" as well
    assert choose(gpu, "", False) == "none"


def test_users_of_transformers_see_what_attention_runs_on():
    logging.info_once.cache_clear()
    choose_backend.cache_clear()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_info()
    try:
        with CaptureLogger(logging.get_logger("transformers")) as captured:
            for bias in (FirePositionBias(4), FirePositionBias(4, mlp_depth=2)) * 2:
                fire_attention(*random_qkv(9, 9, dtype=torch.float32), bias)
    finally:
        logging.set_verbosity(verbosity)
    backend, general = captured.out.splitlines()
    assert "cpu runs on the backend 'cpu'" in backend
    assert "takes the general path" in general


def test_the_backend_can_be_forced(monkeypatch):
    bias, inputs = FirePositionBias(4, init_L=5.0).double(), random_qkv(9, 9)
    expected = fire_attention(*inputs, bias)
    monkeypatch.setenv("FIRE_BACKEND", "none")
    monkeypatch.setattr("modeling_fire.attention_fire.fused_attention", None)
    torch.testing.assert_close(fire_attention(*inputs, bias), expected)


def test_the_operator_is_the_formula():
    positions = FirePositions.arange(11, past=6)
    bias, inputs = double(random_bias(4, positions, L=5.0)), random_qkv(11, 17)
    torch.testing.assert_close(
        fused_attention(*inputs, bias, positions, 0.3), dense_attention(*inputs, bias, positions, 0.3)[0]
    )


def test_flops_are_counted_as_those_of_attention():
    bias, inputs = FirePositionBias(4, init_L=5.0), random_qkv(9, 9, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        fire_attention(*inputs, bias).sum().backward()
    products = 2 * 2 * 4 * 9 * 9 * 8
    counted = counter.get_flop_counts()["Global"]
    assert {flops for op, flops in counted.items() if "attention" in str(op)} == {2 * products, 5 * products}


@torch.no_grad()
def test_a_token_goes_beside_the_operator_only_where_nobody_looks_at_operators(backend):
    bias = FirePositionBias(4, init_L=5.0).eval().requires_grad_(False)
    inputs = [x.detach() for x in random_qkv(1, 9, dtype=torch.float32)]
    expected = fire_attention(*inputs, bias)
    with FlopCounterMode(display=False) as counter:
        fire_attention(*inputs, bias)
    counted = counter.get_flop_counts()["Global"]
    assert {flops for op, flops in counted.items() if "attention" in str(op)} == {2 * 2 * 2 * 4 * 9 * 8}
    traced = torch.jit.trace(lambda *inputs: fire_attention(*inputs, bias), tuple(inputs))
    assert "::attention" in str(traced.graph)
    torch.testing.assert_close(traced(*inputs), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert fire_attention(*map(mode.from_tensor, inputs), bias).shape == expected.shape


def test_compiled_code_follows_the_choice_of_a_backend(monkeypatch):
    bias, inputs, found = FirePositionBias(4, init_L=5.0), random_qkv(9, 9, dtype=torch.float32), []

    def capture(graph, _):
        found.append("::attention" in str(graph.graph) or "modeling_fire.attention" in str(graph.graph))
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda *inputs: fire_attention(*inputs, bias), backend=capture)
    for name in ("cpu", "none"):
        monkeypatch.setenv("FIRE_BACKEND", name)
        compiled(*inputs)
    assert found == [True, False]


@torch.no_grad()
@pytest.mark.parametrize("query", [3, 20, -3, 1000])
def test_one_query_anywhere(query):
    """Also where the table that inference keeps for one token after the other does not reach."""
    bias = FirePositionBias(4, init_L=7.0, init_f="uniform").eval()
    index, where = torch.arange(8)[None], torch.tensor([[query]])
    first, last = torch.zeros_like(where), torch.full_like(where, 8)
    positions = FirePositions(where * 0 + 3, where, index, first, last, consecutive=True, causal=False)
    q, (_, k, v) = torch.randn(1, 4, 1, 8), (x.detach() for x in random_qkv(8, 8, batch=1, dtype=torch.float32))
    pieces = bias(positions, backend="cpu")
    expected = dense_attention(q.double(), k.double(), v.double(), double(pieces), positions, 8**-0.5)[0]
    torch.testing.assert_close(fire_attention(q, k, v, bias, positions).double(), expected, rtol=1e-5, atol=1e-5)
