"""Rows in which a prompt has several continuations -> token trees: the prompt is the trunk, each continuation a branch.

A prompt and a continuation are tokenised as one text, so tokens and masks are those of a supervised row; the trunk is what the
continuations have in common before the first trained token.
n tokens of one document.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Unpack

import numpy as np

from treetune.core.data import chat, chat_templates, instruction, reporting, sources, spans
from treetune.core.data.rows import Message, Row
from treetune.core.protocols import Tokenizer

CHUNK = 512  # rows tokenised together
OVERLONG = ("drop", "truncate", "error")
EMPTY, SAME, SAME_CUT = "an empty completion", "identical completions", "identical completions after the cut"
NO_PROMPT, NOTHING, FULL, TOO_LONG = (
    "an empty prompt",
    "nothing to train on",
    "a prompt that fills sequence_len",
    reporting.TOO_LONG,
)


ReadTexts = Callable[[sources.Rows], list[spans.Text]]  # rows of messages, through the chat template


class PromptReplies(NamedTuple):
    """A row as texts or messages: a prompt (text, or a list of messages) and its continuations (texts, or one message each).

    end: text that closes each continuation. Where it is one token of the tokenizer the continuation ends with it, else an EOS follows.
    extras: tuples of numbers, one for each continuation, such as {"desirable": (True,)}; they become keys of the batch.
    """

    prompt: str | list[Message]
    replies: tuple
    extras: dict[str, tuple]
    end: str = ""


class TreeDoc(NamedTuple):
    """One document: its trunk (branch 0), then its branches 1, 2, ... contiguous.

    weight[i] > 0 says that token i is scored. Token i is predicted by the token before it, the first token of a branch by trunk
    token start - 1. extras has a number for every branch (for the trunk, when there is none).
    """

    tokens: np.ndarray  # int32 [n]
    branch: np.ndarray  # int32 [n]
    start: np.ndarray  # int32 [n], trunk tokens that a branch token may see; 0 in the trunk
    weight: np.ndarray  # float32 [n]
    row: int
    extras: dict[str, tuple]
    classes: np.ndarray | None = None  # int32 [n], the class that is read at a token, -1 for none
    values: dict[str, np.ndarray] | None = None  # float32 [n] each, such as log-probs that were computed once; read where scored


class TreeReport(NamedTuple):
    """What became of the rows. Token counts are of the documents that came out; a prompt counts once."""

    format: str
    rows: int
    docs: int = 0
    dropped: dict[str, int] = {}  # rows by reason
    truncated: int = 0  # documents cut at sequence_len
    tokens: int = 0
    supervised: int = 0
    longest: int = 0  # tokens of the longest prompt with one continuation, before the length policy
    dropped_eos: int = 0  # continuations that lost their end to the cut
    missing_bos: int = 0  # documents without the BOS that the tokenizer adds to plain text
    trailing_space_boundaries: int = 0  # plain prompts that end in a space, so that the first word after it may not be trained
    missing_eos: int = 0  # completions with nothing that ends them
    missing_parts: int = 0  # completions of which the chat template leaves a part out, reasoning mostly
    unread: tuple[str, ...] = ()  # columns, and fields of messages, that nothing reads
    sizes: reporting.LengthCounts = ()  # of the longest side of each row before the length policy
    ending: str = ""  # what closes completions and looks like one token, but is none


def encode_rows(
    rows: sources.Rows,
    read: Callable[[Row, str], PromptReplies],
    tokenizer: Tokenizer,
    *,
    name: str = "rows",
    distinct: bool = True,
    sequence_len: int | None = None,
    overlong: str = "drop",
    **template: Unpack[chat_templates.TemplateOptions],
) -> tuple[list[TreeDoc], TreeReport]:
    """Documents of the rows, in their order, and what became of the rows.

    read: from a row and how errors name it to its Sides. distinct: drop rows with two equal continuations.
    overlong: for rows in which the prompt with one continuation has more than sequence_len tokens: "drop", "truncate" (every
    continuation at the same length, the prompt stays) or "error". template: for rows of messages, as in `chat.reader`.
    Errors: ValueError for bad rows (named), and when no row is left.
    """
    check_length(sequence_len, overlong)
    special, render = spans.read_special_tokens(tokenizer), _renderer(tokenizer, template)
    docs, tally, lengths, unread, ending = [], TreeReport(name, len(rows.rows)), [], {}, ""
    for i, extras, reason, parts in _sequences(rows, read, tokenizer, special, render, distinct):
        location = sources.locate_row(rows, i)
        check_bos(parts, special, location)
        reason = reason or ("" if all(part.weight.any() for part in parts) else NOTHING)
        # Compared as tokens: texts that differ only in what the chat template leaves out would train nothing.
        same = not reason and distinct and any(np.array_equal(part.tokens, parts[0].tokens) for part in parts[1:])
        reason = SAME if same else reason
        doc = None if reason else join_sequences(parts, row=rows.numbers[i], extras=extras)
        unread |= dict.fromkeys(name for part in parts for name in part.unread)
        ending = ending or next((part.ending for part in parts if part.ending), "")
        if doc is not None:
            _check_extras(extras, docs, location)
            lengths.append(max(side_lengths(doc)))
            tally = tally._replace(longest=max(tally.longest, lengths[-1]))
            doc, reason, tally = _fit(doc, sequence_len, overlong, distinct, location, tally)
        if doc is None:
            tally = count_drop(tally, reason or NO_PROMPT)
            continue
        spaces = sum(part.trailing_space_boundaries for part in parts)
        lacks = bool(special.prefix) and doc.tokens[: len(special.prefix)].tolist() != special.prefix
        tally = tally._replace(
            missing_bos=tally.missing_bos + lacks,
            trailing_space_boundaries=tally.trailing_space_boundaries + spaces,
            missing_eos=tally.missing_eos + sum(part.unclosed for part in parts),
            missing_parts=tally.missing_parts + sum(part.cut for part in parts),
        )
        docs.append(doc)
    return docs, finish_report(docs, tally, rows)._replace(unread=tuple(unread), sizes=reporting.count_lengths(lengths), ending=ending)


def grow(
    trunk: np.ndarray, branches: Sequence[tuple[np.ndarray, np.ndarray]], *, row: int, extras: dict[str, tuple] | None = None
) -> TreeDoc:
    """A document of a trunk that nothing scores and branches (tokens, weight), such as a prompt with sampled completions."""
    sizes = [len(trunk), *(len(tokens) for tokens, _ in branches)]
    branch = np.repeat(np.arange(len(sizes)), sizes).astype(np.int32)
    tokens = np.concatenate([trunk, *(tokens for tokens, _ in branches)]).astype(np.int32)
    weight = np.concatenate([np.zeros(len(trunk)), *(weight for _, weight in branches)]).astype(np.float32)
    return TreeDoc(tokens, branch, np.where(branch > 0, len(trunk), 0).astype(np.int32), weight, row, extras or {})


def join_sequences(parts: Sequence[spans.EncodedText], *, row: int, extras: dict[str, tuple] | None = None) -> TreeDoc | None:
    """Document of sequences with a common start: the tokens that they share before the first trained one are the trunk.

    What follows the last trained token of a sequence is left out: nothing reads it. None when they share no first token.
    """
    token_lists = [part.tokens[: np.flatnonzero(part.weight)[-1] + 1] for part in parts]
    if len(parts) == 1:
        none = np.zeros(len(token_lists[0]), np.int32)
        return TreeDoc(token_lists[0], none, none, parts[0].weight[: len(none)], row, extras or {})
    size = min(int(np.flatnonzero(part.weight)[0]) for part in parts)
    equal = np.all([tokens[:size] == token_lists[0][:size] for tokens in token_lists], axis=0)
    size = size if equal.all() else int(np.argmin(equal))
    if size == 0:
        return None
    return grow(
        token_lists[0][:size],
        [(tokens[size:], part.weight[size : len(tokens)]) for tokens, part in zip(token_lists, parts, strict=True)],
        row=row,
        extras=extras,
    )


def branches(doc: TreeDoc) -> list[np.ndarray]:
    """The indices of the tokens of each sequence's own part: of every branch, or of the trunk when there is none."""
    count = int(doc.branch[-1])
    return [np.flatnonzero(doc.branch == b) for b in (range(1, count + 1) if count else (0,))]


