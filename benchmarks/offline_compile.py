"""
Compiles every shipped configuration of the Triton kernels for given GPUs, without a GPU, and reads the machine code.

    python benchmarks/offline_compile.py [--arch 80 90 100] [--form fire general ...] [--kernel forward ...]

For each: registers, bytes of stack, accesses to it (spills) in the loop over tiles, shared memory; and how many
instructions a lane issues for each element of a tile, of which how many are special functions, on the shortest way
around that loop, which is the way of a tile without knots or mask. Exits with 1 if a loop over tiles spills or is not
recognised, a kernel wants more shared memory than the GPU has, or products of float32 are rounded. Of time it says
nothing: nothing is run.
"""

import argparse
import heapq
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_fire.triton_backward_fire import _delta_kernel, _key_gradient_kernel, _query_gradient_kernel
from modeling_fire.triton_fire import GROUP_BLOCK, HEAD_DIMS, Blocks, block_sizes, is_heavy, power_of_two
from modeling_fire.triton_forward_fire import _combine_kernel, _decode_kernel, _forward_kernel
from modeling_fire.triton_tiles_fire import _plan_kernel


# KiB of shared memory that one block may use.
SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
KERNELS = {
    "forward": _forward_kernel,
    "query": _query_gradient_kernel,
    "key": _key_gradient_kernel,
    "decode": _decode_kernel,
    "token": _decode_kernel,
    "plan": _plan_kernel,
    "delta": _delta_kernel,
    "combine": _combine_kernel,
}
POINTERS = {"ROWS": "*i32", "BLOCKS": "*i32", "EDGES": "*i32", "KEYS": "*i64", "VISIBLE": "*i1"}
POINTERS |= {"QUERY": "*i64", "FIRST": "*i64", "LAST": "*i64", "ABSOLUTE": "*i64", "EXCESS": "*fp64"}
DATA_POINTERS = {"Q", "K", "V", "OUT", "GRAD", "DQ", "DK", "DV"}
MATRIX_INSTRUCTIONS = ("HGMMA", "HMMA", "UTCHMMA", "UTCMMA")


class Form(NamedTuple):
    """What else a kernel is compiled for: the bias, and whether keys stand anywhere or one after the other."""

    transform: str
    knots: int
    general: bool = False
    c_per_head: bool = False


FORMS = {
    "fire": Form("log", 32),
    "general": Form("log", 32, general=True),
    "power": Form("power", 32),
    "identity": Form("identity", 32),
    "alibi": Form("identity", 0),
    "kerple-l": Form("log", 0, c_per_head=True),
    "kerple-p": Form("power", 0, c_per_head=True),
    "none": Form("none", 0),
}
LOOPING = ("forward", "query", "key", "decode", "token")


class Case(NamedTuple):
    """One compilation."""

    arch: int
    form: str
    kernel: str
    dtype: str
    head_dim: int
    blocks: Blocks


class Loop(NamedTuple):
    """A loop of a kernel: where it is, its instructions by name, and those on the shortest way around it."""

    place: range
    body: Counter
    shortest: Counter


class Code(NamedTuple):
    """What a compilation came to."""

    registers: int
    stack: int
    shared: int
    rounded: bool  # whether products of float32 are in TF32
    hot_loops: list[Loop]

    @property
    def spills(self) -> int:
        """Local memory accesses in hot loops."""
        return sum(loop.body["STL"] + loop.body["LDL"] for loop in self.hot_loops)


