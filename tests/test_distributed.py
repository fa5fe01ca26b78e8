"""
Two processes compute what one does: tensor parallelism, FSDP2, DDP and pipeline parallelism over gloo, on the CPU.

Each test saves a model and has both ranks run one of the `check_` functions, which compares it with a whole copy.
"""

import datetime
import multiprocessing
import os
import traceback
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import transformers
from helpers import random_ids, tiny_config, tiny_model
from packaging.version import Version
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers.distributed import DistributedConfig

from modeling_fire import FireForCausalLM, FireForTokenClassification, FirePositionBias


WORLD_SIZE = 2
IDS = random_ids(4, 20)
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}


def needs_transformers(version: str, reason: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(Version(transformers.__version__) < Version(version), reason=reason)


def serve(rank: int, connection, folder: str) -> None:
    """Runs every function that comes down `connection` in a process group of its own; answers with its error."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD_SIZE))
    while (call := connection.recv()) is not None:
        number, function, args = call
        # A file for the rendezvous: unlike a port, it cannot be taken by another process.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/{number}",
            rank=rank,
            world_size=WORLD_SIZE,
            timeout=datetime.timedelta(seconds=60),
        )
        error = None
        try:
            function(*args)
        except Exception:
            error = traceback.format_exc()
        dist.destroy_process_group()
        connection.send(error)


@pytest.fixture(scope="module")
def on_both_ranks(tmp_path_factory):
    """A function that runs `function(*args)` on both ranks and fails where one of them does."""
    folder = str(tmp_path_factory.mktemp("rendezvous"))
    context = multiprocessing.get_context("spawn")
    connections, ranks = [], []
    with mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"):
        for rank in range(WORLD_SIZE):
            ours, theirs = context.Pipe()
            connections.append(ours)
            ranks.append(context.Process(target=serve, args=(rank, theirs, folder), daemon=True))
            ranks[-1].start()
    calls = []

    def run(function, *args):
        calls.append(function)
        for connection in connections:
            connection.send((len(calls), function, args))
        errors = []
        for rank, connection in enumerate(connections):
            assert connection.poll(180), f"rank {rank} hangs"
            errors.append(connection.recv())
        assert errors == [None] * WORLD_SIZE, "\n".join(f"rank {rank}: {error}" for rank, error in enumerate(errors))

    yield run
    for connection, rank in zip(connections, ranks, strict=True):
        connection.send(None)
        rank.join(20)
        rank.kill()  # if it hangs


@pytest.fixture
def save(tmp_path):
    """A function that saves the model of some changes to `tiny_config` and returns the folder."""

    def save_model(model_class=FireForCausalLM, **changes) -> str:
        # A start in which heads differ; a vocabulary that transformers 5.17 can split.
        fields = {"fire_init_f": "uniform", "vocab_size": 100, **changes}
        tiny_model(model_class, **fields).save_pretrained(tmp_path)
        return str(tmp_path)

    return save_model


def load_distributed(model_class, folder: str, **sizes):
    return model_class.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_parameters(model) -> dict[str, torch.Tensor]:
    return {name.removeprefix("module."): whole(p.detach()) for name, p in model.named_parameters()}


def assert_same_gradients(model, reference, tolerance: float = 1e-4):
    """Within `tolerance` times the largest entry of each gradient, so that no factor goes unnoticed."""
    found = {name.removeprefix("module."): whole(p.grad) for name, p in model.named_parameters()}
    assert found.keys() == {name for name, _ in reference.named_parameters()}
    for name, parameter in reference.named_parameters():
        scale = parameter.grad.abs().max().item()
        if scale < 1e-6:  # what a softmax ignores: the output bias of FIRE and the bias of the keys
            assert name.endswith(("position_bias.mlp.2.bias", "position_bias.mlp.4.bias", "k_proj.bias")), name
        error = (found[name] - parameter.grad).abs().max().item()
        assert error <= max(tolerance * scale, 1e-6), f"{name}: off by {error}, where the largest entry is {scale}"


def padded_mask() -> torch.Tensor:
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    return mask


def check_tensor_parallel(folder, attn_implementation):
    model = load_distributed(FireForCausalLM, folder, tp_size=WORLD_SIZE)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.to_local().shape[0] * WORLD_SIZE == weight.shape[0]

    arguments = {"attention_mask": padded_mask(), "max_new_tokens": 5, "do_sample": False}
    logits, tokens = [], []
    for each in (model, FireForCausalLM.from_pretrained(folder)):
        each.set_attn_implementation(attn_implementation)
        with torch.no_grad():
            logits.append(each(IDS, attention_mask=padded_mask()).logits)
        tokens.append(each.generate(IDS, **arguments))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(*tokens)


def check_tensor_parallel_gradients(folder, model_class, attn_implementation):
    labels = (IDS % 2 if model_class is FireForTokenClassification else IDS).where(padded_mask().bool(), -100)
    models = load_distributed(model_class, folder, tp_size=WORLD_SIZE), model_class.from_pretrained(folder)
    for each in models:
        each.set_attn_implementation(attn_implementation)
        each(IDS, attention_mask=padded_mask(), labels=labels).loss.backward()
    assert_same_gradients(*models)


TENSOR_PARALLEL = pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attn_implementation": "eager"},
        {"fire_share_layers": True},
        {"fire_mlp_depth": 2, "fire_threshold": False},
        {"qk_norm": True, "num_key_value_heads": 4},
        {"position_bias": "kerple_log"},
        {"position_bias": "t5", "fire_share_layers": True},
        {"position_bias": "alibi"},
        {"position_bias": "none", **ROPE},
        {"tie_word_embeddings": True},
        {"norm_type": "layer_norm", "attention_bias": True, "mlp_bias": True, "mlp_gated": False},
    ],
    ids=str,
)


@TENSOR_PARALLEL
def test_tensor_parallel(on_both_ranks, save, changes):
    on_both_ranks(check_tensor_parallel, save(**changes), changes.get("attn_implementation", "fire"))


@TENSOR_PARALLEL
@pytest.mark.parametrize("model_class", [FireForCausalLM, FireForTokenClassification])
@needs_transformers("5.22", "transformers did not sum the gradients of the position bias over the ranks")
def test_tensor_parallel_gradients(on_both_ranks, save, changes, model_class):
    folder = save(model_class, **changes)
    on_both_ranks(check_tensor_parallel_gradients, folder, model_class, changes.get("attn_implementation", "fire"))


def check_steps(model, reference):
    """Each rank takes its part of the batch, the reference all of it."""
    # Two steps, because DDP reports a parameter without a gradient in the step after. In bfloat16 rounded weights
    # soon drift apart.
    steps, tolerance = (1, 0.02) if reference.dtype == torch.bfloat16 else (2, 1e-4)
    part = IDS[dist.get_rank() :: WORLD_SIZE]
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
    for _ in range(steps):
        model(part, labels=part).loss.backward()
        reference(IDS, labels=IDS).loss.backward()
        assert_same_gradients(model, reference, tolerance)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(whole_parameters(model), whole_parameters(reference), rtol=tolerance, atol=tolerance)


def check_fsdp(folder):
    model = load_distributed(FireForCausalLM, folder, fsdp_size=WORLD_SIZE)
    reference = FireForCausalLM.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), name
        assert parameter.dtype == (torch.float32 if "position_bias" in name else reference.dtype), name
    check_steps(model, reference)


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        pytest.param("bfloat16", marks=needs_transformers("5.23", "transformers put two types into one FSDP2 unit")),
    ],
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fire_share_layers": True},
        {"position_bias": "t5"},
        {"position_bias": "alibi"},
    ],
    ids=str,
)
def test_fsdp(on_both_ranks, save, changes, dtype):
    on_both_ranks(check_fsdp, save(**changes, dtype=dtype))


def check_fsdp_start(folder):
    model = load_distributed(FireForCausalLM, folder, fsdp_size=WORLD_SIZE)
    start = whole_parameters(model)
    for name, expected in FireForCausalLM(model.config).model.layers[0].self_attn.position_bias.named_parameters():
        found = start[f"model.layers.0.self_attn.position_bias.{name}"]
        torch.testing.assert_close(found, expected.detach(), rtol=0, atol=0.05)  # parts of the start are random


def test_fsdp_starts_a_missing_position_bias(on_both_ranks, save):
    folder = save(position_bias="none")
    config = tiny_config(vocab_size=100)
    config.save_pretrained(folder)
    on_both_ranks(check_fsdp_start, folder)


def test_position_bias_is_built_under_zero3(monkeypatch):
    """DeepSpeed's ZeRO-3 takes the values of every module away as soon as its constructor ends."""
    build = torch.nn.Linear.__init__

    def build_and_partition(self, *args, **kwargs):
        build(self, *args, **kwargs)
        for parameter in self.parameters():
            parameter.data = torch.empty(0)

    monkeypatch.setattr(torch.nn.Linear, "__init__", build_and_partition)
    FirePositionBias(num_heads=4)


def check_fsdp_units(folder, units):
    model = FireForCausalLM.from_pretrained(folder)
    for module in reversed(list(model.modules())):
        if type(module).__name__ in units:
            fully_shard(module)
    fully_shard(model)
    check_steps(model, FireForCausalLM.from_pretrained(folder))


@pytest.mark.parametrize(
    "units, dtype",
    [
        (["FireDecoderLayer"], "float32"),
        # FSDP2 wants one type in a unit: beside bfloat16 weights the bias, which stays float32, is one of its own.
        (["FireDecoderLayer", "FirePositionBias"], "bfloat16"),
    ],
)
@pytest.mark.parametrize("changes", [{}, {"fire_share_layers": True}, {"tie_word_embeddings": True}], ids=str)
def test_fsdp_with_classes_as_units(on_both_ranks, save, changes, units, dtype):
    """As Accelerate does with `fsdp_transformer_layer_cls_to_wrap`."""
    on_both_ranks(check_fsdp_units, save(**changes, dtype=dtype), units)


def check_ddp(folder, gradient_checkpointing):
    model, reference = FireForCausalLM.from_pretrained(folder).train(), FireForCausalLM.from_pretrained(folder)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    check_steps(DistributedDataParallel(model), reference)


@pytest.mark.parametrize("gradient_checkpointing", [False, True], ids=["", "gradient_checkpointing"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"fire_share_layers": True},
        {"fire_transform": "identity"},
        {"fire_threshold": False},
        {"fire_threshold": False, "fire_progressive": False},
        {"position_bias": "kerple_log"},
        {"position_bias": "kerple_power"},
        {"position_bias": "t5"},
        {"position_bias": "alibi"},
        {"position_bias": "sandwich"},
        {"position_bias": "none", **ROPE},
    ],
    ids=str,
)
def test_ddp(on_both_ranks, save, changes, gradient_checkpointing):
    """DDP refuses a model with parameters that get no gradient."""
    on_both_ranks(check_ddp, save(**changes), gradient_checkpointing)


def check_pipeline_parallel(folder):
    model = load_distributed(FireForCausalLM, folder, pp_size=WORLD_SIZE)
    reference = FireForCausalLM.from_pretrained(folder)
    assert len(list(model.model.layers.parameters())) < len(list(reference.model.layers.parameters()))
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(IDS, **arguments), reference.generate(IDS, **arguments))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 3},
        {"fire_share_layers": True},
        {"embedding_norm": True},
        {"tie_word_embeddings": True, "dtype": "bfloat16"},
        {"position_bias": "none", **ROPE},
    ],
    ids=str,
)
def test_pipeline_parallel(on_both_ranks, save, changes):
    """Without padding: transformers makes the mask of a later stage from a cache that is empty there, LLaMA's too."""
    on_both_ranks(check_pipeline_parallel, save(**changes))
