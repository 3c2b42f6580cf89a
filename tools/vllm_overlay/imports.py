# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether the imports of vLLM that files make resolve in a source tree.

Nothing is imported: the tree's extensions need not be built.
"""

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

# The build makes these, so a source tree lacks them.
_BUILT = ("vllm.vllm_flash_attn", "vllm._C", "vllm._version")
_ROOTS = ("vllm", "tests")


# The files of a source tree by path.
Tree = Mapping[str, Path]


def unresolved(tree: Tree, paths: Iterable[str]) -> list[str]:
    """List the imports that do not resolve, those inside of functions included.

    Args:
        tree: The files that may be imported.
        paths: The files to look at; those that are no Python are fine.

    Returns:
        A line for each import.
    """
    return [
        f"{path}:{line}: {module}{'.' + name if name else ''}"
        for path in paths
        if path.endswith(".py")
        for line, module, name in _imports(tree[path].read_text("utf-8"), path)
        if not _resolves(tree, module, name)
    ]


def fill_packages(tree: Tree, whole: Tree) -> list[str]:
    """Let every ``__init__.py`` import as much as there is.

    Args:
        tree: The files that may be imported; packages are rewritten.
        whole: The packages' files as they are in the end.

    Returns:
        Those that were written.
    """
    packages = [p for p in whole if p.endswith("/__init__.py") and p in tree]
    written: list[str] = []
    # What one has may be what another one lacked.
    while changed := [path for path in packages if _fill(tree, path, whole[path])]:
        written += changed
    return written


def _fill(tree: Tree, path: str, whole: Path) -> bool:
    part = _present_part(tree, path, whole.read_text("utf-8"))
    changed = part != tree[path].read_text("utf-8")
    if changed:
        tree[path].write_text(part, "utf-8")
    return changed


def _present_part(tree: Tree, path: str, text: str) -> str:
    """A file without the imports that do not resolve, and their names in `__all__`."""
    module, absent = ast.parse(text), set()
    cut: list[ast.stmt | ast.expr] = []
    for node in module.body:
        if isinstance(node, ast.ImportFrom) and any(
            not _resolves(tree, source, name)
            for _, source, name in _imports_of(node, path)
        ):
            absent |= {alias.asname or alias.name for alias in node.names}
            cut.append(node)
    cut += [
        node
        for node in ast.walk(module)
        if isinstance(node, ast.Constant) and node.value in absent
    ]
    without = {
        n for node in cut for n in range(node.lineno, (node.end_lineno or 0) + 1)
    }
    lines = enumerate(text.split("\n"), start=1)
    return "\n".join(line for number, line in lines if number not in without)


def _imports(text: str, path: str) -> Iterator[tuple[int, str, str | None]]:
    for node in ast.walk(ast.parse(text)):
        yield from _imports_of(node, path)


def _imports_of(node: ast.AST, path: str) -> Iterator[tuple[int, str, str | None]]:
    """The line, module and name of what a statement imports from vLLM."""
    found: list[tuple[int, str, str | None]] = []
    if isinstance(node, ast.Import):
        found = [(node.lineno, alias.name, None) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        package = path.split("/")[: -node.level] if node.level else []
        module = ".".join([*package, *filter(None, [node.module])])
        found = [(node.lineno, module, alias.name) for alias in node.names]
    for line, module, name in found:
        if module.split(".")[0] in _ROOTS and not module.startswith(_BUILT):
            yield line, module, name


def _resolves(tree: Tree, module: str, name: str | None) -> bool:
    file = _file(tree, module)
    if name is None or name == "*":
        return file is not None
    if f"{module}.{name}".startswith(_BUILT) or _file(tree, f"{module}.{name}"):
        return True
    names = _names(file.read_text("utf-8")) if file else frozenset()
    return name in names or "__getattr__" in names or "*" in names


def _file(tree: Tree, module: str) -> Path | None:
    base = module.replace(".", "/")
    return tree.get(f"{base}.py") or tree.get(f"{base}/__init__.py")


@functools.lru_cache(maxsize=1024)
def _names(text: str) -> frozenset[str]:
    """What a module binds outside of functions and classes."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(text)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            todo.extend(ast.iter_child_nodes(node))
    return frozenset(names)
