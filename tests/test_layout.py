# SPDX-License-Identifier: Apache-2.0
"""The rules of the source tree that a machine can check: seven places per op, layers, budgets, the README's table."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # which pytest brings there

from sdxl_fast import ops
from sdxl_fast.dispatch import matrix_markdown, registry

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sdxl_fast"

# ---- one op, one name, seven places ----

PLACES = (
    "csrc/cuda/{}.cu",
    "csrc/cpu/{}.cpp",
    "triton_kernels/{}.py",
    "sdxl_fast/reference/{}.py",
    "sdxl_fast/ops/{}.py",
    "tests/ops/test_{}.py",
    "benchmarks/ops/bench_{}.py",
)
# Places an op does without, and why: {"place": "reason"}.
_ATTENTION = ("cross_attention", "self_attention", "vae_attention")
_MATRIX = ("conv2d", "linear", "linear_geglu", "upsample_conv2d")
MISSING_ON_PURPOSE: dict[str, str] = {
    **{f"csrc/cuda/{op}.cu": "Triton serves every GPU; one by hand waits for a GPU to time it on" for op in _ATTENTION},
    "csrc/cpu/disc_head.cpp": "made there of the native group_norm_silu and a product",
    **{f"csrc/cpu/{op}.cpp": "two kernels for the three: attention.cpp, streamed_attention.cpp" for op in _ATTENTION},
    **{f"csrc/cpu/{op}.cpp": "matrix ops use PyTorch's CPU library calls there" for op in _MATRIX},
}

# Budgets a file or function may exceed, and why: {"path" or "path::function": "reason"}.
OVER_BUDGET: dict[str, str] = {"csrc/include/sdxl_fast.h": "the whole C ABI: a prototype a function, of many arguments"}

# Public functions with more than eight arguments, and why.
MANY_ARGUMENTS: dict[str, str] = {
    "group_norm_silu": "beside a norm's own, the map of a skip connection, which would else be concatenated to x first",
    "ddim_move": "two tensors and the three levels, each one per sample, that one pass over them goes through",
}

FILE_LINES = 400
FUNCTION_LINES = 60
DEVICE_FUNCTION_LINES = 120

# A layer imports only from its own number or lower ones.
LAYERS: dict[str, int] = {
    "errors": 0,
    "files": 0,
    "random": 0,
    "text": 0,
    "triton_kernels": 0,
    "constraints": 1,
    "dispatch": 1,
    "native": 1,
    "op": 1,
    "reference": 2,
    "ops": 2,
    "nn": 3,
    "models": 4,
    "diffusion": 4,
    "data": 4,
    "eval": 4,
    "train": 5,
    "inference": 5,
    "cli": 6,
    "cli_calibrate": 6,
    "cli_data": 6,
    "cli_eval": 6,
    "cli_eval_rows": 6,
    "cli_export": 6,
    "cli_export_card": 6,
    "cli_options": 6,
    "demo": 6,
    "env": 6,
    "__main__": 6,
    "examples": 7,  # programs of users: may use everything
    "testing": 7,  # for tests: may use everything, and nothing may use it
}
NEVER_EACH_OTHER = ({"train", "inference"},)
# Names the package loads lazily, by the layer they come from.
PUBLIC_NAMES = {
    "OneStepPipeline": "inference",
    "__version__": "errors",
    "explain": "dispatch",
    "fuse": "nn",
    "optimize": "inference",
    "report": "inference",
    "restore": "inference",
    "use_backend": "dispatch",
}


def _ops() -> list[str]:
    return sorted(registry())


@pytest.mark.parametrize("place", PLACES)
def test_every_op_is_in_all_seven_places(place):
    missing = [path for op in _ops() if not (ROOT / (path := place.format(op))).is_file()]
    unexplained = [path for path in missing if path not in MISSING_ON_PURPOSE]
    assert not unexplained, "write them, or give the reason in MISSING_ON_PURPOSE"


def test_exceptions_are_real():
    """An exception outlives its reason only if nobody looks."""
    for path in MISSING_ON_PURPOSE:
        assert not (ROOT / path).exists(), f"{path} exists now: take it off MISSING_ON_PURPOSE"
    for entry in OVER_BUDGET:
        assert (ROOT / entry.partition("::")[0]).is_file(), f"{entry} is gone: take it off OVER_BUDGET"


@pytest.mark.parametrize("place", ["triton_kernels/{}.py", "sdxl_fast/reference/{}.py", "sdxl_fast/ops/{}.py"])
def test_kernel_modules_belong_to_an_op(place):
    folder = ROOT / Path(place).parent
    names = {path.stem for path in folder.glob("*.py") if not path.stem.startswith("_")}
    assert names <= set(_ops())


def test_ops_are_public():
    assert sorted(ops.__all__) == _ops()


@pytest.mark.parametrize("name", ops.__all__)
def test_public_functions_are_narrow(name):
    """At most eight arguments; only leading tensors, or None, are positional; every option is keyword-only."""
    parameters = inspect.signature(getattr(ops, name)).parameters.values()
    assert (len(parameters) > 8) == (name in MANY_ARGUMENTS), "pass fewer, or give the reason in MANY_ARGUMENTS"
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert all(p.default in (p.empty, None) and "Tensor" in str(p.annotation) for p in positional)
    documentation = getattr(ops, name).__doc__
    assert all(section in documentation for section in ("Args:", "Returns:", "Raises:", "Source:"))


# ---- layers ----


def _typing_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not _typing_only(child):
            yield child
            yield from _walk(child)


def _imported_layers(path: Path, package: str) -> Iterator[str]:
    """Yields the layer of every import of this package in a file, function-level ones included."""
    for node in _walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = package.split(".")
                base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            # `from sdxl_fast import ops` names a layer in what it imports.
            modules = [f"{base}.{alias.name}" for alias in node.names] if base == "sdxl_fast" else [base]
        else:
            continue
        for module in modules:
            first, _, rest = module.partition(".")
            if first == "sdxl_fast" and rest:
                yield rest.partition(".")[0]


def _sources() -> Iterator[tuple[Path, str, str]]:
    """Yields (file, its package, its layer) for everything installed, the package's own __init__ aside."""
    for folder, prefix in ((PACKAGE, ("sdxl_fast",)), (ROOT / "triton_kernels", ("sdxl_fast", "triton_kernels"))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            if parts[1:] != ("__init__",):
                yield path, ".".join(parts[:-1]), parts[1]


def test_layers_import_only_from_below():
    problems = []
    for path, package, layer in _sources():
        assert layer in LAYERS, f"{path.relative_to(ROOT)}: say in LAYERS which layer `{layer}` is"
        for found in _imported_layers(path, package):
            target = PUBLIC_NAMES.get(found, found)
            assert target in LAYERS, f"{path.relative_to(ROOT)} imports unknown layer {target}"
            above = LAYERS[target] > LAYERS[layer]
            rivals = target != layer and any({target, layer} <= pair for pair in NEVER_EACH_OTHER)
            if above or rivals:
                problems.append(f"{path.relative_to(ROOT)} ({layer}) imports {target}")
    assert not problems, "\n".join(problems)


def test_the_layer_check_sees_what_it_should(tmp_path):
    source = tmp_path / "x.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "import sdxl_fast.cli\nfrom sdxl_fast import ops, errors\nfrom ..train import losses\nfrom .swap import fuse\n"
        "def f():\n    from ..inference import pipeline\n"
        "if TYPE_CHECKING:\n    from ..eval import kid\n"
    )
    found = list(_imported_layers(source, "sdxl_fast.nn"))
    assert found == ["cli", "ops", "errors", "train", "nn", "inference"]


