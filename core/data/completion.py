"""Raw text: every token is trained, an EOS follows, and a BOS comes first where the tokenizer adds one."""

from collections.abc import Callable

from treetune.core.data import sources, spans
from treetune.core.data.rows import Row
from treetune.core.protocols import Tokenizer


def reader(tokenizer: Tokenizer, *, field: str = "text") -> Callable[[sources.Rows], list[spans.Text]]:
    """Reader of raw text: the `field` of each row.

    Errors: ValueError for a tokenizer without EOS and for rows without the field (named with the fields they have).
    """
    spans.require_eos(tokenizer)

    def text(row: Row, location: str) -> spans.Text:
        spans.require_text(row, (field,), (), location)
        return spans.Text(row[field], (), whole=True, eos=1.0) if row[field].strip() else spans.Text("", ())

    return lambda rows: [text(row, sources.locate_row(rows, i)) for i, row in enumerate(rows.rows)]
