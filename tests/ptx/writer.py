"""Instructions as Python: operations of numpy, on a value of each thread."""

import re
from typing import Any

import numpy as np

from .parse import Statement
from .values import LANES


# Registers by the letters of their names. Bits are kept; a type is how an instruction looks at them.
REGISTERS = {"p": "bool", "rs": "uint16", "r": "uint32", "rd": "uint64"}
TYPES = {"pred": "bool", "u8": "uint8", "b8": "uint8", "f16": "float16"}
TYPES |= {f"{kind}{bits}": f"uint{bits}" for kind in "ub" for bits in (16, 32, 64)}
TYPES |= {f"s{bits}": f"int{bits}" for bits in (16, 32, 64)}
TYPES |= {"f32": "float32", "f64": "float64", "f32x2": "float32"}
WIDER = {"s16": "int32", "u16": "uint32", "s32": "int64", "u32": "uint64"}
SPECIAL = {"%tid.x": "block.thread", "%ctaid.x": "block.index"}
# What an instruction computes of its operands, all of one type.
FORMS = {
    "add": "{0} + {1}",
    "sub": "{0} - {1}",
    "rem": "np.fmod({0}, {1})",
    "abs": "np.abs({0})",
    "neg": "-{0}",
    "ex2": "block.exp2({0})",
    "lg2": "block.log2({0})",
    "rcp": "block.reciprocal({0})",
    "sqrt": "block.square_root({0})",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "not": "~{0}",
    "prmt": "block.permute_bytes({0}, {1}, {2})",
}
# What the threads of a warp do together, with several results.
TOGETHER = ("ldmatrix", "stmatrix", "mma", "wgmma")
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
ROUNDINGS = {"rzi": "np.trunc", "rni": "np.rint", "rmi": "np.floor", "rpi": "np.ceil"}


