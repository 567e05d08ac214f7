"""Counters of an engine, as its metrics page shows them."""

import bisect
import dataclasses

BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)  # Seconds.


@dataclasses.dataclass
class Histogram:
    """How many values are at most each bound, and their sum."""

    numbers: list[int] = dataclasses.field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0

    def add(self, seconds: float) -> None:
        """Counts a value."""
        self.numbers[bisect.bisect_left(BUCKETS, seconds)] += 1
        self.total += seconds

    def as_dict(self) -> dict:
        """Returns {"buckets": {bound: values up to it}, "sum", "count"}; the last bound is infinity."""
        bounds, so_far, buckets = (*BUCKETS, float("inf")), 0, {}
        for bound, number in zip(bounds, self.numbers, strict=True):
            so_far += number
            buckets[bound] = so_far
        return {"buckets": buckets, "sum": self.total, "count": so_far}


@dataclasses.dataclass
class Counts:
    """What an engine has done since its start."""

    accepted: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    refused: int = 0  # Because the queue was full.
    steps: int = 0  # Evaluations of the network, each for all slots of a program.
    slot_steps_busy: int = 0  # Evaluations that were part of an image.
    slot_steps_computed: int = 0  # Those, and the ones of free slots of the same programs.
    engine_failures: int = 0
    images_seconds: Histogram = dataclasses.field(default_factory=Histogram)  # From request to image.
    start_seconds: Histogram = dataclasses.field(default_factory=Histogram)  # From request to slot.

    @property
    def unfinished(self) -> int:
        """Accepted requests that have no answer yet."""
        return self.accepted - self.finished - self.failed - self.cancelled

    def as_dict(self) -> dict:
        """Returns all counters."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.as_dict() if isinstance(value, Histogram) else value for name, value in fields.items()}
