"""Uploads to the hub: what is committed and when, the card, and a hub that fails, hangs or is not there."""

import importlib.util
import json
import threading
import time
from pathlib import Path

import pytest
import yaml

from treetune.cli import hub as cli_hub
from treetune.core import hub_repos, manifest
from treetune.core.run import cards, published
from treetune.models import adapter as adapters
from treetune.models import hf, loading


def _load(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hub_server = _load("hub_server")


@pytest.fixture
def hub(monkeypatch):
    """A fake hub that this process talks to, with a token that it takes."""
    from huggingface_hub import constants

    one = hub_server.Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", one.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{one.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}")
    monkeypatch.setattr(hub_repos, "WAITS", (0.01,))
    monkeypatch.setenv("HF_ENDPOINT", one.url)
    monkeypatch.setenv("HF_TOKEN", hub_server.TOKEN)
    yield one
    one.close()


def matter(text):
    """The front matter of a card."""
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_a_run_is_uploaded_with_its_card_and_its_tokenizer(hub, sft, here, tiny, kit):
    done = sft("--output-dir", "run", "--hub-model-id", "sums", "--hub-strategy", "end", "--val-set-size", 4, "--eval-steps", 1)
    assert done.code == 0, done
    assert hub.repos["me/sums"]["private"] and [commit[:2] for commit in hub.commits] == [("me/sums", "main")]
    files, listed = hub.files("me/sums"), json.loads((here / "run/adapter" / manifest.NAME).read_text())["files"]
    assert set(files) == {*listed, manifest.NAME}
    for name in set(files) - {cards.CARD}:
        assert files[name] == (here / "run/adapter" / name).read_bytes(), name
    assert hf.tokenizer(here / "run/adapter").get_vocab() == hf.tokenizer(tiny.model).get_vocab()
    assert hf.tokenizer(here / "run/adapter").chat_template == kit.CHATML
    card = files[cards.CARD].decode()
    assert matter(card) == {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["treetune", "sft", "lora"]}
    evaluations = [one for one in kit.metrics(here / "run") if "eval/loss" in one]
    best = min(evaluations, key=lambda one: one["eval/loss"])
    assert f"best (step {best['step']})" in card and f"{best['eval/loss']:.5g}" in card and manifest.entry(tiny.chat).sha256 in card
    shown = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    config = yaml.safe_load((here / "run/config.yaml").read_text())
    assert shown == published.cleared(config) and shown["model"] == tiny.model.name and str(tiny.model.parent) in config["model"]
    public = card + files[cards.FACTS].decode()
    assert str(tiny.model.parent) not in public and str(here) not in public
    assert 'from_pretrained("me/sums")' in card and "vllm serve" in card and "treetune chat --adapter sums" in card
    assert "hf_good" not in (here / "run/config.yaml").read_text() + card


@pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
def test_checkpoints_are_uploaded_as_they_come(strategy, hub, sft, here, tune, tiny, kit):
    args = ("--output-dir", "run", "--max-steps", 4, "--save-steps", 1, "--save-total-limit", 1)
    done = sft(*args, "--hub-model-id", "me/sums", "--hub-strategy", strategy, "--hub-revision", "dev", "--no-hub-private-repo")
    assert done.code == 0, done
    assert not hub.repos["me/sums"]["private"] and not hub.files("me/sums", "main")
    files, summaries = hub.files("me/sums", "dev"), [commit[2] for commit in hub.commits]
    assert summaries[-1] == "End of training: adapter" and "adapter_model.safetensors" in files
    folders = {name.rpartition("/")[0] for name in files} - {""}
    if strategy == "every_save":
        assert folders == set() and any(text.startswith("Step ") for text in summaries)
    elif strategy == "checkpoint":
        assert folders == {"last-checkpoint"}
        inside = here / "run/checkpoints/step_000004"
        assert all(files[f"last-checkpoint/{path.name}"] == path.read_bytes() for path in inside.iterdir())
    else:
        assert folders == {f"checkpoints/step_{step:06d}" for step in (1, 2, 3, 4)}
        assert [text for text in summaries if text.startswith("Step ")] == ["Step 1", "Step 2", "Step 3"]
    assert files["adapter_model.safetensors"] == (here / "run/adapter/adapter_model.safetensors").read_bytes()
    assert not [path for path in (here / "run").iterdir() if path.name.startswith(".hub")]
    if strategy == "checkpoint":
        for name in files:
            (here / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (here / "copy" / name).write_bytes(files[name])
        done = tune("sft", *kit.basics(tiny, "--resume", "copy/last-checkpoint", "--output-dir", "on", "--max-steps", 5))
        assert done.code == 0 and kit.metrics(here / "on")[-1]["step"] == 5, done


def test_training_waits_for_no_upload(hub, sft, here, kit):
    """The hub answers nothing until the last step is made."""
    hub.held.clear()
    threading.Thread(target=_open_after, args=(hub, here / "run/metrics.jsonl", 4), daemon=True).start()
    done = sft("--output-dir", "run", "--max-steps", 4, "--save-steps", 1, "--hub-model-id", "sums")
    assert done.code == 0 and kit.metrics(here / "run")[-1]["step"] == 4, done
    assert [commit[2] for commit in hub.commits][-1] == "End of training: adapter" and len(hub.commits) <= 3


def _open_after(hub, file, step):
    for _ in range(600):
        if file.exists() and f'"step": {step}' in file.read_text():
            break
        time.sleep(0.05)
    hub.held.set()


def test_a_hub_that_fails_costs_nothing_but_the_upload(hub, sft, tune, here, kit):
    plain = sft("--output-dir", "plain")
    hub.fail = 507  # one that huggingface_hub does not try again for half a minute
    done = sft("--output-dir", "run", "--hub-model-id", "sums", "--hub-strategy", "checkpoint", "--save-steps", 1)
    assert plain.code == 0 and done.code == 1, done
    said = " ".join((done.out + done.err).split())
    assert "what trained is safe in run/adapter, and not on the hub" in said and "treetune push run me/sums" in said
    assert kit.timeless(kit.metrics(here / "run")) == kit.timeless(kit.metrics(here / "plain"))
    assert kit.same(*(kit.tensors(here / name / "adapter/adapter_model.safetensors") for name in ("plain", "run")))
    failed = tune("push", "run", "me/sums")
    assert failed.code == 1 and "not on the hub: the hub answered 507" in failed.err, failed
    hub.fail = None
    assert tune("push", "run", "me/sums").code == 0
    assert hub.files("me/sums")["adapter_model.safetensors"] == (here / "run/adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("status,sent", [(409, True), (412, True), (403, False)])
def test_an_upload_that_meets_another_is_made_again(hub, here, status, sent):
    (here / "model").mkdir()
    (here / "model/a.txt").write_text("a")
    repo = hub_repos.prepare(hub_repos.Repo("sums"), "hub_model_id")
    hub.fail, hub.once = status, True
    if sent:
        hub_repos.upload(repo, here / "model", "all")
    else:
        with pytest.raises(hub_repos.Unsent, match="may not write there"):
            hub_repos.upload(repo, here / "model", "all")
    assert hub.fail is None and bool(hub.commits) == sent


def test_a_hub_that_goes_away(hub, sft, here):
    """After the run has begun: the connection is refused."""
    real = hub_repos.prepare

    def gone(*args):
        repo = real(*args)
        hub.close()
        return repo

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hub_repos, "prepare", gone)
        done = sft("--output-dir", "run", "--hub-model-id", "sums", "--hub-strategy", "end")
    assert done.code == 1 and "is not reached" in " ".join((done.out + done.err).split()), done
    assert adapters.base_of(here / "run/adapter")


REFUSED = {
    "token": ({"HF_TOKEN": "hf_bad"}, "sums", "the hub does not take the token"),
    "owner": ({}, "others/sums", "may not write there"),
    "name": ({}, "a/b/c", "must be NAME or OWNER/NAME"),
    "characters": ({}, "my sums", "must be NAME or OWNER/NAME"),
    "no hub": ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "sums", "is not reached"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_hub_does_not_take_is_refused_before_anything_is_written(case, hub, sft, here, kit, monkeypatch):
    values, name, text = REFUSED[case]
    for key, value in values.items():
        monkeypatch.setenv(key, value)
    kit.refused(sft("--hub-model-id", name), "hub_model_id", text)
    assert kit.listing(here) == set() and not hub.commits and "me/b" not in hub.repos


def test_a_merged_model_is_uploaded_with_its_measured_error(hub, sft, tune, here, kit):
    assert sft("--output-dir", "run", "--learning-rate", 0.01).code == 0
    done = tune("merge", "run", "merged", "--save-dtype", "bfloat16", "--max-logit-diff", 10)
    assert done.code == 0, done
    largest = cards.read(here / "merged")["merge"]["largest"]
    assert f"{largest:.2e}" in done.out and f"{largest:.2e}" in (here / "merged" / cards.CARD).read_text()
    assert hf.load(here / "merged").family
    assert tune("push", "run", "sums", "--merged", "merged", "--revision", "whole").code == 0
    card = hub.files("me/sums", "whole")[cards.CARD].decode()
    assert (
        f"at most {largest:.2e}" in card
        and matter(card)["library_name"] == "transformers"
        and "model.safetensors" in hub.files("me/sums", "whole")
    )
    assert sft("--output-dir", "other", "--learning-rate", 0.02).code == 0
    kit.refused(tune("push", "other", "sums", "--merged", "merged"), "is not the merged model of other/adapter")
    kit.refused(tune("push", "run", "sums", "--merged", "run/adapter"), "no measured merge error")
    kit.refused(tune("push", here, "sums"), "holds no adapter and no model")


def test_the_command_that_uploads_by_hand_is_quoted_for_a_shell():
    repo = hub_repos.Repo("me/sums", "try", private=False)
    assert cli_hub.by_hand(Path("my runs/first/adapter"), repo) == "treetune push 'my runs/first' me/sums --revision try --no-private"


def test_a_token_that_may_only_read_is_refused_where_the_repository_is_there(hub, monkeypatch):
    hub_repos.prepare(hub_repos.Repo("sums"), "REPO")
    monkeypatch.setenv("HF_TOKEN", hub_server.READER)
    with pytest.raises(ValueError, match=r"^REPO sums: the token may only read: make one that may write"):
        hub_repos.prepare(hub_repos.Repo("sums"), "REPO")


def _raise(error):
    raise error


def test_an_upload_takes_the_place_of_the_one_before(hub, here, monkeypatch):
    """Files of an adapter beside a merged model would be loaded; what somebody else has put there stays."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalEntryNotFoundError

    repo = hub_repos.prepare(hub_repos.Repo("sums"), "REPO")
    for name, files in {"adapter": ("adapter_config.json", "adapter_model.safetensors", "README.md"), "model": ("config.json",)}.items():
        for part in (here / name, here / name / "last-checkpoint"):
            part.mkdir()
            for file in files:
                (part / file).write_text(name)
            manifest.write(part)
    hub_repos.upload(repo, here / "adapter", "adapter")
    hub.files("me/sums")["notes.txt"] = hub.files("me/sums")["last-checkpoint/notes.txt"] = b"mine"
    real, failures = HfApi.hf_hub_download, [LocalEntryNotFoundError("no network for a moment")]
    monkeypatch.setattr(HfApi, "hf_hub_download", lambda *args, **options: _raise(failures.pop()) if failures else real(*args, **options))
    hub_repos.upload(repo, here / "model", "model")
    kept = {"config.json", manifest.NAME, "README.md", "notes.txt"}
    assert set(hub.files("me/sums")) == kept | {f"last-checkpoint/{name}" for name in kept}
    for path, data in hub.files("me/sums").items():
        (here / "back" / path).parent.mkdir(parents=True, exist_ok=True)
        (here / "back" / path).write_bytes(data)
    assert manifest.check(here / "back/last-checkpoint")


def test_a_card_may_be_edited(hub, sft, tune, here, tiny):
    assert sft("--output-dir", "run").code == 0
    (here / "run/adapter" / cards.CARD).write_text("---\nlicense: mit\n---\nMine.\n")
    loading.load_adapter("run", hf.load(tiny.model))
    assert tune("push", "run", "sums").code == 0 and hub.files("me/sums")[cards.CARD] == b"---\nlicense: mit\n---\nMine.\n"
    assert sft("--output-dir", "run", "--overwrite").code == 2  # it is the user's file, which is not deleted


def test_documents_of_preprocess_are_uploaded_and_read_again(hub, tune, here, tiny, kit):
    rows = kit.write_rows(here / "rows.jsonl", kit.chats(5))
    args = ("--model", tiny.model, "--data", rows)
    done = tune("preprocess", *args, "--push-dataset-to-hub", "me/rows")
    assert done.code == 0 and "uploaded 5 documents" in done.out, done
    assert hub.repos["me/rows"]["private"] and hub.repos["me/rows"]["kind"] == "dataset"
    (here / "back.jsonl").write_bytes(hub.files("me/rows")["train.jsonl"])
    found = [json.loads(line) for line in (here / "back.jsonl").read_text().splitlines()]
    assert all(set(row) == {"input_ids", "labels"} for row in found)
    card = hub.files("me/rows")["README.md"].decode()
    assert matter(card)["configs"][0]["data_files"][0]["path"] == "train.jsonl"
    assert f"- tokenizer of: {tiny.model.name}\n" in card and str(tiny.model.parent) not in card
    told = [
        tune("preprocess", "--model", tiny.model, "--data", file).out.split("documents")[1].split("time")[0]
        for file in (rows, here / "back.jsonl")
    ]
    assert [word for word in told[0].split() if word.isdigit()] == [word for word in told[1].split() if word.isdigit()]
    kit.refused(tune("preprocess", *args, "--no-hub-private-repo"), "there is no push_dataset_to_hub")


def test_a_file_of_axolotl_names_where_preprocess_uploads_to(hub, tune, here, tiny, kit):
    rows = kit.write_rows(here / "rows.jsonl", kit.chats(5))
    file = here / "run.yaml"
    file.write_text(
        f"base_model: {tiny.model}\ndatasets:\n  - path: {rows}\n    type: chat_template\npush_dataset_to_hub: me/rows\n"
        "adapter: lora\nlora_r: 4\nlora_alpha: 8\nlora_target_linear: true\nmicro_batch_size: 1\nmax_steps: 1\n"
        "learning_rate: 1e-4\noutput_dir: out\n"
    )
    kit.refused(tune("train", file), "nearest: treetune preprocess FILE, which uploads")
    done = tune("preprocess", file)
    assert done.code == 0 and "uploaded 5 documents" in done.out, done
    assert len(hub.files("me/rows")["train.jsonl"].splitlines()) == 5 and not (here / "out").exists()
