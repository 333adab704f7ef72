"""Whom a run notifies, and of what."""

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from stages.config.training import StrictModel

if TYPE_CHECKING:
    pass

Event = Literal["failure", "promotion", "cancellation", "success"]


class NotifyConfig(StrictModel):
    """The webhook and the events that are posted to it."""

    webhook_env: str = Field(
        "MOPD_WEBHOOK", pattern=r"^[A-Za-z_]\w*$", description="Environment variable that holds the webhook's address."
    )
    events: list[Event] = Field(["failure", "promotion"], description="Events of a run that are posted.")
