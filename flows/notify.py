"""A word to the outside when a run fails or its champion changes: JSON to a webhook. Free of prefect and mlflow.

The address is a secret more often than not, so the run file names the environment variable that holds it.
"""

import logging
import os
import time
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from stages.config import StrictModel

Event = Literal["failure", "promotion", "cancellation", "success"]
TRIES, TIMEOUT_SECONDS, WAIT_SECONDS = 3, 10.0, 2.0
logger = logging.getLogger(__name__)


class NotifyConfig(StrictModel):
    """Whom to tell what."""

    webhook_env: str = Field(
        "MOPD_WEBHOOK", pattern=r"^[A-Za-z_]\w*$", description="Environment variable that holds the webhook's address."
    )
    events: list[Event] = Field(["failure", "promotion"], description="failure, promotion, cancellation, success.")


def notify(config: NotifyConfig | None, event: Event, run: str, text: str, facts: Mapping[str, Any]) -> bool:
    """Post an event as JSON: `event`, `run`, `text` (which chat services show), and the facts.

    A webhook that does not answer costs a warning, never the run; the warning names its host alone.

    Args:
        config: Of the run file; None for silence.
        event: What happened.
        run: Name of the run.
        text: For people.
        facts: For programs; JSON values.

    Returns:
        Whether it was taken.
    """
    if config is None or event not in config.events:
        return False
    address = os.environ.get(config.webhook_env, "")
    if not address:
        logger.warning("notify.webhook_env: %s is not set; nobody is told: %s", config.webhook_env, text)
        return False
    import httpx

    host = urlsplit(address).hostname
    for attempt in range(TRIES):
        try:
            answer = httpx.post(
                address, json={"event": event, "run": run, "text": text, **facts}, timeout=TIMEOUT_SECONDS
            )
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            fault = type(error).__name__
        else:
            if answer.is_success:
                return True
            fault = f"HTTP {answer.status_code}"
            if answer.is_client_error:
                break
        if attempt + 1 < TRIES:
            time.sleep(WAIT_SECONDS * 2**attempt)
    logger.warning("the webhook at %s did not take '%s' of %s: %s", host, event, run, fault)
    return False