def shipped_cases(arch: int) -> Iterator[Case]:
    """Every entry of the tables of block sizes, in every form; and the small kernels, without a loop over tiles."""
    types = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
    for form, (name, dtype), kernel, head_dim in product(FORMS, types.items(), LOOPING, HEAD_DIMS):
        heavy = is_heavy(FORMS[form].transform, not FORMS[form].general, FORMS[form].c_per_head)
        sizes = block_sizes("decode" if kernel == "token" else kernel, dtype, head_dim, arch // 10, heavy)
        if kernel != "token" or FORMS[form].knots:
            yield Case(arch, form, kernel, name, head_dim, sizes)
    for form in FORMS:
        yield Case(arch, form, "plan", "bf16", 64, Blocks(128, 64, 4, 1))
    for kernel in ("delta", "combine"):
        yield Case(arch, "fire", kernel, "bf16", 64, Blocks(128, 64, 4, 1))


def compile_case(case: Case) -> Any:
    """The kernel as Triton compiles it for bias gradients, tensors aligned to 16 bytes."""
    function, form = KERNELS[case.kernel], FORMS[case.form]
    constants: dict[str, Any] = {
        "TRANSFORM": form.transform,
        "GENERAL": form.general,
        "FAST": True,
        "BIAS_GRAD": form.transform != "none",
        "C_PER_HEAD": form.c_per_head,
        "HEAD_DIM": case.head_dim,
        "ROW_BLOCK": case.blocks.rows,
        "COLUMN_BLOCK": case.blocks.columns,
        "DIM_BLOCK": power_of_two(case.head_dim),
        "KNOT_BLOCK": power_of_two(form.knots),
        "SEGMENT_BLOCK": power_of_two(form.knots + 1),
        "GROUP_BLOCK": GROUP_BLOCK,
        "SPLIT_BLOCK": 64,
        "SCAN_BLOCK": 128,
    }
    if not form.general:
        constants |= {"KEYS": None, "VISIBLE": None}
    if case.kernel == "decode":
        constants |= {"ABSOLUTE": None}
    if case.dtype == "fp32" or form.transform == "none":
        constants |= {"EXCESS": None, "GRID": None}
    signature, values, attributes = {}, {}, {}
    for index, name in enumerate(function.arg_names):
        if name in constants:
            signature[name], values[(index,)] = "constexpr", constants[name]
            continue
        if name.isupper():
            data = f"*{case.dtype}" if name in DATA_POINTERS else "*fp32"
            signature[name] = POINTERS.get(name, data)
        else:
            signature[name] = "fp32" if name in ("scaling", "tolerance", "eps") else "i32"
        if name.isupper() or name.endswith(("_batch", "_head", "_row")):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, values, attributes)
    options = {"num_warps": case.blocks.warps, "num_stages": case.blocks.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)


