"""A judge behind a chat endpoint: what it is asked, what is read of its replies, and what goes wrong. The endpoint is a fake here."""

import http.server
import json
import threading
import time

import numpy as np
import pytest

from treetune.core.data.prompts import Prompt
from treetune.core.rollout import judge
from treetune.core.rollout.group import Completion, Group
from treetune.core.rollout.reward_pool import Pool


@pytest.fixture
def endpoint():
    """(address, bodies and headers that it got, a list of functions of a body -> (status, reply), the last of which stays)."""
    seen, replies = [], [lambda body: (200, "7")]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append((self.path, body, dict(self.headers)))
            status, said = (replies.pop(0) if len(replies) > 1 else replies[0])(body)
            data = json.dumps({"choices": [{"message": {"content": said}}]} if status == 200 else {"error": said}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen, replies
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("7", 7), (" 8.5\n", 8.5), ("-1", -1), ("7/10", 7), ("9 out of 10", 9), ("**Score:** 6/10, as 2 + 2 is 4", 6),
        ("Of 3 criteria 2 hold. Rating: 5", 5), ("<think>maybe 3, or 4</think>\n8", 8), ("I give it a 4.", 4),
        ("Score: 2 ... final score is 3", 3), ("Score: -3", -3), ("**Score:** -0.5", -0.5), ("score = .5", 0.5), ("Score - 7", 7),
        ("Score-7", 7), ("Score (0-10): 7", 7), ("Rating (from 1 to 5): 4", 4), ("Grade (out of 10): 8", 8), ("Score (/10): 9", 9),
        ("Score (8): good", 8), ("Score (8/10)", 8), ("Score is -1", -1), ('{"score": -2}', -2),
        ("no", None), ("", None), ("either 3 or 4", None), ("version v2", None), ("<think>3", None),
    ],
)  # fmt: skip
def test_number_of_a_reply(reply, value):
    assert judge.number(reply) == value


def test_a_judge_is_asked_of_each_completion_with_prompt_and_reference(endpoint, monkeypatch):
    url, seen, replies = endpoint
    replies[:] = [lambda body: (200, "10" if "4!" in body["messages"][0]["content"] else "2")]
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    chats = [[{"role": "user", "content": "2 + 2"}], [{"role": "system", "content": "short"}, {"role": "user", "content": "{completion}"}]]
    found = judge.llm_judge(["4!", [{"role": "assistant", "content": "5"}]], chats, url=url, model="m", answer=["four", None])
    assert found == [10, 2]
    texts = sorted((body["messages"][0]["content"] for _, body, _ in seen), key=lambda text: "4!" not in text)
    assert "<prompt>\n2 + 2\n</prompt>" in texts[0] and "<good_answer>\nfour\n" in texts[0]
    assert "system: short\nuser: {completion}" in texts[1] and judge.NO_REFERENCE in texts[1], "what is filled in is no template"
    (path, body, headers), _ = seen
    assert path == "/v1/chat/completions" and body["model"] == "m" and body["temperature"] == 0
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == "Bearer secret"


def test_a_number_is_a_good_answer(endpoint):
    url, seen, _ = endpoint
    judge.llm_judge(["x"] * 4, ["p"] * 4, url=url, model="m", answer=[42, 0.5, True, float("nan")], solution=[None, None, "yes", None])
    texts = sorted(body["messages"][0]["content"].partition("<good_answer>\n")[2].partition("\n")[0] for _, body, _ in seen)
    assert texts == [judge.NO_REFERENCE, "0.5", "42", "yes"]


def test_a_template_names_columns(endpoint, tmp_path):
    url, seen, _ = endpoint
    file = tmp_path / "ask.txt"
    file.write_text('{kind}: {completion} {"score": NUMBER} {unknown}')
    assert judge.llm_judge(["x"], ["p"], url=url, model="m", template=str(file), kind=["poem"]) == [7]
    assert seen[0][1]["messages"][0]["content"] == 'poem: x {"score": NUMBER} {unknown}'


def test_what_passes_is_tried_again(endpoint, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    url, seen, replies = endpoint
    replies[:] = [lambda body: (503, "busy"), lambda body: (429, "slow down"), lambda body: (200, "3")]
    assert judge.llm_judge(["x"], ["p"], url=url, model="m") == [3] and len(seen) == 3


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, r"expected llm_judge\?url=http://HOST:PORT/v1,model=NAME"), ({"url": "localhost:8000", "model": "m"}, "expected llm_judge"),
        ({"url": "http://127.0.0.1:9", "model": "m", "temperatur": 1}, "llm_judge has no option temperatur"),
        ({"url": "http://127.0.0.1:9", "model": "m", "template": "none.txt"}, "there is no such file"),
    ],
)  # fmt: skip
def test_options_are_checked_before_anything_is_asked(options, match):
    with pytest.raises(ValueError, match=match):
        judge.llm_judge([], [], **options)


def test_failures_are_one_line(endpoint, monkeypatch, tmp_path):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    url, seen, replies = endpoint
    (tmp_path / "t.txt").write_text("score this")
    with pytest.raises(ValueError, match=r"has no \{completion\}"):
        judge.llm_judge([], [], url=url, model="m", template=str(tmp_path / "t.txt"))
    replies[:] = [lambda body: (401, "bad\nkey")]
    with pytest.raises(ValueError, match="refuses, status 401") as refused:
        judge.llm_judge(["x"], ["p"], url=url, model="m")
    assert "\n" not in str(refused.value) and len(seen) == 1, "a refusal is final"
    with pytest.raises(ValueError, match="no answer from the judge at http://127.0.0.1:1/v1/chat/completions, asked 4 times"):
        judge.llm_judge(["x"], ["p"], url="http://127.0.0.1:1/v1", model="m")


def test_a_judge_is_a_reward_like_others(endpoint):
    """In a worker process, by its name with options, with columns of the prompts."""
    url, seen, replies = endpoint
    replies[:] = [lambda body: (200, "1" if "\nno\n" in body["messages"][0]["content"] else "9")]
    ids = np.zeros(1, np.int32)
    two = tuple(Completion(ids, np.zeros(1, np.float32), np.ones(1, bool), True, text) for text in ("yes", "no"))
    with Pool([f"llm_judge?url={url},model=m"]) as pool:
        scores = pool.score([Group(Prompt(ids, "is it?", None, {"answer": "yes"}, 1), 0, two, 0)])
    assert scores.tolist() == [[[9], [1]]] and "<good_answer>\nyes\n" in seen[0][1]["messages"][0]["content"]
