"""Preparing chat rows for training: treetune against TRL on the same rows, interleaved, each run in its own process.

Rows become token ids with masks (SmolLM2's tokenizer, GSM8K as one-turn chats, max length 2048). Ours also runs a second time
from its cache. TRL's part is what SFTTrainer does to its data set on construction, with one and with two worker processes.

    python benchmarks/prepare.py --rows path/to/gsm8k_train.jsonl        (needs the extra `bench`)
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import harness
from step_sft import model_folder, read

MAX_LENGTH = 2048


def chats(path: str) -> list[list[dict]]:
    rows = read(path, 10**9)
    return [[{"role": "user", "content": row["user"]}, {"role": "assistant", "content": row["assistant"]}] for row in rows]


def ours(args: argparse.Namespace) -> dict:
    """Encode, then load the same documents from the cache."""
    from treetune.core.data import cache, formats, sources
    from treetune.models import hf

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in chats(args.rows)))
        tokenizer = hf.tokenizer(args.model)
        start = time.perf_counter()
        docs, report = formats.encode_rows(sources.read(str(file)), tokenizer, sequence_len=MAX_LENGTH)
        seconds = time.perf_counter() - start
        key = cache.entry_key(data=[sources.digest_source(str(file))], tokenizer=tokenizer, options={"sequence_len": MAX_LENGTH})
        cache.save_entry(folder, key, docs, report)
        start = time.perf_counter()
        again = cache.entry_key(data=[sources.digest_source(str(file))], tokenizer=tokenizer, options={"sequence_len": MAX_LENGTH})
        cached_docs, _ = cache.load_entry(folder, again)
        second = time.perf_counter() - start
        assert len(cached_docs) == len(docs)
    return {"seconds": seconds, "second_start_s": second, "rows": report.rows, "tokens": report.tokens, "supervised": report.supervised}


def theirs(args: argparse.Namespace) -> dict:
    """What SFTTrainer does to a prompt-completion data set, on a model too small to matter."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    class Clocked(SFTTrainer):
        def _prepare_dataset(self, *parts, **keywords):
            start = time.perf_counter()
            dataset = super()._prepare_dataset(*parts, **keywords)
            self.seconds = time.perf_counter() - start
            return dataset

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    data = Dataset.from_list([{"prompt": talk[:1], "completion": talk[1:]} for talk in chats(args.rows)])
    shape = LlamaConfig(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    folder = tempfile.mkdtemp()
    config = SFTConfig(output_dir=folder, max_length=MAX_LENGTH, use_cpu=True, report_to="none", dataset_num_proc=args.workers, bf16=False)
    trainer = Clocked(LlamaForCausalLM(shape), config, train_dataset=data, processing_class=tokenizer)
    done = trainer.train_dataset
    supervised = sum(label != -100 for labels in done["labels"] for label in labels)
    return {"seconds": trainer.seconds, "rows": len(done), "tokens": sum(map(len, done["input_ids"])), "supervised": supervised}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", required=True)
    parser.add_argument("--model", default=None)
    parser.add_argument("--side", default=None)
    parser.add_argument("--workers", type=int, default=None)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.model = args.model or model_folder()
    if args.side is not None:
        print(json.dumps({"ours": ours, "trl": theirs}[args.side](args)))
        return
    common = ["--rows", args.rows, "--model", args.model]
    sides = {"ours": ["--side", "ours"], "trl": ["--side", "trl"], "trl_2_workers": ["--side", "trl", "--workers", "2"]}
    runs = harness.interleave(__file__, [[*side, *common] for side in sides.values()], args.repeats)
    medians = {name: harness.medians(side) for name, side in zip(sides, runs, strict=True)}
    best = min(medians["trl"]["seconds"], medians["trl_2_workers"]["seconds"])
    result = {"benchmark": "prepare", "machine": harness.machine(), **medians, "speed": best / medians["ours"]["seconds"]}
    result["runs"] = dict(zip(sides, runs, strict=True))
    print("speed", result["speed"], "saved", harness.save("prepare", result))


if __name__ == "__main__":
    main()
