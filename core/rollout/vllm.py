"""A vLLM server over HTTP: token ids in, token ids and log-probs out. No text is ever encoded again on the way.

P prompts, n completions of each, m tokens of a completion, V vocabulary; log-probs in nats.

Which log-probs a server reports is a choice of the whole server, `--logprobs-mode`:
- processed_logprobs (what `treetune serve` and managed servers use): of the distribution drawn from. Without top_p, top_k, min_p,
  penalties or a regex that is softmax(logits / temperature), the trainer's own; with them it is renormalised over what was kept.
- raw_logprobs: of softmax(logits), whatever the options. That is the trainer's distribution at temperature 1 only.
`comparable` tells when the numbers are those of softmax(logits / temperature); where they are not, they come back as nan (unknown),
so that no ratio is built on them. Log-probs of a prompt (`prompt_logps`) are raw in every mode.
Measured on vLLM 0.32, CPU, SmolLM2-135M: float32 differs from the trainer by at most 4e-5 (mean 1e-5), bfloat16 by 0.5 (mean 0.08).
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import tenacity

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Options of the completions endpoint that a user may add. vLLM ignores names that it does not know, so others are refused here.
STOPPING = frozenset({"stop", "include_stop_str_in_output"})
SHAPING = frozenset({"min_tokens", "frequency_penalty", "presence_penalty", "logit_bias", "bad_words", "allowed_token_ids"})
FINISHED = ("stop", "length")
LOAD_REFUSED = ("/v1/load_lora_adapter", 500)  # what is wrong with an adapter is an error of a worker to vLLM 0.32
PROBE = [0, 1, 2, 3]
TEMPERATURES = (0.5, 2.0)  # of the probe; vLLM takes 0 to 2


class Drawn(NamedTuple):
    """One completion: tokens int32 [m], the stop token included; logp float32 [m], nan where it is not the trainer's; why it ended."""

    tokens: np.ndarray
    logp: np.ndarray
    finish_reason: str


