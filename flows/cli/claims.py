"""`mopd report claims`: tests the hypotheses of several run files from the store and writes one page."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.documents import DocumentError, read_object, user_error
from base.errors import UserError
from base.store.checkpoint import Store, write_whole
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from flows.run_file.load import load_run_file

if TYPE_CHECKING:
    from evals.claims.page import Judged
    from evals.claims.verdicts import Finding
    from evals.comparison.results import Results

FOLDER = Path(__file__).parents[1] / "runs" / "claims"
NOTES = "NOTES.md"
PAGE, DATA = Path("docs/claims.md"), Path("studies/claims.json")


def write_claims(
    folder: Path, overrides: Sequence[str], home: Path, page: Path | None = None, measured: Path | None = None
) -> Path:
    """Test the hypotheses of every run file of a folder and write the page, its figures and its data.

    The data are a JSON file: for each run file its seeds, the level of its intervals, its tests with everything needed
    to compute them again, and its checkpoints' content keys, digests and code fingerprints.

    Args:
        folder: The folder with the run files; those without hypotheses are skipped. The text of its NOTES.md, if there
            is one, follows the page's introduction.
        overrides: Dotted assignments for each of them, such as `seeds=[0,1,2]`.
        home: Where the runs' scores are.
        page: The Markdown file, `PAGE` by default. Figures go into a folder of its name beside it, findings into a JSON
            file beside it, those of `PAGE` into `DATA`.
        measured: The JSON file of an earlier page, whose measurements are judged instead of the home's scores.

    Raises:
        UserError: there is no run file with hypotheses, the store has no scores of any, or the measurements are of
            other tests.
    """
    from evals.claims.page import Judged, claims_page
    from flows.champion.results import collect

    store, tested, made = Store(home), [], {}
    earlier = _measurements(measured) if measured else None
    page, data = (page, page.with_suffix(".json")) if page else (PAGE, DATA)
    for file in sorted(folder.glob("*.yaml")):
        config = load_run_file(file, list(overrides))
        if not config.hypotheses:
            continue
        graph = build_graph(config, home)
        results, kept = collect(graph, store), None if earlier is None else earlier.get(file.name, {})
        made[file.name] = _checkpoints(graph, store) if kept is None else kept.get("checkpoints", {})
        found = _found(results, kept, file)
        for one in found:
            if one.verdict == "not measured":
                sys.stderr.write(f"warning: {file}: hypotheses.{one.hypothesis}.tests.{one.test}: not measured\n")
        tested.append(Judged(file, results, found))
    if not tested:
        raise UserError(f"{folder}: no run file with hypotheses")
    if earlier is None and not any(run.results.cells for run in tested):
        file = tested[0].file
        raise UserError(f"{file}: {home} has no artifacts of this run; make them first: mopd run {file} --home {home}")
    data.parent.mkdir(parents=True, exist_ok=True)
    intro = [_intro(tested[0].results.confidence, os.path.relpath(data, page.parent))]
    if (notes := folder / NOTES).exists():
        intro.append(notes.read_text(encoding="utf-8").strip())
    write_whole(page, claims_page(tested, "\n\n".join(intro), _figures(tested, page.with_suffix(""))))
    content = {run.file.name: _data(run, made[run.file.name]) for run in tested}
    write_whole(data, json.dumps(content, indent=1) + "\n")
    return page


def _figures(tested: "Sequence[Judged]", folder: Path) -> dict[str, Path]:
    """Write the figures; returns title -> path relative to the page."""
    from evals.claims.figures import fits_figure, intervals_figure
    from evals.claims.page import by_hypothesis

    found, figures = by_hypothesis(tested), {}
    drawn = {"Estimate and interval of every test": intervals_figure(found), "Fits": fits_figure(found)}
    folder.mkdir(parents=True, exist_ok=True)
    for (title, svg), name in zip(drawn.items(), ("intervals.svg", "fits.svg"), strict=True):
        if svg is not None:
            write_whole(folder / name, svg)
            figures[title] = Path(folder.name) / name
    return figures


def _found(results: "Results", measured: Mapping[str, Any] | None, file: Path) -> "list[Finding]":
    """Measure and judge a run file's hypotheses, or judge earlier measurements of them."""
    from evals.claims.data import findings_again
    from evals.claims.findings import findings

    if measured is None:
        return findings(results, results.hypotheses)
    try:
        return findings_again(measured.get("findings", []), results.hypotheses, results.confidence)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: its measurements are incomplete or malformed: {error}") from error
    except ValueError as error:
        raise UserError(f"{file}: {error}") from error


def _measurements(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except FileNotFoundError as error:
        raise UserError(f"no such file '{path}'") from error
    except DocumentError as error:
        raise user_error(path, error) from error


def _data(run: "Judged", checkpoints: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """A run file's entry in the JSON file."""
    from evals.claims.data import findings_data

    return {
        "run": run.results.run,
        "seeds": run.results.seeds,
        "confidence": run.results.confidence,
        "findings": findings_data(run.found),
        "checkpoints": checkpoints,
    }


def _checkpoints(graph: StageGraph, store: Store) -> dict[str, dict[str, str]]:
    """node id -> content key, digest and code fingerprint of each checkpoint that is in the store."""
    return {
        node.id: {"key": node.key, "digest": artifact.digest, "code": str(artifact.manifest.get("code", ""))}
        for node in graph.checkpoints
        if (artifact := store.find(node.key))
    }


def _intro(confidence: float, data: str) -> str:
    return (
        "What the literature claims of on-policy distillation, tested at lab scale. Made by `mopd report claims` from "
        "the runs of `flows/runs/claims/`: margins, tests and numbers of examples are in these run files, and their "
        f"git history shows when they were fixed. The same numbers, by seed, are in [a JSON file]({data}), and the "
        "content keys of the checkpoints with them.\n\n"
        f"Intervals are at {100 * confidence:g} %. Scores are paired by example and seed; with three seeds and more "
        "they are for new seeds and new examples, as crossed random effects, with fewer for new examples only (*of "
        "these seeds*). Measures with one value per seed have the t interval over seeds. Every test has a p-value of "
        "the expectation and one of its opposite, both on the two-sided scale and after Holm's correction over all "
        f"tests of its run file. *Shown* and *contradicted* need one below {1 - confidence:.2g}; *not shown* is a "
        "result too, and no evidence of the opposite. A margin that the start itself would keep is *not informative*. "
        "A fit of fewer than seven independent points *cannot be judged*: checkpoints of one method are one point. One "
        "model of half a million parameters and two tasks decide nothing about large models."
    )
