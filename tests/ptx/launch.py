"""Launches of Triton's kernels, compiled for a GPU that is not there, and run a block after the other."""

from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_fire import triton_fire

from .block import Block
from .memory import GlobalMemory
from .program import Program, translate


NAMES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
MEMORY = GlobalMemory()


class Compiled(NamedTuple):
    """A kernel for one kind of arguments, and the bytes of shared memory that it takes."""

    program: Program
    shared: int


class EmulatedKernel:
    """Stands in for a kernel of Triton: `kernel[grid](...)` runs what Triton makes of it for a GPU."""

    def __init__(self, kernel: Any, architecture: int):
        self.kernel, self.architecture = kernel, architecture
        self.compiled: dict[str, Compiled] = {}

    def __getitem__(self, grid: tuple[int]):
        return lambda *arguments, **named: self.launch(grid[0], arguments, named)

    def launch(self, blocks: int, arguments: tuple, named: dict[str, Any]) -> None:
        options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
        options |= {name: named.pop(name) for name in options if name in named}
        given = dict(zip(self.kernel.arg_names, arguments, strict=False)) | named
        signature, constants, attributes, parameters, ranges = {}, {}, {}, [], set()
        for index, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            # As Triton does it: 1 is compiled in, and so is that a number or an address is a multiple of 16.
            special = not parameter.do_not_specialize and isinstance(value, int | torch.Tensor)
            if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
                signature[parameter.name], constants[(index,)] = "constexpr", value
                continue
            signature[parameter.name], number = describe(value)
            parameters.append(number)
            if special and int(number) % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                ranges.add((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        key = str((signature, constants, attributes, options))
        if key not in self.compiled:
            source = ASTSource(self.kernel, signature, constants, attributes)
            made = triton.compile(source, target=GPUTarget("cuda", self.architecture, 32), options=options)
            self.compiled[key] = Compiled(translate(made.asm["ptx"]), made.metadata.shared)
        program, shared = self.compiled[key]
        parameters += [np.uint64(0)] * (len(program.parameters) - len(parameters))  # Triton's scratch memory: none
        MEMORY.allow(ranges)
        with np.errstate(all="ignore"):
            for index in range(blocks):
                program.run(Block(program.threads, index, parameters, shared, MEMORY))


def describe(value: Any) -> tuple[str, np.generic]:
    """The type that Triton gives an argument, and its bits."""
    if isinstance(value, torch.Tensor):
        return f"*{NAMES[value.dtype]}", np.uint64(value.data_ptr())
    if isinstance(value, float):
        return "fp32", np.float32(value).view(np.uint32)
    if -(2**31) <= value < 2**31:
        return "i32", np.int32(value).view(np.uint32)
    return "i64", np.int64(value).view(np.uint64)


def emulate(architecture: int) -> None:
    """Has the kernels of `triton_fire` run as PTX for a GPU, 80, 90 or 100: its compute capability, times ten."""
    for name, value in vars(triton_fire).items():
        if isinstance(value, triton.JITFunction) and value.__module__ != triton_fire.__name__:
            setattr(triton_fire, name, EmulatedKernel(value, architecture))
    compile_time = triton_fire.constants
    triton_fire.constants = lambda *arguments: compile_time(*arguments) | {"FAST": True}
    triton_fire.capability_and_processors = lambda device: (architecture // 10, 4)
