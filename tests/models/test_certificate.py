"""Certificates: what is equal passes, and each kind of error shows in the measure that is there for it."""

import json
from dataclasses import replace

import pytest
import torch

from treetune.core import tree
from treetune.models import certificate, certificate_checks, decode, dense, hf, plain_model
from treetune.ops import attention


@pytest.fixture(scope="module")
def subject(oracle):
    path = oracle("mistral")[1]
    return certificate_checks.Subject(hf.load(path), plain_model.load(path), certificate.seeded_documents(96))


def measures(check, subject):
    return {measure.name: measure for measure in check(subject)}


def over(check, subject):
    return [name for name, measure in measures(check, subject).items() if not (measure.limit is None or measure.value <= measure.limit)]


@pytest.mark.parametrize("kind,tied", [("mistral", False), ("qwen2", True)])
def test_a_native_model_passes(oracle, kind, tied):
    result = certificate.certify(oracle(kind, tied)[1])
    assert result.passed and result.outcome == "native" and certificate.differences(result) == []
    rows = {row.name: row for row in result.rows}
    assert rows["packed, bit for bit"].measure == 0 and rows["adapter targets"].measure == 14
    assert rows["gradient"].note.startswith("28 leaves" if kind == "qwen2" else "21 leaves") or "leaves" in rows["gradient"].note
    assert {row.dtype for row in result.rows} == {"float32"} and len(rows) == len(result.rows) == 13
    moved = rows["adapter, as merged"].note
    assert float(moved.rpartition(" ")[2]) > 0.1, "the adapter does something"


@pytest.mark.parametrize("leaf", ["layers.1.input_norm", "layers.0.up_proj", "embed_tokens"])
def test_other_weights_show_against_transformers(subject, leaf):
    params = tree.map(torch.clone, subject.model.params)
    dict(tree.items(params))[leaf].mul_(1.01)
    other = subject._replace(model=subject.model._replace(params=params))
    assert over(certificate_checks.compare_logits, other) == ["logits"]
    assert over(certificate_checks.compare_gradients, other) == ["loss", "gradient"]


def test_another_function_shows_against_transformers(subject):
    wrong = subject._replace(model=subject.model._replace(cfg=replace(subject.model.cfg, window=9)))
    assert over(certificate_checks.compare_logits, wrong) == ["logits"]


def test_a_leak_between_documents_shows(subject, monkeypatch):
    plan = attention.plan

    def joined(batch, **options):
        whole = torch.tensor([0, len(batch["tokens"])], dtype=torch.int32)
        return plan({name: value for name, value in batch.items() if name != "positions"} | {"cu_docs": whole}, **options)

    monkeypatch.setattr(attention, "plan", joined)
    assert over(certificate_checks.isolate_documents, subject) == ["packed, bit for bit"]
    assert over(certificate_checks.compare_packed, subject) == ["packed, as alone"]
    assert over(certificate_checks.compare_shared_prompt, subject) != []


def test_branches_that_see_each_other_show(subject, monkeypatch):
    plan = attention.plan
    monkeypatch.setattr(
        attention, "plan", lambda batch, **options: plan({k: batch[k] for k in batch if k not in ("branch", "start")}, **options)
    )
    names = over(certificate_checks.compare_shared_prompt, subject)
    assert names == ["shared prompt, as copied", "shared prompt, gradient"]


def test_a_token_that_sees_later_ones_shows(subject, monkeypatch):
    forward = dense.forward

    def reversed_(weights, batch, *rest, **options):
        out = forward(weights, batch, *rest, **options)
        return out._replace(hidden=out.hidden + out.hidden.mean(0))

    assert over(certificate_checks.hide_later_tokens, subject) == []
    monkeypatch.setattr("treetune.models.llama.forward", reversed_)
    assert over(certificate_checks.hide_later_tokens, subject) == ["later tokens unseen"]


def test_a_cache_that_differs_shows(subject, monkeypatch):
    pick = decode.pick
    monkeypatch.setattr(decode, "pick", lambda logits, *rest: pick(logits * 1.0001, *rest))
    names = over(certificate_checks.compare_decoding, subject)
    assert names == ["cached decoding, as forward", "cached branches, as forward"]


def test_an_adapter_that_does_not_reach_a_layer_shows(subject, monkeypatch):
    merge = certificate_checks.lora.merge
    monkeypatch.setattr(certificate_checks.lora, "merge", lambda params, pairs, scale: merge(params, pairs, scale * 1.01))
    assert over(certificate_checks.compare_adapter, subject) == ["adapter, as merged"]


