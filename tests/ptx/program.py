"""A kernel in PTX, run by the threads of a block."""

import re
from types import CodeType
from typing import Any

import numpy as np

from .block import Block
from .parse import Statement, parse
from .values import bfloat16_to_float32, float32_to_bfloat16
from .writer import REGISTERS, Writer, letters


class Program:
    """
    A kernel to be run. It is made of sections, which end where threads may go different ways or wait for each other;
    those whose section comes first go on first, until all are together again.

    Args:
        name (`str`): of the kernel.
        threads (`int`): of a block.
        parameters (`list[str]`): their types.
        statements (`list[Statement]`): its text.
    """

    def __init__(self, name: str, threads: int, parameters: list[str], statements: list[Statement]):
        self.name, self.threads, self.parameters = name, threads, parameters
        self.sections, self.labels = [[]], {}
        for statement in statements:
            opcode = statement.opcode.split(".")[0]
            if opcode in ("", "bar"):
                self.sections.append([])
            if opcode:
                self.sections[-1].append(statement)
            else:
                self.labels[statement.operands[0]] = len(self.sections) - 1
            if opcode in ("bra", "ret", "bar"):
                self.sections.append([])
        starts = (section[0].opcode if section else "" for section in self.sections)
        self.barriers = [place for place, opcode in enumerate(starts) if opcode == "bar.sync"]
        names = set(re.findall(r"%((?:rs|rd|r|p)\d+)", str(statements)))
        self.registers = {name: np.zeros(threads, REGISTERS[letters(name)]) for name in names}
        self.constants: dict[str, Any] = {"np": np, "from_bf16": bfloat16_to_float32, "to_bf16": float32_to_bfloat16}
        self.code: dict[tuple[int, bool], CodeType] = {}

    def run(self, block: Block) -> None:
        scope = self.constants | {"block": block}
        registers = dict(self.registers)
        place: int | np.ndarray = 0  # the section that comes next, of all threads or of each
        end = len(self.sections)
        while np.min(place) < end:
            apart = isinstance(place, np.ndarray)
            waits = np.isin(place, self.barriers)
            if apart and (waits | (place == end)).all():
                block.barrier()
                place = place + waits
                continue
            first = int(np.min(place, where=~waits, initial=end) if apart else place)
            if (first, apart) not in self.code:
                self.code[first, apart] = self.compile(first, apart)
                scope |= self.constants
            registers["active"] = place == first
            exec(self.code[first, apart], scope, registers)
            place = np.where(registers["active"], registers["place"], place) if apart else registers["place"]
            if isinstance(place, np.ndarray) and (place == place[0]).all():
                place = int(place[0])

    def compile(self, place: int, apart: bool) -> CodeType:
        """A section, for all threads, or for those that are `active`, if they are apart."""
        writer = Writer(self, apart)
        lines = [f"place = {place + 1}", *map(writer.statement, self.sections[place])]
        return compile("\n".join(lines), f"<{self.name}, section {place}>", "exec")


def translate(ptx: str) -> Program:
    """The kernel of a text in PTX."""
    entry = ptx[ptx.index(".entry") :]
    name = re.match(r"\.entry\s+(\w+)", entry)[1]
    parameters = re.findall(r"\.param\s+\.(\w+)", entry[: entry.index(")")])
    threads = int(re.search(r"\.reqntid\s+(\d+)", entry)[1])
    body = re.split(r"// -- End function|\Z", entry[entry.index("{") :])[0]
    return Program(name, threads, parameters, parse(body))
