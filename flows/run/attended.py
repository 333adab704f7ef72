"""A run from the terminal: Prefect's server for its time, and its end in words and an exit code."""

import errno
import shutil
import sys
from typing import TYPE_CHECKING

from base.errors import UserError
from base.exit_codes import FAILED, INTERRUPTED, MISTAKE
from base.store.checkpoint import Store
from flows.plan.graph import EVALUATIONS, StageGraph
from flows.plan.lock import status as node_status
from flows.run.run_request import RunRequest

if TYPE_CHECKING:
    from flows.run.finish import Outcome
    from flows.run.pipeline import PipelineFailedError

# Less than this, and a database can no longer write a page.
NOTHING_FREE_BYTES = 2**20


def run_pipeline(asked: RunRequest, graph: StageGraph, *, plain: bool, verbose: bool) -> "Outcome | int":
    """Run what is missing under Prefect.

    Returns:
        What the run came to, or an exit code where it was stopped or failed.

    Raises:
        UserError: it ended by a mistake.
    """
    from flows.run.session import prefect_session

    for entry in node_status(graph, Store(asked.home)):
        if not entry.cached and entry.node.stage not in EVALUATIONS:
            sys.stderr.write(f"{entry.node.id}: to run ({entry.why})\n")
    sys.stderr.write("starting Prefect …\n")
    with prefect_session(asked.home, verbose) as pages:
        from httpx import HTTPError
        from prefect import tags
        from prefect.exceptions import CancelledRun, PrefectException

        from flows.run.crashed_runs import run_tags
        from flows.run.pipeline import PipelineFailedError, ending, pipeline

        sys.stderr.write(f"Prefect: {pages}\n")
        try:
            with tags(*run_tags(graph.config.name)):
                return pipeline(
                    str(asked.file), list(asked.overrides), asked.max_steps, str(asked.home.resolve()), plain
                )
        except CancelledRun:
            return stopped(asked)
        except PipelineFailedError as error:
            return _report_failures(error, asked)
        except (PrefectException, HTTPError) as error:
            # What the run came to counts, not whether Prefect could record it.
            return _unrecorded(error, asked, ending())


def _unrecorded(error: Exception, asked: RunRequest, ended: object) -> "Outcome | int":
    """What a run came to whose end Prefect could not record; or its exit code.

    Raises:
        UserError: it ended by a mistake.
    """
    from prefect.states import State

    from flows.run.finish import Outcome
    from flows.run.pipeline import PipelineFailedError
    from flows.servers.start import without_secrets

    match ended:
        case PipelineFailedError() as failure:
            return _report_failures(failure, asked)
        case UserError() as mistake:
            raise mistake from None
        case State():
            return stopped(asked)
        case Outcome() as outcome:
            said = without_secrets(str(error).partition(" - Response")[0]) or type(error).__name__
            sys.stderr.write(f"warning: Prefect did not record the end of this run: {said}\n")
            return outcome
    return _report_silence(error, asked)


def stopped(asked: RunRequest) -> int:
    """Say how a run that was stopped goes on; returns the exit code."""
    sys.stderr.write(f"stopped; `{asked.command}` resumes where it was\n")
    return INTERRUPTED


def _report_failures(error: "PipelineFailedError", asked: RunRequest) -> int:
    from flows.engines.launch import NodeFailedError
    from flows.engines.worker import DISK_FAULT

    mistakes = []
    for job, failure in error.failures.items():
        text = str(failure)
        full = isinstance(failure, OSError) and failure.errno == errno.ENOSPC
        if full or (isinstance(failure, NodeFailedError) and failure.exit_code == DISK_FAULT):
            text = f"the disk of {asked.home} is full or failing: {text}"
        sys.stderr.write(f"error: {text if text.startswith(job) else f'{job}: {text}'}\n")
        mistakes.append(isinstance(failure, UserError) or getattr(failure, "user_error", False))
    if error.not_started:
        sys.stderr.write(f"not started, for they need what failed: {', '.join(error.not_started)}\n")
    sys.stderr.write(f"all else is finished and kept; `{asked.command}` resumes where it was\n")
    return MISTAKE if all(mistakes) else FAILED


def _report_silence(error: Exception, asked: RunRequest) -> int:
    """Say why Prefect's server does not answer: its database lies in the home, so a full disk ends it first."""
    from flows.servers.start import without_secrets

    if shutil.disk_usage(asked.home).free < NOTHING_FREE_BYTES:
        cause = f"the disk of {asked.home} is full; free some space"
    else:
        said = without_secrets(str(error).partition(" - Response")[0]) or type(error).__name__
        cause = f"Prefect's server no longer answers as it should ({said}); its log is in {asked.home}/servers"
    sys.stderr.write(f"error: {cause}\nwhat is finished is kept; `{asked.command}` resumes where it was\n")
    return FAILED
