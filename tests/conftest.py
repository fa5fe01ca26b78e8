"""Set before anything imports Triton or Weights & Biases."""

import os

import torch


os.environ.setdefault("WANDB_MODE", "disabled")  # for "offline" transformers prints a line that no run of a user has
if "EMULATED_SM" in os.environ:  # kernels are compiled for that GPU, and their PTX runs on the CPU
    os.environ |= {"TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    from ptx.launch import emulate

    emulate(int(os.environ["EMULATED_SM"]))
    os.environ["TRITON_INTERPRET"] = "1"  # so that tensors on the CPU may come to them
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, in Python
