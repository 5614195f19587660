"""Fingerprints: every field counts, the way that a value is held does not."""

import numpy as np
import pytest

from treetune.core.data import cache, columns, fingerprint, prompts, spans, trees

TOKENS, WEIGHT = np.arange(5, dtype=np.int32), np.array([0, 0, 1, 1, 1], np.float32)
BRANCH = np.array([0, 0, 1, 1, 2], np.int32)
DOC = spans.Doc(TOKENS, WEIGHT, 3)
TREE = trees.TreeDoc(TOKENS, BRANCH, BRANCH * 2, WEIGHT, 3, {"desirable": (True, False), "margin": (0.5, 1.0)})
PROMPT = prompts.Prompt(TOKENS, "a b", [{"role": "user", "content": "a b"}], {"answer": "4", "tests": [1, {"x": None}]}, 3)
OTHERS = {
    "tokens": DOC._replace(tokens=TOKENS[::-1].copy()),
    "supervision": DOC._replace(weight=WEIGHT[::-1].copy()),
    "row": DOC._replace(row=4),
    "branches": TREE._replace(branch=BRANCH[::-1].copy()),
    "positions": TREE._replace(start=BRANCH * 3),
    "labels": TREE._replace(extras={"desirable": (False, True), "margin": (0.5, 1.0)}),
    "margins": TREE._replace(extras={"desirable": (True, False), "margin": (0.5, 1.5)}),
    "classes": TREE._replace(classes=BRANCH - 1),
    "columns of a reward": PROMPT._replace(columns={"answer": "5", "tests": [1, {"x": None}]}),
    "inside a column": PROMPT._replace(columns={"answer": "4", "tests": [1, {"x": False}]}),
    "type of a column": PROMPT._replace(columns={"answer": 4, "tests": [1, {"x": None}]}),
    "messages": PROMPT._replace(messages=None),
}


@pytest.mark.parametrize("what", OTHERS)
def test_every_field_counts(what):
    plain = {type(one): one for one in (DOC, TREE, PROMPT)}[type(OTHERS[what])]
    several = [plain] * 3
    assert fingerprint.documents(several) == fingerprint.documents([plain._replace(row=plain.row) for _ in range(3)])
    assert fingerprint.documents(several) != fingerprint.documents([plain, OTHERS[what], plain])


def test_borders_and_order_count():
    one, other = DOC._replace(tokens=TOKENS[:2], weight=WEIGHT[:2]), DOC._replace(tokens=TOKENS[2:], weight=WEIGHT[2:])
    assert len({fingerprint.documents(docs) for docs in ([one, other], [other, one], [one], [DOC], [])}) == 5
    assert fingerprint.values([1, 2], [3]) != fingerprint.values([1], [2, 3]) and fingerprint.values("1") != fingerprint.values(1)


def test_documents_of_the_cache_have_the_fingerprint_of_those_that_were_kept(tmp_path):
    docs = [TREE._replace(row=i) for i in range(fingerprint.CHUNK + 3)]
    cache.save_entry(tmp_path, "k", docs)
    assert fingerprint.documents(cache.load_entry(tmp_path, "k")[0]) == fingerprint.documents(docs)
    assert fingerprint.values({"a": (1, 2), "b": None}) == fingerprint.values({"b": None, "a": [1, 2]})
    assert columns.report_from_json(columns.report_to_json([None, "d"])) == [None, "d"]


def test_foreign_objects_are_not_told_apart_by_their_place_in_memory():
    assert fingerprint.values([object()]) == fingerprint.values([object()])
