"""The command `mopd`: installs the signal handlers before the slow imports."""

import gc
import os
import sys

from base.exit_codes import INTERRUPTED
from base.signals import interrupt_once, keep_exit_code

# Objects that are made between two garbage collections. The imports make millions that live on, and a collection after
# every 700, Python's default, takes a seventh of their time.
COLLECT_AFTER = 50_000


def main() -> None:
    """Run the command line."""
    interrupt_once()
    gc.set_threshold(COLLECT_AFTER)
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        from flows.cli.app import app

        app()
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(INTERRUPTED)
    finally:
        keep_exit_code()


if __name__ == "__main__":
    main()
