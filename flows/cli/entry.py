"""The command `mopd`: installs the signal handlers before the slow imports."""

import sys

from base.exit_codes import INTERRUPTED
from base.signals import interrupt_once, keep_exit_code


def main() -> None:
    """Run the command line."""
    interrupt_once()
    try:
        from flows.cli.app import main as command_line

        command_line()
    except KeyboardInterrupt:
        sys.stderr.write("stopped\n")
        sys.exit(INTERRUPTED)
    finally:
        keep_exit_code()


if __name__ == "__main__":
    main()
