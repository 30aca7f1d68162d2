"""Chat templates in a sandbox where no single operation needs unlimited memory or time.

transformers compiles templates in jinja's sandbox, which keeps them from files and from Python, but
not from `'x' * 10**9`. What a template does in many steps is ended by `launcher.io.limits`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import BuiltinMethodType, CodeType
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from launcher.io import template_sizes as sizes

# Filters and names that put values into containers. Only such a container has a text that is longer
# than what it is made of.
NESTING = {"batch", "slice", "groupby", "dictsort", "items", "map", "dict", "varargs", "kwargs"}


def install() -> None:
    """Have transformers compile templates in this sandbox."""
    assert issubclass(chat_template_utils.ImmutableSandboxedEnvironment, jinja2.Environment)
    chat_template_utils.ImmutableSandboxedEnvironment = BoundedSandbox


class _Filters(dict[str, Callable[..., Any]]):
    """Filters that check their arguments; transformers adds its own later."""

    def __init__(self, environment: BoundedSandbox, filters: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.environment = environment
        for name, function in filters.items():
            self[name] = function

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        check = sizes.FILTERS.get(name)
        if name == "tojson":
            check = self._check_json
        super().__setitem__(name, _checked(function, check) if check else function)

    def _check_json(self, *args: Any, **kwargs: Any) -> None:
        sizes.check_json(self.environment.nests, *args, **kwargs)


def _checked(function: Callable[..., Any], check: Callable[..., None]) -> Callable[..., Any]:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0  # the context or the environment

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        values: Sequence[Any] = args[first:]
        if check is sizes.check_join and not isinstance(values[0], sizes.CONTAINERS):
            values = [list(values[0]), *values[1:]]  # otherwise it can be read only once
        check(*values, **kwargs)
        return function(*args[:first], *values, **kwargs)

    return call


@jinja2.pass_environment
def _sum(
    environment: jinja2.Environment, values: Iterable[Any], attribute: Any = None, start: Any = 0
) -> Any:
    """As jinja's filter, but step by step: a sum of lists can take hours."""
    if attribute is not None:
        values = map(make_attrgetter(environment, attribute), values)
    for value in values:
        start = sizes.check_sum(start + value)
    return start


class BoundedTemplate(jinja2.Template):
    """A compiled template that joins its text with limits."""

    @classmethod
    def from_code(
        cls,
        environment: jinja2.Environment,
        code: CodeType,
        globals: Any,
        uptodate: Callable[[], bool] | None = None,
    ) -> jinja2.Template:
        template = super().from_code(environment, code, globals, uptodate)
        template.root_render_func.__globals__.update(  # the names that compiled code uses
            str=sizes.text,
            escape=sizes.escape,
            str_join=sizes.str_join,
            markup_join=sizes.markup_join,
            check_sum=sizes.check_sum,
        )
        return template

    def generate(self, *args: Any, **kwargs: Any) -> Iterator[str]:
        size = 0
        for number, piece in enumerate(super().generate(*args, **kwargs)):
            size += len(piece)
            if number > sizes.MAX_PIECES or size > sizes.MAX_CHARACTERS:
                sizes.refuse("the text")
            yield piece


class _CodeGenerator(CodeGenerator):
    """Checks sums, and finds out whether the template nests containers.

    One check is enough for a + b + c. jinja's own way to intercept an operator takes a tenth of the
    time of a row.
    """

    environment: BoundedSandbox

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._parts: set[int] = set()  # sums within a sum

    def visit_Add(self, node: Any, frame: Any) -> None:
        for side in (node.left, node.right):
            if isinstance(side, nodes.Add):
                self._parts.add(id(side))
        if id(node) in self._parts:
            super().visit_Add(node, frame)
            return
        self.write("check_sum(")
        super().visit_Add(node, frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._see_container(node.items)
        super().visit_List(node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._see_container(node.items)
        super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self._see_container([pair.value for pair in node.items])
        super().visit_Dict(node, frame)

    def visit_Filter(self, node: nodes.Filter, frame: Any) -> None:
        self._see_name(node.name)
        super().visit_Filter(node, frame)

    def visit_Name(self, node: nodes.Name, frame: Any) -> None:
        self._see_name(node.name)
        super().visit_Name(node, frame)

    def _see_container(self, items: list[nodes.Expr]) -> None:
        if not all(isinstance(item, nodes.Const) for item in items):
            self.environment.nests = True

    def _see_name(self, name: str) -> None:
        if name in NESTING:
            self.environment.nests = True


class BoundedSandbox(ImmutableSandboxedEnvironment):
    """jinja's sandbox with limits for what one operation makes."""

    intercepted_binops = frozenset({"*", "**", "%"})
    code_generator_class = _CodeGenerator
    template_class = BoundedTemplate
    concat = staticmethod(sizes.concat)
    nests = False  # whether the template can put a container into a container, again and again

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.binop_table |= {"*": sizes.multiply, "**": sizes.power, "%": sizes.modulo}
        self.filters = _Filters(self, {**self.filters, "sum": _sum})
        del self.globals["lipsum"]  # any number of words

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """As jinja's, after a check of the methods of texts and numbers."""
        if __obj.__class__ is BuiltinMethodType and isinstance(__obj.__self__, str | bytes | int):
            sizes.check_numbers((*args, *kwargs.values()))
            if check := sizes.METHODS.get(__obj.__name__):
                check(__obj.__self__, *args, **kwargs)
        return super().call(__context, __obj, *args, **kwargs)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """As jinja's, after a check of what is formatted."""
        function = super().wrap_str_format(value)
        if function is None:
            return None

        def call(*args: Any, **kwargs: Any) -> str:
            sizes.check_format(value.__self__, (*args, *kwargs.values()))
            return function(*args, **kwargs)

        return functools.update_wrapper(call, value)
