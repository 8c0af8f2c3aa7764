"""Reading a method's formula for the number of trainable parameters, such as `r (in + out) + out`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from adapterlab.testing.case import NotApplicable

_TOKEN = re.compile(r"[A-Za-z_]+|\d+|[()+\-*/·]|\S")


def evaluate(formula: str, values: Mapping[str, float]) -> int:
    """Compute a formula; names and brackets that stand side by side are multiplied.

    Args:
        formula: sums, products and quotients of names and whole numbers.
        values: of the names. A letter may also stand for the one name that begins with it, in any case.

    Raises:
        NotApplicable: the formula is words, not arithmetic.
    """
    parts: list[str] = []
    for token in _TOKEN.findall(formula.replace("·", "*")):
        if not re.fullmatch(r"[A-Za-z_]+|\d+|[()+\-*/]", token):
            raise NotApplicable(f"the formula {formula!r} is not plain arithmetic")
        operand = token not in ")+-*/"
        if operand and parts and parts[-1] not in ("(", "+", "-", "*", "/"):
            parts.append("*")
        parts.append(token if not token.isidentifier() else repr(_value(token, values, formula)))
    return round(eval("".join(parts), {"__builtins__": {}}))


def _value(name: str, values: Mapping[str, float], formula: str) -> float:
    if name in values:
        return values[name]
    found = [key for key in values if len(name) == 1 and key.lower().startswith(name.lower())]
    if len(found) != 1:
        raise NotApplicable(f"{name!r} in the formula {formula!r} is not a field of the method or a size of a module")
    return values[found[0]]
