# SPDX-License-Identifier: Apache-2.0
"""From a results file to text, a markdown page and a plot: ``python -m benchmarks.report FILE.json ...``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from benchmarks import stage_plot
from benchmarks.results import ResultsFile
from benchmarks.suite import copy_share, fastest, stage_verdicts, verdicts
from sdxl_fast.files import replacing

Row = Mapping[str, Any]

# Of the machine, in this order; the rest is in the JSON.
_FACTS = (
    ("device", "device"),
    ("driver", "driver"),
    ("cuda", "CUDA"),
    ("power_limit", "power limit"),
    ("host_cpu", "host CPU"),
    ("threads", "threads"),
    ("allocator", "allocator"),
    ("priority", "priority"),
    ("load_of_others", "load before the run"),
    ("torch", "torch"),
    ("triton", "triton"),
    ("diffusers", "diffusers"),
    ("python", "python"),
    ("commit", "commit"),
    ("date", "date"),
)
_COLOURS = ("#1b6ca8", "#2a9d57", "#c8553d", "#8e6bbf", "#b8860b", "#7a7a7a")


def seconds_text(seconds: float) -> str:
    """Returns a time with three digits in us, ms or s."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds / size < 1000 else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def rate_text(per_second: float, unit: str) -> str:
    """Returns a rate with three digits in G or T."""
    return f"{per_second / 1e12:.3g} T{unit}/s" if per_second >= 1e12 else f"{per_second / 1e9:.3g} G{unit}/s"


def title(row: Row) -> str:
    """Returns op or model, case, dtype and mode of a row."""
    return f"{row.get('op') or row.get('model')} {row['case']} {row['dtype']} {row['mode']}"


def cells(row: Row, name: str, ceilings: Row) -> list[str]:
    """Returns the columns of one contestant, those of the table below that come after its name."""
    found = row["contestants"][name]
    if "seconds" not in found:
        return [f"not timed: {found.get('refused', 'cut off')}", *[""] * 7]
    median, rate = found["seconds"]["median"], ceilings["matrix_flops_per_s"].get(row["dtype"])
    share = copy_share(row, name)
    speedups = (f"{found[s]['median']:.2f}x" if s in found else "" for s in ("speedup", "same_layout"))
    return [
        seconds_text(median),
        f"{found['seconds']['spread']:.0%}",
        rate_text(row["bytes"] / median, "B"),
        "" if share is None else f"{share:.0%}",
        f"{row['flops'] / median / rate:.1%}" if rate else "",
        *speedups,
        found["gate"],
    ]


def text(row: Row, ceilings: Row) -> str:
    """Returns a row for the terminal, its targets below it."""
    lines = [f"{title(row)}   ({row['sets']} input sets of {row['bytes_per_set'] / 1e6:.3g} MB)"]
    for name in row["contestants"]:
        time, spread, bandwidth, share, _, speedup, _, gate = cells(row, name, ceilings)
        if not spread:
            lines.append(f"  {name:22s} {time}")
            continue
        numbers = f"{time:>9s} ±{spread:>4s}  {bandwidth:>10s}  {share:>5s} of copy  {speedup:>7s} eager"
        lines.append(f"  {name:22s} {numbers}  gate {gate}")
    return "\n".join([*lines, *_target_lines(verdicts(row))])


def model_text(row: Row) -> str:
    """Returns a row of a whole model for the terminal."""
    lines = [f"{row['model']}, {row['case']}, {row['dtype']}, {row['mode']}: {row['about']}"]
    if "skipped" in row:
        return f"{lines[0]}skipped: {row['skipped']}"
    for name, found in row["contestants"].items():
        times = [f"{s} {_stage_text(t)}" for s, t in found["stages"].items()]
        times += [f"{column} {value}" for column, value in zip(_extras(row), _extra_cells(row, name), strict=True)]
        lines.append(f"  {name:22s} {found.get('refused') or '  '.join(times) + '  gate ' + found['gate']}")
    return "\n".join([*lines, *_target_lines(stage_verdicts(row))])


def _extras(row: Row) -> list[str]:
    """Returns the columns that a row of a whole model has beside its stages."""
    memory = any("memory_bytes" in found for found in row["contestants"].values())
    return [*(["of floor"] if row.get("floor") else []), *(["peak memory"] if memory else [])]


