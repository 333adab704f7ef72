"""The run file's settings of notifications."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.config.training import StrictModel

if TYPE_CHECKING:
    pass

Event = Literal["failure", "promotion", "cancellation", "success"]


class NotifyConfig(StrictModel):
    """A webhook and the events to send to it."""

    webhook_env: str = Field(
        "MOPD_WEBHOOK", pattern=r"^[A-Za-z_]\w*$", description="Environment variable that holds the webhook's address."
    )
    events: list[Event] = Field(["failure", "promotion"], description="Events of a run that are posted.")
