"""`mopd report claims`: the hypotheses of several run files, tested from the store and told on one page."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experts.errors import UserError
from flows.plan import StageGraph, build_graph
from flows.run_file import load_run_file
from stages.core.checkpoint import Store, write_whole

if TYPE_CHECKING:
    from evals.claims_page import Judged

FOLDER = Path(__file__).parent / "runs" / "claims"
NOTES = "NOTES.md"
PAGE = Path("docs/claims.md")


def write_claims(folder: Path, overrides: Sequence[str], home: Path, page: Path) -> Path:
    """Test the hypotheses of every run file of a folder and write the page, its figures and its data.

    The data is a JSON file: for each run file its seeds, the level of its intervals, its tests with all a reader needs
    to compute them again, and its checkpoints' content keys, digests and code fingerprints.

    Args:
        folder: Holds the run files; those without hypotheses are passed over. The text of its NOTES.md, if it has one,
            follows the page's introduction.
        overrides: Dotted assignments for each of them, such as `seeds=[0,1,2]`.
        home: Where the runs' scores are.
        page: The Markdown file; figures go into a folder of its name beside it, findings into a JSON file.

    Raises:
        UserError: there is no run file with hypotheses, or no scores of any are in the store.
    """
    from evals.claims import findings
    from evals.claims_figures import claim_figure
    from evals.claims_page import Judged, claims_page
    from flows.results import collect

    store, tested, made = Store(home), [], {}
    figures_folder = page.with_suffix("")
    for file in sorted(folder.glob("*.yaml")):
        config = load_run_file(file, list(overrides))
        if not config.hypotheses:
            continue
        graph = build_graph(config, home)
        results, made[file.name] = collect(graph, store), _checkpoints(graph, store)
        found = findings(results, config.hypotheses)
        for one in found:
            if one.verdict == "not measured":
                sys.stderr.write(f"warning: {file}: hypotheses.{one.hypothesis}.tests.{one.test}: not measured\n")
        figures = {}
        for key in config.hypotheses:
            drawn = claim_figure([one for one in found if one.hypothesis == key])
            if drawn is not None:
                figures_folder.mkdir(parents=True, exist_ok=True)
                write_whole(figures_folder / f"{key}.svg", drawn)
                figures[key] = Path(figures_folder.name) / f"{key}.svg"
        tested.append(Judged(file, results, found, figures))
    if not tested:
        raise UserError(f"{folder}: no run file with hypotheses")
    if not any(run.results.cells for run in tested):
        file = tested[0].file
        raise UserError(f"{file}: nothing of it is in {home}; make it first: mopd run {file} --home {home}")
    page.parent.mkdir(parents=True, exist_ok=True)
    intro = [_intro(tested[0].results.confidence)]
    if (notes := folder / NOTES).exists():
        intro.append(notes.read_text(encoding="utf-8").strip())
    write_whole(page, claims_page(tested, "\n\n".join(intro)))
    data = {run.file.name: _data(run, made[run.file.name]) for run in tested}
    write_whole(page.with_suffix(".json"), json.dumps(data, indent=1) + "\n")
    return page


def _data(run: "Judged", checkpoints: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    """A run file's part of the JSON file."""
    return {
        "run": run.results.run,
        "seeds": run.results.seeds,
        "confidence": run.results.confidence,
        "findings": [{**asdict(one), "config": one.config.model_dump(mode="json")} for one in run.found],
        "checkpoints": checkpoints,
    }


def _checkpoints(graph: StageGraph, store: Store) -> dict[str, dict[str, str]]:
    """node id -> content key, digest and code fingerprint of each checkpoint that is in the store."""
    return {
        node.id: {"key": node.key, "digest": artifact.digest, "code": str(artifact.manifest.get("code", ""))}
        for node in graph.checkpoints
        if (artifact := store.find(node.key))
    }


def _intro(confidence: float) -> str:
    return (
        "What the literature claims of on-policy distillation, tested at lab scale. Made by `mopd report claims` from "
        "the runs of `flows/runs/claims/`: margins, tests and numbers of examples stand in these run files, and their "
        "git history tells when they were fixed. The same numbers, by seed, are in the JSON file beside this page, and "
        "the content keys of the checkpoints with them.\n\n"
        f"Intervals are at {100 * confidence:g} % (tests of equivalence: 90 %, two one-sided tests at 5 %). Scores are "
        "paired by example and seed; with three seeds and more their t intervals, with seeds and examples as crossed "
        "random effects and Satterthwaite's degrees of freedom, speak of new seeds and new examples. Measures with one "
        "value a seed have the t interval over seeds. *above* and *below* are shown only with Holm's correction over "
        "all such tests of a run file. A claim is *contradicted* where the interval lies wholly on the other side, and "
        "*not shown* otherwise: that is a result too, and no evidence of the opposite. One model of half a million "
        "parameters and two tasks decide nothing about large models."
    )
