"""report.html: curves, what was trained token by token, and sample answers, in one file without scripts."""

from collections.abc import Sequence

from treetune.cli import rundir
from treetune.core import records

CURVES = (
    ("loss (nats per supervised token)", ("train/loss", "eval/loss")),
    ("rewards: beta log(p / p_ref) of the two sides", ("rewards/chosen", "rewards/rejected")),
    ("reward margin", ("rewards/margins", "eval/rewards/margins")),
    ("share of pairs ranked right", ("rewards/accuracies", "eval/rewards/accuracies")),
    ("accuracy of the scores", ("accuracy", "eval/accuracy")),
    ("distance of features from those of the true text", ("ebft/cfm_loss", "eval/ebft/cfm_loss")),
    ("gradient norm before clipping", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
    ("supervised tokens per second", ("supervised_tokens_per_second",)),
)
COLOURS = ("#2563eb", "#dc2626")
WIDTH, HEIGHT, PAD = 460, 180, 34
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937 }
figure { display: inline-block; margin: 0 1rem 1rem 0 } figcaption { font-size: 13px }
text { font: 11px system-ui, sans-serif; fill: #6b7280 }
pre { white-space: pre-wrap; background: #f9fafb; padding: .8rem; border-radius: 6px; font-size: 13px }
.on { background: #bbf7d0 } .half { background: #fef08a } .off { color: #9ca3af }
"""
PAGE = """<!doctype html><meta charset="utf-8"><title>{{ name }}</title>
<style>{{ style }}</style>
<h1>{{ name }}</h1>
<h2>Curves</h2>
{% for curve in curves %}<figure><svg width="{{ width }}" height="{{ height }}" role="img">
<text x="2" y="12">{{ curve.high }}</text><text x="2" y="{{ height - 18 }}">{{ curve.low }}</text>
<text x="{{ pad }}" y="{{ height - 4 }}">step {{ curve.first }}</text>
<text x="{{ width - 2 }}" y="{{ height - 4 }}" text-anchor="end">{{ curve.last }}</text>
{% for line in curve.lines %}<polyline fill="none" stroke="{{ line.colour }}" stroke-width="1.6" points="{{ line.points }}"/>
{% for x, y in line.dots %}<circle cx="{{ x }}" cy="{{ y }}" r="2.6" fill="{{ line.colour }}"/>{% endfor %}{% endfor %}
</svg><figcaption>{{ curve.title }}{% for line in curve.lines %} · <span style="color:{{ line.colour }}">{{ line.name }}</span>{% endfor %}
</figcaption></figure>
{% endfor %}
<h2>What is trained</h2>
<p>The first documents as the model reads them: <span class="on">supervised</span>, <span class="half">at another weight</span>,
<span class="off">read only</span>.</p>
{% for row, tokens in documents %}<p>row {{ row }}</p>
<pre>{% for text, kind in tokens %}<span class="{{ kind }}">{{ text }}</span>{% endfor %}</pre>
{% endfor %}
{% if samples %}<h2>Sample answers</h2>
{% for sample in samples %}<p>step {{ sample.step }}: {{ sample.prompt }}</p><pre>{{ sample.answer }}</pre>
{% endfor %}{% endif %}"""


def _curve(title: str, keys: Sequence[str], history: list[dict]) -> dict | None:
    """One chart as SVG points; all its lines share both scales."""
    series = {key: [(record["step"], record[key]) for record in history if record.get(key) is not None] for key in keys}
    points = [point for line in series.values() for point in line if point[1] == point[1]]
    if not points:
        return None
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, high = min(value for _, value in points), max(value for _, value in points)

    def at(step: float, value: float) -> tuple[float, float]:
        x = PAD + (WIDTH - PAD - 8) * (step - first) / max(last - first, 1)
        y = 16 + (HEIGHT - 16 - PAD) * (high - value) / ((high - low) or 1.0)
        return round(x, 1), round(y, 1)

    lines = []
    for colour, (key, line) in zip(COLOURS, series.items(), strict=False):
        placed = [at(*point) for point in line if point[1] == point[1]]
        if placed:
            dots = placed if len(placed) < 12 else []
            lines.append({"name": key, "colour": colour, "dots": dots, "points": " ".join(f"{x},{y}" for x, y in placed)})
    return {"title": title, "lines": lines, "low": f"{low:.3g}", "high": f"{high:.3g}", "first": first, "last": last}


def document(doc, tokenizer) -> tuple[int, list[tuple[str, str]]]:
    """The tokens of a document as (text, class)."""
    kinds = ["off" if weight == 0 else "on" if weight == 1 else "half" for weight in doc.weight.tolist()]
    return doc.row, [(tokenizer.decode([token]), kind) for token, kind in zip(doc.tokens.tolist(), kinds, strict=True)]


def write(run: rundir.RunDir, *, docs: list, tokenizer, history: list[dict]) -> None:
    """Write report.html into a run folder."""
    import jinja2

    samples = records.read(run.samples).records
    curves = [curve for title, keys in CURVES if (curve := _curve(title, keys, history))]
    page = jinja2.Environment(autoescape=True).from_string(PAGE)
    shown = {"documents": [document(doc, tokenizer) for doc in docs], "samples": samples, "curves": curves}
    rundir.write(run.root / "report.html", page.render(name=run.root.name, style=STYLE, width=WIDTH, height=HEIGHT, pad=PAD, **shown))
