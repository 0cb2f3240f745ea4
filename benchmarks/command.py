# SPDX-License-Identifier: Apache-2.0
"""The command line of the op benchmarks, and the loop that measures a list of rows."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, report, roofline
from benchmarks.measure import measure
from benchmarks.results import ResultsFile
from benchmarks.suite import GATE_FAILED, OpBench, Options, Work, stage_verdicts, verdicts, works
from benchmarks.timing import Clock, clock_for
from sdxl_fast.text import one_line

Say = Callable[[str], None]


def say(text: str) -> None:
    """Prints at once, so that a run that is cut off has shown what it did."""
    print(text, flush=True)


def parser(module: str, description: str, *, compile: bool = True, out: Path | None = None) -> argparse.ArgumentParser:
    """Returns the options that the runs share.

    Args:
        module: as ``python -m`` takes it.
        description: for the help.
        compile: without it the caller has an option of its own for torch.compile.
        out: where results go by default, unless the environment variable ``OUT`` names a folder; None is nowhere.
    """
    found = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    found.add_argument("--threads", type=int, default=machine.processors(), help="default: all processors")
    found.add_argument(
        "--quick", action="store_true", help="small shapes, few rounds: tries the code, measures nothing"
    )
    if compile:
        found.add_argument("--compile", action="store_true", help="let torch.compile take part")
    found.add_argument("--rounds", type=int, default=11, help="samples of each contestant")
    found.add_argument("--sets", type=int, help="input sets to rotate; default: twice the last cache")
    where = "write the results there too" if out is None else f"default: $OUT, else {out}"
    default = None if out is None else Path(os.environ.get("OUT") or out)
    found.add_argument("--out", type=Path, default=default, metavar="FOLDER", help=where)
    return found


def options_of(arguments: argparse.Namespace, device: str) -> Options:
    """Returns how to measure, from the command line."""
    copy = roofline.fastest_copy(device, quick=arguments.quick)
    options = Options(device, arguments.compile, arguments.rounds, 5.0, arguments.sets, copy=copy)
    return dataclasses.replace(options, rounds=3, budget_s=0.5, sets=1) if arguments.quick else options


def check(found: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Ends with one line for a number that makes no sense."""
    for name in ("threads", "rounds", "sets"):
        value = getattr(arguments, name, None)
        if value is not None and value < 1:
            found.error(f"--{name} is {value}; it must be at least 1")


def describe(facts: dict[str, Any]) -> str:
    """Returns the lines that stand above a run."""
    lines = [
        f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}",
        f"threads: {facts['threads']}; allocator: {facts['allocator']}",
    ]
    load = facts["load_of_others"]
    if load is not None and load > machine.BUSY:
        lines.append(f"WARNING: {load:.0%} of the processors are in use by others; these timings say little")
    return "\n".join(lines)


def ceilings_text(ceilings: dict[str, Any]) -> str:
    """Returns the line with the measured ceilings."""
    rates = ", ".join(f"{d} {report.rate_text(r, 'FLOP')}" for d, r in ceilings["matrix_flops_per_s"].items())
    return f"copy {report.rate_text(ceilings['copy_bytes_per_s'], 'B')} (read + written); matrix product {rates}"


def start(folder: Path | None, device: str, clock: Clock, *, quick: bool, name: str = "") -> ResultsFile:
    """Takes down the machine and its ceilings; the file, called after machine and ``name``, only with a folder."""
    facts = machine.facts(device)
    say(describe(facts))
    ending = f"_{name}" if name else "_quick" if quick else ""
    results = ResultsFile.create(folder, machine.slug(facts) + ending, facts)
    results.set("ceilings", roofline.measure(device, clock, quick=quick))
    say(ceilings_text(results.data["ceilings"]) + "\n")
    return results


