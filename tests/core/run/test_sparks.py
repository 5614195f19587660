"""Curves in a line: heights are values, places are steps, and curves in one frame can be compared."""

import math

from treetune.core.run import sparks


def test_heights_follow_the_values_from_lowest_to_highest():
    assert sparks.draw([(i, float(i)) for i in range(8)], 8) == sparks.BLOCKS
    assert sparks.draw([(i, float(i)) for i in range(8)], 8, plain=True) == sparks.PLAIN
    assert sparks.draw([(i, 7.0 - i) for i in range(8)], 8) == sparks.BLOCKS[::-1]


def test_a_long_curve_is_the_mean_of_stretches_and_a_short_one_is_not_stretched():
    assert sparks.draw([(i, float(i % 2)) for i in range(100)] + [(100, 9.0)] * 5, 5)[:4] == sparks.BLOCKS[0] * 4
    assert len(sparks.draw([(1, 2.0), (2, 1.0)], 40)) == 2


def test_constant_single_and_missing_values():
    assert sparks.draw([(1, 3.0), (2, 3.0)], 10) == sparks.BLOCKS[4] * 2
    assert sparks.draw([(5, 3.0)], 10) == sparks.BLOCKS[4]
    assert sparks.draw([], 10) == "" and sparks.frame([]) is None
    assert sparks.draw([(1, math.nan), (2, math.inf)], 10) == sparks.BROKEN


def test_what_is_not_finite_is_marked_and_does_not_scale():
    assert sparks.draw([(0, 0.0), (1, math.nan), (2, 1.0), (3, math.inf)], 4, inside=sparks.Frame(0, 3, 0, 1)) == "▁x█x"


def test_curves_in_one_frame_share_both_axes():
    long, short = [(i, 4.0) for i in range(100)], [(i, 0.0) for i in range(50)]
    inside = sparks.frame(long, short)
    assert inside == (0, 99, 0.0, 4.0)
    assert sparks.draw(long, 10, inside=inside) == "█" * 10
    assert sparks.draw(short, 10, inside=inside) == "▁▁▁▁▁     "
    rare = [(0, 0.0), (99, 4.0)]
    assert sparks.draw(rare, 5, inside=inside) == "▁▁▁▁█", "between two evaluations the earlier one holds"
