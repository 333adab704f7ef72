"""Finds passwords in a run file's addresses, because a run file is copied into manifests, MLflow and Prefect."""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from flows.servers.start import without_secrets

ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://\S+")
SECRET = re.compile(
    r"(^|[_-])(api_?key|apikey|key|token|secret|password|passwd|pwd|pass|sig|signature|auth|credential)s?$"
)
VARIABLES = {"api_key_env", "webhook_env"}
VARIABLE = re.compile(r"[A-Za-z_]\w*")
INSTEAD = {
    "domains": "name an environment variable that holds the key in this domain's `api_key_env`",
    "notify": "name an environment variable that holds the whole address in `notify.webhook_env`",
    "resources": "vLLM's servers take no password; let them listen on the loopback or in a private network",
}
OTHERWISE = "remove it; set credentials in environment variables (AWS_…, HF_TOKEN)"


def password_problems(raw: Any) -> list[str]:
    """The secrets that would be stored with a run file, a line for each key.

    Args:
        raw: The raw run file, with its overrides.
    """
    problems = []
    for keys, value in _texts(raw):
        name, top = ".".join(keys), keys[0] if keys else ""
        if keys and keys[-1] in VARIABLES and not VARIABLE.fullmatch(value):
            problems.append(f"{name}: this is the name of an environment variable, such as JUDGE_API_KEY, not a key")
        elif ADDRESS.fullmatch(value) and holds_password(value):
            shown = without_secrets(value).partition("#")[0]
            problems.append(f"{name}: {shown} holds a password, which would be stored; {INSTEAD.get(top, OTHERWISE)}")
    return problems


def holds_password(address: str) -> bool:
    """Whether an address has a user, or a key in its query."""
    try:
        parts = urlsplit(address)
    except ValueError:
        # Unparsable, such as by an unclosed bracket; a password may be anywhere in it.
        return "@" in address
    place, colon, port = parts.netloc.rpartition(":")
    # A slash in a password ends the part that is parsed as the host.
    has_user = "@" in parts.netloc or ("@" in address and bool(colon and place) and not port.isdigit())
    queries = parse_qsl(parts.query, keep_blank_values=True) + parse_qsl(parts.fragment, keep_blank_values=True)
    return has_user or any(SECRET.search(name.lower()) for name, _ in queries)


def _texts(value: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every text below a value, with its path of keys."""
    if isinstance(value, str):
        yield keys, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _texts(inner, (*keys, str(key)))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, keys)
