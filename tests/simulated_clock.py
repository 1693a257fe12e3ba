"""A clock for tests that takes no time."""


class SimulatedClock:
    """A clock that moves only by `advance` and `sleep_until`."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        """The time in seconds."""
        return self._now

    def sleep_until(self, t: float) -> None:
        """Advance to that time."""
        self._now = max(self._now, t)

    def advance(self, seconds: float) -> None:
        """Advance by so many seconds."""
        self._now += seconds
