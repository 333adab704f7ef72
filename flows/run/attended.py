"""A run from the terminal: starts Prefect's server for its duration, and reports its end by text and exit code."""

import errno
import shutil
import sys
from typing import TYPE_CHECKING

from base.errors import UserError
from base.exit_codes import FAILED, INTERRUPTED, MISTAKE
from base.store.checkpoint import Store
from flows.plan.lock import status as node_status
from flows.plan.nodes import StageGraph
from flows.run.run_request import RunRequest
from stages.config.kinds import EVALUATIONS

if TYPE_CHECKING:
    from flows.run.finish import Outcome
    from flows.run.pipeline import PipelineFailedError

# With less free space than this, a database may fail to write a page.
NOTHING_FREE_BYTES = 2**20


def run_pipeline(request: RunRequest, graph: StageGraph, *, plain: bool, verbose: bool) -> "Outcome | int":
    """Run the missing nodes under Prefect.

    Returns:
        The run's outcome, or an exit code if it was stopped or failed.

    Raises:
        UserError: the run ended with a user's mistake.
    """
    from flows.run.session import prefect_session

    for entry in node_status(graph, Store(request.home)):
        if not entry.cached and entry.node.stage not in EVALUATIONS:
            sys.stderr.write(f"{entry.node.id}: to run ({entry.why})\n")
    sys.stderr.write("starting Prefect …\n")
    with prefect_session(request.home, verbose) as pages:
        from httpx import HTTPError
        from prefect import tags
        from prefect.exceptions import CancelledRun, PrefectException

        from flows.run.crashed_runs import run_tags
        from flows.run.pipeline import PipelineFailedError, ending, pipeline

        sys.stderr.write(f"Prefect: {pages}\n")
        try:
            with tags(*run_tags(graph.config.name)):
                return pipeline(
                    str(request.file),
                    list(request.overrides),
                    request.max_steps,
                    str(request.home.resolve()),
                    plain,
                    ignore_memory=request.ignore_memory,
                )
        except CancelledRun:
            return stopped(request)
        except PipelineFailedError as error:
            return _report_failures(error, request)
        except (PrefectException, HTTPError) as error:
            # The outcome of the run counts even if Prefect could not record it.
            return _unrecorded(error, request, ending())


def _unrecorded(error: Exception, request: RunRequest, ended: object) -> "Outcome | int":
    """The outcome of a run whose end Prefect could not record, or its exit code.

    Raises:
        UserError: the run ended with a user's mistake.
    """
    from prefect.states import State

    from flows.run.finish import Outcome
    from flows.run.pipeline import PipelineFailedError
    from flows.servers.start import without_secrets

    match ended:
        case PipelineFailedError() as failure:
            return _report_failures(failure, request)
        case UserError() as mistake:
            raise mistake from None
        case State():
            return stopped(request)
        case Outcome() as outcome:
            cause = without_secrets(str(error).partition(" - Response")[0]) or type(error).__name__
            sys.stderr.write(f"warning: Prefect did not record the end of this run: {cause}\n")
            return outcome
    return _report_silence(error, request)


def stopped(request: RunRequest) -> int:
    """Print how to resume a stopped run, and return the exit code."""
    sys.stderr.write(f"stopped; `{request.command}` resumes the run\n")
    return INTERRUPTED


def _report_failures(error: "PipelineFailedError", request: RunRequest) -> int:
    from flows.engines.launch import NodeFailedError
    from flows.engines.worker import DISK_FAULT

    mistakes = []
    for job, failure in error.failures.items():
        text = str(failure)
        full = isinstance(failure, OSError) and failure.errno == errno.ENOSPC
        if full or (isinstance(failure, NodeFailedError) and failure.exit_code == DISK_FAULT):
            text = f"the disk of {request.home} is full or failing: {text}"
        sys.stderr.write(f"error: {text if text.startswith(job) else f'{job}: {text}'}\n")
        mistakes.append(isinstance(failure, UserError) or getattr(failure, "user_error", False))
    if error.not_started:
        sys.stderr.write(f"not started, because they depend on a failed job: {', '.join(error.not_started)}\n")
    sys.stderr.write(f"everything else is finished and saved; `{request.command}` resumes the rest\n")
    return MISTAKE if all(mistakes) else FAILED


def _report_silence(error: Exception, request: RunRequest) -> int:
    """Print why Prefect's server does not answer, and return the exit code.

    A full disk is checked first, because the server's database is in the home and fails before the rest.
    """
    from flows.servers.start import without_secrets

    if shutil.disk_usage(request.home).free < NOTHING_FREE_BYTES:
        cause = f"the disk of {request.home} is full; free some space"
    else:
        fault = without_secrets(str(error).partition(" - Response")[0]) or type(error).__name__
        cause = f"Prefect's server no longer answers as it should ({fault}); its log is in {request.home}/servers"
    sys.stderr.write(f"error: {cause}\nfinished parts are saved; `{request.command}` resumes the rest\n")
    return FAILED
