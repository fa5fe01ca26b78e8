"""Set before anything imports Triton or Weights & Biases."""

import os

import torch


os.environ.setdefault("WANDB_MODE", "disabled")  # for "offline" transformers prints a line that no run of a user has
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU, in Python