def test_relative_errors_name_what_one_side_lacks():
    one, other = {"a": torch.ones(4), "b": torch.full((4,), 1e-7)}, {"a": torch.ones(4) * 1.01, "b": torch.zeros(4)}
    errors, note = certificate_checks.relative_errors(other, one)
    assert errors["a"] == pytest.approx(0.01, rel=1e-4) and note == ""
    assert errors["b"] == pytest.approx(1e-3, rel=1e-4), "below 1e-4 of the largest: compared with that size"
    errors, note = certificate_checks.relative_errors({"a": torch.ones(4), "c": torch.ones(1)}, one)
    assert errors["b"] == errors["c"] == float("inf") and note.startswith("b has a gradient on one side")


def test_what_is_not_a_number_does_not_pass():
    row = certificate._judge(certificate_checks.Measure("logits", float("nan"), 1e-4), "float32")
    assert row.verdict == certificate.DIFFERENCE


def test_rounding_is_told_from_error_in_float64(subject, monkeypatch, oracle):
    path, seen = oracle("mistral")[1], []

    def measured(pair):
        seen.append(pair.model.cfg.dtype)
        return [certificate_checks.Measure("logits", 1.0 if pair.model.cfg.dtype == torch.float32 else 1e-12, 1e-4)]

    monkeypatch.setattr(
        certificate_checks, "CHECKS", (certificate_checks.Check(measured), certificate_checks.Check(measured, doubled=False))
    )
    rows = list(certificate.measure_rows(path, subject.model, subject.documents))
    assert [(row.verdict, row.dtype) for row in rows] == [("PASS", "float64"), ("DIFFERENCE", "float32")]
    assert seen == [torch.float32, torch.float64, torch.float32]


def test_what_does_not_fit_into_memory_is_left_out_and_said(subject, monkeypatch, oracle):
    monkeypatch.setattr(hf, "memory_bytes", lambda: 1)
    rows = [
        row for row in certificate.measure_rows(oracle("mistral")[1], subject.model, subject.documents) if row.verdict == "not measured"
    ]
    assert [row.name for row in rows] == ["compare gradients", "compare shared prompt"]
    noisy = certificate_checks.Check(lambda _: [certificate_checks.Measure("logits", 1.0, 1e-4)])
    (row,) = certificate._rows(noisy, subject, [], oracle("mistral")[1])
    assert row.verdict == "not measured" and "float64" in row.note


def test_a_part_that_is_refused_has_its_reason(subject, monkeypatch, oracle):
    def refused(subject):
        raise ValueError("sampling is not computed")

    monkeypatch.setattr(certificate_checks, "CHECKS", (certificate_checks.Check(refused),))
    (row,) = certificate.measure_rows(oracle("mistral")[1], subject.model, subject.documents)
    assert row.verdict == "refused" and row.note == "sampling is not computed"


def test_a_model_that_is_refused_has_its_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    result = certificate.certify(tmp_path)
    assert result.outcome == "refused" and "no_such_model" in result.reason and not result.passed
    assert certificate.describe(result)[0].startswith("REFUSED")


def test_weights_that_are_not_finite_are_refused_by_name(oracle, tmp_path):
    """As a run refuses them: every measure would be nan, which names no weight."""
    model = hf.load(oracle("mistral")[1])
    model.params["layers"][0]["q_proj"][0, 0] = torch.nan
    hf.save(tmp_path / "nan", model)
    result = certificate.certify(tmp_path / "nan")
    assert result.outcome == "refused" and "not finite: layers.0.q_proj" in result.reason


def test_a_certificate_is_kept_by_digest_and_versions(oracle, tmp_path, monkeypatch):
    monkeypatch.setenv("TREETUNE_HOME", str(tmp_path))
    row = certificate.Row("logits", 1e-6, 1e-4, "PASS", "float32", "")
    result = certificate.Certificate("a", "d1", "llama", "native", "", (row,))
    certificate.keep(result)
    assert certificate.recall("d1") == result and certificate.recall("d2") is None
    monkeypatch.setattr(certificate, "FORMAT", 0)
    assert certificate.recall("d1") is None, "of other versions"
    monkeypatch.undo()
    monkeypatch.setenv("TREETUNE_HOME", str(tmp_path))
    certificate.place("d1").write_text("{")
    assert certificate.recall("d1") is None


def test_documents_are_those_of_the_tokenizer(oracle, words, tmp_path):
    model = hf.load(oracle("llama")[1])
    hf.save(tmp_path / "m", model, tokenizer=words)
    documents = certificate.example_documents(tmp_path / "m", model)
    assert documents[0] == words(certificate.TEXTS[0])["input_ids"][:64] and len(documents) == 3
    assert max(map(len, certificate.example_documents(oracle("llama")[1], model))) == 24
