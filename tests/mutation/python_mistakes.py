"""Mistakes in Python: a fixed set of operators on the syntax tree, each the change of one expression or statement.

Text is replaced in place, so that a mutant differs from its file by nothing else. What only a reader sees (docstrings,
annotations, the text of errors) and assertions are left alone.
"""

import ast
import re
from collections.abc import Iterator

from tests.mutation.mutant import Mutant, line_at, numbered

_COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: ("is", ("is not",)),
    ast.IsNot: ("is not", ("is",)),
    ast.In: ("in", ("not in",)),
    ast.NotIn: ("not in", ("in",)),
}
_ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"),
    ast.Div: ("/", "*"),
    ast.Pow: ("**", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitXor: ("^", "&"),
}
_EXTREMES = {
    "min": "max",
    "max": "min",
    "minimum": "maximum",
    "maximum": "minimum",
    "amin": "amax",
    "amax": "amin",
    "floor": "ceil",
    "ceil": "floor",
}
# Quantities of which 2 % too much or too little is a wrong ε.
_QUANTITIES = {
    "sample_rate",
    "rate",
    "client_rate",
    "noise_multiplier",
    "std",
    "sensitivity",
    "max_grad_norm",
    "max_update_norm",
    "delta",
    "epsilon",
    "expected_batch_size",
    "steps",
    "scale",
    "bound",
    "norms",
    "sq_norms",
    "_MARGIN",
    "clients",
}
# Calls without which values have another precision, size or sign, or are of somebody else.
_DROPPED = {
    "double",
    "float",
    "to",
    "abs",
    "sqrt",
    "sqrt_",
    "square",
    "square_",
    "clamp",
    "clamp_",
    "round",
    "round_",
    "masked_fill_",
    "nan_to_num",
    "bitwise_and_",
    "contiguous",
    "clone",
    "detach",
    "copy",
    "sum",
    "all",
    "any",
    "t",
    "transpose",
    "measured",
    "restored",
    "clipped",
    "dense",
    "total",
    "isfinite",
    "expand_as",
    "max",
    "min",
    "exp",
    "log",
    "log1p",
    "expm1",
    "ceil",
    "floor",
    "sorted",
    "escape",
    "sha256",
    "item",
    "clear",
    "reversed",
    "fsync",
    "int",
}


def python_mutants(path: str, source: str) -> list[Mutant]:
    """All mutants of a file, in its order."""
    tree = ast.parse(source)
    return numbered(_Finder(path, source, tree).of(tree.body, ""))


