"""Messages between the trainer and its workers (rewards, trackers): JSON, with values that JSON lacks in objects of their own.

A message is its length (8 bytes) and its text. A reward gets a date, a decimal or bytes of a parquet file as what they are. The standard
library only: workers import this.
"""

import base64
import datetime
import json
import os
import socket
import struct
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

KIND = "__value of type__"
WRITE: dict[str, tuple[type, Callable[[Any], str]]] = {  # the first that fits: a datetime is a date too
    "decimal": (Decimal, str),
    "datetime": (datetime.datetime, lambda value: value.isoformat()),
    "date": (datetime.date, lambda value: value.isoformat()),
    "time": (datetime.time, lambda value: value.isoformat()),
    "timedelta": (datetime.timedelta, lambda value: str(value // datetime.timedelta(microseconds=1))),
    "bytes": (bytes, lambda value: base64.b64encode(value).decode()),
    "uuid": (uuid.UUID, str),
}
READ: dict[str, Callable[[str], Any]] = {
    "decimal": Decimal,
    "datetime": datetime.datetime.fromisoformat,
    "date": datetime.date.fromisoformat,
    "time": datetime.time.fromisoformat,
    "timedelta": lambda text: datetime.timedelta(microseconds=int(text)),
    "bytes": base64.b64decode,
    "uuid": uuid.UUID,
}


def dumps(message: Any) -> str:
    """The message as text. Errors: TypeError or ValueError for what can be written neither as JSON nor as one of WRITE."""
    return json.dumps(message, default=_written)


def loads(data: bytes | str) -> Any:
    """The message again."""
    return json.loads(data, object_hook=_read)


def _written(value: Any) -> dict:
    for kind, (cls, write) in WRITE.items():
        if isinstance(value, cls):
            return {KIND: kind, "text": write(value)}
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _read(value: dict) -> Any:
    return READ[value[KIND]](value["text"]) if value.get(KIND) in READ and value.keys() == {KIND, "text"} else value


def send(channel: socket.socket, message: dict) -> None:
    """Writes one message. Errors: TypeError or ValueError for what is not JSON, OSError for a channel that is gone."""
    data = dumps(message).encode()
    channel.sendall(struct.pack("<Q", len(data)) + data)


def receive(channel: socket.socket) -> dict | None:
    """Reads one message; None when the other side is gone."""
    head = _bytes(channel, 8)
    data = head and _bytes(channel, struct.unpack("<Q", head)[0])
    return loads(data) if data else None


def standard_input() -> socket.socket:
    """Standard input as a socket that nothing else has; functions and what they start then read from nowhere."""
    # A copy made by os.dup is not inherited, so that no program that a function starts can answer in its place.
    channel = socket.socket(fileno=os.dup(0))
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    return channel


def _bytes(channel: socket.socket, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        part = channel.recv(min(count - len(data), 1 << 20))
        if not part:
            return None
        data += part
    return bytes(data)
