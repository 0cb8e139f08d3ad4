"""jinja2's sandbox with an end: a template that loops, multiplies or calls itself is stopped, not waited for.

What lives here: the environment. What does not: what a chat template may name (chat_template.py, the one caller). The
sandbox keeps a template from Python's own objects; what it leaves open is how long a template runs, on the event loop
that serves everybody, and how much it makes. Counted are the turns of loops and the calls; bounded are the operands of
the operators that make much of little, and the numbers and results of filters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.nodes import EvalContext
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_TURNS = 500_000  # of the loops of one rendering; below a second
TURNS_OF_A_CALL = 10  # what a call costs, in turns
MAX_NUMBER = 1_000_000  # as an operand of * ** %, or given to a filter
MAX_CHARACTERS = 8_000_000  # of a text that an operator or a filter makes

_turns: ContextVar[list[int]] = ContextVar("turns")


class TooMuchError(TemplateError):
    """The template does more than any chat needs."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Nothing of a template is worked out when it is compiled: constants are an operation like any other."""

    intercepted_binops = frozenset(("*", "**", "%", "+"))

    def __init__(self, **settings: Any) -> None:
        super().__init__(optimized=False, **settings)
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {"counted": _counted, "checked": _checked}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = _Bounds().visit(super()._parse(source, name, filename))
        assert isinstance(template, nodes.Template)
        return template.set_environment(self)  # type: ignore[return-value]

    def call(self, context: Context, function: Any, *arguments: Any, **named: Any) -> Any:
        _count(TURNS_OF_A_CALL)
        _check_numbers([*arguments, *named.values()])
        text = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(text, str):  # a method of it
            _check_texts(function.__name__, text, *arguments)
        return _checked(super().call(context, function, *arguments, **named))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            _check_numbers([left])
            if isinstance(right, int) and right > 64:
                raise TooMuchError(f"a power of {right}")
        elif operator == "*" and not (isinstance(left, int | float) and isinstance(right, int | float)):
            sized, times = (left, right) if hasattr(left, "__len__") else (right, left)
            if isinstance(times, int) and hasattr(sized, "__len__") and len(sized) * times > MAX_NUMBER:
                raise TooMuchError(f"{len(sized)} times {times}")
        elif operator == "%":
            _check_format(left)
        return _checked(super().call_binop(context, operator, left, right))


class _Bounds(NodeTransformer):
    """Puts what loops go through, and what `~` joins, through a filter of this environment."""

    def visit_For(self, loop: nodes.For, *_: Any) -> nodes.For:
        self.generic_visit(loop)
        loop.iter = nodes.Filter(loop.iter, "counted", [], [], None, None, lineno=loop.lineno)
        return loop

    def visit_Concat(self, concat: nodes.Concat, *_: Any) -> nodes.Filter:
        self.generic_visit(concat)
        return nodes.Filter(concat, "checked", [], [], None, None, lineno=concat.lineno)


def counted_from_now() -> None:
    """A rendering begins. Its count is its own, whatever else renders."""
    _turns.set([0])


def _count(turns_more: int = 1) -> None:
    turns = _turns.get()
    turns[0] += turns_more
    if turns[0] > MAX_TURNS:
        raise TooMuchError(f"more than {MAX_TURNS} turns and calls")


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _count()
        yield value


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # with jinja2's marks on it: what is passed to it first
    def filter_(*arguments: Any, **named: Any) -> Any:
        _count()
        _check_numbers([*arguments, *named.values()])
        _check_texts(name, *(each for each in arguments if not isinstance(each, Context | EvalContext)))
        return _checked(function(*arguments, **named))

    return filter_


def _check_numbers(values: Iterable[Any]) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TooMuchError(f"a number of {len(str(value)) if abs(value) < 10**100 else 'over 100'} digits")


def _check_texts(name: str, *arguments: Any) -> None:
    """Before a filter or a method of a text makes a long one of short ones."""
    if name in ("format", "format_map"):
        _check_format(arguments[0])
    if name == "replace" and len(arguments) >= 3:
        text, old, new = map(str, arguments[:3])
        if text.count(old) * len(new) > MAX_CHARACTERS:
            raise TooMuchError("a text as long as that")


def _check_format(form: Any) -> None:
    """A field may ask for a width: `%9999999999d`."""
    if isinstance(form, str) and any(len(digits) > 6 for digits in _numbers(form)):
        raise TooMuchError("a text as wide as that")


def _numbers(text: str) -> list[str]:
    return "".join(character if character.isdigit() else " " for character in text).split()


def _checked(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MAX_CHARACTERS:
        raise TooMuchError(f"a value of {len(value)} parts")
    return value