class SamplingParams(NamedTuple):
    """How tokens are drawn. Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 change nothing.

    stop_ids end a completion, and nothing else does. regex: what completions must match. extra: further options of the completions
    endpoint by name (STOPPING and SHAPING).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: Sequence[int] = ()
    regex: str | None = None
    extra: Mapping[str, Any] = {}


class Served(NamedTuple):
    """A model or adapter that a server offers: its name in requests, the path or id it was loaded from, the longest sequence."""

    name: str
    root: str
    max_len: int | None


class Unreachable(RuntimeError):
    """The server did not answer, or only with errors of its own, for as long as we were willing to try."""


class Lost(RuntimeError):
    """The server does not know the model or adapter of a request: it was restarted, or never had it."""


class _Passing(Exception):
    """An answer that may be better next time."""


def request_seed(seed: int, number: int) -> int:
    """The seed of prompt `number` in a run: 62 bits of a hash. The engine adds 0 .. n - 1 for the completions of a prompt, so seeds of
    neighbouring prompts must not be neighbours."""  # fmt: skip
    return int.from_bytes(hashlib.blake2b(f"{seed}/{number}".encode(), digest_size=8).digest(), "big") >> 2


def comparable(mode: str, params: SamplingParams) -> bool:
    """Whether log-probs reported in this mode (raw_logprobs, processed_logprobs) are those of softmax(logits / temperature).

    Temperature 0 counts as 1, as in the local sampler: the likeliest token, with its log-prob in the untempered distribution.
    """
    if mode == "raw_logprobs":
        return params.temperature in (0, 1)
    whole = params.top_p == 1 and params.top_k <= 0 and params.min_p == 0 or params.temperature == 0
    reshaped = params.repetition_penalty != 1 or params.regex is not None or SHAPING & set(params.extra)
    return mode == "processed_logprobs" and whole and not reshaped


class Client:
    """A connection to one server. `model` is its base model's name there, V its vocabulary; `alive` says whether waiting makes sense.

    timeout_s is that of one answer; connection errors and answers with status 429 or 5xx are tried again, with growing pauses, for
    retry_s. Raises Unreachable after that, Lost for a name that the server does not know, ValueError for what it refuses.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        vocab_size: int,
        timeout_s: float = 240.0,
        retry_s: float = 90.0,
        concurrency: int = 32,
        alive: Callable[[], bool] = lambda: True,
    ):
        self.url, self.model, self.vocab_size = url, model, vocab_size
        self.retry_s, self.concurrency, self.alive = retry_s, concurrency, alive
        self.mode = ""  # unknown until `check` asks, and every log-prob nan
        self.max_len: int | None = None
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        local, plain = httpx.URL(url).host in LOOPBACK, httpx.URL(url).scheme == "http"  # no proxy, no certificates to load
        timeout = httpx.Timeout(timeout_s, connect=min(10.0, timeout_s))
        self.http = httpx.Client(base_url=url, timeout=timeout, limits=limits, trust_env=not local, verify=not plain)

    def close(self) -> None:
        """Close the connections."""
        self.http.close()

    def served(self, *, retry_s: float | None = None) -> list[Served]:
        """What the server offers. retry_s: in place of the client's own."""
        models = self._send("GET", "/v1/models", retry_s=retry_s).get("data", [])
        return [Served(model["id"], model.get("root") or model["id"], model.get("max_model_len")) for model in models]

    def check(self, *, accepted: Sequence[str | Path] = (), needed_len: int = 0, retry_s: float | None = None) -> Served:
        """The served base model, after finding out which log-probs the server reports. One of another name that was loaded from one of
        the `accepted` paths and ids is taken too. retry_s: for these requests, in place of the client's own.

        Raises ValueError when the server has no such model, when one of our name was loaded from none of `accepted`, or when its longest
        sequence is below `needed_len` tokens.
        """
        offered = self.served(retry_s=retry_s)
        base = next((model for model in offered if model.name == self.model), None)
        base = base or next((model for model in offered if any(_same(model.root, path) for path in accepted)), None)
        names = ", ".join(model.name for model in offered)
        if base is None:
            raise ValueError(f"the server at {self.url} serves {names}; expected {self.model}: start it with this model")
        if accepted and not any(_same(base.root, path) for path in accepted):
            raise ValueError(
                f"the server at {self.url} serves {base.root} as {self.model}; expected {accepted[0]}: start it with this model"
            )
        if base.max_len is not None and base.max_len < needed_len:
            raise ValueError(
                f"the server takes sequences of {base.max_len} tokens; prompts and completions of this run need {needed_len}: "
                "start it with a larger max_model_len"
            )
        self.model, self.max_len = base.name, base.max_len
        self.mode = self.logprobs_mode(retry_s=retry_s)
        return base

    def logprobs_mode(self, *, retry_s: float | None = None) -> str:
        """raw_logprobs or processed_logprobs, found by asking: the largest raw log-prob does not depend on the temperature."""
        tops = []
        for temperature in TEMPERATURES:
            payload = {"model": self.model, "prompt": [i % self.vocab_size for i in PROBE], "max_tokens": 1, "logprobs": 1, "seed": 0,
                       "temperature": temperature, "ignore_eos": True}  # fmt: skip
            (choice,) = self._send("POST", "/v1/completions", payload, retry_s=retry_s)["choices"]
            tops.append(max(choice["logprobs"]["top_logprobs"][0].values()))
        return "raw_logprobs" if abs(tops[0] - tops[1]) < 1e-3 else "processed_logprobs"

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        params: SamplingParams = SamplingParams(),  # noqa: B008  (immutable)
        *,
        max_tokens: int,
        n: int = 1,
        model: str | None = None,
    ) -> list[list[Drawn]]:
        """n completions of each prompt, drawn with the prompt's own seed (`request_seed`). model: an adapter's name.

        Raises ValueError for an option or a length that the server does not take, and for an answer that is not what was asked:
        another number of completions, other prompt ids, ids outside the vocabulary, log-probs that do not match the ids.
        """
        _check_params(params, n, max_tokens)
        self._check_prompts(prompts, seeds, max_tokens)
        is_comparable = comparable(self.mode, params)
        # Without ignore_eos vLLM would end completions at an end token of its own choice, and stop_ids would not be the whole truth.
        common = {
            "temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k, "min_p": params.min_p,
            "repetition_penalty": params.repetition_penalty, "model": model or self.model, "n": n, "max_tokens": max_tokens,
            "stop_token_ids": list(params.stop_ids), "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
            **({} if params.regex is None else {"structured_outputs": {"regex": params.regex}}), **params.extra,
        }  # fmt: skip

        def one(prompt: Sequence[int], seed: int) -> list[Drawn]:
            payload = common | {"prompt": [int(token) for token in prompt], "seed": int(seed)}
            return _read(self._send("POST", "/v1/completions", payload), payload, self.vocab_size, is_comparable)

        with ThreadPoolExecutor(max(1, min(self.concurrency, len(prompts)))) as pool:
            waiting = [pool.submit(one, prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
            try:
                return [answer.result() for answer in waiting]
            finally:
                pool.shutdown(wait=False, cancel_futures=True)  # after a failure, the requests that have not started

    def prompt_logps(self, tokens: Sequence[int], *, model: str | None = None) -> np.ndarray:
        """Log-probs (float64 [len(tokens) - 1], temperature 1, raw) of tokens[1:], each given those before it."""
        payload = {"model": model or self.model, "prompt": [int(token) for token in tokens], "max_tokens": 1, "prompt_logprobs": 0,
                   "temperature": 1.0, "seed": 0, "ignore_eos": True}  # fmt: skip
        (choice,) = self._send("POST", "/v1/completions", payload)["choices"]
        entries = choice.get("prompt_logprobs")
        if entries is None or len(entries) != len(tokens):
            raise ValueError(f"the server at {self.url} gives no log-probs of prompts; use a vLLM server that does")
        return np.array([entry[str(token)]["logprob"] for token, entry in zip(payload["prompt"][1:], entries[1:], strict=True)])

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Have the server load the adapter folder `path` as `name`, which must be new to it."""
        payload = {"lora_name": name, "lora_path": str(Path(path).absolute())}
        try:
            self._send("POST", "/v1/load_lora_adapter", payload)
        except Lost as error:
            raise ValueError(
                f"{error}: the server must see the same files, and be started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
            ) from error
        except ValueError as error:
            if "already been loaded" not in str(error):  # a first try whose answer was lost
                raise

    def unload_adapter(self, name: str) -> None:
        """Have the server forget an adapter; one that it does not know is no error."""
        try:
            self._send("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        except Lost:
            pass

    def reload_weights(self, path: str | Path) -> None:
        """Replace the base weights in place by those of a model folder, through the server's development endpoints.

        Needs VLLM_SERVER_DEV_MODE=1, which opens the server to anyone who reaches it: refused unless it is on the loopback interface.
        vLLM 0.32 leaves the head of a tied model as it was; the check after a sync sees that.
        """
        if httpx.URL(self.url).host not in LOOPBACK:
            raise ValueError(f"{self.url} is not on this machine: in-place reloading is for servers on 127.0.0.1 only; restart it instead")
        kwargs = {"weights_path": str(Path(path).absolute())}
        try:
            self._send("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": kwargs})
            reply = self._send("POST", "/reset_prefix_cache")
        except Lost as error:
            raise ValueError(f"the server at {self.url} has no development endpoints: start it with VLLM_SERVER_DEV_MODE=1") from error
        if reply.get("success") is False:
            raise Unreachable(f"the server at {self.url} kept its prefix cache of the old weights: requests were still running")

    def _check_prompts(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], max_tokens: int) -> None:
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts came with {len(seeds)} seeds; expected one each")
        for i, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {i} has no tokens; expected at least one")
            if self.max_len is not None and len(prompt) + max_tokens > self.max_len:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, with max_tokens {max_tokens} more than the {self.max_len} of the server: "
                    "shorten prompts or completions, or start it with a larger max_model_len"
                )

    def _send(self, method: str, path: str, payload: dict | None = None, *, retry_s: float | None = None) -> dict:
        """One exchange, tried again while it makes sense; the JSON object that came back, {} for an answer in plain text."""
        patience_s = self.retry_s if retry_s is None else retry_s
        tries = tenacity.Retrying(
            retry=tenacity.retry_if_exception(lambda error: isinstance(error, httpx.TransportError | _Passing) and self.alive()),
            stop=tenacity.stop_after_delay(patience_s),
            wait=tenacity.wait_exponential(multiplier=0.1, max=5.0),
            reraise=True,
        )
        try:
            return tries(self._exchange, method, path, payload)
        except (httpx.TransportError, _Passing) as error:
            state = f"tried for {patience_s:g} s" if self.alive() else "its process has ended"
            raise Unreachable(f"no answer from the vLLM server at {self.url}{path} ({error or type(error).__name__}; {state})") from error

    def _exchange(self, method: str, path: str, payload: dict | None) -> dict:
        reply = self.http.request(method, path, json=payload)
        status = reply.status_code
        if status == 404:
            raise Lost(f"the server at {self.url} answers {path}: {_message(reply)}")
        if 400 <= status < 500 and status != 429 or (path, status) == LOAD_REFUSED:
            raise ValueError(f"the server at {self.url} refuses {path}: {_message(reply)}")
        if status >= 400:
            raise _Passing(f"status {status}: {_message(reply)}")
        answer = reply.json() if "json" in reply.headers.get("content-type", "") else {}
        if any(choice.get("finish_reason") in ("abort", "error") for choice in answer.get("choices", ())):
            raise _Passing("it gave up a completion")
        return answer


def _same(root: str, accepted: str | Path) -> bool:
    return root == str(accepted) or (Path(root).exists() and Path(root).resolve() == Path(accepted).expanduser().resolve())


def _message(reply: httpx.Response) -> str:
    """What an error answer says, in one line."""
    try:
        body = reply.json()
    except ValueError:
        body = reply.text
    error = body.get("error", body) if isinstance(body, dict) else body
    text = error.get("message") or error.get("detail") or error if isinstance(error, dict) else error
    return " ".join(str(text).split())[:400]


def _check_params(params: SamplingParams, n: int, max_tokens: int) -> None:
    if n < 1 or max_tokens < 1:
        raise ValueError(f"n is {n} and max_tokens {max_tokens}; expected at least 1 of each")
    if not params.temperature >= 0 or n > 1 and params.temperature == 0:
        raise ValueError(f"temperature is {params.temperature} for n {n}; expected a number above 0, or 0 for a single completion")
    if unknown := sorted(set(params.extra) - STOPPING - SHAPING):
        names = ", ".join(sorted(STOPPING | SHAPING))
        raise ValueError(f"generation option {unknown[0]!r} is unknown; besides those of the run the vLLM sampler takes {names}")


def _read(answer: dict, payload: dict, vocab_size: int, is_comparable: bool) -> list[Drawn]:
    """The completions of one answer, in order. Raises ValueError where it is not what was asked."""
    choices = sorted(answer.get("choices", ()), key=lambda choice: choice["index"])
    if len(choices) != payload["n"]:
        raise ValueError(f"the server gave {len(choices)} completions of a prompt; asked were {payload['n']}")
    return [_drawn(choice, payload, vocab_size, is_comparable) for choice in choices]


def _drawn(choice: dict, payload: dict, vocab_size: int, is_comparable: bool) -> Drawn:
    ids, reported = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    if ids is None or reported is None:
        raise ValueError("the server gives no token ids or no log-probs (return_token_ids, logprobs): it needs a newer vLLM")
    if choice.get("prompt_token_ids") not in (None, payload["prompt"]):
        raise ValueError("the server answered another prompt than the ids it was given: ids must pass it unchanged")
    if len(ids) != len(reported) or not 0 < len(ids) <= payload["max_tokens"]:
        raise ValueError(
            f"a completion came with {len(ids)} ids and {len(reported)} log-probs; expected as many, 1 to {payload['max_tokens']}"
        )
    if outside := [token for token in ids if not 0 <= token < vocab_size]:
        raise ValueError(f"a completion holds token {outside[0]}, and the vocabulary has {vocab_size}: the server has another model")
    if choice.get("finish_reason") not in FINISHED:
        raise ValueError(f"a completion ended with {choice.get('finish_reason')!r}; expected one of {', '.join(FINISHED)}")
    logp = [math.nan if value is None or not is_comparable else value for value in reported]
    return Drawn(np.array(ids, np.int32), np.array(logp, np.float32), choice["finish_reason"])
