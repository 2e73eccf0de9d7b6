"""Check the Python source in official checkpoints. It is parsed, never compiled or executed.

dermis does not need the source, because it has its own networks. The check is a warning for users: a checkpoint whose source
would do more at import than define functions and classes was tampered with, and another program would run it.
"""

from __future__ import annotations

import ast

from dermis.errors import BundleError, quote

MAX_SOURCE_CHARACTERS = 1_000_000  # the official modules have some 40,000
_IMPORTS = frozenset({
    "__future__", "collections", "copy", "dataclasses", "dnnlib", "enum", "functools", "itertools", "math", "numpy",
    "re", "scipy", "torch", "torch_utils", "training", "typing", "warnings",
})  # fmt: skip
_DECORATORS = frozenset({
    "persistence.persistent_class", "torch_utils.persistence.persistent_class", "misc.profiled_function",
    "torch_utils.misc.profiled_function", "staticmethod", "classmethod", "property",
})  # fmt: skip
_FORBIDDEN_NAMES = frozenset({
    "__builtins__", "__import__", "__loader__", "breakpoint", "compile", "eval", "exec", "globals", "open",
})  # fmt: skip
_INERT = (
    ast.Constant,
    ast.Name,
    ast.Attribute,
    ast.List,
    ast.Tuple,
    ast.Dict,
    ast.Set,
    ast.UnaryOp,
    ast.BinOp,
    ast.unaryop,
    ast.operator,
    ast.expr_context,
)


def check_source(source: str) -> None:
    """Raise `BundleError` if importing `source` could do more than define functions, classes and constants."""
    if len(source) > MAX_SOURCE_CHARACTERS:
        raise BundleError(f"embeds a source of {len(source):,} characters, far more than the official modules have")
    try:
        tree = ast.parse(source)
        for node in ast.walk(tree):
            _check_anywhere(node)
        _check_body(tree.body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise BundleError(f"embeds a source that is not Python ({type(error).__name__}); do not load it") from None


def _refuse(node: ast.AST, what: str) -> BundleError:
    line = getattr(node, "lineno", "?")
    return BundleError(f"embeds a source that {what} (its line {line}), as no official module does; do not load it")


def _check_anywhere(node: ast.AST) -> None:
    modules: list[str] = []
    if isinstance(node, ast.Import):
        modules = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        modules = [node.module or ""] if node.level == 0 else ["a relative module"]
    elif isinstance(node, ast.Name) and node.id in _FORBIDDEN_NAMES:
        raise _refuse(node, f"uses {node.id}")
    for module in modules:
        if module.split(".")[0] not in _IMPORTS:
            raise _refuse(node, f"imports {quote(module)}")


def _check_body(body: list[ast.stmt]) -> None:
    """Check the statements that an import would execute: those of the module and of its classes."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom | ast.Pass):
            continue
        if isinstance(node, ast.FunctionDef):
            _check_decorators(node)
            arguments = node.args
            annotated = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg]
            hints = [item.annotation for item in [*annotated, arguments.kwarg] if item]
            _check_inert([*arguments.defaults, *arguments.kw_defaults])
            _check_inert([*hints, node.returns], (ast.Subscript,))
        elif isinstance(node, ast.ClassDef):
            _check_decorators(node)
            _check_inert([*node.bases, *[keyword.value for keyword in node.keywords]])
            if node.keywords:
                raise _refuse(node, "defines a class with a metaclass or keywords")
            _check_body(node.body)
        elif isinstance(node, ast.Assign) and all(isinstance(target, ast.Name) for target in node.targets):
            _check_inert([node.value])
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            _check_inert([node.value])
            _check_inert([node.annotation], (ast.Subscript,))
        elif not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
            raise _refuse(node, "has side effects when it is imported")


def _check_decorators(node: ast.FunctionDef | ast.ClassDef) -> None:
    for decorator in node.decorator_list:
        if ast.unparse(decorator) not in _DECORATORS:
            raise _refuse(node, f"uses the decorator {quote(ast.unparse(decorator))}")


def _check_inert(expressions: list[ast.expr | None], also: tuple[type[ast.AST], ...] = ()) -> None:
    for expression in expressions:
        for node in ast.walk(expression) if expression else ():
            if not isinstance(node, (*_INERT, *also)):
                raise _refuse(expression or node, "computes something when it is imported")
