"""A word to the outside when a run fails or its champion changes: JSON to a webhook. Free of prefect and mlflow.

The address is a secret more often than not, so the run file names the environment variable that holds it. A champion is
told of once, though a run may be killed before it comes to that: what is owed stands in a file.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field

from base.store.checkpoint import Store, write_whole
from flows.plan.state_files import read_json
from stages.config.training import StrictModel

if TYPE_CHECKING:
    from flows.run_file.schema import RunConfig

Event = Literal["failure", "promotion", "cancellation", "success"]
TRIES, TIMEOUT_SECONDS, WAIT_SECONDS = 3, 10.0, 2.0
OWED_FILE = "untold.json"
logger = logging.getLogger(__name__)


class NotifyConfig(StrictModel):
    """The webhook and the events that are posted to it."""

    webhook_env: str = Field(
        "MOPD_WEBHOOK", pattern=r"^[A-Za-z_]\w*$", description="Environment variable that holds the webhook's address."
    )
    events: list[Event] = Field(["failure", "promotion"], description="Events of a run that are posted.")


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


def owe_promotions(store: Store, config: "RunConfig", facts: Mapping[str, Any]) -> None:
    """Note, before the gate speaks, how many champions there were: who comes after them is to be told of.

    Args:
        facts: For programs; told where the run does not live to tell more.
    """
    from flows.champion.champion import read_history

    path = _owed_path(store, config.name)
    if config.notify and "promotion" in config.notify.events and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"champions": len(read_history(store, config.name)), "facts": facts}))


def tell_promotions(store: Store, config: "RunConfig", facts: Mapping[str, Any] | None = None) -> None:
    """Tell the webhook of the champions by the gate that are owed to it; those it does not take stay owed.

    Args:
        facts: For programs; those of the run that owes it where None.
    """
    from flows.champion.champion import read_history

    path = _owed_path(store, config.name)
    owed = read_json(path)
    if not owed:
        return
    for champion in read_history(store, config.name)[owed["champions"] :]:
        told = {**(owed["facts"] if facts is None else facts), "champion": champion.student, "when": champion.when}
        text = f"{config.name}: {champion} is champion"
        if champion.by == "gate" and not notify(config.notify, "promotion", config.name, text, told):
            return
        owed["champions"] += 1
        write_whole(path, json.dumps(owed))
    path.unlink()


def _owed_path(store: Store, run: str) -> Path:
    from flows.champion.champion import champion_path

    return champion_path(store, run).with_name(OWED_FILE)
