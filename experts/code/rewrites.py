"""Needless rewrites of working code (rough demonstrations), and a measure of the needless part of an edit."""

import ast
import io
import random
import re
import tokenize
from collections.abc import Iterator, Sequence
from functools import lru_cache

from experts.code.mutations import Source, Splice

SILENT_TOKENS = frozenset({tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER})
MIRRORED = {ast.Lt: ">", ast.LtE: ">=", ast.Gt: "<", ast.GtE: "<=", ast.Eq: "==", ast.NotEq: "!="}
SPARE_NAMES = "cdefghjkltuvwz"


@lru_cache(maxsize=4096)
def code_tokens(code: str) -> tuple[str, ...]:
    """The Python tokens of a text, without comments, blank lines and the width of white space.

    Raises:
        SyntaxError: the text cannot be tokenized.
    """
    try:
        return tuple(
            tokenize.tok_name[token.type] if not token.string.strip() else token.string
            for token in tokenize.generate_tokens(io.StringIO(code.rstrip() + "\n").readline)
            if token.type not in SILENT_TOKENS
        )
    except tokenize.TokenError as error:
        raise SyntaxError(str(error)) from None


def edit_distance(left: Sequence[str], right: Sequence[str]) -> int:
    """Levenshtein distance: the fewest tokens to insert, delete or replace."""
    start = 0
    while start < min(len(left), len(right)) and left[start] == right[start]:
        start += 1
    end = 0
    while end < min(len(left), len(right)) - start and left[-1 - end] == right[-1 - end]:
        end += 1
    left, right = left[start : len(left) - end], right[start : len(right) - end]
    row = list(range(len(right) + 1))
    for i, token in enumerate(left, 1):
        previous, row[0] = row[0], i
        for j, other in enumerate(right, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (token != other))
    return row[-1]


def rewrites(code: str, rng: random.Random) -> list[str]:
    """Equivalent versions of a function that change more than a repair needs, in random order.

    They rename a parameter, store a result in a variable before returning it, or write operands the other way round.
    Equivalence is likely, not proven (`a+b` of lists does not commute): the caller runs the tests.

    Raises:
        SyntaxError: the text is not valid Python.
    """
    source = Source(code)
    found = [splice.apply(code) for splice in (*_stored(source), *_flipped(source))]
    found.extend(_renamed(source, rng))
    rng.shuffle(found)
    return found


def _renamed(source: Source, rng: random.Random) -> Iterator[str]:
    for function in ast.walk(source.tree):
        if isinstance(function, ast.FunctionDef):
            for argument in function.args.args:
                spare = [name for name in SPARE_NAMES if not re.search(rf"\b{name}\b", source.text)]
                if spare:
                    yield _rename(source, function, argument.arg, rng.choice(spare))


def _rename(source: Source, function: ast.FunctionDef, old: str, new: str) -> str:
    places = [
        source.offset(node.lineno, node.col_offset)
        for node in ast.walk(function)
        if (isinstance(node, ast.Name) and node.id == old) or (isinstance(node, ast.arg) and node.arg == old)
    ]
    text = source.text
    for start in sorted(places, reverse=True):
        text = Splice(start, start + len(old), new).apply(text)
    return text


def _stored(source: Source) -> Iterator[Splice]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Return) and isinstance(node.value, ast.expr) and not isinstance(node.value, ast.Name):
            start, stop = source.span(node)
            line = source.text[source.text.rfind("\n", 0, start) + 1 : start]
            if not line.strip():
                yield Splice(start, stop, f"r={source.segment(node.value)}\n{line}return r")


def _flipped(source: Source) -> Iterator[Splice]:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
            left, right, symbol = node.left, node.right, "+" if isinstance(node.op, ast.Add) else "*"
        elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in MIRRORED:
            left, right, symbol = node.left, node.comparators[0], MIRRORED[type(node.ops[0])]
        else:
            continue
        if isinstance(left, ast.Name | ast.Constant) and isinstance(right, ast.Name | ast.Constant):
            stop = source.span(right)[1]
            yield Splice(source.span(left)[0], stop, source.segment(right) + symbol + source.segment(left))