def run_rows(
    listed: Iterable[Work],
    options: Options,
    clock: Clock,
    results: ResultsFile,
    *,
    deadline: float = math.inf,
    tell: Say = say,
) -> None:
    """Measures one case after the other, leaving out rows that are there; each row is in the file when it is done.

    No case begins after ``deadline`` [s of the monotonic clock].
    """
    for work in listed:
        if time.monotonic() > deadline:
            return
        modes = tuple(mode for mode in work.modes if not _measured(results, work.key(mode), options))
        if not modes:
            continue
        work = dataclasses.replace(work, modes=modes)
        try:
            for row in measure(work, options, clock):
                results.put("rows", row)
                tell(report.text(row, results.data["ceilings"]) + "\n")
        except torch.OutOfMemoryError as error:
            for mode in modes:
                if results.find("rows", work.key(mode)) is None:
                    results.put("rows", {**work.key(mode), "skipped": one_line(error)})
                    tell(f"{report.title(work.key(mode))}: skipped: {one_line(error)}")
        gc.collect()
        if options.device == "cuda":
            torch.cuda.empty_cache()


def _measured(results: ResultsFile, key: dict[str, str], options: Options) -> bool:
    """Whether there is a row already, with everyone in it who would take part."""
    row = results.find("rows", key)
    return row is not None and (not options.compile or row.get("compile", True))


def summary(results: ResultsFile) -> str:
    """Returns what the rows come to: our mean speed-up over eager by op and dtype, and how many targets are reached."""
    lines = []
    groups: dict[tuple[str, str, str], list[float]] = {}
    for row in results.data["rows"]:
        for name in ("cpu", "cuda", "triton"):
            found = row.get("contestants", {}).get(name, {})
            if "speedup" in found:
                groups.setdefault((row["op"], row["dtype"], name), []).append(found["speedup"]["median"])
    for (op, dtype, name), values in groups.items():
        mean = report.geometric_mean(values)
        lines.append(f"{op} {dtype} on {name}: {mean:.2f}x eager (geometric mean of {len(values)} rows)")
    checked = [v for row in results.data["rows"] if "targets" in row for v in verdicts(row)]
    checked += [v for row in results.data["end_to_end"] for v in stage_verdicts(row)]
    if checked:
        lines.append(f"targets reached: {sum(reached for _, _, reached in checked)} of {len(checked)}")
    return "\n".join(lines)


def failures(results: ResultsFile) -> list[str]:
    """Returns the contestants that failed their gate, with the reason."""
    return [
        f"{report.title(row)}: {name}: {found['refused']}"
        for row in (*results.data["rows"], *results.data["end_to_end"])
        for name, found in row.get("contestants", {}).items()
        if GATE_FAILED in found.get("refused", "")
    ]


def finish(results: ResultsFile, *, complete: bool = True, tell: Say = say) -> int:
    """Prints the summary, writes page and plot, and returns the exit status: 1 when a gate failed."""
    results.set("complete", complete)
    tell(summary(results))
    if results.path is not None:
        for path in (results.path, *report.write(results)):
            tell(f"wrote {path}")
    wrong = failures(results)
    for line in wrong:
        tell(f"FAILED ITS GATE: {line}")
    return 1 if wrong else 0


def main(bench: OpBench, module: str, argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark of one op on the CPU, or on the GPU with ``--device cuda``."""
    arguments_given = list(sys.argv[1:] if argv is None else argv)
    found = parser(module, f"Time {bench.subject.op} against stock PyTorch.")
    found.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = found.parse_args(arguments_given)
    check(found, arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        found.error("--device cuda, but torch finds no CUDA GPU here")
    machine.restart_with_warm_allocator(module, arguments_given, arguments.threads)
    torch.set_num_threads(arguments.threads)
    machine.full_float32()
    clock = clock_for(arguments.device, quick=arguments.quick)
    results = start(arguments.out, arguments.device, clock, quick=arguments.quick)
    cases = bench.cases(arguments.device, quick=arguments.quick)
    run_rows(works(bench, cases), options_of(arguments, arguments.device), clock, results)
    raise SystemExit(finish(results))
