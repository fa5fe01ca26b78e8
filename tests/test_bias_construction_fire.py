"""How biases are built, cast, copied and loaded."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from helpers import random_fire, tiny_config, tiny_model
from torch import nn

from modeling_fire import FirePositionBias
from modeling_fire.other_biases_fire import (
    AlibiPositionBias,
    KerplePositionBias,
    SandwichPositionBias,
    T5PositionBias,
    alibi_slopes,
)
from modeling_fire.position_bias_fire import build_position_bias
from modeling_fire.positions_fire import FirePositions


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fire", FirePositionBias),
        ("alibi", AlibiPositionBias),
        ("kerple_log", KerplePositionBias),
        ("kerple_power", KerplePositionBias),
        ("t5", T5PositionBias),
        ("sandwich", SandwichPositionBias),
    ],
)
def test_every_name_is_built_and_causes_a_bias_of_its_own(name, expected):
    torch.manual_seed(0)
    bias = build_position_bias(tiny_config(position_bias=name))
    assert type(bias) is expected
    assert getattr(bias, "variant", None) == (name.removeprefix("kerple_") if "kerple" in name else None)
    output = bias(FirePositions.arange(6))
    assert output.shape == (1, 4, 6, 6) and output.dtype == torch.float32
    assert output[0, 0, -1].unique().numel() > 1


def test_no_bias_is_built_for_none():
    assert build_position_bias(tiny_config(position_bias="none")) is None


def test_fire_is_built_with_every_field_of_the_configuration():
    config = tiny_config(
        fire_mlp_width=5,
        fire_mlp_depth=2,
        fire_activation="gelu",
        fire_transform="power",
        fire_init_c=0.3,
        fire_init_L=21.0,
        fire_init_f="uniform",
        fire_eps=1e-3,
        fire_progressive=False,
    )
    bias = build_position_bias(config)
    assert [type(layer) for layer in bias.mlp][1::2] == [nn.GELU, nn.GELU]
    assert [len(layer.bias) for layer in bias.mlp[::2]] == [5, 5, 4]
    assert [bias.c.item(), bias.init_L.item()] == pytest.approx([0.3, 21.0])
    assert (bias.transform, bias.eps, bias.progressive, bias.threshold) == ("power", 1e-3, False, True)
    hidden = build_position_bias(tiny_config(fire_init_c=0.1, fire_init_L=99.0, max_position_embeddings=64)).mlp[0]
    last_knot = -hidden.bias[-1] / hidden.weight[-1]  # where the distance is the training length
    assert last_knot.item() == pytest.approx(math.log1p(6.4) / math.log1p(9.9))
    assert build_position_bias(tiny_config(fire_threshold=False)).L_multiplier is None


@pytest.mark.parametrize(
    ("construct", "argument"),
    [
        (lambda: FirePositionBias(4, activation="tanh"), "activation"),
        (lambda: FirePositionBias(4, transform="sqrt"), "transform"),
        (lambda: FirePositionBias(4, mlp_depth=3), "mlp_depth"),
        (lambda: FirePositionBias(4, mlp_width=0), "mlp_width"),
        (lambda: FirePositionBias(4, train_length=0), "train_length"),
        (lambda: FirePositionBias(4, init_c=0.0), "init_c"),
        (lambda: FirePositionBias(4, init_L=math.nan), "init_L"),
        (lambda: FirePositionBias(4, eps=0.0), "eps"),
        (lambda: FirePositionBias(4, init_f="zero"), "init_f"),
        (lambda: FirePositionBias.from_t5(torch.zeros(32, 4), max_length=64), "max_length"),
        (lambda: build_position_bias(SimpleNamespace(num_attention_heads=4, position_bias="rope")), "position_bias"),
        (lambda: FirePositionBias.from_kerple(torch.ones(4), 1.0, 64, variant="identity"), "variant"),
        (lambda: KerplePositionBias(4, "linear"), "variant"),
    ],
)
def test_errors_name_the_argument(construct, argument):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        construct()


def test_autocast_does_not_reach_the_bias():
    bias, positions = random_fire().float(), FirePositions.arange(1000)
    with torch.autocast("cpu", torch.bfloat16):
        output = bias(positions)
    assert output.dtype == torch.float32
    assert torch.equal(output, bias(positions))


CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "to device": lambda model: model.to("cpu", torch.float16),
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
}


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
@pytest.mark.parametrize("name", ["fire", "kerple_log", "t5"])
def test_casting_a_model_leaves_its_bias_in_float32(name, cast):
    model = tiny_model(position_bias=name)
    model(torch.arange(9)[None]).logits.sum().backward()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cast(model)
    for key, value in model.state_dict().items():
        kept = "position_bias" in key
        assert (value.dtype == torch.float32) == kept, key
        assert not kept or torch.equal(value, before[key]), key
    for key, parameter in model.named_parameters():
        assert (parameter.grad.dtype == torch.float32) == ("position_bias" in key), key


def test_double_computes_in_float64():
    bias, positions = random_fire(), FirePositions.arange(20)
    assert bias(positions).dtype == torch.float64
    assert bias.bfloat16().c.dtype == torch.float64, "a narrower cast must not round"
    assert bias.float()(positions).dtype == torch.float32


@pytest.mark.parametrize("init_f", ["decay", "uniform"])
@pytest.mark.parametrize("mlp_depth", [1, 2])
def test_the_default_type_leaves_the_start_alone(mlp_depth, init_f):
    """`from_config(config, dtype=torch.bfloat16)` sets it."""

    def start(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        before = torch.get_default_dtype()
        torch.manual_seed(0)
        try:
            torch.set_default_dtype(dtype)
            bias = FirePositionBias(4, mlp_depth=mlp_depth, init_f=init_f)
            return bias.state_dict() | {"alibi": alibi_slopes(12)}
        finally:
            torch.set_default_dtype(before)

    narrow, usual, wide = (start(dtype) for dtype in (torch.bfloat16, torch.float32, torch.float64))
    for name in usual:
        assert torch.equal(narrow[name], usual[name]) and narrow[name].dtype == torch.float32
        assert torch.equal(wide[name].float(), usual[name]) and (wide[name].dtype == torch.float64 or name == "alibi")


@pytest.mark.parametrize("position_bias", ["fire", "kerple_log", "t5"])
def test_float64_is_saved_and_loaded(position_bias, tmp_path):
    model = tiny_model(position_bias=position_bias).double()
    for parameter in model.parameters():
        parameter.data += 1e-9
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype="auto").state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("mlp_depth", [1, 2])
def test_parameters_are_reset_on_any_device(mlp_depth):
    FirePositionBias(4, mlp_depth=mlp_depth).to("meta").reset_parameters()


def test_meta_device_and_back():
    bias = FirePositionBias(4, init_c=0.2, init_L=300.0).to("meta", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in bias.state_dict().values()} == {("meta", torch.float32)}
    for module in bias.to_empty(device="cpu").modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert [bias.c.item(), bias.L_multiplier.item(), bias.init_L.item()] == pytest.approx([0.2, 1.0, 300.0])
    assert bias(FirePositions.arange(9)).isfinite().all()


def test_copies_and_state_dicts_are_equal_and_independent():
    bias, positions = random_fire(), FirePositions.arange(20)
    expected = bias(positions)
    loaded = FirePositionBias(3, 5, init_L=99.0).double()
    loaded.load_state_dict(bias.state_dict())
    copied = copy.deepcopy(bias)
    nn.init.ones_(bias.c)
    assert torch.equal(loaded(positions), expected)
    assert torch.equal(copied(positions), expected)
    assert not torch.equal(bias(positions), expected)


def test_unused_parameters_do_not_exist():
    names = {name for name, _ in FirePositionBias(2, transform="identity", threshold=False).named_parameters()}
    assert names == {"mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"}
    assert all(p.ndim > 0 for p in FirePositionBias(2).parameters()), "FSDP2 refuses parameters without dimensions"
