"""Reference page of the errors a user can meet, read from the source that raises them.

    python -m cdr.error_reference > docs/reference/errors.md

Walks the syntax trees of cdr, udfs and jobs for every call of a class of `cdr.errors`, and for
every problem of a config. What is computed when it happens stands as `{name}`; constants, variables
and what callers pass to a function that makes errors are followed. There is no list by hand: an
error is on the page because it is in the code, and a test compares the two. Nothing is executed.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from cdr import errors
from cdr.errors import CdrError, ConfigError, FailReason, NoPairReason, RejectReason

_INTRODUCTION = """\
# Errors, and what to do

<!-- Written by `python -m cdr.error_reference` from the code that raises them. -->

An error says what is wrong, where, and what to do. Search this page for a few of its words; what
differs from case to case stands here in braces. Problems of a config come together, one a line,
under `N problems in the config`, before Spark starts. Exit codes: 0 done, 1 failed, 2 config, input
or setup is wrong, 3 finished above a threshold of rejected or failed rows, 4 stopped early.

No error loses work. What was committed before is kept, and the same command goes on from there.
Before a first run, `make doctor` (`cdr-doctor`) finds most of what is missing on a machine.
"""

_ROWS = """\
## Rows: why one was left out

A row never ends a run. A candidate is `ok`, `rejected` for good (table `rejects`, with the reason,
a detail and the row itself) or `failed` for now (`rewards.status`, tried again by the next run); a
prompt without a pair stands in `unpaired`.
"""
_REASONS: Mapping[str, type[RejectReason | FailReason | NoPairReason]] = {
    "Rejected: `rejects.reason`": RejectReason,
    "Failed: `rewards.error`": FailReason,
    "Without a pair: `unpaired.reason`": NoPairReason,
}
_KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, CdrError)
}
_WIDTH = 96
_FOLDERS = ("cdr", "udfs", "jobs")
_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Raised:
    """An error as one place in the code makes it.

    Args:
        kind: class of `cdr.errors`.
        area: what the module is about.
        what: the sentence, with `{name}` for what is only known when it happens.
        fixes: what it says to do; several where that depends.
        place: `file:line`, for tests.
    """

    kind: type[CdrError]
    area: str
    what: str
    fixes: tuple[str, ...]
    place: str


@dataclass
class _Module:
    name: str
    tree: ast.Module
    parents: dict[ast.AST, ast.AST] = field(default_factory=dict)
    calls: list[ast.Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        for node in ast.walk(self.tree):
            self.parents.update((child, node) for child in ast.iter_child_nodes(node))
            if isinstance(node, ast.Call):
                self.calls.append(node)

    def functions_around(self, node: ast.AST) -> Iterator[_Function]:
        while (node := self.parents.get(node)) is not None:  # type: ignore[assignment]
            if isinstance(node, _Function):
                yield node

    @property
    def area(self) -> str:
        first = (ast.get_docstring(self.tree) or "").split("\n")[0].split(": ")[0]
        return first.rstrip(".")


Bound = Mapping[str, tuple[ast.expr, "_Module"]]


class _Reader:
    """Finds errors and follows their texts through the source.

    Args:
        root: folder that holds cdr, udfs and jobs.
    """

    def __init__(self, root: Path) -> None:
        files = sorted(path for folder in _FOLDERS for path in (root / folder).rglob("*.py"))
        self.modules = {
            ".".join(path.relative_to(root).with_suffix("").parts): _Module(
                path.relative_to(root).as_posix(), ast.parse(path.read_text(encoding="utf-8"))
            )
            for path in files
        }

    def read(self) -> Iterator[Raised]:
        for module in self.modules.values():
            for call in module.calls:
                name = _name(call.func)
                if name in _KINDS and call.args:
                    for bound in self._bindings(call, module):
                        yield from self._raised(_KINDS[name], call, module, bound)
                elif name == "ValueError" and call.args and _checks_config(module):
                    yield from self._raised(ConfigError, call, module, {})

    def _raised(
        self, kind: type[CdrError], call: ast.Call, module: _Module, bound: Bound
    ) -> Iterator[Raised]:
        given = {keyword.arg: keyword.value for keyword in call.keywords}
        fixes = self.texts(given["fix"], module, bound) if "fix" in given else []
        place = f"{module.name}:{call.lineno}"
        for what in dict.fromkeys(self.texts(call.args[0], module, bound)):
            yield Raised(kind, module.area, what, tuple(dict.fromkeys(fixes)), place)

    def _bindings(self, call: ast.Call, module: _Module) -> Iterator[Bound]:
        """Give what callers pass, where the error's texts are parameters of its function."""
        texts = [call.args[0], *(key.value for key in call.keywords if key.arg == "fix")]
        for function in module.functions_around(call):
            if {_name(text) for text in texts} & _parameters(function):
                yield from [*self._calls_of(function, module)] or [{}]
                return
        yield {}

    def _calls_of(self, function: _Function, module: _Module) -> Iterator[Bound]:
        """Give the arguments of every call of a function, by parameter, with their module."""
        ordered = [p.arg for p in function.args.args if p.arg != "self"]
        for other in self.modules.values():
            for call in other.calls:
                is_method = isinstance(call.func, ast.Attribute) and other is module
                called = getattr(call.func, "attr", "") if is_method else _name(call.func)
                if called == function.name:
                    given = zip(ordered, call.args, strict=False)
                    named = ((key.arg, key.value) for key in call.keywords if key.arg)
                    yield {name: (value, other) for name, value in [*given, *named]}

    def texts(self, node: ast.expr, module: _Module, bound: Bound, depth: int = 0) -> list[str]:
        """Give the texts an expression can have; several where that depends."""
        if depth > 6:
            return []

        def inner(part: ast.expr) -> list[str]:
            return self.texts(part, module, bound, depth + 1)

        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return ["".join(self._piece(part, module) for part in parts)]
            case ast.BinOp(op=ast.Add()):
                left, right = (
                    inner(side) or ["{" + _label(side) + "}"] for side in (node.left, node.right)
                )
                return [a + b for a in left for b in right]
            case ast.BoolOp(values=choices) | ast.List(elts=choices) | ast.Tuple(elts=choices):
                return [text for choice in choices for text in inner(choice)]
            case ast.IfExp(body=body, orelse=orelse):
                return [*inner(body), *inner(orelse)]
            case ast.ListComp(elt=element) | ast.GeneratorExp(elt=element):
                return inner(element)
            case ast.Call(func=ast.Attribute(attr="join"), args=[ast.List(elts=parts)]):
                lines = [text for part in parts for text in inner(part)[:1]]
                return ["\n".join(lines)] if lines else []
            case ast.Call(func=ast.Attribute(attr="join" | "fromkeys"), args=[part, *_]):
                return inner(part)
            case ast.Call(func=ast.Attribute(attr="rstrip", value=part)):
                return inner(part)
            case ast.Call(func=ast.Name(id=name)):
                made = _find_function(name, module)
                return [] if made is None else [
                    text
                    for part in ast.walk(made)
                    if isinstance(part, ast.Return) and part.value is not None
                    for text in self.texts(part.value, module, {}, depth + 1)
                ]  # fmt: skip
            case ast.Name(id=name):
                return self._variable(node, name, module, bound, depth)
        return []

    def _variable(
        self, node: ast.Name, name: str, module: _Module, bound: Bound, depth: int
    ) -> list[str]:
        if name in bound:
            value, other = bound[name]
            return self.texts(value, other, {}, depth + 1)
        for scope in [*module.functions_around(node), module.tree]:
            values = list(_assigned(name, scope))
            if values:
                return [
                    text for v in values for text in self.texts(v, module, bound, depth + 1)
                ]  # fmt: skip
        for function in module.functions_around(node):
            if name in _parameters(function):
                return [
                    text
                    for given in self._calls_of(function, module)
                    if name in given
                    for text in self.texts(*given[name], {}, depth + 1)
                ]
        origin = self._origin(name, module)
        values = list(_assigned(name, origin.tree)) if origin else []
        return [t for v in values if origin for t in self.texts(v, origin, {}, depth + 1)]

    def _origin(self, name: str, module: _Module) -> _Module | None:
        for node in module.tree.body:
            if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
                return self.modules.get(node.module or "")
        return None

    def _piece(self, part: ast.expr, module: _Module) -> str:
        if isinstance(part, ast.Constant):
            return str(part.value)
        assert isinstance(part, ast.FormattedValue)
        name = _name(part.value)
        if name and name.strip("_").isupper():  # a constant: its value, where it is plain
            other = module if list(_assigned(name, module.tree)) else self._origin(name, module)
            values = list(_assigned(name, other.tree)) if other else []
            if values and isinstance(values[0], ast.Constant):
                return str(values[0].value)
        return "{" + _label(part.value) + "}"


