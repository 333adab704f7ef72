"""Progress that is read from the output of a program."""

import pytest

from stages.learner.program_output import Line, parser


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"step": 3, "total": 10, "loss": 0.5, "note": "x", "ok": true}', Line(3, 10, {"loss": 0.5})),
        ('  {"step": 3.0, "loss": NaN, "kl": 1}', Line(3, None, {"kl": 1.0})),
        ('{"step": 3, "total": 0}', Line(3, None, {})),
        ('{"loss": 0.5}', None),
        ('{"step": -1}', None),
        ('{"step": "3"}', None),
        ('{"step": 3', None),
        ("[3]", None),
        ("step 3", None),
        ("", None),
        ('{"step": 3, "x": "' + "y" * 200_000 + '"}', None),
    ],
)
def test_json_lines(text: str, line: Line | None) -> None:
    assert parser(None)(text) == line


def test_a_regular_expression_names_step_total_and_metrics() -> None:
    parse = parser(r"step (?P<step>\d+)(/(?P<total>\d+))?.* loss=(?P<loss>\S+)")
    assert parse("INFO step 4/20 in 3 s loss=1.5e-1\n") == Line(4, 20, {"loss": 0.15})
    assert parse("step 4 loss=nan") == Line(4, None, {})
    assert parse("step 4/20") is None


def test_only_so_many_metrics_of_a_line_are_kept() -> None:
    many = ", ".join(f'"m{n}": {n}' for n in range(200))
    line = parser(None)(f'{{"step": 1, {many}}}')
    assert line is not None and len(line.metrics) == 50
