"""Exit codes of `mopd`, as docs/results.md lists them."""

DONE, FAILED, MISTAKE, UNPROMOTED, INTERRUPTED = 0, 1, 2, 3, 130