def single_branch(doc: TreeDoc, branch: int) -> TreeDoc:
    """The trunk with one of its branches, as a document without any."""
    keep = (doc.branch == 0) | (doc.branch == branch)
    none = np.zeros(int(keep.sum()), np.int32)
    extras = {name: values[branch - 1 : branch] for name, values in doc.extras.items()}
    values = None if doc.values is None else {name: value[keep] for name, value in doc.values.items()}
    return TreeDoc(doc.tokens[keep], none, none, doc.weight[keep], doc.row, extras, values=values)


def side_lengths(doc: TreeDoc) -> list[int]:
    """Number of tokens of the trunk with each branch."""
    return [int(doc.start[part[-1]]) + len(part) for part in branches(doc)]


def check_length(sequence_len: int | None, overlong: str) -> None:
    """Raise ValueError for an unknown policy, or for a length that cannot hold a prompt and a completion."""
    if overlong not in OVERLONG:
        fix = ": a row with one prompt for all its continuations cannot be split" if overlong == "split" else ""
        raise ValueError(f"overlong is {overlong!r}: expected one of {', '.join(OVERLONG)}{fix}")
    if sequence_len is not None and sequence_len < 2:
        raise ValueError(f"sequence_len is {sequence_len}: expected at least 2 tokens, one to read and one to predict")