class _Finder:
    def __init__(self, path: str, source: str, tree: ast.Module) -> None:
        self.path, self.text = path, source.encode()
        self.modules = {
            alias.asname or alias.name.partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import)
            for alias in node.names
        } | {"F", "nn"}
        # Where a quantity decides what is refused, or is asked for its shape, 2 % more or less matters little.
        conditions: list[ast.AST] = [
            node.test for node in ast.walk(tree) if isinstance(node, ast.If | ast.While | ast.IfExp | ast.Assert)
        ]
        self.unscaled = {inner for condition in conditions for inner in ast.walk(condition)}
        self.unscaled |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        # Whether lengths are compared: they are the same.
        self.strict = {node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "strict"}
        self.lines = [0]
        for line in self.text.splitlines(keepends=True):
            self.lines.append(self.lines[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr | ast.stmt | ast.keyword)
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset

    def source(self, node: ast.expr) -> str:
        return self.text[slice(*self.span(node))].decode()

    def of(self, statements: list[ast.stmt], function: str) -> Iterator[Mutant]:
        for statement in statements:
            yield from self.statement(statement, function)

    def replace(self, function: str, operator: str, start: int, end: int, after: str) -> Mutant:
        line = line_at(self.text, start)
        return Mutant(self.path, function, operator, start, end, self.text[start:end].decode(), after, line)

    def between(
        self, function: str, operator: str, left: ast.expr, right: ast.expr, old: str, new: str
    ) -> Iterator[Mutant]:
        """``new`` for the sign ``old`` between two expressions."""
        start, end = self.span(left)[1], self.span(right)[0]
        sign = rf"\b{old}\b".replace(" ", r"\s+") if old[0].isalpha() else re.escape(old)
        if found := re.search(sign, self.text[start:end].decode()):
            at = start + len(self.text[start:end].decode()[: found.start()].encode())
            yield self.replace(function, operator, at, at + len(found.group().encode()), new)

    # Statements

    def statement(self, node: ast.stmt, function: str) -> Iterator[Mutant]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == "__repr__":
                return
            inner = f"{function}.{node.name}" if function else node.name
            if not isinstance(node, ast.ClassDef):
                for default in [*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None)]:
                    yield from self.expression(default, inner)
            yield from self.of(node.body, inner)
            return
        start, end = self.span(node)
        dropped = (
            isinstance(node, ast.Raise | ast.AugAssign | ast.Delete)
            or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
            or (
                isinstance(node, ast.Assign) and all(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets)
            )
            or (isinstance(node, ast.Return) and node.value is None)
        )
        if dropped:
            yield self.replace(function, "drop statement", start, end, "pass")
        if isinstance(node, ast.Raise | ast.Assert | ast.Import | ast.ImportFrom) or (
            isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call)
        ):
            return
        if isinstance(node, ast.AugAssign) and type(node.op) in _ARITHMETIC:
            old, new = _ARITHMETIC[type(node.op)]
            yield from self.between(function, "arithmetic", node.target, node.value, f"{old}=", f"{new}=")
        if isinstance(node, ast.If | ast.While):
            yield from self.negated(node.test, function)
        for name, value in ast.iter_fields(node):
            if name == "annotation":
                continue
            for child in value if isinstance(value, list) else [value]:
                yield from self.child(child, function)

    def child(self, node: object, function: str) -> Iterator[Mutant]:
        if isinstance(node, ast.stmt):
            yield from self.statement(node, function)
        elif isinstance(node, ast.expr):
            yield from self.expression(node, function)
        elif isinstance(node, ast.AST):  # handlers, items of with, cases, comprehensions, arguments
            if isinstance(node, ast.comprehension):
                for test in node.ifs:
                    yield from self.negated(test, function)
            for name, value in ast.iter_fields(node):
                if name not in ("annotation", "type"):
                    for child in value if isinstance(value, list) else [value]:
                        yield from self.child(child, function)

    def negated(self, test: ast.expr, function: str) -> Iterator[Mutant]:
        if (isinstance(test, ast.Compare) and len(test.ops) == 1) or isinstance(test, ast.UnaryOp):
            return  # the comparison's own mutants have it, or those of "not"
        start, end = self.span(test)
        yield self.replace(function, "negate", start, end, f"not ({self.source(test)})")

    # Expressions

    def expression(self, node: ast.expr, function: str) -> Iterator[Mutant]:
        if isinstance(node, ast.JoinedStr):
            return
        (start, end), text = self.span(node), self.source(node)
        match node:
            case ast.Compare():
                values = [node.left, *node.comparators]
                for left, op, right in zip(values, node.ops, values[1:], strict=False):
                    old, new = _COMPARISONS[type(op)]
                    for sign in new:
                        yield from self.between(function, "compare", left, right, old, sign)
            case ast.BoolOp():
                old, sign = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
                for left, right in zip(node.values, node.values[1:], strict=False):
                    yield from self.between(function, "and/or", left, right, old, sign)
            case ast.BinOp() if type(node.op) in _ARITHMETIC:
                old, sign = _ARITHMETIC[type(node.op)]
                yield from self.between(function, "arithmetic", node.left, node.right, old, sign)
            case ast.UnaryOp() if isinstance(node.op, ast.Not | ast.USub):
                kind = "negate" if isinstance(node.op, ast.Not) else "sign"
                yield self.replace(function, kind, start, end, f"({self.source(node.operand)})")
            case ast.Constant() if node not in self.strict:
                for after in _constants(node.value):
                    yield self.replace(function, "constant", start, end, after)
            case ast.IfExp():
                yield from self.negated(node.test, function)
            case ast.Call():
                yield from self.call(node, function)
            case ast.Name(id=name, ctx=ast.Load()) | ast.Attribute(attr=name, ctx=ast.Load()) if (
                name in _QUANTITIES and node not in self.unscaled
            ):
                yield self.replace(function, "quantity", start, end, f"({text} * 1.02)")
        for name, value in ast.iter_fields(node):
            if (name == "func" and isinstance(value, ast.Name)) or (
                name == "slice" and isinstance(value, ast.Constant)
            ):
                continue
            for child in value if isinstance(value, list) else [value]:
                yield from self.child(child, function)

    def call(self, node: ast.Call, function: str) -> Iterator[Mutant]:
        (start, end), text = self.span(node), self.source(node)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        plain = not any(isinstance(argument, ast.Starred) for argument in node.args)
        if name == "sum" and isinstance(node.func, ast.Name):
            yield self.replace(function, "extreme", start, start + len(name), "max")
        if name in _EXTREMES:
            at = self.span(node.func)[1]
            yield self.replace(function, "extreme", at - len(name), at, _EXTREMES[name])
        method = isinstance(node.func, ast.Attribute) and not self.is_module(node.func.value)
        on_device = name == "to" and text.endswith("device)")  # there is one device where mutants are run
        if name in _DROPPED and method and not on_device:
            assert isinstance(node.func, ast.Attribute)
            yield self.replace(function, "drop call", start, end, self.source(node.func.value))
        if (
            name in _DROPPED
            and (not method or name in ("measured", "restored"))
            and len(node.args) == 1
            and plain
            and (not isinstance(node.args[0], ast.GeneratorExp))
        ):
            yield self.replace(function, "drop call", start, end, f"({self.source(node.args[0])})")
        if len(node.args) >= 2 and plain and all(isinstance(a, ast.Name | ast.Attribute) for a in node.args[:2]):
            first, second = map(self.source, node.args[:2])
            if name not in ("isinstance", "getattr", "hasattr", "setattr", "zip", "isclose", "equal"):
                yield self.replace(
                    function,
                    "swap arguments",
                    self.span(node.args[0])[0],
                    self.span(node.args[1])[1],
                    f"{second}, {first}",
                )
        for keyword in node.keywords:
            if keyword.arg in ("min", "max") and name.startswith("clamp"):
                at = self.span(keyword)[0]
                yield self.replace(function, "extreme", at, at + 3, {"min": "max", "max": "min"}[keyword.arg])
            if keyword.arg in ("dtype", "generator", "count", "dim"):
                at, until = self.span(keyword)
                left = re.search(r",\s*$", self.text[:at].decode())
                if left is not None:
                    yield self.replace(function, "drop keyword", at - len(left.group().encode()), until, "")
                elif right := re.match(r"\s*,?\s*", self.text[until:].decode()):
                    yield self.replace(function, "drop keyword", at, until + len(right.group().encode()), "")

    def is_module(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id in self.modules


def _constants(value: object) -> list[str]:
    if isinstance(value, bool):
        return [str(not value)]
    if isinstance(value, int):
        return [str(value + 1)]
    if isinstance(value, float):
        # What is so small is a tolerance.
        return [repr(value * (1.02 if value > 1e-3 else 100))] if value else ["1.0"]
    return []
