"""Numbers of documents are those of the documents."""

import re

from treetune.core.data import overview


def test_histogram_counts_every_length_once():
    lengths = [3, 3, 4, 9, 30, 31, 31, 47]
    lines = overview.histogram(lengths, bins=5)
    ranges = [re.match(r" *(\d+)-(\d+) +(\d+)", line).groups() for line in lines]
    for low, high, count in ranges:
        assert int(count) == sum(int(low) <= length <= int(high) for length in lengths)
    assert sum(int(count) for _, _, count in ranges) == len(lengths)
