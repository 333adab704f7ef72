"""The garbage collector of a process whose start makes millions of objects that live on."""

import gc

# Objects that are made between two collections. After every 700, Python's default, collections take a seventh of the
# time of the imports.
COLLECT_AFTER = 50_000


def collect_rarely() -> None:
    """Let this process collect garbage rarely, from now on."""
    gc.set_threshold(COLLECT_AFTER)
