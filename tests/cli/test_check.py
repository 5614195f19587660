"""`treetune check`: the table, the exit codes, and the certificate that is kept."""

import json

import pytest

from treetune.models import certificate, hf


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("TREETUNE_HOME", str(tmp_path / "home"))


def test_a_model_that_passes(tiny, tune):
    done = tune("check", tiny.model)
    assert done.code == 0, done.err
    assert "PASS" in done.out and "native (family llama), all measures within their limits" in done.out and "DIFFERENCE" not in done.out
    kept = [line.removeprefix("kept in ") for line in done.out.splitlines() if line.startswith("kept in ")]
    entry = json.loads(open(kept[0]).read())
    assert entry["outcome"] == "native" and entry["versions"]["transformers"]
    assert certificate.recall(entry["digest"]).passed


def test_a_model_that_differs(tiny, tune, monkeypatch):
    load = hf.load

    def changed(path, **options):
        model = load(path, **options)
        model.params["norm"].mul_(1.01)
        return model

    monkeypatch.setattr(hf, "load", changed)
    done = tune("check", tiny.model)
    assert done.code == 1 and "DIFFERENCE    logits" in done.out and "over their limit" in done.out


def test_a_model_that_is_refused(tiny, tune, here):
    (here / "config.json").write_text((tiny.model / "config.json").read_text().replace('"silu"', '"gelu"'))
    done = tune("check", here)
    assert done.code == 2 and "REFUSED" in done.out and "hidden_act" in done.out


def test_a_file_of_gguf_is_no_folder(tune, here):
    (here / "m.gguf").write_bytes(b"GGUF")
    done = tune("check", "m.gguf")
    assert done.code == 2 and "folder" in done.err