def join_counts(dropped: Mapping[str, int]) -> str:
    """Dropped rows by reason, in one line of an error."""
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "no rows"


def count_drop(tally: TreeReport, reason: str) -> TreeReport:
    """The tally with one more row dropped."""
    return tally._replace(dropped=tally.dropped | {reason: tally.dropped.get(reason, 0) + 1})


def finish_report(docs: Sequence[TreeDoc], tally: TreeReport, rows: sources.Rows) -> TreeReport:
    """The tally with the documents counted. Errors: ValueError when there is none."""
    if not docs:
        reasons = ", ".join(f"{count} {reason}" for reason, count in tally.dropped.items())
        fix = (
            f"raise sequence_len (the longest row has {tally.longest} tokens)"
            if {TOO_LONG, FULL} & set(tally.dropped)
            else "fill the columns"
        )
        raise ValueError(f"{rows.name}: not one row to train on in {tally.rows}, read as {tally.format} ({reasons}): {fix}")
    supervised = sum(int(np.count_nonzero(doc.weight)) for doc in docs)
    return tally._replace(docs=len(docs), tokens=sum(len(doc.tokens) for doc in docs), supervised=supervised)


def describe_trees(report: TreeReport) -> str:
    """The report in one line, with what is unusual."""
    unusual = {
        "documents truncated": report.truncated,
        "completions lost their end": report.dropped_eos,
        "completions without an end-of-turn token": report.missing_eos,
        "completions of which the chat template leaves a part out": report.missing_parts,
        "documents without BOS": report.missing_bos,
        "prompts end in a space, so that the word after it may not be trained": report.trailing_space_boundaries,
    }
    return reporting.format_report(report, unusual)


def _check_extras(extras: dict, docs: Sequence[TreeDoc], location: str) -> None:
    differing = sorted(set(extras) ^ set(docs[0].extras)) if docs else []
    if differing:
        has = "has" if differing[0] in extras else "lacks"
        raise ValueError(f"{location} {has} the field {differing[0]}, unlike row {docs[0].row}: fill it in all rows or in none")


def drop_reason(sides: PromptReplies, distinct: bool) -> str:
    """Reason why a row gives no document; "" when it gives one."""
    if not all(_says(reply) for reply in sides.replies):
        return EMPTY
    same = any(reply in sides.replies[:i] for i, reply in enumerate(sides.replies))
    return SAME if distinct and same else "" if sides.prompt else NO_PROMPT


def _says(reply: str | dict) -> bool:
    """Whether a reply has any text, thoughts or tool calls."""
    if isinstance(reply, str):
        return bool(reply.strip())
    return bool(reply.get("tool_calls")) or bool((str(reply.get("reasoning_content") or "") + str(reply.get("content") or "")).strip())


def _fit(
    doc: TreeDoc, size: int | None, overlong: str, distinct: bool, location: str, tally: TreeReport
) -> tuple[TreeDoc | None, str, TreeReport]:
    """(document under the length policy or None, why not, tally)."""
    sizes = side_lengths(doc)
    longest = max(length for length, foreign in zip(sizes, doc.extras.get("kind", [0] * len(sizes)), strict=True) if not foreign)
    if size is None or max(sizes) <= size:
        return doc, "", tally
    if longest <= size:  # a completion of another row says nothing against this one: what does not fit of it is left out
        return truncate_tree(doc, size), "", tally
    if overlong == "error":
        raise ValueError(
            f"{location} has {longest} tokens, more than sequence_len {size}: raise sequence_len, or set overlong to drop or truncate"
        )
    if overlong == "drop":
        return None, TOO_LONG, tally
    doc = truncate_tree(doc, size)
    scored_branches = [part for part in branches(doc) if doc.weight[part].any()]
    if len(scored_branches) < len(sizes):
        return None, FULL, tally
    texts = [tuple(doc.tokens[part]) for part in scored_branches]
    if distinct and len(set(texts)) < len(texts):
        return None, SAME_CUT, tally
    lost = sum(length > size for length in sizes)
    return doc, "", tally._replace(truncated=tally.truncated + 1, dropped_eos=tally.dropped_eos + lost)


def truncate_tree(doc: TreeDoc, size: int) -> TreeDoc:
    """The document without the tokens at position `size` and after, in every branch alike."""
    first = np.searchsorted(doc.branch, doc.branch, "left")
    keep = np.arange(len(doc.tokens)) - first + doc.start < size
    return doc._replace(
        tokens=doc.tokens[keep],
        branch=doc.branch[keep],
        start=doc.start[keep],
        weight=doc.weight[keep],
        classes=None if doc.classes is None else doc.classes[keep],
    )