def read_errors(root: Path | None = None) -> list[Raised]:
    """Read every error from the source, sorted by kind, area and text.

    Args:
        root: folder that holds the packages; None for the one this module was loaded from.
    """
    root = root or Path(__file__).resolve().parents[1]
    order = list(_KINDS)
    found = {(e.kind, e.area, e.what, e.fixes): e for e in _Reader(root).read()}.values()
    return sorted(found, key=lambda e: (order.index(e.kind.__name__), e.area, e.what))


def render_error_reference(found: Sequence[Raised]) -> str:
    """Write the page: reasons of rows first, then errors by kind and area; Markdown."""
    page = [_INTRODUCTION, _ROWS]
    page += [_reason_table(title, reasons) for title, reasons in _REASONS.items()]
    for kind in dict.fromkeys(error.kind for error in found):
        about = " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())
        words = re.sub("(?<=[a-z])(?=[A-Z])", " ", kind.__name__.removesuffix("Error"))
        page.append(f"## {words.capitalize()} (exit code {kind.exit_code})\n\n{about}\n")
        ours = [error for error in found if error.kind is kind]
        for area in dict.fromkeys(error.area for error in ours):
            blocks = [_block(error) for error in ours if error.area == area]
            page.append(f"### {area}\n\n```text\n" + "\n\n".join(blocks) + "\n```\n")
    return "\n".join(page)


