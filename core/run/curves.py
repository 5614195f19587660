"""Charts of a run's records: which ones a method has, and their lines as places on a sheet."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from treetune.core.run import answer_metrics, health

History = Sequence[dict]
Points = list[tuple[float, float]]
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 460, 210, 52, 12, 12, 26
MARKED = 24  # up to so many points of a line are drawn as dots, too
EXACT = ("learning rate", "memory")  # beginnings of titles of what has no noise
SMOOTHED = 60  # from so many points on a line is drawn thin, with its moving mean over it
COLOURS = "abcdef"
DRAWN = 600  # points of a line at most: of more, the lowest and highest of each stretch
ANSWER_REWARDS = "eval/reward_"

# title, keys of the records; charts without a value are left out
CHARTS = (
    ("reward: mean over completions", ("reward", "eval/reward")),
    ("reward_std: deviation over all completions of a step", ("reward_std", "eval/reward_std")),
    ("rewards: each function's mean", ("rewards/*/mean",)),
    ("mean reward of features: weighted alignment less diversity", ("ebft/mean_reward", "eval/ebft/mean_reward")),
    ("alignment with the true text; higher is nearer", ("ebft/alignment", "eval/ebft/alignment")),
    ("diversity: how alike siblings are; lower is more varied", ("ebft/diversity", "eval/ebft/diversity")),
    ("cfm_loss: distance of mean features from the true text's", ("ebft/cfm_loss", "eval/ebft/cfm_loss")),
    ("ce_loss: cross-entropy of the true tokens (nats)", ("ebft/ce_loss", "eval/ebft/ce_loss")),
    ("completion length (tokens)", ("completions/mean_length", "completions/min_length", "completions/max_length")),
    ("share of completions cut off at the longest length", ("completions/clipped_ratio",)),
    ("share of prompts whose completions all have one reward", ("frac_reward_zero_std",)),
    ("entropy (nats per token)", ("entropy",)),
    ("rewards of the two sides, as the policy implies them", ("rewards/chosen", "rewards/rejected")),
    ("margin: reward of chosen less rejected", ("rewards/margins", "eval/rewards/margins")),
    ("share ranked right", ("rewards/accuracies", "eval/rewards/accuracies")),
    ("accuracy of the scores", ("accuracy", "eval/accuracy")),
    ("accuracy on good and on bad steps", ("accuracy/good", "accuracy/bad")),
    ("margin: score of chosen less rejected", ("margin", "eval/margin")),
    ("scores: lowest, mean and highest", ("mean_reward", "min_reward", "max_reward")),
    ("log-probs of the two sides (nats)", ("logps/chosen", "logps/rejected")),
    ("log-odds of chosen against rejected", ("log_odds_chosen", "eval/log_odds_chosen")),
    ("chosen side's likelihood (nats per token)", ("nll_loss", "eval/nll_loss")),
    ("kl: distance from the reference, as the method measures it", ("kl", "eval/kl")),
    ("share of tokens outside the clip range", ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean")),
    ("token accuracy", ("mean_token_accuracy", "eval/mean_token_accuracy")),
    ("answers beside good ones: BLEU and chrF of 100, TER, the lower the better", ("eval/sacrebleu", "eval/chrf", "eval/ter")),
    ("rewards of answers to held-out prompts, means", (f"{ANSWER_REWARDS}*",)),
    ("share of answers that are the good one", ("eval/exact_match",)),
    ("gradient norm before clipping", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
    ("supervised tokens per second", ("supervised_tokens_per_second",)),
    ("memory, peak so far (GiB)", ("memory_gib",)),
)


class Line(NamedTuple):
    """A line: the name of its metric, which colour, its last value, and paths: all of it, its moving mean; dots (x, y, text)."""

    name: str
    colour: str
    last: str
    path: str
    mean: str
    dots: list[tuple[float, float, str]]


class Chart(NamedTuple):
    """Lines on one sheet with the grid behind them: (place, text) of each horizontal line, and of each step below."""

    title: str
    lines: list[Line]
    rows: list[tuple[float, str]]
    columns: list[tuple[float, str, str]]
    window: int  # of the moving mean; 0: there is none


def charts(history: History, *, loss: str) -> list[Chart]:
    """The charts that a run's records fill. loss: what the loss is a mean over; of sampled texts it says nothing and has no chart."""
    losses = () if any(health.sampled(record) for record in history) else ((f"loss ({loss})", ("train/loss", "eval/loss")),)
    drawn = [_chart(title, _expand(keys, history), history) for title, keys in (*losses, *CHARTS)]
    return [chart for chart in drawn if chart is not None]


