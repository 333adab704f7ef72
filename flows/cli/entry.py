"""The command `mopd`: installs the signal handlers before the slow imports."""

import os
import sys

from base.exit_codes import INTERRUPTED
from base.garbage import collect_rarely
from base.signals import interrupt_once, keep_exit_code


def main() -> None:
    """Run the command line."""
    interrupt_once()
    collect_rarely()
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
