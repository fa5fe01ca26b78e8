"""Every layout in configuration/accelerate: those that run without GPUs are run, the others are loaded and checked."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT
from pretrain import pretrain
from pretrain_settings import Pretrain
from settings import read_fields


LAYOUTS = ROOT / "configuration" / "accelerate"


ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHONPATH": str(ROOT),
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
# Accelerate has FSDP for GPUs only. Here processes on the CPU pass for such, and say what they split.
CPU_AS_GPU = """
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed import fsdp

fully_shard = fsdp.fully_shard

def report(module, *args, **kwargs):
    print("split", type(module).__name__, flush=True)
    return fully_shard(module, *args, **kwargs)

fsdp.fully_shard = report
PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)
"""
# Slurm with two nodes, both of which are this machine.
SRUN = """#!/bin/bash
SLURM_NODEID=1 "${@:2}" &
SLURM_NODEID=0 "${@:2}" && wait $!
"""
SCONTROL = """#!/bin/bash
echo 127.0.0.1
"""


@pytest.mark.parametrize("path", sorted(LAYOUTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_layouts_load_and_name_no_machine(path):
    config = load_config_from_file(str(path))  # refuses unknown fields
    assert config.mixed_precision == "no", "the precision is said in one place, the YAML of the run"
    assert config.gpu_ids == ("0" if path.stem == "one_gpu" else None)
    assert config.main_process_ip is None and config.machine_rank == 0
    assert config.num_processes == {"cpu": 1, "one_gpu": 1, "two_cpu_processes": 2}.get(path.stem, -1)
    known = vars(launch_command_parser().parse_args(["script"]))
    blocks = {**config.fsdp_config, **config.deepspeed_config}
    assert set(blocks) <= set(known)
    kind = str(config.distributed_type).split(".")[-1]
    assert kind == {"cpu": "NO", "one_gpu": "NO", "fsdp2": "FSDP", "deepspeed_zero3": "DEEPSPEED"}.get(
        path.stem, "MULTI_GPU"
    )


@pytest.fixture
def settings(tmp_path) -> dict:
    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"Once there was a fox. {number:b} times " * 3}) + "\n" for number in range(60))
    )
    shape = {"vocab_size": 256, "hidden_size": 32, "intermediate_size": 64}
    shape |= {"num_hidden_layers": 2, "num_attention_heads": 2, "tie_word_embeddings": True}
    (tmp_path / "model.json").write_text(json.dumps(shape))
    return {
        "output_dir": str(tmp_path / "out"),
        "model": {"config": str(tmp_path / "model.json")},
        "tokenizer": "bytes",
        "data": {"train": str(tmp_path / "text.jsonl"), "held_out": str(tmp_path / "text.jsonl")},
        "length": 32,
        "batch_size": 8,
        "training": {
            "max_steps": 40,
            "per_device_train_batch_size": 2,
            "learning_rate": 0.005,
            "logging_steps": 1,
            "eval_strategy": "steps",
            "eval_steps": 20,
            "save_steps": 4,
            "save_total_limit": 2,
            "disable_tqdm": True,
        },
        "evaluation": {"contexts": [32, 64], "num_targets": 8, "num_windows": 4},
    }


def steps_saved(checkpoints: Path) -> int:
    """The step of the last whole checkpoint, or 0."""
    return max((int(path.parent.name.split("-")[1]) for path in checkpoints.glob("*/trainer_state.json")), default=0)


def run_and_kill(command: list, environment: dict, checkpoints: Path) -> None:
    """SIGKILL to a launch and all that it started, as soon as it has saved a checkpoint."""
    before = steps_saved(checkpoints)
    log = checkpoints.with_name("log")
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        process = psutil.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    deadline = time.monotonic() + 120
    while steps_saved(checkpoints) == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    for each in [process, *process.children(recursive=True)]:
        each.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL and before < steps_saved(checkpoints), log.read_text()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def as_gpus(folder: Path) -> dict:
    """The environment in which processes on the CPU pass for GPUs."""
    (folder / "sitecustomize.py").write_text(CPU_AS_GPU)
    path = os.pathsep.join([str(folder), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**ENVIRONMENT, "PYTHONPATH": path, "ACCELERATE_TORCH_DEVICE": "cpu", "DS_ACCELERATOR": "cpu"}


def assert_same_losses(result: dict, settings: dict) -> None:
    """As those of one process that is left alone."""
    alone = {**settings, "output_dir": settings["output_dir"] + "-alone"}
    alone["training"] = {**settings["training"], "per_device_train_batch_size": 8, "use_cpu": True}
    expected = pretrain(read_fields(Pretrain, alone))
    assert list(result["train_loss"]) == [str(step) for step in expected["train_loss"]]
    for step, loss in expected["train_loss"].items():
        assert result["train_loss"][str(step)] == pytest.approx(loss, rel=1e-3), step
    for step, losses in expected["eval_loss"].items():
        assert list(result["eval_loss"][str(step)].values()) == pytest.approx(list(losses.values()), rel=1e-3), step


def test_layouts_do_what_one_process_does_and_continue_each_other(settings, tmp_path):
    """
    One run, begun with two processes, killed, continued with FSDP2, killed, and ended on two nodes: every loss is that
    of one process which was left alone.
    """
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(settings))
    checkpoints = tmp_path / "out" / "checkpoints"

    launch = ["accelerate", "launch", "--config_file", str(LAYOUTS / "two_cpu_processes.yaml")]
    run_and_kill([*launch, "recipes/pretrain.py", str(run)], ENVIRONMENT, checkpoints)

    launch = ["accelerate", "launch", "--config_file", str(LAYOUTS / "fsdp2.yaml"), "--num_processes", "2"]
    run_and_kill([*launch, "recipes/pretrain.py", str(run), "training.use_cpu=false"], as_gpus(tmp_path), checkpoints)
    log = checkpoints.with_name("log").read_text()
    assert (log.count("split FireDecoderLayer"), log.count("split FireForCausalLM")) == (4, 2)

    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(content)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_JOB_NODELIST": "node[1-2]"}
    slurm |= {"SLURM_JOB_ID": str(free_port()), "PATH": f"{tmp_path}:{ENVIRONMENT['PATH']}"}
    ended = subprocess.run(
        ["bash", str(LAYOUTS / "several_nodes.slurm"), str(run)],
        cwd=ROOT,
        env={**ENVIRONMENT, **slurm},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr

    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["processes"] == 2

    assert_same_losses(result, settings)


def test_deepspeed_does_what_one_process_does(settings, tmp_path):
    """Killed and continued by as many processes, which DeepSpeed's checkpoints are for."""
    pytest.importorskip("deepspeed")
    settings["training"]["max_steps"] = 12
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(settings))
    launch = ["accelerate", "launch", "--config_file", str(LAYOUTS / "deepspeed_zero3.yaml"), "--num_processes", "2"]
    command = [*launch, "recipes/pretrain.py", str(run), "training.use_cpu=false"]
    run_and_kill(command, as_gpus(tmp_path), tmp_path / "out" / "checkpoints")
    ended = subprocess.run(command, cwd=ROOT, env=as_gpus(tmp_path), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert_same_losses(json.loads((tmp_path / "out" / "results.json").read_text()), settings)
