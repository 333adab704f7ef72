"""Health checks of vLLM servers."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass

from stages.vllm.settings import FAULT

HEALTH_SECONDS = 2.0
# Servers on this machine are reached without the environment's proxy.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Health:
    """A server's answer to a health check.

    Attributes:
        well: Whether it serves.
        fault: The server's own message on why it needs a restart, such as weights it failed to load.
    """

    well: bool
    fault: str | None = None


def ask_health(url: str) -> Health:
    """Query a server's health. A server that does not answer is not well and has no fault."""
    try:
        with _DIRECT.open(f"{url}/health", timeout=HEALTH_SECONDS) as response:
            return Health(response.status == 200)
    except urllib.error.HTTPError as error:
        with error:
            return Health(False, _fault(error.read()))
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return Health(False)


def _fault(body: bytes) -> str | None:
    try:
        return str(json.loads(body)[FAULT])
    except (ValueError, KeyError, TypeError):
        return None
