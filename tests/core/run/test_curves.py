"""Charts of records: what they show is what was recorded."""

import math
import re

import pytest

from treetune.core.run import curves, page


def titles(history, loss="nats per supervised token"):
    return [chart.title for chart in curves.charts(history, loss=loss)]


def chart(history, title):
    return next(one for one in curves.charts(history, loss="mean over pairs") if one.title.startswith(title))


def places(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+),([-\d.]+)", path)]


def test_sampled_texts_have_rewards_and_no_loss():
    record = {"train/loss": 1e-8, "reward": 0.5, "reward_std": 0.2, "completions/mean_length": 20.0, "entropy": 1.0, "kl": 0.01}
    record |= {"rewards/a/mean": 0.3, "rewards/b/mean": 0.2, "clip_ratio/region_mean": 0.0}
    found = titles([record | {"step": step} for step in (1, 2)])
    assert not any(title.startswith("loss") for title in found)
    for word in ("reward: ", "reward_std", "each function", "completion length", "entropy", "kl", "clip range"):
        assert any(word in title for title in found), word


def test_pairs_name_their_own_mean():
    history = [
        {"step": 1, "train/loss": 0.7, "rewards/chosen": 0.1, "rewards/rejected": -0.1, "rewards/margins": 0.2, "rewards/accuracies": 1}
    ]
    assert chart(history, "loss").title == "loss (mean over pairs)"
    assert {"margin: reward of chosen less rejected", "share ranked right"} <= set(titles(history))


def test_one_reward_function_has_no_chart_beside_the_sum():
    assert not any("each function" in title for title in titles([{"step": 1, "reward": 1.0, "rewards/a/mean": 1.0, "rewards/mean": 1.0}]))


@pytest.mark.parametrize(
    "values", [[1.0, 2.0, 4.0], [-3.0, -1.0, -2.0], [5.0, 5.0, 5.0], [0.0, 0.0, 0.0], [1e-8, 3e-8, 2e-8], [-2.0, -2.0, -2.0]]
)
def test_points_stand_between_the_grid_lines_that_name_their_values(values):
    one = chart([{"step": i + 1, "grad_norm": value} for i, value in enumerate(values)], "gradient norm")
    (y0, text0), (y1, text1) = one.rows[0], one.rows[-1]
    low, high = float(text0), float(text1)
    for (_, y), value in zip(places(one.lines[0].path), values, strict=True):
        assert math.isclose(low + (high - low) * (y - y0) / (y1 - y0), value, rel_tol=0.02, abs_tol=(high - low) / 100)
        assert curves.TOP - 0.1 <= y <= curves.HEIGHT - curves.BOTTOM + 0.1


def test_unknown_values_break_the_line_and_infinite_ones_do_not_scale_it():
    one = chart([{"step": i, "grad_norm": value} for i, value in enumerate([1.0, math.nan, 3.0, math.inf, 2.0])], "gradient norm")
    assert one.lines[0].path.count("M") == 3 and len(places(one.lines[0].path)) == 3
    assert one.lines[0].last == "2"


def test_a_share_is_seen_as_one():
    one = chart([{"step": 1, "rewards/accuracies": 0.5}, {"step": 2, "rewards/accuracies": 0.6}], "share ranked")
    assert [text for _, text in one.rows] == ["0", "0.5", "1"]


def test_long_runs_have_a_moving_mean_and_keep_their_spikes():
    values = [float(i % 7) for i in range(5000)]
    values[3333] = 100.0
    one = chart([{"step": i, "grad_norm": value} for i, value in enumerate(values)], "gradient norm")
    line = one.lines[0]
    assert one.window == 200 and line.mean and not line.dots
    assert len(places(line.path)) <= curves.DRAWN
    assert min(y for _, y in places(line.path)) == curves.TOP, "the spike reaches the top"
    assert min(y for _, y in places(line.mean)) > curves.TOP + 100


def test_a_single_step_is_a_point():
    one = chart([{"step": 7, "learning_rate": 2e-5}], "learning rate")
    assert len(one.lines[0].dots) == 1 and one.columns == [(pytest.approx(one.lines[0].dots[0][0]), "step 7", "middle")]


def test_runs_beside_each_other_have_the_curves_that_each_shows_alone():
    """The loss of sampled texts says nothing; beyond the colours, lines are dashed and their squares hollow."""
    text = [{"step": 1, "train/loss": 1.0}, {"step": 1, "eval/mean_token_accuracy": 0.5}]
    drawn = {
        one.title: [line.name for line in one.lines]
        for one in curves.compared({"a": text, "b": [{"step": 1, "train/loss": 0.0, "reward": 1.0}]})
    }
    assert drawn == {"train/loss": ["a"], "token accuracy, held out": ["a"], "reward: mean over completions": ["b"]}
    many = curves.compared({str(i): text[:1] for i in range(7)})
    html = page.part("{% for one in charts %}{{ chart(one) }}{% endfor %}", charts=many)
    assert html.count("\u25a0") + html.count("&#9632;") == 6 and html.count("\u25a1") + html.count("&#9633;") == 1
