"""Arithmetic expressions written by a model: parsed, never evaluated as code, and exact.

    sum     = ["-"] product {("+" | "-") product}
    product = operand {("*" | "/") operand}
    operand = ASCII digits without leading zeros | "(" sum ")"

Spaces between tokens are ignored. No powers, no functions, no other alphabets' digits, and limits on length, digits
and depth, so that any text takes bounded time.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARS = 256
MAX_DIGITS = 12
MAX_DEPTH = 16

_TOKEN = re.compile(r" *(0|[1-9][0-9]*|[-+*/()])")


@dataclass(frozen=True, slots=True)
class Chain:
    """A sum (operators + and -) or a product (* and /); the first operator belongs to the first operand."""

    operators: str
    operands: tuple[Expression, ...]

    @property
    def is_sum(self) -> bool:
        return self.operators[0] in "+-"


Expression = int | Chain


def parse(text: str) -> Expression | None:
    """The expression that is the whole of `text`; None if there is none within the limits."""
    tokens = _tokenize(text)
    if tokens is None:
        return None
    parser = _Parser(tokens)
    found = parser.sum(depth=0)
    return found if parser.is_at_end else None


def numbers(expression: Expression) -> Iterator[int]:
    """The literals, in the order in which they are written."""
    if isinstance(expression, int):
        yield expression
    else:
        for operand in expression.operands:
            yield from numbers(operand)


def has_negation(expression: Expression) -> bool:
    """Whether some sum begins with a minus sign."""
    if isinstance(expression, int):
        return False
    return expression.operators[0] == "-" or any(has_negation(operand) for operand in expression.operands)


def value(expression: Expression) -> Fraction | None:
    """The exact value; None if something is divided by zero."""
    if isinstance(expression, int):
        return Fraction(expression)
    result = Fraction(0 if expression.is_sum else 1)
    for operator, operand in zip(expression.operators, expression.operands, strict=True):
        right = value(operand)
        if right is None or (operator == "/" and right == 0):
            return None
        if operator == "+":
            result += right
        elif operator == "-":
            result -= right
        elif operator == "*":
            result *= right
        else:
            result /= right
    return result


def render(expression: Expression) -> str:
    """Without spaces, and with the positive terms of a sum first: "-3 + 5*7" becomes "5*7-3"."""
    if isinstance(expression, int):
        return str(expression)
    pairs = list(zip(expression.operators, expression.operands, strict=True))
    if expression.is_sum:
        pairs.sort(key=lambda pair: pair[0] == "-")
    texts = []
    for operator, operand in pairs:
        is_grouped = isinstance(operand, Chain) and (operand.is_sum or not expression.is_sum)
        texts.append(f"{operator}({render(operand)})" if is_grouped else f"{operator}{render(operand)}")
    return "".join(texts).removeprefix("+").removeprefix("*")


def _tokenize(text: str) -> list[str] | None:
    text = text.strip(" ")
    if not 0 < len(text) <= MAX_CHARS:
        return None
    tokens, position = [], 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None or len(match[1]) > MAX_DIGITS:
            return None
        tokens.append(match[1])
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent over tokens; every method returns None where the grammar is violated."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._position = 0

    @property
    def is_at_end(self) -> bool:
        return self._position == len(self._tokens)

    def sum(self, depth: int) -> Expression | None:
        sign = self._take("-") or "+"
        return self._chain(sign, "+-", depth)

    def _chain(self, operator: str | None, alphabet: str, depth: int) -> Expression | None:
        operators, operands = "", []
        while operator is not None:
            operand = self._chain("*", "*/", depth) if alphabet == "+-" else self._operand(depth)
            if operand is None:
                return None
            operators += operator
            operands.append(operand)
            operator = self._take(alphabet)
        return operands[0] if operators in ("+", "*") else Chain(operators, tuple(operands))

    def _operand(self, depth: int) -> Expression | None:
        if self._take("("):
            inner = self.sum(depth + 1) if depth < MAX_DEPTH else None
            return inner if self._take(")") else None
        if self.is_at_end or not self._tokens[self._position].isdigit():
            return None
        self._position += 1
        return int(self._tokens[self._position - 1])

    def _take(self, wanted: str) -> str | None:
        """The next token if it is one of the characters of `wanted`."""
        if self.is_at_end or self._tokens[self._position] not in wanted:
            return None
        self._position += 1
        return self._tokens[self._position - 1]
