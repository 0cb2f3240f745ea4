"""What `fuse` says of a model."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

_SHOWN = 3  # names after a reason; the rest is counted


@dataclass(slots=True)
class FuseReport:
    """What `fuse` did: module name to the operation it now runs, and module name to the reason it was left alone."""

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = Counter(self.replaced.values())
        lines = [f"{count:4d} {what}" for what, count in sorted(counts.items())] or ["nothing was fused"]
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, reason in self.kept.items():
            reasons[reason].append(name or "the module itself")
        for reason, names in reasons.items():
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            lines.append(f"{len(names):4d} left alone, {reason}: {', '.join(names[:_SHOWN])}{more}")
        return "\n".join(lines)