def _block(error: Raised) -> str:
    """Write an error as a terminal shows it, in lines that fit a page."""
    lines = [_wrap(line, "  ") for line in error.what.split("\n")]
    for fix in error.fixes:
        first, *more = fix.split("\n")
        lines += [_wrap(f"  fix: {first}", "       "), *more]
    return "\n".join(lines)


def _wrap(text: str, indent: str) -> str:
    return textwrap.fill(
        text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _reason_table(title: str, reasons: type[RejectReason | FailReason | NoPairReason]) -> str:
    """Write the members of an enumeration, each with the text that stands below it in the code."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(reasons)))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    rows = [
        f"| `{ast.literal_eval(member.value)}` | {' '.join(ast.literal_eval(text.value).split())} |"
        for member, text in pairwise(body)
        if isinstance(member, ast.Assign) and isinstance(text, ast.Expr)
    ]
    about = (inspect.getdoc(reasons) or "").split("\n")[0]
    head = "| reason | meaning, and what to do |\n|---|---|\n"
    return f"### {title}\n\n{about}\n\n{head}" + "\n".join(rows) + "\n"


def _assigned(name: str, scope: ast.AST) -> Iterator[ast.expr]:
    """Give what a scope assigns, adds or appends to a variable, in order."""
    for node in scope.body if isinstance(scope, ast.Module) else ast.walk(scope):
        match node:
            case ast.Assign(targets=[ast.Name(id=found)], value=value) if found == name:
                yield value
            case ast.AugAssign(target=ast.Name(id=found), value=value) if found == name:
                yield value
            case ast.Assign(targets=[ast.Tuple(elts=names)], value=ast.Tuple(elts=values)):
                yield from (v for n, v in zip(names, values, strict=False) if _name(n) == name)
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=found), attr="append" | "extend"), args=[value]
            ) if found == name:
                yield value


def _find_function(name: str, module: _Module) -> _Function | None:
    found = (n for n in module.tree.body if isinstance(n, _Function) and n.name == name)
    return next(found, None)


def _parameters(function: _Function) -> set[str]:
    return {parameter.arg for parameter in [*function.args.args, *function.args.kwonlyargs]}


def _checks_config(module: _Module) -> bool:
    """Tell whether a ValueError in a module becomes a problem of a config: pydantic takes it."""
    imports = (n for n in module.tree.body if isinstance(n, ast.ImportFrom))
    return any(node.module == "pydantic" for node in imports)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _label(node: ast.AST) -> str:
    """Name a computed part of a text in one word, as `missing` for `', '.join(missing)`."""
    match node:
        case ast.Name(id=name):
            return name.strip("_").lower()
        case ast.Attribute(attr="__name__"):
            return "type"
        case ast.Attribute(attr=name):
            return name.strip("_").lower()
        case ast.Call(func=ast.Attribute(value=value, attr="splitlines" | "keys" | "values")):
            return _label(value)
        case ast.Call(func=ast.Attribute() as function, args=[]):
            return _label(function)
        case ast.Call(args=[*_, last]):
            return _label(last)
        case ast.Call(func=function):
            return _label(function)
        case ast.Subscript(value=value, slice=ast.Constant(value=str(key))):
            return key if isinstance(value, ast.Name) else _label(value)
        case ast.Subscript(value=value) | ast.Starred(value=value):
            return _label(value)
        case ast.BinOp(left=left):
            return _label(left)
        case ast.BoolOp(values=[first, *_]) | ast.IfExp(body=first):
            return _label(first)
        case ast.GeneratorExp() | ast.ListComp():
            return _label(node.generators[0].iter)
    return "..."


if __name__ == "__main__":
    print(render_error_reference(read_errors()), end="")