def metrics(history: History) -> list[str]:
    """The metrics of a run's records that a chart shows, in the order of the charts."""
    losses = () if any(health.sampled(record) for record in history) else ("train/loss", "eval/loss")
    names = (*losses, *(key for _, keys in CHARTS for key in _expand(keys, history)))
    return [name for name in names if any(math.isfinite(record.get(name, math.nan)) for record in history)]


def compared(runs: Mapping[str, History]) -> list[Chart]:
    """A chart for each metric that a run has, with a line for each run that has it, in the run's colour."""
    titles = {key: title + ", held out" * key.startswith("eval/") for title, keys in CHARTS for key in keys[:2] if _alone(key, keys)}
    shown = {name: metrics(history) for name, history in runs.items()}
    metric_names = dict.fromkeys(metric for several in shown.values() for metric in several)
    out = []
    for metric in metric_names:
        having = {name: history if metric in shown[name] else [] for name, history in runs.items()}
        out.append(_beside(metric, titles.get(metric, metric), having))
    return [chart for chart in out if chart is not None]


def _alone(key: str, keys: Sequence[str]) -> bool:
    """Whether the title of a chart is that of one of its metrics alone: the first one, or the same of held-out rows."""
    return key in (keys[0], f"eval/{keys[0]}")


def colour(index: int) -> str:
    """The class of a line; behind the colours, the same ones dashed."""
    return COLOURS[index % len(COLOURS)] + " dashed" * (index >= len(COLOURS))


def _beside(metric: str, title: str, runs: Mapping[str, History]) -> Chart | None:
    colours = {name: colour(i) for i, name in enumerate(runs)}
    series = {name: _points(metric, history) for name, history in runs.items()}
    return _sheet(title, series, colours)


def _expand(keys: Sequence[str], history: History) -> list[str]:
    """The keys, or those that a pattern matches; of rewards if there are several: a line alone would repeat the chart of the sum."""
    if "*" not in keys[0]:
        return list(keys)
    before, after = keys[0].split("*")
    pattern = re.compile(rf"{re.escape(before)}.+{re.escape(after)}")
    matches = list(dict.fromkeys(key for record in history for key in record if pattern.fullmatch(key)))
    if before == ANSWER_REWARDS:
        return [key for key in matches if answer_metrics.is_reward(key)]
    return matches if len(matches) > 1 else []


def _chart(title: str, keys: Sequence[str], history: History) -> Chart | None:
    return _sheet(title, {key: _points(key, history) for key in keys}, {key: colour(i) for i, key in enumerate(keys)})


def _points(metric: str, history: History) -> Points:
    return [(record["step"], record[metric]) for record in history if record.get(metric) is not None]


