"""Deploys a run file to Prefect: a schedule, a work pool of processes, and parameters with the run file's schema.

It uses standing servers and a standing worker: `mopd ui` and `mopd worker`, or those of the environment.
"""

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
import zoneinfo
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from base.errors import UserError, nearest
from base.processes import end_with_parent
from base.signals import interrupt_once
from evals.tables.markdown import code, plain
from flows.run.run_request import RunRequest
from flows.run.session import expect_answer
from flows.run_file.parameters import form_schema
from flows.run_file.schema import RunConfig
from flows.servers.access import secret_path
from flows.servers.standing import prefect_client
from flows.servers.start import mlflow_environment, prefect_environment, without_secrets

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

    from flows.run.crashed_runs import CrashDetector

POOL = "mopd"
ENTRYPOINT = "flows.run.pipeline.pipeline"
SET_FOLDER = "prefect.deployments.steps.set_working_directory"
NEXT_RUNS = 3
LOOK_SECONDS = 10.0
# A first worker that ends sooner than this is misconfigured, and is not restarted.
SHORT_LIFE_SECONDS = 10.0
RESTART_SECONDS = 2.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """When and where a run is started.

    Attributes:
        cron: Five fields; None for runs that a user or a program starts.
        timezone: IANA name of the schedule's time zone.
        paused: Whether the schedule starts paused. A schedule that is already paused stays so in any case.
        pool: The work pool.
    """

    cron: str | None = None
    timezone: str = "UTC"
    paused: bool = False
    pool: str = POOL


def deploy(request: RunRequest, plan: Plan) -> list[str]:
    """Create or replace the deployment of a run file, and create its work pool if there is none.

    Args:
        request: The run. It is planned first, so that mistakes are reported now and not at the first scheduled start.
        plan: When and where to start it.

    Returns:
        A line for each action.

    Raises:
        UserError: the run file is wrong, the schedule cannot be read, or no Prefect server answers.
    """
    graph = request.graph()
    with _client(request.home) as (client, pages):
        from prefect.client.schemas.actions import DeploymentScheduleCreate
        from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions

        from flows.run.pipeline import pipeline
        from flows.run.pool import make_pool

        schedule = _schedule(plan)
        make_pool(client, plan.pool)
        name = graph.config.name
        paused = plan.paused or _is_paused(client, name)
        deployment = client.create_deployment(
            client.create_flow(pipeline),
            name,
            schedules=[DeploymentScheduleCreate(schedule=schedule, active=not paused)] if schedule else [],
            # Runs of one name do not overlap; the next one waits.
            concurrency_limit=1,
            concurrency_options=ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.ENQUEUE),
            parameters=_parameters(request),
            parameter_openapi_schema=form_schema(graph.config),
            enforce_parameter_schema=True,
            entrypoint=ENTRYPOINT,
            # The paths of a run file are relative to this folder.
            pull_steps=[{SET_FOLDER: {"directory": str(Path.cwd())}}],
            work_pool_name=plan.pool,
            description=_description(graph.config, request),
            tags=[f"mopd:{name}"],
        )
        lines = [f"deployment mopd/{name}: {pages}/deployments/deployment/{deployment}"]
    if schedule:
        lines.append(f"schedule: {plan.cron} ({plan.timezone}){', paused' if paused else ''}")
        lines += [f"  next: {moment}" for moment in _next_runs(schedule)]
    command = f"{_client_variables(request.home, pages)} prefect deployment run 'mopd/{name}'"
    lines.append(f"to start it now, press Run on its page, or run: {command}")
    lines.append(f"the runs need a worker: mopd worker --home {request.home}" + _pool_option(plan.pool))
    return lines


def retire(config: RunConfig, home: Path) -> list[str]:
    """Remove a run's deployment; runs that have started continue. Returns a line for each action.

    Raises:
        UserError: there is none, or no Prefect server answers.
    """
    with _client(home) as (client, _):
        from prefect.exceptions import ObjectNotFound

        try:
            client.delete_deployment(client.read_deployment_by_name(f"mopd/{config.name}").id)
        except ObjectNotFound:
            raise UserError(f"{config.name}: there is no deployment mopd/{config.name}") from None
    return [f"deployment mopd/{config.name}: removed"]


def work(home: Path, pool: str, limit: int | None) -> None:
    """Run a worker of a pool until Ctrl-C or SIGTERM. Prefect's worker runs as a child process and is restarted.

    Prefect's worker ends itself when its server is unreachable for long. While it runs, the runs of this host that no
    Prefect worker supervises are settled, because they would block later ones (`flows.run.crashed_runs`).

    Raises:
        UserError: no Prefect server answers, or the worker does not start.
    """
    with _client(home) as (client, _):
        from flows.run.pool import POOL_TYPE, make_pool

        make_pool(client, pool)
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", POOL_TYPE]
    command += ["--install-policy", "never"]
    command += ["--limit", str(limit)] if limit else []
    from flows.run.crashed_runs import CrashDetector, worker_name

    # Prefect's worker ends itself on SIGTERM by a SIGINT, which a process started in the background ignores.
    interrupt_once(background=True)
    first, detector = True, CrashDetector()
    while True:
        started, process = time.monotonic(), _start_worker([*command, "--name", worker_name()])
        try:
            while _lives(process):
                _look(detector)
            if first and time.monotonic() - started < SHORT_LIFE_SECONDS:
                raise UserError(f"Prefect's worker ended with code {process.returncode}; its output is above")
            first = False
            sys.stderr.write(f"Prefect's worker ended with code {process.returncode}; it is restarted\n")
            time.sleep(RESTART_SECONDS)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            return


