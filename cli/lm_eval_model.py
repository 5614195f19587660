"""The model as lm-eval's harness asks for it: texts in, log-likelihoods and continuations out, as its own `hf` backend tokenises them.

lm-eval is imported here at once, so this module is imported where the harness is used only.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from lm_eval import utils as lm_eval_utils  # pyright: ignore[reportMissingImports]
from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
from lm_eval.models import utils as model_utils  # pyright: ignore[reportMissingImports]

from treetune.cli.counter import Count
from treetune.core.data import pack, questions, shared_prefixes
from treetune.core.data.shared_prefixes import Scored, SharedDoc
from treetune.core.lora import Lora
from treetune.models import Model, batches, bridge, decode, policy

GENERATED = 256  # tokens of an answer, where a task does not say
LENGTH = 2048  # positions of a model, where neither it nor its tokenizer says
UNBOUNDED = (bridge.UNBOUNDED, model_utils.TOKENIZER_INFINITY)  # what stands for no limit
DRAWN = ("temperature", "top_p", "top_k", "min_p")


class Settings(NamedTuple):
    """How the harness's requests are computed; the fields have the names of their options."""

    batch_size: int = 8
    max_length: int | None = None
    seed: int = 0


DEFAULTS = Settings()


class PolicyLM(TemplateLM):
    """A model with or without an adapter on it, which is not merged."""

    def __init__(
        self,
        model: Model,
        tokenizer: Any,
        *,
        lora: Lora | None = None,
        stop: Sequence[int] = (),
        settings: Settings = DEFAULTS,
        progress: Count = lambda more, expected=0: None,
    ):
        """stop: ids that end an answer, besides the tokenizer's end of text. progress: told of requests that come, and are done."""
        super().__init__()
        self.model, self.lora, self.tokenizer, self.settings, self.progress = model, lora, tokenizer, settings, progress
        self.stop = [*stop]
        self._device = model.params["embed_tokens"].device

    @property
    def eot_token_id(self) -> int:
        """The end of a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.tokenizer.eos_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def max_length(self) -> int:
        """The longest text, in tokens: longer ones lose their beginning."""
        limits = (self.settings.max_length, self.model.cfg.max_positions, getattr(self.tokenizer, "model_max_length", None))
        return next((limit for limit in limits if limit is not None and limit not in UNBOUNDED), LENGTH)

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's name, of which lm-eval makes names of files."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation, up to where the answer begins, or goes on."""
        options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        write = partial(self.tokenizer.apply_chat_template, tokenize=False, **options)
        try:
            return write(chat_history)
        except TemplateError:  # of templates that know no system message
            return write([message for message in chat_history if message["role"] != "system"])

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, left_truncate_len: int | None = None, **_: Any) -> list[int]:
        """Ids of a text, with what the tokenizer adds to one by itself, unless the text has its beginning already."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **special)[-(left_truncate_len or 0) :]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        """(log-probability in nats, whether each token is the likeliest) of each continuation after its context."""
        if not requests:
            return []
        sequences = [self._sequence(context, continuation) for _, context, continuation in requests]
        self.progress(0, len(sequences))
        answers: dict[int, tuple[float, bool]] = {}
        logprob, state = self._reader()
        collate = batches.batcher(self.model.cfg, self._device, (pack.collate_shared,))
        for group in self._passes(sequences):
            batch, plan = collate(group)
            with torch.no_grad():
                stats = logprob(state.params, state.frozen, batch, plan, want=("top1",))
            assert stats.top1 is not None, "the likeliest token was asked for"
            lens = batch["seq_lens"].tolist()
            logps, greedy = stats.logp.double().cpu().split(lens), stats.top1.cpu().split(lens)
            for number, logp, likeliest in zip(batch["row"].tolist(), logps, greedy, strict=True):
                answers[number] = (float(logp.sum()), bool(likeliest.all()))
            self.progress(len(lens))
        return [answers[i] for i in range(len(sequences))]

    def _passes(self, sequences: list[Scored]) -> Iterator[list[SharedDoc]]:
        """The documents of each forward pass: as many tokens as `batch_size` of the longest sequence."""
        budget, shared = self.settings.batch_size * max(len(one.tokens) for one in sequences), self.model.cfg.shared_positions
        # Behind the positions that may be shared a model turns all of a document otherwise: such a document comes alone.
        documents = shared_prefixes.share(sequences, budget, longest=shared)
        long = [doc for doc in documents if not doc.branch[-1] and len(doc.tokens) > shared]
        others = [doc for doc in documents if doc.branch[-1] or len(doc.tokens) <= shared]
        for part in (long, others):
            for numbers in pack.pack([len(doc.tokens) for doc in part], budget, seed=None):
                yield [part[i] for i in numbers]

    def _reader(self) -> tuple[Any, Any]:
        sizes, state = policy.inference(self.model, self.lora)
        return policy.logprob(sizes), state

    def _sequence(self, context: list[int], continuation: list[int]) -> Scored:
        if not context or not continuation:
            raise ValueError("a task asks for the likelihood of a text without tokens: expected a continuation of at least one")
        if len(continuation) > self.max_length:
            raise ValueError(f"a continuation has {len(continuation)} tokens, and texts have at most {self.max_length}: raise max_length")
        ids = np.array((context + continuation)[-(self.max_length + 1) :], dtype=np.int32)
        return Scored(ids[:-1], ids[-len(continuation) :])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability in nats of each whole text: in windows as long as texts may be, each token once."""
        windows, owner = [], []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            cut = lm_eval_utils.get_rolling_token_windows(
                token_list=ids, prefix_token=self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            )
            parts = [(None, *lm_eval_utils.make_disjoint_window(window)) for window in cut]
            windows += parts
            owner += [number] * len(parts)
        totals = [0.0] * len(requests)
        for number, (logp, _) in zip(owner, self._loglikelihood_tokens(windows), strict=True):
            totals[number] += logp
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each text up to a stop text, drawn as its task says."""
        self.progress(0, len(requests))
        groups: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(request.args[1])].append(number)
        texts = [""] * len(requests)
        for numbers in groups.values():
            drawing = self._drawing(requests[numbers[0]].args[1])
            ids = {i: self.tok_encode(requests[i].args[0], left_truncate_len=drawing.room) for i in numbers}
            order = sorted(numbers, key=lambda i: -len(ids[i]))
            for first in range(0, len(order), self.settings.batch_size):
                chunk = order[first : first + self.settings.batch_size]
                for i, text in zip(chunk, self._generate([ids[i] for i in chunk], chunk, drawing), strict=True):
                    texts[i] = text
                self.progress(len(chunk))
        return texts

    def _drawing(self, asked: dict[str, Any]) -> "Drawing":
        """Errors: ValueError for what the sampler does not do."""
        options: dict[str, Any] = {**model_utils.normalize_gen_kwargs(asked, GENERATED)}
        end = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = model_utils.handle_stop_sequences(options.pop("until", None), eos=end)
        length, sampled = options.pop("max_gen_toks"), options.pop("do_sample")
        unknown = sorted(set(options) - set(DRAWN))
        if unknown:
            raise ValueError(f"a task generates with {', '.join(unknown)}: expected {', '.join(DRAWN)}, do_sample, until, max_gen_toks")
        if (room := self.max_length - length) < 1:
            raise ValueError(f"a task generates {length} tokens, and texts have at most {self.max_length}: lower max_gen_toks of the task")
        draw = {name: options[name] for name in DRAWN if name in options} if sampled else {}
        return Drawing(length, room, until, {"temperature": 1.0} | draw if sampled else {"temperature": 0.0})

    def _generate(self, prompts: list[list[int]], names: list[int], drawing: "Drawing") -> list[str]:
        stops = StopTexts(self.tokenizer, drawing.until, len(prompts))
        stop = list({*self.stop, self.eot_token_id})
        samples = decode.sample(
            self.model, prompts, lora=self.lora, ids=names, max_new_tokens=drawing.length, seed=self.settings.seed,
            tell=stops, stop=stop, **drawing.draw,
        )  # fmt: skip
        rows = zip(samples.tokens.tolist(), samples.lens.tolist(), strict=True)
        texts = [questions.decode(tokens[:length], self.tokenizer, stop) for tokens, length in rows]
        return [model_utils.postprocess_generated_text(text, drawing.until, None) for text in texts]


class Drawing(NamedTuple):
    """How continuations are drawn: at most `length` tokens after at most `room`, up to a text of `until`."""

    length: int
    room: int
    until: list[str]
    draw: dict[str, Any]


class StopTexts:
    """Told each token that is drawn, says which rows have come to a stop text."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], rows: int):
        self.tokenizer, self.rows = tokenizer, [[] for _ in range(rows)]
        # A text may be written in more tokens than its own: two more, as lm-eval looks back.
        self.texts = [(text, len(tokenizer.encode(text, add_special_tokens=False)) + 2) for text in texts if text]

    def __call__(self, rows: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """bool [r] for rows [r] and what was drawn for them [r]."""
        ended = []
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            own = self.rows[row]
            own.append(token)
            ended.append(any(text in self.tokenizer.decode(own[-length:]) for text, length in self.texts))
        return torch.tensor(ended, device=rows.device)