def _sequences(
    rows: sources.Rows,
    read: Callable[[Row, str], PromptReplies],
    tokenizer: Tokenizer,
    special: spans.SpecialTokens,
    render: ReadTexts,
    distinct: bool,
) -> Iterator[tuple[int, dict, str, list[spans.EncodedText]]]:
    """(index of the row, its extras, why it cannot be used, its tokens with each continuation) row by row."""
    for start in range(0, len(rows.rows), CHUNK):
        chunk = sources.take(rows, range(start, min(start + CHUNK, len(rows.rows))))
        sides = [read(row, sources.locate_row(chunk, i)) for i, row in enumerate(chunk.rows)]
        reasons = [drop_reason(row_sides, distinct) for row_sides in sides]
        usable = [i for i, reason in enumerate(reasons) if not reason]
        texts = _texts([sides[i] for i in usable], sources.take(chunk, usable), render)
        parts = iter(spans.encode(texts, tokenizer, special))
        for i, (row_sides, reason) in enumerate(zip(sides, reasons, strict=True)):
            encoded_replies = [] if reason else [next(parts) for _ in row_sides.replies]
            yield start + i, row_sides.extras, reason, [_close(part, row_sides, tokenizer, special) for part in encoded_replies]


def _texts(sides: Sequence[PromptReplies], rows: sources.Rows, render: ReadTexts) -> list[spans.Text]:
    """One text for each continuation of each row, in order."""
    conversations, indices = [], []
    for i, row_sides in enumerate(sides):
        if not isinstance(row_sides.prompt, str):
            prompt = [message | {"train": False} for message in row_sides.prompt]
            tools = rows.rows[i].get("tools")
            conversations += [{"messages": [*prompt, reply | {"train": True}], "tools": tools} for reply in row_sides.replies]
            indices += [i] * len(row_sides.replies)
    repeated = sources.take(rows, indices)._replace(rows=conversations)
    rendered = iter(render(repeated) if conversations else ())
    texts = [
        (i, plain_pair(row_sides.prompt, reply + row_sides.end) if isinstance(row_sides.prompt, str) else next(rendered))
        for i, row_sides in enumerate(sides)
        for reply in row_sides.replies
    ]
    for i, text in texts:
        check_unicode(text.text, sources.locate_row(rows, i))
    return [text for _, text in texts]


def plain_pair(prompt: str, completion: str) -> spans.Text:
    """Prompt and completion as one text, the completion trained."""
    end = len(prompt) + len(completion)
    turn = spans.Turn(len(prompt), end, end, end, 1.0, 0.0)
    return spans.Text(prompt + completion, (turn,), trailing_space_boundaries=instruction.trailing_space(prompt, completion))


def _close(part: spans.EncodedText, sides: PromptReplies, tokenizer: Tokenizer, special: spans.SpecialTokens) -> spans.EncodedText:
    """Plain text with the default prefix before and a trained EOS behind, each unless it is there already or `end` does its work."""
    if not isinstance(sides.prompt, str):
        return part
    spans.require_eos(tokenizer)
    tokens, weight = part.tokens, part.weight
    ends = {special.eos, tokenizer.convert_tokens_to_ids(sides.end) if sides.end else None} - {tokenizer.unk_token_id}
    prefix = special.prefix if tokens[: len(special.prefix)].tolist() != special.prefix else []
    suffix = [] if len(tokens) and int(tokens[-1]) in ends else [special.eos]
    tokens = np.concatenate([np.array(prefix, np.int32), tokens, np.array(suffix, np.int32)]).astype(np.int32)
    weight = np.concatenate([np.zeros(len(prefix)), weight, np.ones(len(suffix))]).astype(np.float32)
    weight[:1] = 0.0
    return part._replace(tokens=tokens, weight=weight)


def check_bos(parts: Sequence[spans.EncodedText], special: spans.SpecialTokens, location: str) -> None:
    """Raise ValueError for a sequence that starts with two BOS tokens."""
    if special.bos is not None and any(part.tokens[:2].tolist() == [special.bos] * 2 for part in parts):
        raise ValueError(f"{location} starts with two BOS tokens: take the BOS out of the chat template or out of the text")


def check_unicode(text: str, location: str) -> None:
    """Raise ValueError for a text that is not valid Unicode, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{location}: not valid Unicode ({error.reason} at character {error.start} of the text)") from error


def _renderer(tokenizer: Tokenizer, template: chat_templates.TemplateOptions) -> ReadTexts:
    """chat's reader, made when the first row of messages comes: rows of plain text need no chat template."""
    readers: list[ReadTexts] = []

    def render(rows: sources.Rows) -> list[spans.Text]:
        if not readers:
            readers.append(chat.reader(tokenizer, **template))
        return readers[0](rows)

    return render
