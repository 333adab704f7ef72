"""The command `mopd`: signals are answered before anything else is imported, which takes a while."""

import sys

from base.exit_codes import INTERRUPTED
from base.signals import interrupt_once


def main() -> None:
    """Run the command line."""
    interrupt_once()
    try:
        from flows.cli.app import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