def _lives(process: "subprocess.Popen[bytes]") -> bool:
    """Wait `LOOK_SECONDS` and return whether the process is still alive; returns False as soon as it ends."""
    try:
        process.wait(LOOK_SECONDS)
    except subprocess.TimeoutExpired:
        return True
    return False


def _start_worker(command: Sequence[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        # Ctrl-C reaches only this process, which then terminates the worker.
        start_new_session=True,
        preexec_fn=_killed_with_parent,  # noqa: PLW1509 - nothing but a system call
    )


def _killed_with_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent(signal.SIGKILL)


def _look(detector: "CrashDetector") -> None:
    """Check the runs of this host, unless the server does not answer."""
    from httpx import HTTPError

    try:
        for line in detector.look():
            sys.stderr.write(line + "\n")
    except HTTPError as error:
        logger.debug("Prefect's server did not answer: %s", error)


def _settings(home: Path) -> dict[str, str]:
    """Environment of a client of the standing servers."""
    return prefect_environment(home) | mlflow_environment() | prefect_client(home)


@contextmanager
def _client(home: Path) -> "Iterator[tuple[SyncPrefectClient, str]]":
    """A client of the standing server, and the URL of its pages, without secrets."""
    settings = _settings(home)
    # Prefect reads its settings once, at its import.
    os.environ.update(settings)
    from prefect import get_client

    with get_client(sync_client=True) as client:
        expect_answer(client, settings["PREFECT_API_URL"])
        yield client, without_secrets(settings["PREFECT_API_URL"].removesuffix("/api"))


def _is_paused(client: "SyncPrefectClient", name: str) -> bool:
    """Whether the deployment exists and its schedule is paused; deploying it again must not resume it."""
    from prefect.exceptions import ObjectNotFound

    try:
        schedules = client.read_deployment_by_name(f"mopd/{name}").schedules
    except ObjectNotFound:
        return False
    return bool(schedules) and not any(schedule.active for schedule in schedules)


def _schedule(plan: Plan) -> Any:
    from prefect.client.schemas.schedules import CronSchedule
    from pydantic import ValidationError

    if plan.cron is None:
        return None
    if plan.timezone not in (zones := zoneinfo.available_timezones()):
        raise UserError(f"--timezone: '{plan.timezone}' is not an IANA time zone{nearest(plan.timezone, zones)}")
    try:
        return CronSchedule(cron=plan.cron, timezone=plan.timezone)
    except ValidationError as error:
        problems = "; ".join(str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors())
        raise UserError(
            f"--cron '{plan.cron}': {problems}; write minute, hour, day, month and weekday, "
            f"such as '0 2 * * 1' for Mondays at two"
        ) from None


def _next_runs(schedule: Any) -> list[str]:
    import asyncio

    from prefect.server.schemas.schedules import CronSchedule

    moments = asyncio.run(CronSchedule(cron=schedule.cron, timezone=schedule.timezone).get_dates(NEXT_RUNS))
    return [moment.strftime("%A %Y-%m-%d %H:%M %Z") for moment in moments]


def _parameters(request: RunRequest) -> dict[str, Any]:
    return {
        "run_file": str(request.file.resolve()),
        "overrides": list(request.overrides),
        **({} if request.max_steps is None else {"max_steps": request.max_steps}),
        "home": str(request.home.resolve()),
        "plain": True,
    }


def _description(config: RunConfig, request: RunRequest) -> str:
    experts = ", ".join(f"{name} ({expert.domain})" for name, expert in config.experts.items())
    changed = f" with {code(json.dumps(list(request.overrides)))}" if request.overrides else ""
    return f"Run file {code(str(request.file))}{changed}. Experts: {plain(experts or 'none')}. Seeds {config.seeds}."


def _client_variables(home: Path, pages: str) -> str:
    """Shell assignments for Prefect's own command line. The password is read from its file, not printed."""
    variables = f"PREFECT_API_URL={pages}/api"
    if "PREFECT_API_AUTH_STRING" in prefect_client(home):
        variables += f' PREFECT_API_AUTH_STRING="$(cat {shlex.quote(str(secret_path(home)))})"'
    return variables


def _pool_option(pool: str) -> str:
    return "" if pool == POOL else f" --pool {pool}"