# ---- budgets ----


def _budgeted() -> list[Path]:
    """Files git knows or would take, of the kinds people write by hand."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    kinds = {".py", ".cpp", ".cu", ".cuh", ".h"}
    return [ROOT / name for name in listed if Path(name).suffix in kinds and (ROOT / name).is_file()]


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for path in _budgeted()
        if (lines := len(path.read_text().splitlines())) > FILE_LINES
    }
    assert not {path: n for path, n in long.items() if path not in OVER_BUDGET}, f"more than {FILE_LINES} lines"


def _is_device_function(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.dump(decorator) for decorator in node.decorator_list)


def _code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, the docstring not counted: explaining oneself is free."""
    total = (node.end_lineno or node.lineno) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        total -= (first.end_lineno or first.lineno) - first.lineno + 1
    return total


def test_functions_are_short():
    long = []
    for path in _budgeted():
        if path.suffix != ".py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            device = isinstance(node, ast.FunctionDef) and _is_device_function(node)
            name = f"{path.relative_to(ROOT)}::{node.name}"
            if _code_lines(node) > (DEVICE_FUNCTION_LINES if device else FUNCTION_LINES) and name not in OVER_BUDGET:
                long.append(f"{name}: {_code_lines(node)} lines")
    assert not long, "\n".join(long)


