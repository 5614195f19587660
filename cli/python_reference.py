"""The page docs/reference/python.md: functions and classes that Python code calls, read from the source without importing it.

What a module has is listed in its order: the signature, and the first sentence of the docstring. Names with an underscore are left out.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOSSES = [f"losses.{path.stem}" for path in sorted((ROOT / "losses").glob("*.py")) if path.stem != "__init__"]
MODELS = ["policy", "reference", "reward_model", "sampling", "decode", "families", "hf", "fetch"]
DATA = ["sources", "formats", "kinds", "spans", "trees", "preference", "prompts", "pack", "loader"]
ROLLOUT = ["group", "documents", "prompt_order", "feed_state", "builtin"]
GROUPS = {
    "Runs": ["cli.fit", "core.run.source", "core.run.observers"],
    "Models": [f"models.{name}" for name in MODELS],
    "Rows to streams": [f"core.data.{name}" for name in DATA],
    "Steps": [f"core.{name}" for name in ("state", "step", "optim", "schedules")],
    "Trees": [f"core.{name}" for name in ("tree", "lora")],
    "Losses": LOSSES,
    "Rollouts": [f"core.rollout.{name}" for name in ROLLOUT],
    "Ops": [f"ops.{name}" for name in ("linear_logprob", "attention", "noise")],
}
MARKS = r"([\\*<\[]|(?<!\w)_|_(?!\w))"
INTRODUCTION = """# Functions and classes

Each module with its functions and classes, their signatures, and the first sentence of their docstrings; `help(function)` has
the rest: formulas, shapes, errors. [From Python](../python.md) shows how they are put together, [extending](../extending.md)
what a function of your own looks like. Modules that are not here are parts of these.
"""


def page() -> str:
    """The page as Markdown."""
    parts = [INTRODUCTION]
    for title, modules in GROUPS.items():
        parts += [f"## {title}\n", *(part for name in modules for part in _module(name))]
    return "\n".join(parts)


def _module(name: str) -> Iterator[str]:
    """The heading of a module, its docstring's first sentence, and an entry for each function and class."""
    parsed = ast.parse((ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8"))
    yield f"### `treetune.{name}`\n\n{_said(parsed, name)}\n"
    for node in parsed.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            signature = _signature(node) if isinstance(node, ast.FunctionDef) else _made(node)
            yield f"- `{signature}`\n\n    {_said(node, f'{name}.{node.name}')}\n"


def _said(node: ast.Module | ast.ClassDef | ast.FunctionDef, name: str) -> str:
    """The first sentence of a docstring, or as much of it as stands in its first lines. Errors: ValueError where there is none."""
    text = (ast.get_docstring(node) or "").partition("\n\n")[0]
    if not text:
        raise ValueError(f"{name} has no docstring")
    lines = text.splitlines()
    end = next((i for i, line in enumerate(lines) if line.endswith(".")), len(lines))
    return prose(" ".join(lines[: end + 1]))


def prose(text: str) -> str:
    """The text, with what Markdown would take for marks as it is written, but for code between backquotes."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(MARKS, r"\\\1", part) for part in parts)


def _signature(node: ast.FunctionDef, name: str = "", bound: bool = False) -> str:
    """A function as it is called: parameters with their types and defaults, and what it returns; of a method without self."""
    given, defaults = node.args, node.args.defaults
    places = [*given.posonlyargs, *given.args]
    firsts = [None] * (len(places) - len(defaults)) + list(defaults)
    words = [_parameter(one, default) for one, default in zip(places, firsts, strict=True)][bound:]
    words += [f"*{_parameter(given.vararg)}"] if given.vararg else ["*"] if given.kwonlyargs else []
    words += [_parameter(one, default) for one, default in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    words += [f"**{_parameter(given.kwarg)}"] if given.kwarg else []
    return f"{name or node.name}({', '.join(words)})" + (f" -> {ast.unparse(node.returns)}" if node.returns else "")


def _parameter(one: ast.arg, default: ast.expr | None = None) -> str:
    kind = f": {ast.unparse(one.annotation)}" if one.annotation else ""
    return f"{one.arg}{kind}" + ("" if default is None else f" = {ast.unparse(default)}" if kind else f"={ast.unparse(default)}")


def _made(node: ast.ClassDef) -> str:
    """A class as it is made or called: its fields, what it is called with, its __init__, or its name alone."""
    methods = {one.name: one for one in node.body if isinstance(one, ast.FunctionDef)}
    for name in ("__call__", "__init__"):
        if name in methods:
            return _signature(methods[name], node.name, bound=True).removesuffix(" -> None" if name == "__init__" else "")
    fields = [one for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
    return f"{node.name}({', '.join(ast.unparse(one) for one in fields)})" if fields else node.name
