"""The rules of the code's form that no linter checks."""

import ast
import pathlib

import pytest

from sparseformer_jax import registry

ROOT = pathlib.Path(__file__).parent.parent
FILES = sorted(
    file
    for package in ("sparseformer_jax", "pallas_kernels")
    for file in (ROOT / package).rglob("*.py")
)
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 100
FORBIDDEN_IMPORTS = {"tensorflow", "pickle", "cloudpickle"}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def names(files: list[pathlib.Path]) -> list[str]:
    return [str(file.relative_to(ROOT)) for file in files]


def imports(tree: ast.AST) -> set[str]:
    """Returns the dotted names of all modules imported, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module}
    return found


def importers(library: str) -> set[str]:
    """Returns the files of both packages that import a library."""
    return {
        str(file.relative_to(ROOT))
        for file in FILES
        if library in {name.split(".")[0] for name in imports(parse(file))}
    }


def parse(file: pathlib.Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def public(body: list[ast.stmt]) -> list[ast.ClassDef | Function]:
    """Returns public functions and classes, with the public methods of the latter."""
    found = []
    for node in body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            found.append(node)
            if isinstance(node, ast.ClassDef):
                found += public(node.body)
    return found


@pytest.mark.parametrize("file", FILES, ids=names(FILES))
def test_form(file):
    tree = parse(file)
    assert ast.get_docstring(tree), "a module says in its first line what it does"
    assert len(file.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES
    for node in public(tree.body):
        assert ast.get_docstring(node), f"{node.name} has no docstring"
    for node in ast.walk(tree):
        if isinstance(node, Function):
            assert node.returns, f"{node.name} has no return annotation"
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{node.name} has {lines} lines"


@pytest.mark.parametrize("library", sorted(FORBIDDEN_IMPORTS))
def test_nothing_imports(library):
    assert not importers(library)


def test_libraries_behind_one_file_each():
    assert importers("orbax") <= {"sparseformer_jax/training/checkpoint.py"}
    assert importers("jax_triton") <= {"pallas_kernels/triton_call.py"}
    # What is timed beside our kernels, where it is installed.
    assert importers("torch") <= {"pallas_kernels/bench/torch_attention.py"}


# "none" is no sparsity.
METHODS = [(kind, n) for kind in registry.KINDS for n in registry.names(kind) if n != "none"]


@pytest.mark.parametrize(("kind", "name"), METHODS)
def test_a_method_is_three_files(kind, name):
    method = registry.method(kind, name)
    assert {"Options", "Method"} <= vars(method).keys()
    assert (ROOT / f"configs/{name}.py").is_file()
    assert (ROOT / f"tests/{kind}/test_{name}.py").is_file()
