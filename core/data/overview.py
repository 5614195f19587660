"""What documents hold, in numbers and lines: lengths, supervised tokens, and what packing and shared prompts save."""

from collections.abc import Sequence

from treetune.core.data import dataset, formats, kinds, loader, trees
from treetune.core.data.dataset import Docs
from treetune.core.data.formats import TextReport
from treetune.core.data.spans import Doc
from treetune.core.data.trees import TreeDoc

BINS, BAR = 12, 40  # lines of a histogram, and characters of its longest bar


def histogram(lengths: Sequence[int], *, bins: int = BINS) -> list[str]:
    """One line per range of lengths (tokens): the range, how many documents, and a bar."""
    low, high = min(lengths), max(lengths)
    width = max(1, -(-(high - low + 1) // bins))
    counts = [0] * (-(-(high - low + 1) // width))
    for length in lengths:
        counts[(length - low) // width] += 1
    edges = [low + i * width for i in range(len(counts))]
    lines = zip(edges, counts, strict=True)
    return [f"{edge:>6}-{edge + width - 1:<6} {count:>7} {'#' * round(BAR * count / max(counts))}" for edge, count in lines]


def packing_efficiency(lengths: Sequence[int], budget: int, *, seed: int) -> float:
    """Share of the token budget that the packed documents of an epoch fill."""
    plan = loader.epoch_plan(lengths, budget=budget, seed=seed)
    return sum(lengths) / (len(plan) * budget)


def describe(docs: Sequence[Doc] | Sequence[TreeDoc], kind: kinds.DatasetSpec) -> dict[str, str]:
    """Lines by name: how many documents and tokens there are, what is learned of them, and what shared prompts save."""
    lengths = [len(doc.tokens) for doc in docs]
    rows = {
        "documents": f"{len(docs)}, {min(lengths)} to {max(lengths)} tokens, mean {sum(lengths) / len(docs):.1f}",
        "tokens": f"{sum(lengths)}, {_describe_targets(docs, kind)}",
    }
    if isinstance(docs[0], TreeDoc) and docs[0].branch[-1]:
        rows["prompts"] = _describe_sharing([doc for doc in docs if isinstance(doc, TreeDoc)])
    return rows


def _describe_targets(docs: Sequence[Doc] | Sequence[TreeDoc], kind: kinds.DatasetSpec) -> str:
    """What is learned of the documents: their supervised tokens, or what a head gives at some of them."""
    branching = [doc for doc in docs if isinstance(doc, TreeDoc)]
    if kind.read == "last":
        return f"with a score to learn at the end of each of {sum(len(trees.branches(doc)) for doc in branching)} completions"
    supervised = sum(int((doc.weight > 0).sum()) for doc in docs)
    if kind.read == "classes":
        good = sum(int((doc.classes == 1).sum()) for doc in branching if doc.classes is not None)
        return f"with {supervised} judged steps, {good} of them good"
    return f"of which {supervised} supervised ({100 * supervised / sum(len(doc.tokens) for doc in docs):.1f} %)"


def _describe_sharing(docs: Sequence[TreeDoc]) -> str:
    """What it saves that each prompt is there once for all its completions."""
    shared, copied = sum(len(doc.tokens) for doc in docs), sum(sum(trees.side_lengths(doc)) for doc in docs)
    longest = max(max(trees.side_lengths(doc)) for doc in docs)
    return f"shared by their completions: {shared} tokens instead of {copied}; the longest prompt with one completion has {longest}"


def describe_packing(docs: Docs, *, sequence_len: int, micro_batch_size: int, seed: int) -> str:
    """How full micro-batches are, whose budget is micro_batch_size * sequence_len tokens, or the longest document."""
    lengths = dataset.lengths(docs)
    sizes = {"sequence_len": sequence_len, "micro_batch_size": micro_batch_size}
    budget = dataset.batching(packing=True, **sizes, longest=max(lengths))["budget"]
    source = "the longest document" if budget == max(lengths) else f"{micro_batch_size} x {sequence_len}"
    return f"{100 * packing_efficiency(lengths, budget, seed=seed):.1f} % full at {budget} tokens per micro-batch ({source})"


def describe_roles(reports: Sequence[TextReport] | Sequence[trees.TreeReport]) -> str:
    """Tokens and supervised tokens by who wrote them."""
    report = formats.merge_text_reports([report for report in reports if isinstance(report, TextReport)])
    return ", ".join(f"{role} {tokens} ({supervised} supervised)" for role, tokens, supervised in report.roles if tokens)