class Writer:
    """Writes the statements of a section. Constants become arrays, made once for a program."""

    def __init__(self, program: Any, apart: bool):
        self.program, self.apart, self.threads = program, apart, program.threads

    def statement(self, statement: Statement) -> str:
        opcode, *suffixes = statement.opcode.split(".")
        where = statement.predicate.replace("!", "~").replace("%", "") or None
        if opcode in ("bra", "ret"):
            end = self.program.labels[statement.operands[0]] if opcode == "bra" else len(self.program.sections)
            return f"place = np.where({where}, {end}, place)" if where else f"place = {end}"
        if self.apart:
            if opcode in TOGETHER:
                raise NotImplementedError(f"{self.program.name}: {statement.opcode} by some of the threads.")
            where = f"active & {where}" if where else "active"
        if opcode in FORMS:
            return self.combined(suffixes, statement.operands, where, FORMS[opcode])
        write = getattr(self, f"write_{opcode}", None)
        if write is None:
            raise NotImplementedError(f"{self.program.name}: {statement.opcode} {statement.operands} is unknown.")
        return write(suffixes, statement.operands, where)

    # ------------------------------------------------------------ operands

    def constant(self, value: np.generic) -> str:
        constants = self.program.constants
        name = f"k{len(constants)}"
        constants[name] = np.full(self.threads, value)
        return name

    def read(self, operand: str, kind: str) -> str:
        """An operand as values of a type of PTX."""
        dtype = np.dtype(TYPES[kind])
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand.startswith("%"):
            register = register_name(operand)
            kept = np.dtype(REGISTERS[letters(register)])
            bits = f"uint{8 * dtype.itemsize}"
            whole = kept.itemsize == dtype.itemsize or kind == "f32x2"  # two, of which numpy sees twice as many
            narrowed = register if whole else f"{register}.astype(np.{bits})"
            return narrowed if dtype in (kept, bits) else f"{narrowed}.view(np.{dtype})"
        if operand == "global_smem":
            return self.constant(dtype.type(0))
        if operand.startswith(("0f", "0d")):
            bits = np.array(int(operand[2:], 16), f"uint{8 * dtype.itemsize}")
        elif kind == "pred":
            return self.constant(np.bool_(int(operand, 0) != 0))
        else:
            number = int(operand.removesuffix("U"), 0)
            bits = np.array(number % 2 ** (8 * dtype.itemsize), f"uint{8 * dtype.itemsize}")
        return self.constant(bits.view(dtype)[()])

    def address(self, operand: str, kind: str) -> str:
        """`[register + offset]`."""
        base, _, offset = operand.strip("[] ").replace(" ", "").partition("+")
        base = self.read(base, kind)
        return f"({base} + {self.read(offset, kind)})" if offset not in ("", "0") else base

    def result(self, operand: str, expression: str, where: str | None) -> str:
        """An assignment of values of any type to a register."""
        register = register_name(operand)
        kept = REGISTERS[letters(register)]
        bits = expression if kept == "bool" else f"({expression}).view(np.{kept})"
        return f"{register} = {bits}" if where is None else f"{register} = np.where({where}, {bits}, {register})"

    def combined(self, suffixes: list[str], operands: list[str], where: str | None, form: str) -> str:
        """A result by a form with `{0}`, `{1}`, ... for the operands, all of the type of the last suffix."""
        values = [self.read(operand, suffixes[-1]) for operand in operands[1:]]
        return self.result(operands[0], form.format(*values), where)

    # ------------------------------------------------------------ arithmetic

    def write_mul(self, suffixes, operands, where):
        return self.combined(suffixes, operands, where, self.product(suffixes))

    def write_mad(self, suffixes, operands, where):
        last = self.read(operands[3], widened(suffixes))
        return self.combined(suffixes, operands[:3], where, f"{self.product(suffixes)} + {last}")

    def product(self, suffixes: list[str]) -> str:
        if "hi" in suffixes:
            raise NotImplementedError("The upper half of a product.")
        wider = WIDER[suffixes[-1]] if "wide" in suffixes else None
        return f"{{0}}.astype(np.{wider}) * {{1}}.astype(np.{wider})" if wider else "{0} * {1}"

    def write_fma(self, suffixes, operands, where):
        if suffixes[-2:] == ["f32", "bf16"]:  # products of the latter, added to the former
            a, b = (f"from_bf16({self.read(operand, 'b16')})" for operand in operands[1:3])
            return self.result(operands[0], f"block.multiply_add({a}, {b}, {self.read(operands[3], 'f32')})", where)
        form = "{0} * {1} + {2}" if suffixes[-1] == "f64" else "block.multiply_add({0}, {1}, {2})"
        return self.combined(suffixes, operands, where, form)

    def write_div(self, suffixes, operands, where):
        if suffixes[-1] == "f32":
            return self.combined(suffixes, operands, where, "block.divide({0}, {1})")
        return self.combined(suffixes, operands, where, f"np.trunc({{0}} / {{1}}).astype(np.{TYPES[suffixes[-1]]})")

    def write_min(self, suffixes, operands, where):
        return self.extreme("min", suffixes, operands, where)

    def write_max(self, suffixes, operands, where):
        return self.extreme("max", suffixes, operands, where)

    def extreme(self, name, suffixes, operands, where):
        function = f"np.f{name}" if suffixes[-1][0] == "f" and "NaN" not in suffixes else f"np.{name}imum"
        if "xorsign" in suffixes:
            return self.combined(
                suffixes, operands, where,
                f"np.copysign({function}(np.abs({{0}}), np.abs({{1}})), {{0}} * np.copysign(np.float32(1), {{1}}))",
            )  # fmt: skip
        form = "{f}({0}, {1})" if len(operands) == 3 else "{f}({f}({0}, {1}), {2})"
        return self.combined(suffixes, operands, where, form.replace("{f}", function))

    # ------------------------------------------------------------ bits

    def write_shl(self, suffixes, operands, where):
        return self.shifted("<<", suffixes, operands, where)

    def write_shr(self, suffixes, operands, where):
        return self.shifted(">>", suffixes, operands, where)

    def shifted(self, sign, suffixes, operands, where):
        value, count, dtype = self.read(operands[1], suffixes[-1]), self.read(operands[2], "u32"), TYPES[suffixes[-1]]
        most = 8 * np.dtype(dtype).itemsize - 1
        shifted = f"{value} {sign} np.minimum({count}, np.uint32({most})).astype(np.{dtype})"
        if suffixes[-1][0] != "s":  # a signed number shifted away leaves its sign
            shifted = f"np.where({count} > {most}, np.{dtype}(0), {shifted})"
        return self.result(operands[0], shifted, where)

    def write_bfe(self, suffixes, operands, where):
        dtype = TYPES[suffixes[-1]]
        bits, start, count = 8 * np.dtype(dtype).itemsize, int(operands[2], 0), int(operands[3], 0)
        up, down = f"np.{dtype}({bits - start - count})", f"np.{dtype}({bits - count})"
        return self.combined(suffixes, operands[:2], where, f"{{0}} << {up} >> {down}")

    # ------------------------------------------------------------ choice and moving

    def write_selp(self, suffixes, operands, where):
        values = f"{self.read(operands[1], suffixes[-1])}, {self.read(operands[2], suffixes[-1])}"
        return self.result(operands[0], f"np.where({register_name(operands[3])}, {values})", where)

    def write_setp(self, suffixes, operands, where):
        comparison, *others, kind = suffixes
        if [other for other in others if other != "ftz"]:
            raise NotImplementedError(f"A comparison {suffixes}.")
        a, b = (self.read(operand, kind) for operand in operands[1:3])
        unordered = f"(np.isnan({a}) | np.isnan({b}))"
        if comparison in ("num", "nan"):
            return self.result(operands[0], ("~" if comparison == "num" else "") + unordered, where)
        if kind[0] == "f" and comparison.endswith("u"):
            return self.result(operands[0], f"({a} {COMPARISONS[comparison[:-1]]} {b}) | {unordered}", where)
        form = f"{a} {COMPARISONS[comparison]} {b}"
        if kind[0] == "f" and comparison == "ne":  # false beside NaN
            form = f"({form}) & ~{unordered}"
        return self.result(operands[0], form, where)

    def write_mov(self, suffixes, operands, where):
        kind, (target, source) = suffixes[-1], operands
        half = {"b32": 16, "b64": 32}.get(kind)
        if target.startswith("{"):
            value = self.read(source, kind)
            values = f"{value}.astype(np.uint{half})", f"({value} >> {half}).astype(np.uint{half})"
            wanted = [pair for pair in zip(parts(target), values, strict=True) if pair[0] != "_"]
            return "; ".join(self.result(*pair, where) for pair in wanted)
        if source.startswith("{"):
            low, high = (f"{self.read(part, f'b{half}')}.astype(np.{TYPES[kind]})" for part in parts(source))
            return self.result(target, f"{low} | {high} << np.{TYPES[kind]}({half})", where)
        return self.combined(suffixes, operands, where, "{0}")

    def write_cvt(self, suffixes, operands, where):
        *rounding, target, source = suffixes
        values = [self.read(operand, "b16" if source == "bf16" else source) for operand in operands[1:]]
        if source == "bf16":
            values = [f"from_bf16({values[0]})"]
        if target in ("bf16x2", "f16x2"):
            high, low = (to_half(value, target[:-2]) for value in values)
            return self.result(operands[0], f"{high}.astype(np.uint32) << np.uint32(16) | {low}", where)
        if target in ("bf16", "f16"):
            return self.result(operands[0], to_half(values[0], target), where)
        dtype = TYPES[target]
        if rounding and rounding[0] in ROUNDINGS:
            values = [f"{ROUNDINGS[rounding[0]]}({values[0]})"]
            if target[0] != "f":  # saturating, and 0 for NaN
                limits = np.iinfo(dtype)
                values = [f"np.clip(np.nan_to_num({values[0]}.astype(float)), {limits.min}, {limits.max})"]
        return self.result(operands[0], f"{values[0]}.astype(np.{dtype})", where)

    # ------------------------------------------------------------ memory

    def write_ld(self, suffixes, operands, where):
        target, source = operands
        if suffixes[0] == "param":
            number = int(re.search(r"_param_(\d+)", source)[1])
            kept = REGISTERS[letters(register_name(target))]
            value = f"np.full({self.threads}, block.parameters[{number}]).view(np.int{{}}).astype(np.{kept})"
            signed = value.format(TYPES[suffixes[-1]][-2:])
            return f"{register_name(target)} = {signed}"
        registers = register_names(target)
        size = np.dtype(TYPES[suffixes[-1]]).itemsize
        names = f"[{', '.join(registers)}]"
        return f"{names} = block.load_{self.space(suffixes, source)}, {size}, {names}, {where})"

    def write_st(self, suffixes, operands, where):
        kind = suffixes[-1]
        values = ", ".join(self.read(part, kind) for part in parts(operands[1]))
        size = np.dtype(TYPES[kind]).itemsize
        return f"block.store_{self.space(suffixes, operands[0])}, {size}, [{values}], {where})"

    def space(self, suffixes: list[str], address: str) -> str:
        space, kind = suffixes[0], "u64" if suffixes[0] == "global" else "u32"
        return f"{space}({self.address(address, kind)}"

    def write_atom(self, suffixes, operands, where):
        if "add" not in suffixes or suffixes[-1][0] != "f":
            raise NotImplementedError(f"An atomic operation {suffixes}.")
        value = self.read(operands[-1], suffixes[-1])
        return f"block.add_global({self.address(operands[-2], 'u64')}, {value}, {where})"

    write_red = write_atom

    def write_cp(self, suffixes, operands, where):
        if "commit_group" in suffixes:
            return "block.close_group()"
        if "wait_group" in suffixes:
            return f"block.wait_for_groups({operands[0]})"
        target, source = self.address(operands[0], "u32"), self.address(operands[1], "u64")
        size = int(operands[2], 0)
        read = self.read(operands[3] if len(operands) > 3 else str(size), "u32")
        return f"block.copy_async({target}, {source}, {size}, {read}, {where})"

    def write_bar(self, suffixes, operands, where):
        if "warp" in suffixes:
            return "pass"
        if operands != ["0"]:
            raise NotImplementedError("A barrier of some of the threads.")
        return "block.barrier()"

    def write_fence(self, suffixes, operands, where):
        return "block.fence()"

    # ------------------------------------------------------------ sm_100

    def write_elect(self, suffixes, operands, where):
        elected = operands[0].split("|")[1]
        return self.result(elected, f"block.thread % {LANES} == 0", where)

    def write_mbarrier(self, suffixes, operands, where):
        if suffixes != ["try_wait"]:
            return "pass"  # a barrier is what is promised to its address
        return f"block.tensor_memory.wait({self.address(operands[0], 'u32')}, {where})"

    def write_tcgen05(self, suffixes, operands, where):
        memory, name = "block.tensor_memory", suffixes[0]
        if name == "alloc":
            return f"{memory}.allocate({self.address(operands[0], 'u32')}, {where})"
        if name == "commit":
            return f"{memory}.promise({self.address(operands[0], 'u32')}, {where})"
        if name == "mma":
            result, left, right, instruction, keep = operands
            left = self.address(left, "u32") if left.startswith("[") else self.read(left, "b64")
            arguments = [self.address(result, "u32"), left, self.read(right, "b64"), self.read(instruction, "b32")]
            return f"{memory}.multiply({', '.join(arguments)}, {self.read(keep, 'pred')}, {where})"
        if name == "ld" and suffixes[3] in ("32x32b", "16x32bx2"):
            registers, address, split = register_names(operands[0]), operands[1], [*operands[2:], "None"][0]
            loaded = f"{memory}.load({self.address(address, 'u32')}, {len(registers)}, {split})"
            return f"[{', '.join(registers)}] = {loaded}"
        if name == "st" and suffixes[3] in ("32x32b", "16x32bx2"):
            address, split, registers = operands[0], ["None", *operands[1:-1]][-1], operands[-1]
            values = ", ".join(self.read(part, "b32") for part in parts(registers))
            return f"{memory}.store({self.address(address, 'u32')}, [{values}], {where}, {split})"
        if name in ("wait::ld", "wait::st", "dealloc", "relinquish_alloc_permit"):
            return "pass"
        raise NotImplementedError(f"An instruction {suffixes} of tensor memory.")

    # ------------------------------------------------------------ warps and matrices

    def write_shfl(self, suffixes, operands, where):
        lane = self.read(operands[2], "u32")
        return self.result(operands[0], f"block.shuffle({register_name(operands[1])}, {suffixes[1]!r}, {lane})", where)

    def write_redux(self, suffixes, operands, where):
        value = self.read(operands[1], suffixes[-1])
        return self.result(operands[0], f"block.reduce({value}, {suffixes[1]!r})", where)

    def write_ldmatrix(self, suffixes, operands, where):
        registers = register_names(operands[0])
        count, transposed = len(registers), "trans" in suffixes
        loaded = f"block.load_matrices({self.address(operands[1], 'u32')}, {count}, {transposed})"
        return f"[{', '.join(registers)}] = {loaded}"

    def write_stmatrix(self, suffixes, operands, where):
        address, registers = self.address(operands[0], "u32"), ", ".join(register_names(operands[1]))
        return f"block.store_matrices({address}, [{registers}], {'trans' in suffixes})"

    def write_mma(self, suffixes, operands, where):
        if "m16n8k16" not in suffixes or suffixes[-4] != "f32":
            raise NotImplementedError(f"A product {suffixes}.")
        a, b = (f"[{', '.join(register_names(operand))}]" for operand in operands[1:3])
        results = ", ".join(register_names(operands[0]))
        return f"[{results}] = block.multiply({a}, {b}, {self.floats(operands[3])}, {suffixes[-2]!r})"

    def write_wgmma(self, suffixes, operands, where):
        if "mma_async" not in suffixes:
            return f"block.wait_for_products({operands[0]})" if "wait_group" in suffixes else "pass"
        accumulator, left, right, keep, *rest = operands
        if rest[:2] != ["1", "1"] or suffixes[-3] != "f32":
            raise NotImplementedError(f"A product {suffixes} {rest}.")
        in_registers = left.startswith("{")
        transposed = (False, rest[2] == "1") if in_registers else (rest[2] == "1", rest[3] == "1")
        left = f"[{', '.join(register_names(left))}]" if in_registers else self.read(left, "b64")
        return (
            f"[{', '.join(register_names(accumulator))}] = block.multiply_groups({self.floats(accumulator)}, {left}, "
            f"{self.read(right, 'b64')}, {self.read(keep, 'pred')}, {transposed}, {suffixes[-1]!r})"
        )

    def floats(self, registers: str) -> str:
        return f"[{', '.join(self.read(part, 'f32') for part in parts(registers))}]"


def parts(operand: str) -> list[str]:
    """The operands of a vector `{a, b}`, or the one that it is."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def register_name(operand: str) -> str:
    return operand.strip("{} ").removeprefix("%")


def register_names(operand: str) -> list[str]:
    return [register_name(part) for part in parts(operand)]


def letters(register: str) -> str:
    return register.rstrip("0123456789")


def widened(suffixes: list[str]) -> str:
    """The type of the third operand of a multiplication and addition."""
    kind = suffixes[-1]
    return f"{kind[0]}{2 * int(kind[1:])}" if "wide" in suffixes else kind


def to_half(value: str, kind: str) -> str:
    return f"to_bf16({value})" if kind == "bf16" else f"{value}.astype(np.float16).view(np.uint16)"
