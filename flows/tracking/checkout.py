"""The git checkout with a run's files: its commit, and whether files differ from it."""

import logging
import subprocess
from pathlib import Path

COMMIT, DIRTY = "mlflow.source.git.commit", "git.dirty"
TIMEOUT_SECONDS = 20.0
# The repository's own settings must not start a program.
GIT = ("git", "-c", "core.fsmonitor=false", "--no-optional-locks")
logger = logging.getLogger(__name__)


def git_tags(folder: Path) -> dict[str, str]:
    """Tags of a run: the commit of a folder's repository, and whether tracked files differ from it.

    Returns:
        The tags; empty if the folder is in no repository, has no commit yet, or git is not installed.
    """
    commit = _ask(folder, "rev-parse", "HEAD")
    if not commit:
        return {}
    changed = _ask(folder, "status", "--porcelain", "--untracked-files=no")
    return {COMMIT: commit} | ({} if changed is None else {DIRTY: str(bool(changed)).lower()})


def _ask(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(
            [*GIT, "-C", str(folder), *words], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
    except (FileNotFoundError, subprocess.TimeoutExpired) as error:
        logger.debug("%s: git gives no answer: %s", folder, error)
        return None
    return done.stdout.strip() if done.returncode == 0 else None