def _sheet(title: str, series: Mapping[str, Points], colours: Mapping[str, str]) -> Chart | None:
    """The lines of several series, by name, on one sheet; those without a finite value are left out."""
    series = {name: points for name, points in series.items() if any(math.isfinite(value) for _, value in points)}
    if not series:
        return None
    finite = [point for points in series.values() for point in points if math.isfinite(point[1])]
    bounds = [0.0, 1.0] if title.startswith("share") else []  # a share is seen against the whole
    ticks = _ticks(min([value for _, value in finite] + bounds), max([value for _, value in finite] + bounds))
    first, last = min(step for step, _ in finite), max(step for step, _ in finite)
    sheet = _Places(first, last, ticks[0], ticks[-1])
    lengths = [len(points) for points in series.values() if len(points) >= SMOOTHED and not title.startswith(EXACT)]
    window = max(lengths, default=0) // 25
    lines = [_line(name, colours[name], points, sheet, window) for name, points in series.items()]
    return Chart(title, lines, [(sheet.y(tick), _short(tick)) for tick in ticks], _columns(sheet), window)


def _short(value: float) -> str:
    """A number in few characters."""
    plain = f"{value:.6g}"
    return plain if len(plain) <= 6 else re.sub(r"e([+-])0*", r"e\1", f"{value:.3e}").replace("e+", "e").replace(".000e", "e")


class _Places(NamedTuple):
    first: float
    last: float
    low: float
    high: float

    def x(self, step: float) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * ((step - self.first) / (self.last - self.first) if self.last > self.first else 0.5), 1)

    def y(self, value: float) -> float:
        return round(TOP + (HEIGHT - TOP - BOTTOM) * (self.high - value) / (self.high - self.low), 1)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (0.0, 2 * high or 1.0) if high >= 0 else (2 * low, 0.0)
    raw = (high - low) / 3
    power = 10.0 ** math.floor(math.log10(raw))
    size = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first, last = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [i * size for i in range(first, last + 1)]


def _columns(sheet: _Places) -> list[tuple[float, str, str]]:
    """The first, the middle and the last step: (place, text, which of its ends stands there)."""
    if sheet.first == sheet.last:
        return [(sheet.x(sheet.first), f"step {sheet.first:g}", "middle")]
    middle = (sheet.first + sheet.last) // 2
    centre = [(sheet.x(middle), f"{middle:g}", "middle")] if sheet.last - sheet.first > 3 else []
    return [(sheet.x(sheet.first), f"step {sheet.first:g}", "start"), *centre, (sheet.x(sheet.last), f"{sheet.last:g}", "end")]


def _line(name: str, colour: str, points: Points, sheet: _Places, window: int) -> Line:
    finite = [point for point in points if math.isfinite(point[1])]
    smooth = window if len(points) >= SMOOTHED else 0
    mean = _path(list(_means(points, smooth)), sheet) if smooth else ""
    dots = [(sheet.x(step), sheet.y(value), f"step {step:g}: {value:.6g}") for step, value in finite] if len(finite) <= MARKED else []
    return Line(name, colour, f"{finite[-1][1]:.4g}", _path(points, sheet), mean, dots)


def _means(points: Points, window: int) -> Iterator[tuple[float, float]]:
    """Mean of the last `window` points at each of them, or at about DRAWN of them."""
    apart = max(1, len(points) // DRAWN)  # of a long line, a mean at each point would take minutes
    for i in range((len(points) - 1) % apart, len(points), apart):
        values = [value for _, value in points[max(0, i - window + 1) : i + 1] if math.isfinite(value)]
        yield points[i][0], sum(values) / len(values) if values else math.nan


def _path(points: Points, sheet: _Places) -> str:
    """An SVG path, broken where values are not finite."""
    commands, pen = [], "M"
    for step, value in _thin(points):
        if math.isfinite(value):
            commands.append(f"{pen}{sheet.x(step)},{sheet.y(value)}")
        pen = "L" if math.isfinite(value) else "M"
    return "".join(commands)


def _thin(points: Points) -> Points:
    """Long lines as the lowest and highest of each stretch, so that no spike is lost."""
    if len(points) <= DRAWN:
        return points
    size, extremes = 2 * len(points) / DRAWN, []
    for i in range(DRAWN // 2):
        stretch = [point for point in points[int(i * size) : int((i + 1) * size)] if math.isfinite(point[1])]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])} if stretch else set()
        extremes += sorted(ends)
    return extremes
