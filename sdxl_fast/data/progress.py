"""What `sdxl-fast data prepare` says while it works: a line per shard, in a terminal and in a log file alike."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from ..text import duration
from .report import Record

NAMED = 3  # reasons in a line: the most frequent


@dataclass
class Progress:
    """The shards of one process: `done` of `total` were there when it began."""

    who: str
    total: int
    done: int
    log: Callable[[str], None]
    clock: Callable[[], float] = time.monotonic
    made: int = 0
    pictures: int = 0
    begun: float = field(init=False)

    def __post_init__(self) -> None:
        self.begun = self.clock()

    def tell(self, number: int, record: Record) -> None:
        """Logs what became of a part, how fast that went and how long the others will take; warns of nothing kept."""
        self.made += 1
        self.pictures += record.input
        seconds = max(self.clock() - self.begun, 1e-9)
        place = self.done + self.made
        counts = Counter(reason for _, reason, _ in record.dropped).most_common(NAMED)
        why = f" ({', '.join(f'{reason} {count}' for reason, count in counts)})" if counts else ""
        damage = f", {len(record.damaged)} damaged files" if record.damaged else ""
        self.log(
            f"{self.who}: shard {place}/{self.total} ({number:06d}): kept {len(record.samples)} of {record.input}{why}"
            f"{damage}; {self.pictures / seconds:.3g} pictures/s, "
            f"{duration(seconds / self.made * (self.total - place))} left"
        )
        if not record.samples:
            self.log(f"warning: nothing of part {number:06d} was kept")