def _extra_cells(row: Row, name: str) -> list[str]:
    """Returns a contestant's entries there: the floor over its time, and gigabytes."""
    found, cells = row["contestants"][name], []
    for column in _extras(row):
        value = ""
        if column == "of floor" and "total" in found["stages"]:
            value = f"{row['floor']['total'] / found['stages']['total']['median']:.0%}"
        if column == "peak memory" and "memory_bytes" in found:
            value = f"{found['memory_bytes'] / 1e9:.2f} GB"
        cells.append(value)
    return cells


def _target_lines(found: Iterable[tuple[str, float | None, bool]]) -> list[str]:
    lines = []
    for what, value, reached in found:
        got = "not timed" if value is None else f"{value:.2f}"
        lines.append(f"  target: {what}: {'reached' if reached else 'NOT REACHED'} ({got})")
    return lines


def _stage_text(found: Row | None) -> str:
    if found is None:
        return ""
    return f"not timed: {found['refused']}" if "refused" in found else seconds_text(found["median"])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return [
        "| " + " | ".join(head) + " |",
        "|" + "---|" * len(head),
        *("| " + " | ".join(row) + " |" for row in escaped),
        "",
    ]


def _machine(data: Row) -> list[str]:
    machine = data["machine"]
    found = []
    for key, name in _FACTS:
        value = machine.get(key)
        repeated = key == "host_cpu" and value == machine.get("device")
        if value not in (None, "") and not repeated:
            found.append((name, f"{value:.0%}" if key == "load_of_others" else str(value)))
    ceilings = data["ceilings"]
    if ceilings:
        copies = ", ".join(f"{name} {rate_text(rate, 'B')}" for name, rate in ceilings["copies"].items())
        found.append(("copy (read + written)", f"{rate_text(ceilings['copy_bytes_per_s'], 'B')} ({copies})"))
        for dtype, rate in ceilings["matrix_flops_per_s"].items():
            found.append((f"matrix product {dtype}", rate_text(rate, "FLOP")))
    return _table(("", ""), found)


def _ops(data: Row) -> list[str]:
    lines: list[str] = []
    head = (
        "case",
        "dtype",
        "mode",
        "contestant",
        "time",
        "spread",
        "bandwidth",
        "of copy",
        "of matrix",
        "times eager",
        "same layout",
        "gate",
    )
    for op in dict.fromkeys(row["op"] for row in data["rows"]):
        rows = []
        for row in (r for r in data["rows"] if r["op"] == op):
            labels = [row["case"], row["dtype"], row["mode"]]
            for name in row.get("contestants", {}):
                rows.append([*labels, name, *cells(row, name, data["ceilings"])])
                labels = ["", "", ""]
            if "skipped" in row:
                rows.append([*labels, "", f"skipped: {row['skipped']}", *[""] * 7])
        lines += [f"## {op}", "", *_table(head, rows)]
    return lines


def _targets(data: Row) -> list[str]:
    listed = [(row, verdicts(row)) for row in data["rows"] if "contestants" in row]
    listed += [(row, stage_verdicts(row)) for row in data["end_to_end"]]
    rows = [
        [title(row), what, "not timed" if value is None else f"{value:.2f}", "yes" if reached else "**no**"]
        for row, found in listed
        for what, value, reached in found
    ]
    return ["## Targets", "", *_table(("row", "target", "measured", "reached"), rows)] if rows else []


def _end_to_end(data: Row) -> list[str]:
    lines: list[str] = []
    for row in data["end_to_end"]:
        lines += [f"## {row['model']}, {row['case']}, {row['dtype']}", "", row["about"], ""]
        if "skipped" in row:
            lines += [f"Skipped: {row['skipped']}", ""]
            continue
        stages = list(dict.fromkeys(stage for found in row["contestants"].values() for stage in found["stages"]))
        rows = []
        for name, found in row["contestants"].items():
            times = [_stage_text(found["stages"].get(stage)) for stage in stages]
            rows.append([name, *times, *_extra_cells(row, name), found.get("refused", found["gate"])])
        lines += _table((row["mode"], *stages, *_extras(row), "gate"), rows)
        if row.get("floor"):
            least = ", ".join(f"{stage} {seconds_text(value)}" for stage, value in row["floor"].items())
            lines += [f"Floor of this machine: {least}.", ""]
    return lines


