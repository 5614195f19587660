"""Parameter trees: nested dicts and lists whose leaves are anything else (tensors, `Param`s, named tuples).

A path joins keys and list indices with dots: `layers.0.q_proj.A`. Only dicts and lists are nodes.
"""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Tree = Any


# A recursion of our own: torch.utils._pytree is private, and five times slower on trees of this kind.
def map(fn: Callable, tree: Tree, *rest: Tree) -> Tree:
    """Apply `fn` to every leaf; `rest` are trees with the same nodes, whose leaves become further arguments."""
    if isinstance(tree, dict):
        return {key: map(fn, child, *(other[key] for other in rest)) for key, child in tree.items()}
    if isinstance(tree, list):
        return [map(fn, child, *(other[i] for other in rest)) for i, child in enumerate(tree)]
    return fn(tree, *rest)


def items(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted path, leaf) in tree order."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else None
    if children is None:
        yield prefix, tree
        return
    for key, child in children:
        yield from items(child, f"{prefix}.{key}" if prefix else str(key))


def leaves(tree: Tree) -> list:
    """All leaves in tree order."""
    return [leaf for _, leaf in items(tree)]


def from_items(pairs: Iterable[tuple[str, Any]]) -> Tree:
    """Inverse of `items`: numeric path parts become list indices; indices that are absent become empty dicts."""
    root: dict = {}
    for path, leaf in pairs:
        *parents, last = path.split(".")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return _lists(root)


def _lists(node: Tree) -> Tree:
    if not isinstance(node, dict):
        return node
    children = {key: _lists(child) for key, child in node.items()}
    if children and all(key.isdigit() for key in children):
        return [children.get(str(i), {}) for i in range(max(int(key) for key in children) + 1)]
    return children


def select(tree: Tree, regex: str) -> Tree:
    """The sub-tree of the leaves whose path matches `regex` (re.search); list positions are kept."""
    return from_items((path, leaf) for path, leaf in items(tree) if re.search(regex, path))


def merge(under: Tree, over: Tree) -> Tree:
    """A tree with the leaves of both; where both have a leaf, `over` wins. Neither input is changed."""
    if isinstance(under, dict) and isinstance(over, dict):
        both = {key: merge(child, over[key]) if key in over else child for key, child in under.items()}
        return both | {key: child for key, child in over.items() if key not in under}
    if isinstance(over, dict | list) and not over:
        return under
    if isinstance(under, list) and isinstance(over, list):
        size = max(len(under), len(over))
        return [merge(_at(under, i), _at(over, i)) for i in range(size)]
    return over


def _at(nodes: list, index: int) -> Tree:
    return nodes[index] if index < len(nodes) else {}


def bytes(tree: Tree) -> int:
    """Bytes held by all leaves, tensors or quantised."""
    return sum(leaf.nbytes for leaf in leaves(tree))


def nearest(word: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """The entries of `candidates` that look most like `word`, best first (for error messages)."""
    candidates = list(candidates)
    return difflib.get_close_matches(word, candidates, n=count, cutoff=0.0) or sorted(candidates)[:count]


def assign(tree: Tree, rules: Iterable[tuple[str, Any]], default: Any) -> Tree:
    """Per-leaf values from (regex, value) rules over paths: first match wins, `default` where none does.

    Raises ValueError for a rule that matches no path of the tree, naming the nearest paths.
    """
    rules = list(rules)
    paths = [path for path, _ in items(tree)]
    for regex, _ in rules:
        require_match(regex, paths)
    values = [next((value for regex, value in rules if re.search(regex, path)), default) for path in paths]
    flat = iter(values)
    return map(lambda _: next(flat), tree)


def require_match(regex: str, paths: list[str]) -> None:
    """Raise ValueError naming the nearest paths when `regex` matches none of `paths` or is not a regex."""
    try:
        matches = any(re.search(regex, path) for path in paths)
    except re.error as error:
        raise ValueError(f"{regex!r} is not a regular expression: {error}") from error
    if not matches:
        raise ValueError(f"{regex!r} matches no parameter; the nearest paths are {', '.join(nearest(regex, paths))}")
