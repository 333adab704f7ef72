"""`mopd report claims`: the hypotheses of several run files, tested from the store and told on one page."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from experts.errors import UserError
from flows.plan import build_graph
from flows.run_file import load_run_file
from stages.core.checkpoint import Store, write_whole

FOLDER = Path(__file__).parent / "runs" / "claims"
PAGE = Path("docs/claims.md")


def write_claims(folder: Path, overrides: Sequence[str], home: Path, page: Path) -> Path:
    """Test the hypotheses of every run file of a folder and write the page, its figures and its data.

    Args:
        folder: Holds the run files; those without hypotheses are passed over.
        overrides: Dotted assignments for each of them, such as `seeds=[0,1,2]`.
        home: Where the runs' scores are.
        page: The Markdown file; figures go into a folder of its name beside it, findings into a JSON file.

    Raises:
        UserError: there is no run file with hypotheses, or none of a file's scores is in the store.
    """
    from evals.claims import findings
    from evals.claims_figures import claim_figure
    from evals.claims_page import Judged, claims_page
    from flows.results import collect

    store, tested = Store(home), []
    figures_folder = page.with_suffix("")
    for file in sorted(folder.glob("*.yaml")):
        config = load_run_file(file, list(overrides))
        if not config.hypotheses:
            continue
        results = collect(build_graph(config, home), store)
        if not results.cells:
            raise UserError(f"{file}: nothing of it is in {home}; make it first: mopd run {file} --home {home}")
        found = findings(results, config.hypotheses)
        for one in found:
            if one.verdict == "not measured":
                sys.stderr.write(f"warning: {file}: hypotheses.{one.hypothesis}.tests.{one.test}: not measured\n")
        figures = {}
        for key in config.hypotheses:
            drawn = claim_figure(results, [one for one in found if one.hypothesis == key])
            if drawn is not None:
                figures_folder.mkdir(parents=True, exist_ok=True)
                write_whole(figures_folder / f"{key}.svg", drawn)
                figures[key] = Path(figures_folder.name) / f"{key}.svg"
        tested.append(Judged(file, results, found, figures))
    if not tested:
        raise UserError(f"{folder}: no run file with hypotheses")
    page.parent.mkdir(parents=True, exist_ok=True)
    write_whole(page, claims_page(tested, _intro(tested[0].results.confidence)))
    data = {
        run.file.name: [{**asdict(one), "config": one.config.model_dump(mode="json")} for one in run.found]
        for run in tested
    }
    write_whole(page.with_suffix(".json"), json.dumps(data, indent=1) + "\n")
    return page


def _intro(confidence: float) -> str:
    return (
        "What the literature claims of on-policy distillation, tested at lab scale. Made by `mopd report claims` from "
        "the runs of `flows/runs/claims/`, where every comparison, margin and number of examples was fixed before it "
        "was measured; the same numbers are in the JSON file beside this page.\n\n"
        f"Intervals are at {100 * confidence:g} % (tests of equivalence: 90 %, two one-sided tests at 5 %). Scores are "
        "paired by example and seed and the bootstrap resamples both; measures with one value a seed have a t interval "
        "over seeds. *above* and *below* are shown only with Holm's correction over all such tests of a run file. A "
        "claim is *contradicted* where the interval lies wholly on the other side, and *not shown* otherwise: that is "
        "a result too, and no evidence of the opposite. One model of half a million parameters and two tasks decide "
        "nothing about large models."
    )