def markdown(data: Row, *, plot: str | None = None, stages: str | None = None) -> str:
    """Returns the page of a results file; ``plot`` and ``stages`` are the names of the pictures beside it."""
    lines = [f"# {data['machine'].get('device', 'unknown device')}", ""]
    if not data["complete"]:
        lines += ["The run was cut off; what is here was measured in full.", ""]
    lines += _machine(data)
    for run in data["tests"]:
        lines += [f"`{run['case']}`: {run['outcome']}", ""]
    lines += _targets(data)
    if stages is not None:
        lines += [f"![Whole calls by stage]({stages})", ""]
    lines += _end_to_end(data)
    lines += _ops(data)
    if plot is not None:
        lines += [f"![Share of the copy bandwidth]({plot})", ""]
    lines.append("Written by `python -m benchmarks.report`; `benchmarks/README.md` says what the columns mean.")
    return "\n".join(lines) + "\n"


def _timed(data: Row) -> list[Row]:
    return [r for r in data["rows"] if "copy" in r and any("seconds" in c for c in r["contestants"].values())]


def _series(rows: Sequence[Row]) -> dict[str, list[tuple[Row, str]]]:
    """Returns by contestant the rows it was timed in, with its name there; of a peer's two layouts the faster."""
    found: dict[str, list[tuple[Row, str]]] = {}
    for row in rows:
        for family in dict.fromkeys(name.partition(" ")[0] for name in row["contestants"]):
            name = fastest(row, family)
            if name is not None:
                found.setdefault(family, []).append((row, name))
    return found


def _draw_shares(axes: Any, series: Mapping[str, list[tuple[Row, str]]], rows: Sequence[Row]) -> None:
    height = 0.8 / len(series)
    for i, (family, listed) in enumerate(series.items()):
        at = [rows.index(row) + (i + 0.5) * height - 0.4 for row, _ in listed]
        shares = [100 * cast(float, copy_share(row, name)) for row, name in listed]
        bars = axes.barh(at, shares, height, color=_COLOURS[i % len(_COLOURS)], label=family)
        axes.bar_label(bars, [f"{share:.0f}" for share in shares], padding=3, fontsize=7)
    axes.axvline(100, color="#444444", linewidth=1)
    axes.set_yticks(range(len(rows)), [title(row) for row in rows], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel("percent of the copy bandwidth (least traffic / time)")
    axes.grid(True, axis="x", alpha=0.25)
    axes.legend(frameon=False, fontsize=8)


def plot(data: Row, path: Path, *, most: int = 24) -> bool:
    """Draws the bandwidth shares of the first ``most`` rows; False when there is nothing to draw."""
    rows = _timed(data)
    if not rows:
        return False
    from matplotlib.figure import Figure

    listed = rows[:most]
    figure = Figure(figsize=(9, max(4.0, 1.2 + 0.4 * len(listed))), layout="constrained")
    axes = figure.subplots()
    _draw_shares(axes, _series(listed), listed)
    axes.set_title(f"{data['machine']['device']}, {data['machine']['date'][:10]}", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return True


def write(results: ResultsFile, *, with_plot: bool = True) -> list[Path]:
    """Writes the page, and the plots, beside a results file and returns their paths."""
    page, picture = results.path.with_suffix(".md"), results.path.with_suffix(".png")
    bars = results.path.with_name(f"{results.path.stem}_stages.png")
    drawers = ((picture, plot), (bars, stage_plot.plot)) if with_plot else ()
    drawn = [path for path, draw in drawers if draw(results.data, path)]
    names = {path: path.name for path in drawn}
    with replacing(page) as temporary:
        temporary.write_text(markdown(results.data, plot=names.get(picture), stages=names.get(bars)))
    return [page, *drawn]


def geometric_mean(values: Sequence[float]) -> float:
    """Returns the geometric mean of positive values, the right mean of ratios; 1 for none."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else 1.0


def main(argv: Sequence[str] | None = None) -> None:
    """Writes page and plot beside each results file named."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    for file in parser.parse_args(argv).files:
        try:
            results = ResultsFile.load(file)
        except ValueError as error:
            parser.error(str(error))
        for path in write(results):
            print(path)


if __name__ == "__main__":
    main()
