"""Access control of a home's servers: the secret of Prefect's API, and the allowed origins and host names.

Every program of the home sends the secret, and a browser asks the user for it. A page of another origin does not have
it, and neither does a page behind a rebound name, because browsers store passwords per origin. MLflow supports no such
secret, so the host names and origins of its server are restricted. Free of torch, prefect and mlflow.
"""

import contextlib
import hashlib
import ipaddress
import os
import secrets
import socket
import sys
import tempfile
from pathlib import Path

import psutil

from base.errors import UserError
from base.private import is_shared, keep_private
from stages.vllm.settings import KEY_VARIABLE

USER = "mopd"
SECRET_FILE = "prefect.secret"
SECRET_BYTES = 32


def secret_path(home: Path) -> Path:
    """The file with the secret of a home."""
    return home.resolve() / "servers" / SECRET_FILE


def home_secret(home: Path) -> str:
    """The secret of a home, `USER:TOKEN`, created at its first use.

    The file is readable by the owner only, or by the group if a team shares the home.

    Raises:
        UserError: the file belongs to another user and is not readable.
    """
    keep_private(home)
    path = secret_path(home)
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _make(path, 0o660 if is_shared(home) else 0o600)
    try:
        return path.read_text().strip()
    except PermissionError:
        raise UserError(
            f"{path}: belongs to another user; set PREFECT_API_URL and PREFECT_API_AUTH_STRING for that server, or "
            f"choose another --home"
        ) from None


def server_key(home: Path) -> str:
    """The key of a home's vLLM servers: that of the environment, or one derived from the home's secret.

    Raises:
        UserError: as for `home_secret`.
    """
    return os.environ.get(KEY_VARIABLE) or hashlib.sha256(f"vllm {home_secret(home)}".encode()).hexdigest()


def _make(path: Path, mode: int) -> None:
    """Write a new secret. If several processes do so at once, the first one's is kept."""
    descriptor, name = tempfile.mkstemp(dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(f"{USER}:{secrets.token_urlsafe(SECRET_BYTES)}\n")
        temporary.chmod(mode)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink()


def login(home: Path) -> str:
    """A line on how to log in to Prefect's pages, with the secret on a terminal and with its file's path in a log."""
    path = secret_path(home)
    if not sys.stdout.isatty():
        return f"its pages ask for a password once in each browser: the line in {path}"
    return f"its pages ask for a password once in each browser: {home_secret(home)}"


def client_secret(home: Path) -> dict[str, str]:
    """Environment with which a Prefect client authenticates to a server of the home."""
    return {"PREFECT_API_AUTH_STRING": home_secret(home)}


def prefect_server_access(home: Path, host: str, port: int) -> dict[str, str]:
    """Environment of a Prefect server that requires the secret and allows browsers its own pages' origins only."""
    secret = home_secret(home)
    origins = ",".join(f"http://{name}" for name in _places(host, port))
    return {
        "PREFECT_SERVER_API_AUTH_STRING": secret,
        "PREFECT_API_AUTH_STRING": secret,
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": origins,
    }


def mlflow_server_access(host: str, port: int) -> dict[str, str]:
    """Environment of an MLflow server: its allowed host names and origins, unless the user has set them.

    MLflow's default accepts `10.*` as a private address, and so also the name `10.attacker.example`.
    """
    places = _places(host, port)
    wanted = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(places),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{place}" for place in places),
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def _places(host: str, port: int) -> list[str]:
    """Every `NAME:PORT` under which a browser can open a server that listens on this host."""
    names = ["127.0.0.1", "localhost"]
    if host not in names:
        names += _names_of_this_machine() if _is_everywhere(host) else [host]
    bracketed = (f"[{name}]" if ":" in name and not name.startswith("[") else name for name in dict.fromkeys(names))
    return [f"{name}:{port}" for name in bracketed]


def _is_everywhere(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


def _names_of_this_machine() -> list[str]:
    families = (socket.AF_INET, socket.AF_INET6)
    addresses = [each.address for found in psutil.net_if_addrs().values() for each in found if each.family in families]
    # A link-local address is followed by the name of its link, which browsers do not send.
    return [os.uname().nodename, socket.getfqdn(), *(address.partition("%")[0] for address in addresses)]
