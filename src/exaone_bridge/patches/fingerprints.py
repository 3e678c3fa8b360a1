"""Whether the code that a patch changes is the one that the patch was written for. No torch.

`fingerprints.json` has the fingerprints of each patch's target in the versions it was tested with.
`python -m exaone_bridge.patches.fingerprints` adds those of the installed versions to it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

__all__ = ["fingerprint", "known_fingerprints"]

_FILE = Path(__file__).with_suffix(".json")
_MAX_STEPS = 4  # imports and base classes to follow to a definition


def known_fingerprints() -> dict[str, list[str]]:
    """Read the fingerprints that were tested: the target of a patch -> one for each source."""
    known: dict[str, list[str]] = json.loads(_FILE.read_text())
    return known


def fingerprint(target: str) -> str:
    """Hash the source of a patch's target, without importing it.

    Comments, docstrings and formatting do not count.

    Args:
        target: "module", "module:function", "module:NAME" or "module:Class.method".

    Returns:
        16 hexadecimal digits; empty: there is no such code.
    """
    module, _, path = target.partition(":")
    tree = _parse(module)
    nodes = [tree] if tree and not path else _definitions(module, path.split("."), _MAX_STEPS)
    source = "\n".join(ast.unparse(_without_docstrings(node)) for node in nodes)
    return hashlib.sha256(source.encode()).hexdigest()[:16] if source else ""


def _parse(module: str) -> ast.Module | None:
    file = _file_of(module)
    return None if file is None else ast.parse(file.read_text())


def _file_of(module: str) -> Path | None:
    """Find a module's file. Only namespace packages are imported, in which there is no code."""
    names = module.split(".")
    for depth in range(1, len(names) + 1):
        try:
            spec = importlib.util.find_spec(".".join(names[:depth]))
        except (ImportError, ValueError):  # no such parent, or a fake module without a spec
            return None
        if spec is None:
            return None
        if spec.origin is not None:
            break
    else:
        return None
    if depth == len(names):
        return Path(spec.origin)
    path = Path(spec.origin).parent.joinpath(*names[depth:])
    return next(filter(Path.is_file, (path.with_suffix(".py"), path / "__init__.py")), None)


def _definitions(module: str, path: list[str], steps: int) -> list[ast.stmt]:
    """Find the statements that define `path`, through imports and in base classes."""
    tree = _parse(module)
    if tree is None or not steps:
        return []
    found = _named(tree.body, path[0])
    if not found:
        return _definitions(_origin(tree, module, path[0]), path, steps - 1)
    for depth, name in enumerate(path[1:], start=1):
        owners = [node for node in found if isinstance(node, ast.ClassDef)]
        found = [one for owner in owners for one in _named(owner.body, name)]
        if not found and owners and owners[0].bases:
            base = ast.unparse(owners[0].bases[0])
            return _definitions(module, [base, *path[depth:]], steps - 1)
    return found


def _named(body: list[ast.stmt], name: str) -> list[ast.stmt]:
    """Find what defines a name in these statements, in their branches too."""
    found = []
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if getattr(node, "name", None) == name or name in (
            one.id for one in targets if isinstance(one, ast.Name)
        ):
            found.append(node)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            found += _named(list(_inner(node)), name)
    return found


def _inner(node: ast.If | ast.Try | ast.With) -> Iterator[ast.stmt]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ExceptHandler):
            yield from child.body
        elif isinstance(child, ast.stmt):
            yield child


def _origin(tree: ast.Module, module: str, name: str) -> str:
    """Return the module that a name is imported from, or this module."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in (
            alias.asname or alias.name for alias in node.names
        ):
            parents = module.split(".")[: -node.level] if node.level else []
            return ".".join([*parents, *filter(None, [node.module])])
    return module


def _without_docstrings(root: ast.AST) -> ast.AST:
    for node in ast.walk(root):
        if isinstance(
            node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
        ) and (ast.get_docstring(node, clean=False) is not None):
            node.body = node.body[1:] or [ast.Pass()]
    return root


def _add_installed() -> None:
    """Write the fingerprints of the installed versions into the file, beside those there."""
    from exaone_bridge.patches.table import PATCHES

    known = known_fingerprints() if _FILE.exists() else {}
    written = {
        target: sorted({*known.get(target, []), fingerprint(target)})
        for target in sorted(patch.target for patch in PATCHES)
    }
    _FILE.write_text(json.dumps(written, indent=4) + "\n")


if __name__ == "__main__":
    _add_installed()
