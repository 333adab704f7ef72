"""The work pool of the runs, of type process, with a job template that has no variables.

Prefect accepts job variables with a run: a command, a folder, an environment. A worker would execute them. The template
of this pool has no variables, so the API rejects all of them, and a worker ignores any that reached the database in
another way. A run has the worker's own environment; its folder is part of the deployment.

Import this module only after Prefect's environment is set, because Prefect reads it once.
"""

from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.workers.process import ProcessWorker

from base.errors import UserError

POOL = "mopd"
POOL_TYPE = "process"
# Without `env`, because an `env` here would be merged with that of a run.
TEMPLATE: dict[str, Any] = {
    "job_configuration": {"stream_output": True},
    "variables": {"type": "object", "properties": {}, "additionalProperties": False},
}


def make_pool(client: SyncPrefectClient, name: str) -> None:
    """Create the work pool, or replace its template if it still has Prefect's default template.

    Raises:
        UserError: the pool is of another type, or has a custom template.
    """
    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        try:
            client.create_work_pool(WorkPoolCreate(name=name, type=POOL_TYPE, base_job_template=TEMPLATE))
        except ObjectAlreadyExists:
            # Another worker created it in the meantime.
            make_pool(client, name)
        return
    if pool.type != POOL_TYPE:
        raise UserError(f"--pool: work pool '{name}' is of type {pool.type}, not {POOL_TYPE}; name another pool")
    if pool.base_job_template == TEMPLATE:
        return
    if name != POOL and pool.base_job_template not in ({}, ProcessWorker.get_default_base_job_template()):
        raise UserError(
            f"--pool: work pool '{name}' has a job template of its own, by which a run may bring a command; name "
            f"another, such as '{POOL}'"
        )
    client.update_work_pool(name, WorkPoolUpdate(base_job_template=TEMPLATE))
