import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from treetune.core import tree

STEADY = settings(deadline=None, derandomize=True)  # the same examples on every machine, however busy
KEYS = st.text("abc_", min_size=1, max_size=3)
# Lists hold whole nodes, as the layers of a model do; an empty node has no path and so cannot come back.
TREES = st.recursive(st.integers(), lambda t: st.dictionaries(KEYS, t, min_size=1, max_size=3) | st.lists(t, min_size=1, max_size=3))
NODES = st.dictionaries(KEYS, TREES, min_size=1, max_size=3)
MODEL = {"embed": 1, "layers": [{"q_proj": 2, "k_proj": 3}, {"q_proj": 4, "k_proj": 5}], "norm": 6}


@STEADY
@given(NODES)
def test_items_and_from_items_are_inverse(value):
    assert tree.from_items(tree.items(value)) == value
    assert [path for path, _ in tree.items(value)] == [path for path, _ in tree.items(tree.from_items(tree.items(value)))]


def test_paths_join_keys_and_indices_with_dots():
    assert [path for path, _ in tree.items(MODEL)][:3] == ["embed", "layers.0.q_proj", "layers.0.k_proj"]
    assert tree.leaves(MODEL) == [1, 2, 3, 4, 5, 6]


@STEADY
@given(NODES)
def test_map_keeps_nodes_and_pairs_leaves(value):
    doubled = tree.map(lambda x: 2 * x, value)
    assert tree.leaves(tree.map(lambda a, b, c: a + b - c, value, doubled, value)) == tree.leaves(doubled)
    assert [path for path, _ in tree.items(doubled)] == [path for path, _ in tree.items(value)]


def test_map_reads_named_tuples_as_leaves():
    from treetune.core.param import Param

    assert tree.map(lambda param: param.shape, {"a": [Param((2, 3))]}) == {"a": [(2, 3)]}


def test_absent_indices_become_empty_nodes():
    assert tree.from_items([("layers.2.a", 1), ("x", 2)]) == {"layers": [{}, {}, {"a": 1}], "x": 2}


def test_select_keeps_list_positions():
    assert tree.select(MODEL, r"^layers\.1\.q") == {"layers": [{}, {"q_proj": 4}]}
    assert tree.select(MODEL, "nothing") == {}


@STEADY
@given(NODES, NODES)
def test_merge_has_the_leaves_of_both_and_over_wins(under, over):
    assume(not _mixed(under, over))  # where a list meets a dict, `over` replaces the node
    merged = dict(tree.items(tree.merge(under, over)))
    assert dict(tree.items(over)).items() <= merged.items()
    clash = {path for path, _ in tree.items(over)}
    kept = {p: v for p, v in tree.items(under) if not any(p == c or p.startswith(c + ".") or c.startswith(p + ".") for c in clash)}
    assert kept.items() <= merged.items()


def _mixed(one, other) -> bool:
    """Whether a list meets a dict somewhere."""
    if isinstance(one, dict) and isinstance(other, dict):
        return any(_mixed(one[key], other[key]) for key in one.keys() & other.keys())
    if isinstance(one, list) and isinstance(other, list):
        return any(_mixed(a, b) for a, b in zip(one, other, strict=False))
    return isinstance(one, dict | list) and isinstance(other, dict | list)


def test_merge_of_a_part_changes_that_part_only():
    part = {"layers": [{}, {"k_proj": 50}], "lm_head": 7}
    merged = tree.merge(MODEL, part)
    assert merged == {"embed": 1, "layers": [{"q_proj": 2, "k_proj": 3}, {"q_proj": 4, "k_proj": 50}], "norm": 6, "lm_head": 7}
    assert MODEL["layers"][1]["k_proj"] == 5 and part == {"layers": [{}, {"k_proj": 50}], "lm_head": 7}


@pytest.mark.parametrize("over", [[9], [{}, 9], [9, {}], [], {}])
def test_merge_loses_no_leaf_of_a_list(over):
    merged = tree.merge({"taps": [1, 2]}, {"taps": over})["taps"]
    seen = over if isinstance(over, list) else []
    assert merged == [seen[i] if i < len(seen) and seen[i] != {} else (1, 2)[i] for i in range(2)]


def test_assign_takes_the_first_rule_that_matches():
    values = tree.assign(MODEL, [(r"layers\.0", "a"), ("q_proj", "b")], "c")
    assert tree.leaves(values) == ["c", "a", "a", "b", "c", "c"]


def test_assign_refuses_a_rule_that_matches_nothing_and_names_the_nearest_paths():
    with pytest.raises(ValueError, match=r"'layers\.0\.q_porj' matches no parameter; the nearest paths are layers\.0\.q_proj"):
        tree.assign(MODEL, [("layers.0.q_porj", 1)], 0)
    with pytest.raises(ValueError, match="not a regular expression"):
        tree.assign(MODEL, [("q_proj(", 1)], 0)


def test_nearest_and_bytes():
    assert tree.nearest("norn", ["embed", "norm", "layers.0.q_proj"])[0] == "norm"
    assert tree.nearest("x", []) == []
    assert tree.bytes({"a": torch.zeros(3, 2), "b": [torch.zeros(5, dtype=torch.bfloat16)]}) == 34
