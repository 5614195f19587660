"""A language model as a reward: a chat endpoint is asked for a number about each completion.

`llm_judge?url=http://127.0.0.1:8000/v1,model=NAME` names it among rewards. Standard library only at the top:
worker processes import it.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

TEMPLATE = """Judge the answer to a prompt. Give it a number from 0 (useless or wrong) to 10 (as good as can be).

<prompt>
{prompt}
</prompt>

<answer>
{completion}
</answer>

<good_answer>
{reference}
</good_answer>

Reply with the number alone."""
NO_REFERENCE = "(none is known)"
REFERENCES = ("ground_truth", "answer", "solution", "reference")  # columns that may hold a good answer
NUMBER = r"[-+]?(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)"
SCALE = r"(?:\s*\([^()\n]*(?:[0-9]\s*(?:-|–|to)|/|out of)\s*[0-9]+[^()\n]*\))?"  # Score (0-10): 7
# As few blanks and signs as can be before the number, which keeps its own minus and point; a hyphen right behind the word is neither.
SCORE = re.compile(rf"(?:score|rating|grade){SCALE}-?\W{{0,9}}?(?:is\s+|of\s+)?({NUMBER})", re.IGNORECASE)
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
TOGETHER = 8  # requests at a time
TRIES = 4
LIMIT_S = 120.0  # of one answer; reward_timeout is the limit of a call for all rows of a worker
KEY = "OPENAI_API_KEY"  # environment variable with the key of the endpoint


def llm_judge(
    completions: Sequence[Any],
    prompts: Sequence[Any],
    *,
    url: str = "",
    model: str = "",
    template: str = "",
    max_tokens: int = 512,
    key: str = KEY,
    **columns: Any,
) -> list[float | None]:
    """The number that a model behind an OpenAI-compatible chat endpoint gives each completion; no opinion where its reply has none.

    template: file whose {prompt}, {completion}, {reference} and {COLUMN} are filled in. key: environment variable with the API key.
    Errors: ValueError for options that are missing or unknown, a file without {completion}, and an endpoint that refuses or is gone.
    """
    text = _checked(url, model, str(template), columns)
    if not completions:
        return []
    asked = [_filled(text, _fields(i, completions, prompts, columns)) for i in range(len(completions))]
    with _client(url, os.environ.get(key, "")) as client, ThreadPoolExecutor(TOGETHER) as threads:
        ask = _asker(client, f"{url.rstrip('/')}/chat/completions", str(model), max_tokens)
        return [number(reply) for reply in threads.map(ask, asked)]


def number(reply: str) -> float | None:
    """The number that a reply gives: the whole of it, the last after the word score, rating or grade, else the only one.

    What is thought before it (up to </think>), `/10` behind it, and the scale in brackets before it, aside. None where no number is meant.
    """
    reply = reply.rpartition("</think>")[2]
    if "<think>" in reply:  # cut off before it said anything
        return None
    said = re.sub(rf"({NUMBER})\s*(?:/|out of)\s*[0-9]+", r"\1", reply)
    named, all_ = SCORE.findall(re.sub(r"[*_`]", "", said)), re.findall(rf"(?<![\w.])({NUMBER})(?![\w])", said)
    found = named or (all_ if len(all_) == 1 else [])
    return float(found[-1]) if found else None


def _checked(url: str, model: str, file: str, columns: Mapping[str, Any]) -> str:
    """The template of the options."""
    if unknown := [name for name, value in columns.items() if not isinstance(value, list)]:
        raise ValueError(f"llm_judge has no option {unknown[0]}; its options are url, model, template, max_tokens, key")
    if not re.match(r"https?://[^/]", str(url)) or model == "":
        raise ValueError(f"llm_judge has url={url}, model={model}: expected llm_judge?url=http://HOST:PORT/v1,model=NAME")
    if not file:
        return TEMPLATE
    if not Path(file).is_file():
        raise ValueError(f"llm_judge has template={file}: there is no such file")
    text = Path(file).read_text(encoding="utf-8")
    if "{completion}" not in text:
        raise ValueError(f"llm_judge has template={file}, which has no {{completion}} to fill in: the judge would see no answer")
    return text


def good_answer(row: Mapping[str, Any]) -> str | None:
    """The good answer among the columns of a row: the first that is a text, else the first that is a number."""
    values = [row.get(name) for name in REFERENCES]
    texts = [value for value in values if isinstance(value, str)]
    numbers = [str(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool) and value == value]
    return next(iter((*texts, *numbers)), None)


def _fields(i: int, completions: Sequence[Any], prompts: Sequence[Any], columns: Mapping[str, Any]) -> dict[str, str]:
    """What a template may name of a row."""
    row = {name: values[i] for name, values in columns.items()}
    known = good_answer(row)
    reference = NO_REFERENCE if known is None else known
    own = {"prompt": _text(row.get("readable_prompt") or prompts[i]), "completion": _text(completions[i]), "reference": reference}
    return {name: str(value) for name, value in row.items() if value is not None} | own


def _text(value: Any) -> str:
    """A text, or messages as lines: the content alone of a single one."""
    if isinstance(value, str):
        return value
    if len(value) == 1:
        return str(value[0]["content"])
    return "\n".join(f"{message['role']}: {message['content']}" for message in value)


def _filled(template: str, fields: Mapping[str, str]) -> str:
    # Not str.format: a template may ask for JSON, whose braces are no fields.
    return re.sub(r"\{(\w+)\}", lambda match: fields.get(match[1], match[0]), template)


def _client(url: str, key: str) -> Any:
    """Connections to the endpoint; proxies of the environment are for other machines alone."""
    import httpx

    place = httpx.URL(url)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.Client(timeout=LIMIT_S, trust_env=place.host not in LOOPBACK, verify=place.scheme == "https", headers=headers)


def _asker(client: Any, address: str, model: str, max_tokens: int) -> Callable[[str], str]:
    """The function that asks the endpoint once, and again while that makes sense."""
    import httpx
    import tenacity

    def ask(text: str) -> str:
        body = {"model": model, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": max_tokens}
        reply = client.post(address, json=body)
        if reply.status_code == 429 or reply.status_code >= 500:
            raise httpx.TransportError(f"status {reply.status_code}")
        return _content(reply, address)

    tries = partial(
        tenacity.Retrying,
        retry=tenacity.retry_if_exception_type(httpx.TransportError),
        stop=tenacity.stop_after_attempt(TRIES),
        wait=tenacity.wait_exponential(multiplier=0.25, max=4.0),
        reraise=True,
    )

    def patiently(text: str) -> str:
        try:
            return tries()(ask, text)
        except httpx.TransportError as error:
            raise ValueError(f"no answer from the judge at {address}, asked {TRIES} times: {str(error) or type(error).__name__}") from error

    return patiently


def _content(reply: Any, address: str) -> str:
    """The text of a reply. Errors: ValueError, one line, for one that refuses, or is of another form."""
    if reply.status_code != 200:
        raise ValueError(f"the judge at {address} refuses, status {reply.status_code}: {' '.join(reply.text.split())[:200]}")
    try:
        return reply.json()["choices"][0]["message"]["content"] or ""
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"the judge at {address} gives no chat completion: {' '.join(reply.text.split())[:200]}") from error