def tool(name: str, *arguments: str) -> str:
    """What one of the tools that come with Triton prints."""
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def read_code(compiled: Any) -> Code:
    """Registers, stack and loops from the machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        listing = tool("nvdisasm", "-c", file.name)
    registers, stack = (int(re.search(rf"{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK"))
    rounded = "tf32" in compiled.asm["ptx"]
    return Code(registers, stack, compiled.metadata.shared, rounded, hot_loops(find_loops(listing)))


def hot_loops(loops: list[Loop]) -> list[Loop]:
    """The innermost loops with both products of attention; on CUDA cores (float32), with many multiply-adds."""
    hot = [loop for loop in loops if sum(loop.body[name] for name in MATRIX_INSTRUCTIONS) > 1]
    hot = hot or [loop for loop in loops if loop.shortest["FFMA"] + 2 * loop.shortest["FFMA2"] > 100]
    hot = [loop for loop in hot if loop.shortest]
    return [loop for loop in hot if not any(set(other.place) < set(loop.place) for other in hot)]


def find_loops(listing: str) -> list[Loop]:
    """
    The loops of a listing: from the target of each backward branch to the branch. What comes back from behind the end
    of the kernel, where code for rare cases is put, is no loop.
    """
    names: list[str] = []
    targets: dict[int, str] = {}
    labels: dict[str, int] = {}
    always: set[int] = set()
    exits: set[int] = set()
    for line in listing.splitlines():
        if place := re.match(r"\s*(\.L_x_\d+):", line):
            labels[place.group(1)] = len(names)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?(.*?);", line):
            predicate, text = instruction.groups()
            name = text.split()[0]
            if (target := re.search(r"(\.L_x_\d+)", text)) and name.startswith("BRA"):
                targets[len(names)] = target.group(1)
                # A branch on a condition may name its predicate as an operand.
                if predicate is None and name != "BRA.DIV" and not re.search(r"!?U?P\d", text):
                    always.add(len(names))
            if name.startswith("EXIT") and predicate is None:
                exits.add(len(names))
            names.append(name if name.startswith("MUFU") else name.split(".")[0])
    loops = []
    for branch, label in targets.items():
        inside = range(labels[label], branch + 1)
        if inside and exits.isdisjoint(inside):
            way = shortest_way(labels[label], branch, targets, labels, always)
            loops.append(Loop(inside, Counter(names[i] for i in inside), Counter(names[i] for i in way)))
    return loops


def shortest_way(start: int, end: int, targets: dict[int, str], labels: dict[str, int], always: set[int]) -> list[int]:
    """The instructions on the way from `start` to `end` that passes the fewest."""
    queue, came_from = [(0, start, start)], {}
    while queue:
        length, at, previous = heapq.heappop(queue)
        if at in came_from:
            continue
        came_from[at] = previous
        if at == end:
            break
        following = [] if at in always else [at + 1]
        if at in targets:
            following.append(labels[targets[at]])
        for after in following:
            if start <= after <= end and after not in came_from:
                heapq.heappush(queue, (length + 1, after, at))
    way = [end]
    while way[-1] != start:
        if way[-1] not in came_from:
            return []
        way.append(came_from[way[-1]])
    return way


def fault(case: Case, code: Code) -> str:
    """What is wrong with the code, or nothing."""
    if code.shared > SHARED_MEMORY[case.arch] * 1024:
        return "too much shared memory"
    if code.spills:
        return "spills"
    if code.rounded:
        return "products in TF32"
    return "no loop over tiles recognised" if case.kernel in LOOPING and not code.hot_loops else ""


def describe(case: Case, code: Code) -> str:
    """One line of the table."""
    elements = case.blocks.rows * case.blocks.columns / (32 * case.blocks.warps)
    if case.kernel in ("decode", "token"):
        elements = GROUP_BLOCK * case.blocks.columns / (32 * case.blocks.warps)
    loops = []
    for loop in code.hot_loops:
        way = loop.shortest
        special = sum(count for name, count in way.items() if name.startswith("MUFU"))
        loops.append(f"{way.total() / elements:.1f} ({special / elements:.2f})")
    blocks = f"{case.blocks.rows}x{case.blocks.columns}"
    line = (
        f"sm_{case.arch:<4} {case.form:8} {case.kernel:8} {case.dtype:5} {case.head_dim:>4} {blocks:>8}"
        f" {case.blocks.warps:>3} {case.blocks.stages:>3} {code.registers:>5} {code.stack:>6} {code.spills:>6}"
        f" {code.shared:>7}  " + ", ".join(loops)
    )
    return line + (f"  <-- {wrong}" if (wrong := fault(case, code)) else "")


HEADER = (
    "arch    form     kernel   dtype  dim     tile   w  st  regs  stack spills  shared"
    "  instructions an element (special functions)"
)


def examine(case: Case) -> tuple[str, bool]:
    """The line of a case, and whether it will do."""
    code = read_code(compile_case(case))
    return describe(case, code), not fault(case, code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--form", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--kernel", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--head_dim", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], help="bf16, fp16 (the same code), fp32")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    print(HEADER)
    cases = [case for arch in options.arch for case in shipped_cases(arch)]
    for field in ("form", "kernel", "head_dim", "dtype"):
        cases = [case for case in cases if getattr(case, field) in getattr(options, field)]
    good = True
    with ProcessPoolExecutor(options.processes, mp_context=get_context("spawn")) as pool:
        for line, fits in pool.map(examine, cases):
            print(line, flush=True)
            good &= fits
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
