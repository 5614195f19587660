"""What rewards get of a data file's columns is what the file holds."""

import datetime
import json
import uuid
from decimal import Decimal

import pytest

from treetune.core.rollout import wire

VALUES = [
    Decimal("0.1"), Decimal("9" * 38), datetime.datetime(2020, 1, 1, 5, tzinfo=datetime.UTC), datetime.date(1, 1, 1), datetime.time(3, 4),
    datetime.timedelta(days=-9, microseconds=5), b"\xff\x00", uuid.UUID(int=7), 10**400, {"a": [None, Decimal("1")]}, "x", {}, [], None,
    {wire.KIND: "decimal"}, {wire.KIND: "other", "text": "1"},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back(value):
    found = wire.loads(wire.dumps(value))
    assert found == value and type(found) is type(value)


def test_plain_messages_are_json_and_others_are_refused():
    message = {"rows": {"a": [1, 2.5, None, "é", [True]]}}
    assert json.loads(wire.dumps(message)) == message
    with pytest.raises(TypeError, match="Object of type object is not JSON"):
        wire.dumps({"a": object()})
