# SPDX-License-Identifier: Apache-2.0
"""The results file: whole and valid after every row, whenever the run is cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdxl_fast.files import replacing

FORMAT = 2


def empty(machine: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of a file in which nothing has been measured."""
    sections: dict[str, Any] = {"ceilings": {}, "tests": [], "rows": [], "end_to_end": [], "faults": []}
    return {"format": FORMAT, "complete": False, "machine": machine, **sections}


class ResultsFile:
    """``{"format", "complete", "machine", "ceilings", "tests", "rows", "end_to_end", "faults"}`` as JSON.

    Every change is written at once to a temporary file that then takes the place of the old one. A row replaces the one
    of the same key, so that a later, fuller measurement wins. With no path, results are only kept in memory.
    """

    def __init__(self, path: Path | None, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    @classmethod
    def create(cls, folder: str | Path | None, name: str, machine: dict[str, Any]) -> ResultsFile:
        """Starts ``<folder>/<name>.json``, in place of one that may be there; no file without a folder."""
        found = cls(None if folder is None else Path(folder) / f"{name}.json", empty(machine))
        found.save()
        return found

    @classmethod
    def load(cls, path: str | Path) -> ResultsFile:
        """Opens an existing file, to read it or to continue it.

        Raises:
            ValueError: when it is not a results file of this format.
        """
        try:
            data = json.loads(Path(path).read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not a results file ({error})") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ValueError(f"{path}: not a results file of format {FORMAT}")
        return cls(Path(path), data)

    @staticmethod
    def key(row: dict[str, Any]) -> tuple[str, ...]:
        """Returns what tells one row from another."""
        return tuple(str(row.get(part)) for part in ("op", "model", "case", "dtype", "mode", "contestant"))

    def find(self, section: str, row: dict[str, Any]) -> dict[str, Any] | None:
        """Returns the row with the key of ``row``, or None."""
        return next((other for other in self.data[section] if self.key(other) == self.key(row)), None)

    def put(self, section: str, row: dict[str, Any]) -> None:
        """Adds or replaces a row of "rows", "end_to_end", "tests" or "faults", and saves."""
        rows = self.data[section]
        position = next((i for i, other in enumerate(rows) if self.key(other) == self.key(row)), len(rows))
        rows[position : position + 1] = [row]
        self.save()

    def set(self, section: str, value: Any) -> None:
        """Sets "machine", "ceilings" or "complete", and saves."""
        self.data[section] = value
        self.save()

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is None:
            return
        with replacing(self.path) as temporary:
            temporary.write_text(json.dumps(self.data, indent=1, allow_nan=False) + "\n")
