"""The virtual clock: counts of priced work, and the time of whoever is running."""

from __future__ import annotations

from collections.abc import Callable, Mapping


class Meter:
    """Counts work by price item and vendor operations by name; time follows from the counts.

    Time is computed from counts, so a batch and its pages one by one cost exactly the same. `now_ns` is the virtual
    time of the actor that runs now: the sequential driver never touches it, the timed driver sets it before each step.
    """

    def __init__(self, prices: Mapping[str, float]) -> None:
        self.prices = dict(prices)
        self.counts: dict[str, int] = {}
        self.elsewhere: dict[str, int] = {}
        self.ops: dict[str, int] = {}
        self.now_ns: float = 0
        self.watch: Callable[[str, str, str, int], None] | None = None
        """Told (kind, name, price item, n) of all work, where somebody listens; kinds as in `events.Event`."""

    def charge(self, item: str, n: int = 1) -> None:
        """Charge n times the price `item` to whoever is running. KeyError for an item no profile has: a bug."""
        if n:
            self.now_ns += self.prices[item] * n
            self.counts[item] = self.counts.get(item, 0) + n
            if self.watch:
                self.watch("charge", item, item, n)

    def op(self, name: str, item: str, n: int = 1) -> None:
        """Count n vendor operations under their spec's name, and charge them."""
        if n:
            self.ops[name] = self.ops.get(name, 0) + n
            self.now_ns += self.prices[item] * n
            self.counts[item] = self.counts.get(item, 0) + n
            if self.watch:
                self.watch("op", name, item, n)

    def charge_elsewhere(self, item: str, n: int = 1) -> None:
        """Charge work that other CPUs do meanwhile: cpu time, but not the runner's waiting time."""
        if n:
            self.prices[item]
            self.elsewhere[item] = self.elsewhere.get(item, 0) + n
            if self.watch:
                self.watch("elsewhere", item, item, n)

    @property
    def cpu_ns(self) -> float:
        """Time of all CPUs, summed."""
        return sum(self.prices[i] * n for i, n in self.counts.items()) + sum(
            self.prices[i] * n for i, n in self.elsewhere.items()
        )

    @property
    def serial_ns(self) -> float:
        """Time that passes when everything runs one after the other: elapsed time of the sequential driver."""
        return sum(self.prices[i] * n for i, n in self.counts.items())

    def parts_ns(self) -> dict[str, float]:
        """cpu time by price item, the largest first."""
        parts: dict[str, float] = {}
        for counts in (self.counts, self.elsewhere):
            for item, n in counts.items():
                parts[item] = parts.get(item, 0) + self.prices[item] * n
        return dict(sorted(parts.items(), key=lambda part: -part[1]))