# ---- requirements ----

IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml"}


def _requirements() -> tuple[set[str], set[str]]:
    """What pyproject.toml requires always and what only with an extra, by the names they are imported by."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(lines: list[str]) -> set[str]:
        plain = (re.match(r"[\w.-]+", line)[0].lower() for line in lines)
        return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in plain}

    extras = project["optional-dependencies"]
    return names(project["dependencies"]), names([line for extra in extras.values() for line in extra])


def _imported_elsewhere() -> set[str]:
    """Top-level modules that installed code imports anywhere, the standard library's and its own aside."""
    found = set()
    for path, _, _ in _sources():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found.update(alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"sdxl_fast"}


def test_requirements_are_what_the_package_imports():
    always, extra = _requirements()
    imported = _imported_elsewhere()
    assert not always - imported, "required and never imported"
    # The shared suite in sdxl_fast.testing runs under pytest, which whoever uses it has.
    assert not imported - always - extra, "imported and nowhere required"


# ---- README ----


def test_readme_matrix_is_the_registry():
    """The table between the markers is generated by ``sdxl_fast.dispatch.matrix_markdown()``."""
    text = (ROOT / "README.md").read_text()
    begin, end = "<!-- op-matrix:begin -->", "<!-- op-matrix:end -->"
    assert begin in text and end in text, "README.md has no op matrix"
    table = text.split(begin)[1].split(end)[0].strip()
    assert table == matrix_markdown(), "paste what sdxl_fast.dispatch.matrix_markdown() returns"


# ---- importing ----


def _in_fresh_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, sdxl_fast; print([m for m in ('torch', 'triton', 'diffusers', 'numpy') if m in sys.modules])"
    assert _in_fresh_python(code) == "[]"


def test_using_ops_imports_torch_alone_and_takes_under_a_second_beyond_it():
    code = (
        "import sys, time, torch; t = time.process_time(); import sdxl_fast.ops; seconds = time.process_time() - t\n"
        "heavy = ('triton', 'diffusers', 'transformers', 'peft', 'sdxl_fast._C', 'sdxl_fast.triton_kernels')\n"
        "print(seconds < 1, [m for m in heavy if m in sys.modules], torch.cuda.is_initialized())"
    )
    assert _in_fresh_python(code) == "True [] False"


def test_public_names_exist_and_unknown_ones_are_attribute_errors():
    import sdxl_fast

    assert set(sdxl_fast.__all__) <= set(dir(sdxl_fast))
    for name in sdxl_fast.__all__:
        assert getattr(sdxl_fast, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        sdxl_fast.nonsense  # noqa: B018
