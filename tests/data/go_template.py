"""Enough of Go's text/template to render the Modelfiles' templates: if, else if, else, range, eq, and, or, not,
variables.

Written from the documentation of pkg.go.dev/text/template, to check that a Modelfile writes what was trained.
"""

import re
from typing import Any

_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|\(|\)|[^\s()]+')


def render(template: str, messages: list[dict[str, str]], date: str = "DATE") -> str:
    """The text for `messages`, as Ollama renders `.Messages` and `.System`."""
    data = {
        "Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages],
        "System": "\n\n".join(m["content"] for m in messages if m["role"] == "system"),
    }
    parts = re.split(r"(\{\{.*?\}\})", template, flags=re.DOTALL)
    nodes, rest = _parse([part for part in parts if part])
    assert not rest
    return _write(nodes, data, {"$": data, "currentDate": date})


def _parse(parts: list[str]) -> tuple[list[Any], list[str]]:
    nodes: list[Any] = []
    while parts:
        action = parts[0][2:-2].strip() if parts[0].startswith("{{") else None
        if action is None:
            nodes.append(("text", parts.pop(0)))
        elif action == "end" or action.startswith("else"):
            return nodes, parts
        elif action.startswith(("if ", "range ")):
            node, parts = _parse_block(parts)
            nodes.append(node)
        else:
            nodes.append(("action", action))
            parts.pop(0)
    return nodes, parts


def _parse_block(parts: list[str]) -> tuple[Any, list[str]]:
    action = parts.pop(0)[2:-2].strip()
    kind, _, condition = action.partition(" ")
    body, parts = _parse(parts)
    branches = [(condition, body)]
    while (following := parts.pop(0)[2:-2].strip()) != "end":
        body, parts = _parse(parts)
        branches.append((following.removeprefix("else").strip().removeprefix("if ").strip(), body))
    return (kind, branches), parts


def _write(nodes: list[Any], dot: Any, variables: dict[str, Any]) -> str:
    written = []
    for kind, value in nodes:
        if kind == "text":
            written.append(value)
        elif kind == "if":
            body = next((body for condition, body in value if not condition or _value(condition, dot, variables)), [])
            written.append(_write(body, dot, variables))
        elif kind == "range":
            names, _, expression = value[0][0].partition(":=")
            index, item = (name.strip() for name in names.split(","))
            for number, element in enumerate(_value(expression, dot, variables)):
                inner = variables | {index: number, item: element}
                written.append(_write(value[0][1], element, inner))
        elif ":=" in value:
            name, _, expression = value.partition(":=")
            variables[name.strip()] = _value(expression, dot, variables)
        else:
            written.append(str(_value(value, dot, variables)))
    return "".join(written)


def _value(expression: str, dot: Any, variables: dict[str, Any]) -> Any:
    return _call(_nested(_TOKEN.findall(expression)), dot, variables)


def _nested(tokens: list[str]) -> list[Any]:
    stack: list[list[Any]] = [[]]
    for token in tokens:
        if token == "(":
            stack.append([])
        elif token == ")":
            inner = stack.pop()
            stack[-1].append(inner)
        else:
            stack[-1].append(token)
    return stack[0]


def _call(words: Any, dot: Any, variables: dict[str, Any]) -> Any:
    if isinstance(words, str):
        return _operand(words, dot, variables)
    function, *arguments = words
    values = [_call(word, dot, variables) for word in arguments]
    if not values:
        return _call(function, dot, variables)
    return {
        "eq": lambda a, b: a == b, "and": lambda *all_: next((v for v in all_ if not v), all_[-1]),
        "or": lambda *any_: next((v for v in any_ if v), any_[-1]), "not": lambda a: not a,
        "len": len, "slice": lambda items, start: items[start:],
    }[function](*values)  # fmt: skip


def _operand(word: str, dot: Any, variables: dict[str, Any]) -> Any:
    if word.startswith('"'):
        return word[1:-1].encode().decode("unicode_escape")
    if word.isdigit():
        return int(word)
    if word.startswith("."):
        return dot[word[1:]]
    if word.startswith("$."):
        return variables["$"][word[2:]]
    return variables[word]
