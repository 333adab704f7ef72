"""How a flow run is called in Prefect's pages: by its run file, unless a person began it there."""

from typing import TYPE_CHECKING, Any

from prefect.context import FlowRunContext

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun


def flow_run_name() -> str:
    """The name of the flow run that is beginning; for Prefect to call."""
    context = FlowRunContext.get()
    assert context is not None and context.flow_run is not None
    return name_of(context.flow_run, context.parameters or {})


def name_of(run: "FlowRun", parameters: dict[str, Any]) -> str:
    """Its run file for a run of the command line or of the schedule; for any other the name that it was begun with."""
    begun_by_hand = run.deployment_id is not None and not run.auto_scheduled
    return run.name if begun_by_hand else str(parameters["run_file"])
