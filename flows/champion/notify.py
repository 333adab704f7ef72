"""Posts JSON to a webhook when a run fails or its champion changes. Free of prefect and mlflow.

The address is usually a secret, so the run file names the environment variable that holds it. Each promotion is sent
once. Pending notifications are kept in a file, because a run may be killed before it sends them.
"""

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from base.store.checkpoint import Store, write_whole
from flows.plan.state_files import read_json
from flows.run_file.notify import Event, NotifyConfig

if TYPE_CHECKING:
    from flows.run_file.schema import RunConfig

TRIES, TIMEOUT_SECONDS, WAIT_SECONDS = 3, 10.0, 2.0
PENDING_FILE = "untold.json"
logger = logging.getLogger(__name__)


def notify(config: NotifyConfig | None, event: Event, run: str, text: str, facts: Mapping[str, Any]) -> bool:
    """Post an event as JSON: `event`, `run`, `text` (which chat services show), and the facts.

    If the webhook does not respond, a warning is logged and the run goes on; the warning names only its host.

    Args:
        config: The run file's `notify`; None to send nothing.
        event: The kind of event.
        run: Name of the run.
        text: For people.
        facts: For programs; JSON values.

    Returns:
        Whether the webhook accepted it.
    """
    if config is None or event not in config.events:
        return False
    address = os.environ.get(config.webhook_env, "")
    if not address:
        logger.warning("notify.webhook_env: %s is not set; not sent: %s", config.webhook_env, text)
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
    logger.warning("the webhook at %s did not accept '%s' of %s: %s", host, event, run, fault)
    return False


def queue_notifications(store: Store, config: "RunConfig", facts: Mapping[str, Any]) -> None:
    """Record the number of champions before the gate's verdict: later ones are to be notified.

    Args:
        store: Where the run's history is.
        config: The run.
        facts: For programs; sent if the run is killed before it can send more.
    """
    from flows.plan.champion_history import read_history

    path = _pending_path(store, config.name)
    if config.notify and "promotion" in config.notify.events and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"champions": len(read_history(store, config.name)), "facts": facts}))


def send_notifications(store: Store, config: "RunConfig", facts: Mapping[str, Any] | None = None) -> None:
    """Send the pending notifications of champions by the gate; those that the webhook does not accept stay pending.

    Args:
        store: Where the run's history is.
        config: The run.
        facts: For programs; those recorded by `queue_notifications` if None.
    """
    from flows.plan.champion_history import read_history

    path = _pending_path(store, config.name)
    pending = read_json(path)
    if not pending:
        return
    for champion in read_history(store, config.name)[pending["champions"] :]:
        content = {
            **(pending["facts"] if facts is None else facts),
            "champion": champion.student,
            "when": champion.when,
        }
        text = f"{config.name}: {champion} is champion"
        if champion.by == "gate" and not notify(config.notify, "promotion", config.name, text, content):
            return
        pending["champions"] += 1
        write_whole(path, json.dumps(pending))
    path.unlink()


def _pending_path(store: Store, run: str) -> Path:
    from flows.plan.champion_history import champion_path

    return champion_path(store, run).with_name(PENDING_FILE)
