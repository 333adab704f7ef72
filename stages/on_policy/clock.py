"""Times the parts of a step."""

import time


class Clock:
    """Seconds of the parts of a step, in this process."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """End a part."""
        now = time.monotonic()
        self.seconds[f"seconds/{name}"] = now - self._last
        self._last = now
