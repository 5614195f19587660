"""A stand-in for vLLM's server: the endpoints that we use, on a model that is a table, with faults to switch on.

The model: logits of the next token are table[last token], [V, V]; an adapter adds a table of its own, made from the number in its
folder's adapter_config.json. As in vLLM, unknown options are ignored, raw log-probs ignore the temperature, seeds count up over the
completions of a prompt, and a stop token is part of the completion. As a program: fake_vllm.py --port P [--hang | --die | --stubborn].
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

VOCAB = 12
ROOT = "models/tiny"


def table(number: float, scale: float = 1.0) -> np.ndarray:
    """Logits [V, V] made from a number; 0 is no change."""
    return scale * number * np.random.default_rng(0).normal(size=(VOCAB, VOCAB))


BASE = table(1.0, 2.0)


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)) - x.max(-1, keepdims=True)


def logps(tokens: list[int], number: float = 0.0) -> np.ndarray:
    """What a trainer with this adapter would say of tokens[1:]."""
    rows = log_softmax(BASE + table(number))
    return np.array([rows[last, token] for last, token in zip(tokens[:-1], tokens[1:], strict=True)])


class Fake:
    """State and faults; `asked` holds (path, payload) of every request."""

    def __init__(self, mode: str = "processed_logprobs", max_model_len: int = 64):
        self.mode, self.max_model_len = mode, max_model_len
        self.adapters: dict[str, float] = {}
        self.asked: list[tuple[str, dict]] = []
        self.forgets = self.drops = False  # loads answer 200 and change nothing; connections close without an answer
        self.failures: list[int] = []  # statuses of the next answers
        self.spoil = lambda choices: choices  # what becomes of the completions
        self.number = 0.0  # of the base weights
        self.latest = 0.0

    def models(self) -> dict:
        names = {"tiny": ROOT} | {name: "adapter" for name in self.adapters}
        return {"data": [{"id": name, "root": root, "max_model_len": self.max_model_len} for name, root in names.items()]}

    def complete(self, ask: dict) -> tuple[int, dict]:
        if ask["model"] not in ("tiny", *self.adapters):
            return 404, {"error": {"message": f"The model `{ask['model']}` does not exist."}}
        if ask["temperature"] > 2:
            return 400, {"error": {"message": "temperature must be in [0, 2]"}}
        logits = BASE + table(self.number) + table(self.adapters.get(ask["model"], 0.0))
        choices = [self._choice(ask, logits, index) for index in range(ask.get("n", 1))]
        return 200, {"choices": self.spoil(choices[::-1])}

    def _choice(self, ask: dict, logits: np.ndarray, index: int) -> dict:
        generator = np.random.default_rng(ask["seed"] + index)
        tokens, reported, tops, last, reason = [], [], [], ask["prompt"][-1], "length"
        while len(tokens) < ask["max_tokens"] and reason == "length":
            raw = log_softmax(logits[last])
            drawn = kept(logits[last], ask)
            last = int(drawn.argmax()) if ask["temperature"] == 0 else int(generator.choice(VOCAB, p=np.exp(drawn)))
            shown = raw if self.mode == "raw_logprobs" else drawn
            tokens.append(last)
            reported.append(float(shown[last]))
            tops.append({str(shown.argmax()): float(shown.max())})
            reason = "stop" if last in ask.get("stop_token_ids", ()) else "length"
        choice = {"index": index, "token_ids": tokens, "finish_reason": reason, "prompt_token_ids": ask["prompt"],
                  "logprobs": {"token_logprobs": reported, "top_logprobs": tops}}  # fmt: skip
        if "prompt_logprobs" in ask:
            rows = log_softmax(logits)
            pairs = zip(ask["prompt"][:-1], ask["prompt"][1:], strict=True)
            choice["prompt_logprobs"] = [None] + [{str(token): {"logprob": float(rows[last, token])}} for last, token in pairs]
        return choice

    def load(self, ask: dict) -> tuple[int, dict]:
        file = Path(ask["lora_path"]) / "adapter_config.json"
        if ask["lora_name"] in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{ask['lora_name']}' has already been loaded."}}
        if not file.is_file():
            return 404, {"error": {"message": f"No adapter found for {ask['lora_path']}"}}
        found = json.loads(file.read_text())
        if found["r"] > 16:
            return 500, {"error": {"message": "LoRA rank 32 is greater than max_lora_rank 16."}}
        self.latest = self.latest if self.forgets else found["number"]
        self.adapters[ask["lora_name"]] = self.latest
        return 200, {}

    def unload(self, ask: dict) -> tuple[int, dict]:
        found = self.adapters.pop(ask["lora_name"], None)
        return (200, {}) if found is not None else (404, {"error": {"message": "cannot be found"}})

    def rpc(self, ask: dict) -> tuple[int, dict]:
        self.number = json.loads((Path(ask["kwargs"]["weights_path"]) / "config.json").read_text())["number"]
        return 200, {"results": [None]}

    def answer(self, path: str, ask: dict) -> tuple[int, dict]:
        routes = {"/v1/completions": self.complete, "/v1/load_lora_adapter": self.load, "/v1/unload_lora_adapter": self.unload,
                  "/collective_rpc": self.rpc, "/reset_prefix_cache": lambda ask: (200, {"success": True})}  # fmt: skip
        fixed = {"/v1/models": (200, self.models()), "/health": (200, {})}
        return fixed[path] if path in fixed else routes[path](ask) if path in routes else (404, {"detail": "Not Found"})


def kept(logits: np.ndarray, ask: dict) -> np.ndarray:
    """Log-probs of what is drawn from: after temperature, top_k and top_p."""
    logp = log_softmax(logits / (ask["temperature"] or 1.0))
    order = np.argsort(-logp)
    keep = np.zeros(VOCAB, bool)
    keep[order[: ask.get("top_k") or VOCAB]] = True
    inside = np.exp(logp[order]).cumsum() - np.exp(logp[order]) < ask.get("top_p", 1.0)
    keep[order[~inside]] = False
    return log_softmax(np.where(keep, logp, -1e9))


def serve(fake: Fake, port: int = 0) -> ThreadingHTTPServer:
    """The server, not yet running, bound to the loopback interface."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            size = int(self.headers.get("Content-Length") or 0)
            ask = json.loads(self.rfile.read(size)) if size else {}
            fake.asked.append((self.path, ask))
            if fake.drops:
                self.close_connection = True
                self.connection.close()
                return
            failing = fake.failures and self.path != "/health"
            status, body = (fake.failures.pop(0), {"error": {"message": "not now"}}) if failing else fake.answer(self.path, ask)
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default=None)
    parser.add_argument("--hang", action="store_true", help="never healthy")
    parser.add_argument("--die", action="store_true", help="end with an error before being healthy")
    parser.add_argument("--stubborn", default=None, help="ignore SIGTERM, with a worker that does too; the file gets both process ids")
    options, _ = parser.parse_known_args()
    if sockets := os.environ.get("VLLM_RPC_BASE_PATH"):
        (Path(sockets) / "socket").touch()  # vLLM removes its own only when it ends in good order
    if options.die:
        print("loading\nValueError: no space for the key/value cache", flush=True)
        sys.exit(3)
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])  # an ignored signal stays ignored
        Path(options.stubborn).write_text(f"{os.getpid()} {worker.pid}")
    if options.hang:
        time.sleep(300)
    fake = Fake()
    if options.model:
        fake.number = json.loads((Path(options.model) / "config.json").read_text()).get("number", 0.0)
    server = serve(fake, options.port)
    if not options.stubborn:
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    server.serve_forever()


if __name__ == "__main__":
    main()
