"""Chat templates rendered under guard.

A template that comes with a model is a program written by a stranger. Two things keep it harmless: Jinja's immutable
sandbox stops it from reaching anything but the values it was given, and a meter stops it from working without end. The
meter counts loop passes, calls and the text they make, so a bomb ends at the same point on every machine, also one that
waits for a certain message; a clock or a trial run could promise neither.
"""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .._errors import DataError

if TYPE_CHECKING:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST_TEMPLATE = 128 * 1024  # characters; the longest template known of a released model has about 20,000
WORK = 500_000  # units of one rendering: a loop pass, a call, or a kilobyte of text
GROWTH, SLACK = 8, 64 * 1024  # no text may exceed GROWTH x (input + template) + SLACK characters

_FILTERS = (
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float", "indent", "int",
    "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse", "round",
    "safe", "select", "selectattr", "sort", "string", "title", "trim", "unique", "upper",
)  # fmt: skip
_COMPARING_TESTS = ("in", "eq", "==", "equalto", "ne", "!=", "lt", "<", "le", "<=", "gt", ">", "ge", ">=")
_TEXT_METHODS = frozenset({
    "capitalize", "count", "endswith", "find", "format", "index", "isalnum", "isalpha", "isdigit", "islower",
    "isnumeric", "isspace", "isupper", "join", "lower", "lstrip", "partition", "removeprefix", "removesuffix",
    "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip", "split", "splitlines", "startswith", "strip",
    "title", "upper",
})  # fmt: skip


class TemplateError(DataError):
    """A chat template that refuses a conversation, has a mistake, or oversteps its sandbox."""


class _Meter(threading.local):
    """Work and length that are left to the rendering in progress; idle between renderings."""

    left: int = WORK
    longest: int = SLACK

    def start(self, size: int) -> None:
        self.left, self.longest = WORK + size // 64, GROWTH * size + SLACK

    def charge(self, units: int) -> None:
        self.left -= units
        if self.left < 0:
            raise TemplateError(
                f"the chat template was stopped after {WORK:,} steps", fix="use a template without such loops"
            )

    def check_length(self, length: int) -> None:
        if length > self.longest:
            raise TemplateError(
                f"the chat template was stopped: it makes a text of more than {self.longest:,} characters",
                fix=f"use a template whose text stays below {GROWTH} times its input",
            )
        self.charge(1 + (length >> 10))

    def checked(self, value: Any) -> Any:
        """`value`, after its length once written out has been charged."""
        kind = type(value)
        if kind is str:
            self.left -= 1
            if len(value) > 1023 or self.left < 0:
                self.check_length(len(value))
        elif kind is list or kind is tuple or kind is dict:
            length, parts = measure(value)
            self.check_length(length)
            self.charge(parts >> 2)
        return value


_meter = _Meter()


def measure(value: Any) -> tuple[int, int]:
    """Characters of `value` written out, roughly, and its parts. A part that occurs twice counts twice as text but is
    visited, and counted as a part, once."""
    seen: dict[int, int] = {}
    parts = 0

    def size(part: Any) -> int:
        nonlocal parts
        parts += 1
        if isinstance(part, str):
            return 2 + len(part)
        if not isinstance(part, (list, tuple, dict)):
            return 8
        if id(part) not in seen:
            items = [*part.keys(), *part.values()] if isinstance(part, dict) else part
            seen[id(part)] = 2 + sum(map(size, items))
        return seen[id(part)]

    return size(value), parts


def plain(value: Any) -> Any:
    """`value` rebuilt of JSON types; anything else becomes the name of its type in angle brackets.

    Templates test whether an image is there and never read it; an object with methods has no place in the sandbox.
    """
    kind = type(value)
    if kind is str or value is None or kind in (bool, int, float):
        return value
    if kind is dict:
        return {plain(key): plain(item) for key, item in value.items()}
    if kind is list or kind is tuple:
        return [plain(item) for item in value]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain(value.item())
    return f"<{kind.__name__}>"


class CompiledTemplate:
    """A chat template ready to render. Guarded unless `trusted`, which is for templates of this package.

    Errors: `TemplateError` for a mistake in the template, for its own `raise_exception`, and for a limit it oversteps.
    """

    def __init__(self, source: str, *, trusted: bool = False) -> None:
        if len(source) > LONGEST_TEMPLATE and not trusted:
            raise TemplateError(
                f"a chat template of {len(source):,} characters",
                fix=f"templates may have up to {LONGEST_TEMPLATE:,} characters",
            )
        self.source, self.trusted = source, trusted
        environment = _trusted_environment() if trusted else _guarded_environment()
        try:
            tree = environment.parse(source)
            code = environment.compile(tree if trusted else _metered(tree))
            self._template: jinja2.Template = environment.template_class.from_code(
                environment, code, environment.globals
            )
        except (Exception, RecursionError) as error:
            raise TemplateError(f"the chat template can't be compiled: {_said(error)}") from error

    def render(self, variables: dict[str, Any]) -> str:
        """The text for `variables`, which hold JSON types only (see `plain`)."""
        try:
            if self.trusted:
                return self._template.render(variables)
            return self._render_metered(variables)
        except TemplateError:
            raise
        except (Exception, RecursionError) as error:
            raise TemplateError(f"the chat template refuses this conversation: {_said(error)}") from error

    def _render_metered(self, variables: dict[str, Any]) -> str:
        _meter.start(len(repr(variables)) + len(self.source))
        pieces, length = [], 0
        for piece in self._template.generate(variables):
            length += len(piece)
            if length > _meter.longest:
                _meter.check_length(length)
            pieces.append(piece)
        return "".join(pieces)


