"""Corruptions of a function: each family finds positions in the syntax tree and splices a few characters.

Only the spliced characters change. Formatting, comments and docstring are unchanged, and the smallest repair is known:
undoing the splice.
"""

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass

OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.FloorDiv: "//", ast.Mod: "%", ast.Div: "/"}
COMPARISONS = {ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="}
NEAR_OPERATORS = {
    "+": "-*",
    "-": "+",
    "*": "+",
    "//": ("%", "*"),
    "%": ("//", "+"),
    "/": ("//", "*"),
}
NEAR_COMPARISONS = {
    "<": ("<=", ">"),
    "<=": ("<", ">="),
    ">": (">=", "<"),
    ">=": (">", "<="),
    "==": ("!=",),
    "!=": ("==",),
}
NEAR_CALLS = {
    "min": "max",
    "max": "min",
    "any": "all",
    "all": "any",
    "append": "extend",
    "extend": "append",
    "upper": "lower",
    "lower": "upper",
    "startswith": "endswith",
    "endswith": "startswith",
    "index": "count",
    "add": "discard",
    "sum": "len",
    "ceil": "floor",
    "floor": "ceil",
}


@dataclass(frozen=True, slots=True)
class Splice:
    """Replace `text[start:stop]` (characters) by `new`."""

    start: int
    stop: int
    new: str

    def apply(self, text: str) -> str:
        """The text with the splice made."""
        return text[: self.start] + self.new + text[self.stop :]


class Source:
    """A parsed text with the character positions of its nodes.

    Raises:
        SyntaxError: the text is not valid Python.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.tree = ast.parse(text)
        self._lines = text.split("\n")
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line) + 1)

    def offset(self, line: int, column: int) -> int:
        """Character offset of a syntax-tree position (1-based line, UTF-8 column)."""
        prefix = self._lines[line - 1].encode()[:column].decode()
        return self._starts[line - 1] + len(prefix)

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        """Start and stop of a node in characters."""
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.offset(node.lineno, node.col_offset), self.offset(node.end_lineno, node.end_col_offset)

    def segment(self, node: ast.expr | ast.stmt) -> str:
        """A node's own text."""
        start, stop = self.span(node)
        return self.text[start:stop]

    def between(self, left: ast.expr, right: ast.expr, symbol: str, new: str) -> Iterator[Splice]:
        """Replace the symbol between two neighbours, if it is unambiguous."""
        start, stop = self.span(left)[1], self.span(right)[0]
        gap = self.text[start:stop]
        if gap.count(symbol) == 1:
            at = start + gap.index(symbol)
            yield Splice(at, at + len(symbol), new)


Family = Callable[[Source], Iterator[Splice]]


def _operator(source: Source) -> Iterator[Splice]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            symbol = OPERATORS[type(node.op)]
            for new in NEAR_OPERATORS[symbol]:
                yield from source.between(node.left, node.right, symbol, new)


def _augmented(source: Source) -> Iterator[Splice]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.AugAssign) and type(node.op) in OPERATORS:
            symbol = OPERATORS[type(node.op)]
            for new in NEAR_OPERATORS[symbol]:
                yield from source.between(node.target, node.value, symbol + "=", new + "=")


def _comparison(source: Source) -> Iterator[Splice]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            symbol = COMPARISONS[type(node.ops[0])]
            for new in NEAR_COMPARISONS[symbol]:
                yield from source.between(node.left, node.comparators[0], symbol, new)


def _constant(source: Source) -> Iterator[Splice]:
    indices = _index_nodes(source)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Constant) and type(node.value) is int and node not in indices:
            yield from _shifted(source, node)


def _index(source: Source) -> Iterator[Splice]:
    for node in _index_nodes(source):
        yield from _shifted(source, node)


def _index_nodes(source: Source) -> list[ast.Constant]:
    return [
        node
        for subscript in ast.walk(source.tree)
        if isinstance(subscript, ast.Subscript)
        for node in ast.walk(subscript.slice)
        if isinstance(node, ast.Constant) and type(node.value) is int
    ]


def _shifted(source: Source, node: ast.Constant) -> Iterator[Splice]:
    start, stop = source.span(node)
    assert isinstance(node.value, int)
    for value in (node.value - 1, node.value + 1):
        if value >= 0:
            yield Splice(start, stop, str(value))


def _boolean(source: Source) -> Iterator[Splice]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            for left, right in zip(node.values, node.values[1:], strict=False):
                yield from source.between(left, right, old, new)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            yield Splice(source.span(node)[0], source.span(node.operand)[0], "")


def _swapped_operands(source: Source) -> Iterator[Splice]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.BinOp):
            yield from _swap(source, node.left, node.right)
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            yield from _swap(source, node.left, node.comparators[0])


def _swapped_arguments(source: Source) -> Iterator[Splice]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and len(node.args) == 2:
            yield from _swap(source, node.args[0], node.args[1])
        elif isinstance(node, ast.IfExp):
            yield from _swap(source, node.body, node.orelse)


def _swap(source: Source, left: ast.expr, right: ast.expr) -> Iterator[Splice]:
    (start, middle), (resume, stop) = source.span(left), source.span(right)
    if source.segment(left) != source.segment(right):
        yield Splice(start, stop, source.text[resume:stop] + source.text[middle:resume] + source.text[start:middle])


def _wrong_variable(source: Source) -> Iterator[Splice]:
    for function in ast.walk(source.tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        names = [argument.arg for argument in function.args.args]
        for node in ast.walk(function):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names:
                for name in names:
                    if name != node.id:
                        yield Splice(*source.span(node), name)


def _negation(source: Source) -> Iterator[Splice]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            yield Splice(source.span(node)[0], source.span(node.operand)[0], "")
        elif isinstance(node, ast.Return) and node.value is not None:
            start = source.span(node.value)[0]
            if isinstance(node.value, ast.Compare | ast.BoolOp):
                yield Splice(start, start, "not ")
            elif isinstance(node.value, ast.BinOp | ast.Name | ast.Call):
                yield Splice(start, start, "-")


def _call(source: Source) -> Iterator[Splice]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in NEAR_CALLS:
                stop = source.span(node.func)[1]
                yield Splice(stop - len(name), stop, NEAR_CALLS[name])


def _range_bound(source: Source) -> Iterator[Splice]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "range" and node.args:
            bound = node.args[0] if len(node.args) == 1 else node.args[1]
            stop = source.span(bound)[1]
            yield Splice(stop, stop, "-1")
            yield Splice(stop, stop, "+1")


FAMILIES: dict[str, Family] = {
    "operator": _operator,
    "augmented_assignment": _augmented,
    "comparison": _comparison,
    "constant": _constant,
    "index": _index,
    "boolean": _boolean,
    "swapped_operands": _swapped_operands,
    "swapped_arguments": _swapped_arguments,
    "wrong_variable": _wrong_variable,
    "negation": _negation,
    "call": _call,
    "range_bound": _range_bound,
}


def corruptions(text: str, family: str) -> list[Splice]:
    """All splices of one family in a text, each of which still parses; in a stable order.

    Raises:
        SyntaxError: the text is not valid Python.
        KeyError: no such family.
    """
    return [splice for splice in FAMILIES[family](Source(text)) if parses(splice.apply(text))]


def parses(text: str) -> bool:
    """Whether the text is valid Python."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
