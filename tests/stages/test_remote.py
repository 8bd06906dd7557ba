"""A served teacher: a real HTTP server on a local port that holds a tiny model and answers as vLLM does."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch

from tests import tiny
from tests.stages.test_loops import same, weights
from tests.stages.toy import DATA, INIT, make, rl
from tutelage.credit.teacher import Teacher
from tutelage.graph import key
from tutelage.learn.learner import ModelScorer
from tutelage.learn.remote import Remote, RemoteScorer
from tutelage.losses.distill import SampledReverseKL
from tutelage.losses.top_k import TailReverseKL
from tutelage.model.attention import Rows
from tutelage.model.folder import load_model
from tutelage.spec import UserError
from tutelage.stages.remote import RemoteTeacher
from tutelage.stages.teacher_scores import TeacherScores
from tutelage.store import Store

MODEL = tiny.model(seed=4)


@contextmanager
def serving(model=MODEL, name="big", broken=0, mute=False, slow=0.0, shift=0):
    """(url, list of request bodies); ``broken`` answers 503 so many times."""
    asked, left = [], [broken]

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *a):
            pass

        def _say(self, status, body):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self._say(200, {"data": [{"id": name}]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            time.sleep(slow)
            if left[0]:
                left[0] -= 1
                return self._say(503, {})
            if body["model"] != name:
                return self._say(404, {"error": "no such model"})
            ids = [t + shift for t in body["prompt"]]
            with torch.no_grad():
                logprobs = model(input_ids=torch.tensor([ids]), layout=Rows(torch.tensor([len(ids)]))).logits[0].log_softmax(-1)
            rows = [None]
            for row, token in zip(logprobs[:-1], ids[1:], strict=True):
                chosen = {*row.topk(body["prompt_logprobs"]).indices.tolist(), token}
                rows.append({str(i): {"logprob": float(row[i]), "rank": 1} for i in chosen})
            self._say(200, {"choices": [{"text": "", "prompt_logprobs": None if mute else rows}]})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        server.server_close()


def scorer(url, model="big", timeout=10.0, retries=2):
    return RemoteScorer("served", Remote(url, model, 7, timeout, retries))


def test_a_served_teacher_scores_as_the_same_model_in_memory():
    samples, local = tiny.samples([9, 3, 14]), ModelScorer("local", MODEL)
    with serving() as (url, asked):
        remote = scorer(url)
        for a, b in zip(remote.score(samples, 1.0, "logp"), local.score(samples, 1.0, "logp"), strict=True):
            np.testing.assert_allclose(a.values, b.values, atol=1e-4)
            assert np.array_equal(a.index, b.index)
        for mine, theirs in zip(remote.topk(samples, 1.0, 6), local.topk(samples, 1.0, 6), strict=True):
            assert np.array_equal(mine[0].values, theirs[0].values)
            np.testing.assert_allclose(mine[1].values, theirs[1].values, atol=1e-3)
    assert (remote.scored, remote.params) == (2 * 26, 7)
    assert all(body["max_tokens"] == 1 for body in asked)


@pytest.mark.parametrize(
    ("server", "client", "says"),
    [
        ({}, {"model": "small"}, r"serves no model 'small'; it serves 'big'"),
        ({"mute": True}, {}, r"without prompt_logprobs"),
        ({"broken": 9}, {"retries": 1}, r"does not answer \(status 503, asked 2 times\)"),
        ({"slow": 1.0}, {"timeout": 0.2, "retries": 0}, r"does not answer \(.*timed out"),
        ({"shift": 1}, {}, r"scored other tokens"),
    ],
)
def test_what_a_server_gets_wrong_is_one_line(server, client, says):
    samples = tiny.samples([6], seed=2)
    samples[0].tokens = np.array([5, 20, 30, 21, 31, 22])  # none of them, plus one, among the likeliest
    with serving(**server) as (url, _), pytest.raises(UserError, match=says) as error:
        scorer(url, **client).score(samples, 1.0, "logp")
    assert "\n" not in str(error.value)


def test_a_server_that_comes_back_is_asked_again():
    with serving(broken=2) as (url, asked):
        scorer(url).score(tiny.samples([6]), 1.0, "logp")
    assert len(asked) == 3


def test_no_server_another_temperature_and_hidden_states_are_one_line():
    samples = tiny.samples([6])
    with pytest.raises(UserError, match=r"does not answer.*server up"):
        scorer("http://127.0.0.1:9/v1", retries=0).score(samples, 1.0, "logp")
    with pytest.raises(UserError, match="temperature 1 only"):
        scorer("http://127.0.0.1:9/v1").score(samples, 0.7, "logp")
    with pytest.raises(UserError, match="no hidden states"):
        scorer("http://127.0.0.1:9/v1").score(samples, 1.0, "hidden")


@pytest.mark.parametrize(("loss", "want"), [(SampledReverseKL(), "logp"), (TailReverseKL(), "topk")])
def test_online_learns_from_a_served_teacher_as_from_the_model_itself(loss, want, tmp_path):
    store, teacher = Store(tmp_path / "s"), rl(name="t", steps=2)
    make(teacher, store)
    fields = {"loss": loss, "credit": (Teacher(want=want, k=8),), "steps": 2}
    with serving(load_model(store.path(key(teacher), "policy"))) as (url, _):
        n = INIT.infer(None)["policy"].params
        served = RemoteTeacher(name="served", served="big", reference=INIT.out(), params=n, url=url)
        remote = rl(name="remote", teachers={"low": served.out()}, **fields)
        make(remote, store)
        scored = TeacherScores(name="scored", teacher=served.out(), data=DATA.out(), k=4)
        make(scored, store)
    own = rl(name="own", teachers={"low": teacher.out()}, **fields)
    make(own, store)
    a, b, start = weights(store, remote), weights(store, own), weights(store, INIT)
    assert not same(a, start)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-4, rtol=0)
    assert store.meta(key(remote))["cost"]["flops"] == store.meta(key(own))["cost"]["flops"]
