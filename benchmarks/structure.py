"""Measurements of a checkout's structure as JSON: `python benchmarks/structure.py [CHECKOUT]`. Reads the source, imports nothing."""

import ast
import io
import json
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FOLDERS = (
    "core",
    "core/config",
    "core/data",
    "core/rollout",
    "core/run",
    "ops",
    "models",
    "losses",
    "cli",
    "tests",
    "benchmarks",
    "examples",
)
CODE = ("core", "ops", "models", "losses", "cli")
VAGUE = ("found", "made", "used", "said", "where", "on", "told", "given", "kept", "own", "known", "held")
MAX_PARAMETERS = 8
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Checkout:
    """Source files of a checkout, parsed once."""

    def __init__(self, root: Path):
        self.root = root
        paths = sorted(path for folder in {name.split("/")[0] for name in FOLDERS} for path in (root / folder).rglob("*.py"))
        self.texts = {path.relative_to(root).as_posix(): path.read_text(encoding="utf-8") for path in paths}
        self.trees = {name: ast.parse(text) for name, text in self.texts.items()}

    def inside(self, folder: str) -> list[str]:
        """Files of a folder; sub-folders that are measured by themselves do not count."""
        others = [other + "/" for other in FOLDERS if other.startswith(folder + "/")]
        return [name for name in self.trees if name.startswith(folder + "/") and not name.startswith(tuple(others))]

    def imports(self, name: str) -> set[str]:
        """Files of the checkout that a file imports, inside functions too."""
        files: set[str | None] = set()
        for node in ast.walk(self.trees[name]):
            if isinstance(node, ast.ImportFrom) and node.module:
                files |= {self._file(f"{node.module}.{alias.name}") or self._file(node.module) for alias in node.names}
            elif isinstance(node, ast.Import):
                files |= {self._file(alias.name) for alias in node.names}
        return {file for file in files if file is not None} - {name}

    def _file(self, module: str) -> str | None:
        package, _, inner = module.partition(".")
        path = inner.replace(".", "/")
        candidates = [file for file in (f"{path}.py", f"{path}/__init__.py") if file in self.trees]
        return candidates[0] if package == "treetune" and candidates else None


def sizes(checkout: Checkout) -> dict[str, dict[str, float]]:
    """Lines, files and full-line comments in per cent of each folder."""
    table = {}
    for folder in FOLDERS:
        names = checkout.inside(folder)
        lines = sum(len(checkout.texts[name].splitlines()) for name in names)
        comments = sum(_comment_lines(checkout.texts[name]) for name in names)
        if names:
            table[folder] = {"files": len(names), "lines": lines, "comments_percent": round(100 * comments / max(1, lines), 2)}
    return table


def _comment_lines(text: str) -> int:
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT and not token.line[: token.start[1]].strip() for token in tokens)


def layers(checkout: Checkout) -> dict[str, int]:
    """Arrows between the files of cli/, and storeys: the longest way along them that comes to no file twice."""
    files = [name for name in checkout.trees if name.startswith("cli/")]
    graph = {name: {other for other in checkout.imports(name) if other.startswith("cli/")} for name in files}

    @cache
    def depth(name: str, seen: tuple[str, ...] = ()) -> int:
        return 1 + max((depth(other, (*seen, name)) for other in graph[name] if other not in seen), default=0)

    return {"files": len(graph), "arrows": sum(map(len, graph.values())), "storeys": max(map(depth, graph), default=0)}


def closure(checkout: Checkout, command: str) -> int:
    """Files that a training command may load: all that its own file imports, directly or not, inside functions too."""
    start = next(name for name in (f"cli/methods/{command}.py", f"cli/{command}.py") if name in checkout.trees)
    seen, rest = set(), [start, *(name for name in ("cli/fit.py",) if name in checkout.trees)]
    while rest:
        name = rest.pop()
        if name not in seen:
            seen.add(name)
            rest += checkout.imports(name)
    return len(seen)


def vague_names(checkout: Checkout) -> dict[str, int]:
    """How often participles and prepositions are names that the code binds, by name."""
    counts = Counter(name for _, tree in _code(checkout) for name in _bound(tree) if name in VAGUE)
    return {"total": counts.total(), **dict(counts.most_common())}


def _bound(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


def _code(checkout: Checkout) -> Iterator[tuple[str, ast.Module]]:
    return ((name, tree) for name, tree in checkout.trees.items() if name.split("/")[0] in CODE)


def _parameters(function: Function) -> list[ast.arg]:
    parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [parameter for parameter in parameters if parameter.arg not in ("self", "cls")]


def functions(checkout: Checkout) -> dict[str, object]:
    """Functions with many parameters, and public ones that lack an annotation."""
    long, bare, lengths = [], [], []
    for name, tree in _code(checkout):
        public = {id(node) for node in _public(tree)}
        for node in (node for node in ast.walk(tree) if isinstance(node, Function)):
            parameters = _parameters(node)
            lengths.append((node.end_lineno or node.lineno) - node.lineno + 1)
            if len(parameters) > MAX_PARAMETERS:
                long.append(f"{name}:{node.name}")
            if id(node) in public and (node.returns is None or any(parameter.annotation is None for parameter in parameters)):
                bare.append(f"{name}:{node.name}")
    median = sorted(lengths)[len(lengths) // 2] if lengths else 0
    return {"functions": len(lengths), "median_lines": median, "over_8_parameters": long, "public_without_annotation": bare}


def _public(tree: ast.Module) -> Iterator[Function]:
    owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_"))]
    for owner in owners:
        yield from (node for node in owner.body if isinstance(node, Function) and not node.name.startswith("_"))


def measure(root: Path) -> dict[str, object]:
    """All measurements of a checkout."""
    checkout = Checkout(root)
    return {
        "folders": sizes(checkout),
        "cli": layers(checkout),
        "modules_loaded": {command: closure(checkout, command) for command in ("sft", "grpo")},
        "vague_names": vague_names(checkout),
        **functions(checkout),
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1] if len(sys.argv) > 1 else ".")), indent=1))