@functools.lru_cache(maxsize=64)
def compile_template(source: str, trusted: bool = False) -> CompiledTemplate:
    """`CompiledTemplate(source)`, kept: compiling costs as much as rendering hundreds of conversations."""
    return CompiledTemplate(source, trusted=trusted)


def _said(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _now(format: str) -> str:
    from datetime import datetime

    if len(format) > 64 or re.search(r"%[-_^#]*\d", format):  # the C library pads to any width that is asked for
        raise TemplateError(f"strftime_now does not take the format {format[:64]!r}")
    return datetime.now().strftime(format)


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """JSON as transformers writes it: not escaped for HTML, which is what Jinja's own filter does."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _make_dict(*args: Any, **kwargs: Any) -> dict:
    return dict(*args, **kwargs)


def _set_up(environment: ImmutableSandboxedEnvironment) -> ImmutableSandboxedEnvironment:
    """What a chat template may expect: the names that transformers gives it."""
    from jinja2.utils import Namespace

    environment.filters["tojson"] = _to_json
    environment.globals = {
        "raise_exception": _raise,
        "strftime_now": _now,
        "range": environment.globals["range"],
        "dict": _make_dict,
        "namespace": Namespace,
    }
    return environment


def _options() -> dict[str, Any]:
    from jinja2 import ext, nodes

    class Generation(ext.Extension):
        """`{% generation %}` marks assistant text for trainers that need it; the text itself is unchanged."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    return {"trim_blocks": True, "lstrip_blocks": True, "extensions": [Generation, ext.loopcontrols]}


@functools.cache
def _trusted_environment() -> ImmutableSandboxedEnvironment:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    return _set_up(ImmutableSandboxedEnvironment(**_options()))


@functools.cache
def _guarded_environment() -> ImmutableSandboxedEnvironment:
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace, pass_context

    trusted = _trusted_environment()

    class Guarded(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset({"+", "*", "**", "%"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            if operator == "+" and type(left) is str and type(right) is str:  # nearly every operation of a template
                return _meter.checked(left + right)
            _check_operation(operator, left, right)
            return super().call_binop(context, operator, left, right)

        def wrap_str_format(self, value: Any) -> None:
            """Jinja's own formatting does not count; `_check_text_call` lets through what needs no guard."""

        def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
            _meter.charge(1)
            owner = getattr(__obj, "__self__", None)
            if isinstance(owner, str):
                args = _check_text_call(owner, __obj.__name__, args)
            return _meter.checked(super().call(__context, __obj, *args, **kwargs))

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            if isinstance(obj, str) and attr not in _TEXT_METHODS:
                return False
            return super().is_safe_attribute(obj, attr, value)

    class PlainNamespace(Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise TemplateError(f"a chat template may not set {name!r}")
            super().__setitem__(name, value)

    def counted_range(*args: int) -> range:
        numbers = trusted.globals["range"](*args)
        _meter.charge(len(numbers))
        return numbers

    def metered_filter(name: str) -> Any:
        @pass_context
        def run(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
            _meter.checked(value)
            return _meter.checked(trusted.call_filter(name, value, args, kwargs, context=context))

        return run

    def metered_test(name: str) -> Any:
        def run(value: Any, other: Any) -> bool:
            return trusted.tests[name](_meter.checked(value), _meter.checked(other))

        return run

    environment = _set_up(Guarded(finalize=_meter.checked, **_options()))
    environment.globals |= {"range": counted_range, "namespace": PlainNamespace}
    environment.filters = {name: metered_filter(name) for name in _FILTERS}
    environment.filters |= {"indent": _indent(environment.filters["indent"])}
    # `pass_context` also keeps Jinja from running a filter on constants while it compiles, before any meter runs
    for name, function in {
        "tojson": _limited_json, "join": _join, "replace": _replace, "concat": _concat,
        "counted": _counted, "checked": _checked,
    }.items():  # fmt: skip
        environment.filters[name] = pass_context(function)
    environment.tests |= {name: metered_test(name) for name in _COMPARING_TESTS}
    return environment


def _check_operation(operator: str, left: Any, right: Any) -> None:
    """Refuse arithmetic whose result is out of proportion to its operands, before it is made."""
    if operator == "%" and isinstance(left, str):
        raise TemplateError("a chat template may not format text with %", fix="join pieces with ~")
    numbers = isinstance(left, (int, float)) and isinstance(right, (int, float))
    if operator == "+" and not numbers:
        parts = sum(len(side) for side in (left, right) if isinstance(side, (str, list, tuple)))
        _meter.check_length(parts)
        _meter.charge(parts >> 3)
    elif operator == "*" and not numbers:
        text, times = (left, right) if isinstance(right, int) else (right, left)
        _meter.check_length(measure(text)[0] * (times if isinstance(times, int) else 1))
    elif operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
        if bits > 4096:
            raise TemplateError("a chat template may not compute with numbers of thousands of bits")


def _check_text_call(owner: str, method: str, args: tuple) -> tuple:
    """The arguments of a call to a method of `owner`, after its result has been found short enough."""
    _meter.check_length(len(owner))
    if method == "join" and args:
        parts = [str(part) for part in _counted(None, args[0])]
        _meter.check_length(sum(map(len, parts)) + len(owner) * len(parts))
        return (parts,)
    if method == "replace" and len(args) > 1:
        _check_replacement(owner, str(args[0]), str(args[1]))
    if method == "format" and re.search(r"\{[^{}]*[^{}\d][^{}]*\}", owner):
        raise TemplateError("in a chat template, format fills {} and {0} only")
    return args


def _check_replacement(text: str, old: str, new: str) -> None:
    if len(new) > len(old):
        _meter.check_length(len(text) + text.count(old) * (len(new) - len(old)))


def _checked(context: Any, value: Any) -> Any:
    return _meter.checked(value)


def _counted(context: Any, items: Iterable, cost: int = 1) -> Iterator:
    for item in items:
        _meter.charge(cost)
        yield item


def _concat(context: Any, parts: list) -> str:
    texts = [str(_meter.checked(part)) for part in parts]
    _meter.check_length(sum(map(len, texts)))
    return "".join(texts)


def _join(context: Any, items: Iterable, separator: str = "") -> str:
    texts = [str(_meter.checked(item)) for item in _counted(context, items)]
    _meter.check_length(sum(map(len, texts)) + len(separator) * len(texts))
    return separator.join(texts)


def _replace(context: Any, text: Any, old: str, new: str, count: int = -1) -> str:
    _check_replacement(str(text), old, new)
    return str(text).replace(old, new, count)


def _limited_json(context: Any, value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    if (isinstance(indent, int) and indent > 16) or (isinstance(indent, str) and len(indent) > 16):
        raise TemplateError("tojson takes an indent of up to 16")
    return _meter.checked(_to_json(_meter.checked(value), ensure_ascii, indent, separators, sort_keys))


def _indent(filter: Any) -> Any:
    from jinja2.utils import pass_context

    @pass_context
    def run(context: Any, value: Any, width: int | str = 4, *args: Any, **kwargs: Any) -> Any:
        if (len(width) if isinstance(width, str) else width) > 64:
            raise TemplateError("indent takes a width of up to 64")
        return filter(context, value, width, *args, **kwargs)

    return run


def _metered(tree: Any) -> Any:
    """The template with every place where work or text can pile up led past the meter."""
    from jinja2 import nodes
    from jinja2.visitor import NodeTransformer

    def filtered(node: Any, name: str, *args: Any) -> Any:
        constants = [nodes.Const(argument) for argument in args]
        return nodes.Filter(node, name, constants, [], None, None).set_lineno(node.lineno)

    def is_constant(node: Any) -> bool:
        return isinstance(node, nodes.Const)

    class Metered(NodeTransformer):
        def visit_For(self, node: Any) -> Any:
            if node.recursive:
                raise TemplateError("a chat template may not use recursive loops")
            text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            self.generic_visit(node)
            node.iter = filtered(node.iter, "counted", 1 + text // 256)
            return node

        def visit_Concat(self, node: Any) -> Any:
            self.generic_visit(node)
            return filtered(nodes.List(node.nodes).set_lineno(node.lineno), "concat")

        def visit_List(self, node: Any) -> Any:
            self.generic_visit(node)
            return node if all(map(is_constant, node.items)) else filtered(node, "checked")

        def visit_Tuple(self, node: Any) -> Any:
            return node if node.ctx == "store" else self.visit_List(node)

        def visit_Dict(self, node: Any) -> Any:
            self.generic_visit(node)
            return filtered(node, "checked")

        def visit_Getitem(self, node: Any) -> Any:
            self.generic_visit(node)
            return filtered(node, "checked") if isinstance(node.arg, nodes.Slice) else node

        def visit_Compare(self, node: Any) -> Any:
            self.generic_visit(node)
            equality = all(operand.op in ("eq", "ne") for operand in node.ops)
            if equality and any(is_constant(side) for side in (node.expr, *(operand.expr for operand in node.ops))):
                return node  # as cheap as the constant is short
            node.expr = filtered(node.expr, "checked")
            for operand in node.ops:
                operand.expr = filtered(operand.expr, "checked")
            return node

    return Metered().visit(tree)
