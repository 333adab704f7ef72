"""The run file's settings of notifications."""

from typing import Literal

from pydantic import Field, field_validator

from stages.config.training import StrictModel

Event = Literal["failure", "promotion", "cancellation", "success"]


class NotifyConfig(StrictModel):
    """A webhook and the events to send to it."""

    webhook_env: str = Field(
        "MOPD_WEBHOOK", pattern=r"^[A-Za-z_]\w*$", description="Environment variable that holds the webhook's address."
    )
    events: list[Event] = Field(["failure", "promotion"], min_length=1, description="Events of a run that are posted.")

    @field_validator("events")
    @classmethod
    def _named_once(cls, value: list[Event]) -> list[Event]:
        if twice := next((event for event in value if value.count(event) > 1), None):
            raise ValueError(f"'{twice}' is named twice")
        return value
