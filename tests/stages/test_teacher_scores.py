"""Distillation from stored scores: the stage against dense distributions, and `Fit` learning from what it wrote."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.stages.toy import DATA, INIT, Types, make
from tutelage.context import Stopped
from tutelage.graph import key
from tutelage.learn.optim import AdamW
from tutelage.losses.top_k import TailForwardKL, TopKReverseKL
from tutelage.spec import SpecError, UserError
from tutelage.stages import teacher_scores
from tutelage.stages.fit import Fit
from tutelage.stages.model import NewModel
from tutelage.stages.teacher_scores import NAMES, TeacherScores
from tutelage.store import Store
from tutelage.text.rows import read_rows
from tutelage.text.signals import read_signals
from tutelage.text.template import Chat, Document

OTHER = INIT.model_copy(update={"name": "other", "seed": 8})


def scores(**more):
    return TeacherScores(**{"name": "scores", "teacher": OTHER.out(), "data": DATA.out(), "k": 6, **more})


def fit(**more):
    fields = {"name": "fit", "model": INIT.out(), "data": scores().out(), "loss": TailForwardKL(), "steps": 1, "rows": 25}
    return Fit(**{**fields, **more})


def samples_of(store, stage):
    """The stage's data as samples with what it wrote."""
    from tutelage.model.folder import load_tokenizer

    folder = store.path(key(stage), "data")
    tokenizer = load_tokenizer(store.path(key(INIT), "policy"))
    made = [Chat().example(tokenizer, r["prompt"], r["completion"]) for r in read_rows(folder)]
    read_signals(folder, made, NAMES)
    return made


def dense(model, sample):
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(sample.tokens)[None]).logits[0, sample.trained - 1]
    return logits.log_softmax(-1)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("stores") / "s")
    make(scores(), store)
    make(fit(), store)
    return store


def stock(store, stage):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(store.path(key(stage), "policy")).eval()


def test_what_is_stored_is_the_teachers_distribution_cut_at_k(store):
    teacher, made = stock(store, OTHER), samples_of(store, scores())
    assert len(made) == 25
    for s in made:
        logprobs = dense(teacher, s)
        ids, stored = s.signals["teacher_topk"].values, s.signals["teacher_topk_logp"].values
        assert ids.shape == (len(s.trained), 6)
        assert np.array_equal(ids, logprobs.topk(6).indices)
        np.testing.assert_allclose(stored[:, :6], logprobs.topk(6).values, atol=1e-5)
        np.testing.assert_allclose(np.exp(stored).sum(-1), 1, atol=1e-5)
        assert s.signals["teacher_topk"].provenance["model"] == "other"


def test_fit_reports_the_divergence_of_dense_distributions(store):
    student, teacher = stock(store, INIT), stock(store, OTHER)
    found = []
    for s in samples_of(store, scores()):
        for p, q in zip(dense(student, s).exp().tolist(), dense(teacher, s).exp().tolist(), strict=True):
            best = sorted(range(len(q)), key=lambda v: -q[v])[:6]
            pairs = [(q[v], p[v]) for v in best] + [(1 - sum(q[v] for v in best), 1 - sum(p[v] for v in best))]
            found.append(sum(b * np.log(b / a) for b, a in pairs))
    (line,) = store.metrics(key(fit()))
    assert line["forward_kl"] == pytest.approx(np.mean(found), rel=1e-3)


@pytest.mark.parametrize("loss", [TailForwardKL(), TopKReverseKL()])
def test_the_student_comes_to_the_teacher(store, loss):
    stage = fit(steps=60, loss=loss, optimizer=AdamW(lr=0.01))
    make(stage, store)
    values = [m[loss.measure] for m in store.metrics(key(stage))]
    assert values[-1] < 0.2 * values[0]


def test_a_teacher_that_is_the_student_moves_nothing(store):
    stage = fit(data=scores(teacher=INIT.out()).out(), steps=2)
    make(stage, store)
    weights = [load_file(store.path(key(s), "policy") / "model.safetensors") for s in (stage, INIT)]
    assert all(torch.equal(weights[0][n], weights[1][n]) for n in weights[1])


def test_scoring_stopped_anywhere_resumes_to_the_same_bits(store, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_scores, "PART", 7)
    cut, whole = Store(tmp_path / "cut"), Store(tmp_path / "whole")
    for after in (1, 2):
        calls = []
        with pytest.raises(Stopped):
            make(scores(), cut, stopping=lambda: calls.append(1) or len(calls) >= after)  # noqa: B023
    resumed, done = make(scores(), cut), make(scores(), whole)
    files = [s.path(key(scores()), "data") / "signals.parquet" for s in (cut, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert resumed.cost == done.cost


# --- what is refused ---


def refused(stage, *words):
    with pytest.raises(SpecError) as error:
        stage.infer(Types())
    assert all(word in str(error.value) for word in words), error.value


def test_data_without_scores_or_of_another_tokenizer():
    refused(fit(data=DATA.out()), "TailForwardKL", "teacher_topk")
    foreign = NewModel(name="foreign", alphabet="abc", width=32, layers=1, mlp=48)
    refused(fit(data=scores(teacher=foreign.out()).out()), "another tokenizer", "scores.data")
    refused(scores(k=10_000), "vocabulary", "smaller k")
    refused(scores(data=scores().out(), template=Document(), teacher=DATA.out()), "is no model")


def test_another_template_than_was_scored_is_one_line(store):
    with pytest.raises(UserError, match=r"row 0: other tokens.*template"):
        make(fit(template=Document()), store)
