# SPDX-License-Identifier: Apache-2.0
"""What the logs of a training say."""

from __future__ import annotations

import json
from pathlib import Path


def d_accuracy(folder: Path) -> list[float]:
    """D's accuracy at the end of its own training and of the student's, means over a log interval each.

    Of the last unit in the run's folder that had a discriminator; nothing where none did.
    """
    for log in sorted(folder.glob("**/metrics.jsonl"), reverse=True):
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        judged = [row for row in rows if "d_accuracy" in row]
        if judged:
            alone = [row for row in judged if "g_loss" not in row]
            return [round(row["d_accuracy"], 3) for row in (*alone[-1:], judged[-1])]
    return []
