"""The statements of a text in PTX."""

import re
from typing import NamedTuple


# How Triton waits for a barrier: it tries until it succeeds, if a predicate holds.
TRIES = r"waitLoop:\s*mbarrier\.try_wait\S* complete, (\[[^\]]*\])[^;]*;\s*@!complete bra\.uni waitLoop;"
TRIES_IF = r"@!(%p\d+) bra\.uni skipWait;\s*" + TRIES + r"\s*skipWait:"


class Statement(NamedTuple):
    """An instruction, or a label, whose `opcode` is empty."""

    predicate: str
    opcode: str
    operands: list[str]


def parse(body: str) -> list[Statement]:
    """The statements of a kernel; braces that only bound the life of names go."""
    body = re.sub(r"//[^\n]*|^\s*\.(loc|file|pragma|reg)\b[^\n]*|^\$L__tmp\d+:", "", body, flags=re.M)
    body = re.sub(TRIES, r"mbarrier.try_wait \1;", re.sub(TRIES_IF, r"@\1 mbarrier.try_wait \2;", body))
    statements = []
    for text in re.split(r";|(\$\w+):|^\s*[{}]\s*$", body, flags=re.M):
        text = (text or "").strip()
        if text.startswith("$"):
            statements.append(Statement("", "", [text]))
        elif text:
            predicate, opcode, rest = re.match(r"(?:@(!?%p\d+)\s+)?(\S+)\s*(.*)", text, re.S).groups()
            operands = re.findall(r"[\[{][^\]}]*[\]}]|[^\s,]+", rest)
            statements.append(Statement(predicate or "", opcode, operands))
    return statements
