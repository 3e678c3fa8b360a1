"""Every public function with tensors in its signature gives their shapes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

from tests.helpers.paths import ROOT

SOURCES = [ast.parse(path.read_text()) for path in sorted((ROOT / "src").rglob("*.py"))]
# Axes in brackets, such as [S, B, H], [..., 2F], [S / cp] or `[*info.shape]`; not x[i].
# A shape with a star is code, because Sphinx takes the star for the begin of an emphasis.
SHAPE = re.compile(r"(?<![\w.`])\[(\.\.\.|[A-Za-z0-9(])([^\]\n[]|\[\w+\])*\]|`\[\*[^`\n]+\]`")


def tensor_aliases() -> set[str]:
    """Names of types that are made of tensors: `Images = dict[str, torch.Tensor]`."""
    names = {"Tensor"}
    for _ in range(3):  # an alias of an alias
        names |= {
            node.targets[0].id
            for tree in SOURCES
            for node in tree.body
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and isinstance(node.value, ast.Subscript)
            and names & identifiers(node.value)
        }
    return names


def identifiers(node: ast.expr) -> set[str]:
    return set(re.findall(r"\w+", ast.unparse(node)))


def signature(function: ast.FunctionDef) -> set[str]:
    arguments = ast.walk(function.args)
    types = [node.annotation for node in arguments if isinstance(node, ast.arg)]
    return set().union(*(identifiers(type_) for type_ in (*types, function.returns) if type_))


def public_functions(
    scope: ast.Module | ast.ClassDef, owner: str = ""
) -> Iterator[tuple[str, ast.FunctionDef, str]]:
    """Yield name, function and docstring, which for `forward` may be that of its class."""
    for node in scope.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            if isinstance(node, ast.ClassDef):
                yield from public_functions(node, f"{owner}{node.name}.")
            else:
                with_class = node.name == "forward" and isinstance(scope, ast.ClassDef)
                texts = [ast.get_docstring(each) for each in (node, *[scope] * with_class)]
                yield owner + node.name, node, "\n".join(filter(None, texts))


def test_public_functions_with_tensors_give_shapes() -> None:
    aliases = tensor_aliases()
    functions = [
        (name, docstring)
        for tree in SOURCES
        for name, function, docstring in public_functions(tree)
        if aliases & signature(function)
    ]
    assert len(functions) > 60
    assert not [name for name, docstring in functions if not SHAPE.search(docstring)]
