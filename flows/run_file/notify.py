"""The run file's settings of notifications."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from stages.config.training import StrictModel, each_once

Event = Literal["failure", "promotion", "cancellation", "success"]


class NotifyConfig(StrictModel):
    """A webhook and the events to send to it."""

    webhook_env: str = Field(
        "MOPD_WEBHOOK", pattern=r"^[A-Za-z_]\w*$", description="Environment variable that holds the webhook's address."
    )
    events: Annotated[list[Event], AfterValidator(each_once)] = Field(
        ["failure", "promotion"], min_length=1, description="Events of a run that are posted."
    )
