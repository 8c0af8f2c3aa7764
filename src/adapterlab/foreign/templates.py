"""Chat templates that end: they are programs of others, run by jinja's sandbox, which bounds neither time nor size.

Every pass of a loop and every call is a step, and every text or list that is made has a weight. Both are paid from
an allowance that grows with the conversation. So what a template may do does not depend on the speed of a machine.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, cast

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_STEPS, _WEIGHT, _PER_CHARACTER = 300_000, 3_000_000, 100
_WIDE = re.compile(r"\d{5,}|\*")  # a width in a format; the widest that templates use have two digits
_BITS = 4096
_ENTRY = 10  # what an entry of a list weighs, in characters


class _Account:
    """What one conversation may still cost."""

    def __init__(self, conversation: Any):
        self.steps, self.weight = _STEPS, _WEIGHT
        more = _PER_CHARACTER * self.weigh(conversation, 0)
        self.steps, self.weight = _STEPS + more, _WEIGHT + more

    def step(self) -> None:
        """Pay for a pass of a loop or a call."""
        self.steps -= 1
        if self.steps < 0:
            raise TemplateError("it does not end: it takes more steps than any template needs for such a conversation")

    def pay(self, weight: int) -> None:
        """Pay for something that is made."""
        self.weight -= weight
        if self.weight < 0:
            raise TemplateError("it makes larger texts or lists than any template needs for such a conversation")

    def weigh(self, value: Any, price: int = 1) -> int:
        """Count the characters and entries of a value, and pay for them while counting: a value may hold itself."""
        total, left = 0, [value]
        while left:
            one = left.pop()
            inner = [*one, *one.values()] if isinstance(one, dict) else one if isinstance(one, (list, tuple)) else ()
            size = 1 + len(one) if isinstance(one, str) else _ENTRY * (1 + len(inner))
            total += size
            self.pay(price * size)
            left.extend(inner)
        return total


_ACCOUNT: ContextVar[_Account] = ContextVar("account")


class _Bounded(ImmutableSandboxedEnvironment):
    """The sandbox, with everything that may be large paid for before it is made."""

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute with two values."""
        account = _ACCOUNT.get()
        if operator == "**" or (operator == "*" and isinstance(left, int) and isinstance(right, int)):
            account.pay(_power(left, right) if operator == "**" else 0)
        elif operator == "*":
            times, many = (left, right) if isinstance(left, int) else (right, left)
            account.pay(max(0, times) * _length(many) if isinstance(times, int) else 0)
        elif operator == "%" and isinstance(left, str):
            _check_format(left)
        else:
            account.pay(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function, macro or method."""
        _ACCOUNT.get().step()
        method = getattr(__obj, "__wrapped__", __obj)  # the sandbox wraps `format`
        bound = getattr(method, "__self__", None)
        if isinstance(bound, str):
            _pay_for(method.__name__, (bound, *args), kwargs)
        elif args or kwargs:
            _ACCOUNT.get().weigh([*args, *kwargs.values()])
        return super().call(__context, __obj, *args, **kwargs)


class _Accounted(Template):
    """Opens an account for whatever it renders."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        """Return the whole text."""
        return "".join(self.generate(*args, **kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        """Yield the text in pieces."""
        token = _ACCOUNT.set(_Account([args, kwargs]))
        try:
            yield from super().generate(*args, **kwargs)
        except (RecursionError, MemoryError, OverflowError) as error:
            raise TemplateError(f"it goes too deep or becomes too large ({type(error).__name__})") from None
        finally:
            _ACCOUNT.reset(token)


class _Counted(NodeTransformer):
    """Puts a count into loops, and a price on what is written down or joined."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "counted_steps")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "joined")

    def visit_List(self, node: nodes.List) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(node, "weighed")

    def visit_Dict(self, node: nodes.Dict) -> nodes.Filter:
        self.generic_visit(node)
        return _filtered(node, "weighed")


def _filtered(node: nodes.Node, name: str) -> nodes.Filter:
    return nodes.Filter(cast("nodes.Expr", node), name, [], [], None, None, lineno=node.lineno)


def _steps(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _ACCOUNT.get().step()
        yield value


def _weighed(value: Any) -> Any:
    _ACCOUNT.get().weigh(value)
    return value


def _joined(parts: list[Any]) -> str:
    return "".join(map(str, _weighed(parts)))


def _finalize(value: Any) -> Any:
    return _weighed(value) if isinstance(value, (str, list, tuple, dict)) else value


def _priced(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def paid(*args: Any, **kwargs: Any) -> Any:
        _ACCOUNT.get().step()
        _pay_for(name, args, kwargs)
        return function(*args, **kwargs)

    return paid


def _pay_for(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Pay for what a filter, or a method of texts, may make of its arguments: widths, repetitions, the texts again."""
    account, given = _ACCOUNT.get(), [*args, *kwargs.values()]
    texts = [value for value in given if isinstance(value, str)]
    if name in ("format", "format_map", "format_value") and texts:
        _check_format(texts[0])
    account.weigh([value for value in given if isinstance(value, (str, list, tuple, dict))])
    lines = 1 + texts[0].count("\n") if name == "indent" and texts else 1
    account.pay(sum(lines * max(0, v) for v in given if isinstance(v, int)))
    if name == "replace" and len(texts) == 3:
        account.pay(texts[0].count(texts[1]) * len(texts[2]))
    elif name in ("join", "indent", "wordwrap", "translate", "expandtabs"):
        many = max((_length(value) for value in given if not isinstance(value, str)), default=0)
        account.pay(max(many, max(map(len, texts), default=0), lines) * min(map(len, texts), default=0))


def _check_format(text: str) -> None:
    if _WIDE.search(text):
        raise TemplateError(f"it formats with a width that no text needs: {text[:60]!r}")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _power(base: Any, exponent: Any) -> int:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * max(0, exponent) > _BITS:
        raise TemplateError("it raises a number to a power that no text needs")
    return 0


def bounded(plain: Environment, source: str) -> Template:
    """Compile a template in a copy of an environment, with its filters and tags, that counts what it does.

    Args:
        plain: the sandbox to copy; it stays as it is.
        source: of the template.

    Raises:
        TemplateError: the source is malformed. Rendering raises it too, when the template takes too much.
    """
    environment = copy.copy(plain)
    environment.__class__ = _Bounded
    environment.filters = {name: _priced(name, function) for name, function in plain.filters.items()}
    environment.filters |= {"counted_steps": _steps, "joined": _joined, "weighed": _weighed}
    environment.globals = {name: value for name, value in plain.globals.items() if name != "lipsum"}
    environment.finalize = _finalize
    environment.template_class = _Accounted
    tree = _Counted().visit(environment.parse(source))
    code = environment.compile(tree)
    return environment.template_class.from_code(environment, code, environment.make_globals(None))
