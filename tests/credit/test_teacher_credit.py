import asyncio
import threading

import numpy as np
import pytest
import torch

from tutelage.credit.base import CreditContext
from tutelage.credit.teacher import Teacher, distinct
from tutelage.losses.distill import FullReverseKL, SampledReverseKL
from tutelage.spec import SpecError
from tutelage.types import Batch, Sample, Signal, Task

VOCAB = 9


class Bigram:
    """A model whose logits depend on the previous token: hidden [T, D] = table[previous], logits = hidden @ W."""

    def __init__(self, name="bigram", width=4, seed=0):
        rng = torch.Generator().manual_seed(seed)
        self.name, self.width, self.calls = name, width, []
        self.table = torch.randn(VOCAB, width, generator=rng)
        self.weight = torch.randn(VOCAB, width, generator=rng)

    def __call__(self, hidden):
        return hidden @ self.weight.T

    head = property(lambda self: self)

    def hidden(self, s):
        """[T_sel, D]: the next-token shift"""
        return self.table[torch.from_numpy(s.tokens[s.trained - 1])]

    def score(self, samples, temperature, want):
        self.calls.append((samples, temperature, want, threading.current_thread()))
        found = []
        for s in samples:
            values = self.hidden(s)
            if want == "logp":
                logprobs = (self(values) / temperature).log_softmax(-1)
                values = logprobs[torch.arange(len(logprobs)), torch.from_numpy(s.tokens[s.trained])]
            found.append(Signal(values.numpy(), s.trained, {"model": self.name, "temperature": temperature}))
        return found


def sample(domain, mask="..xx.x", seed=0):
    tokens = np.random.default_rng(seed).integers(VOCAB, size=len(mask))
    return Sample(tokens, np.array([c == "x" for c in mask]), task=Task(f"{domain}-{seed}", domain, ()))


def assign(samples, teachers, want="logp", temperature=1.0):
    return asyncio.run(Teacher(want=want).assign(samples, CreditContext(temperature, teachers)))


class Output:
    def __init__(self, logits, targets, temperature):
        self.logprobs = (logits / temperature).log_softmax(-1)
        self.logp = self.logprobs[torch.arange(len(targets)), targets]
        self.entropy = -(self.logprobs.exp() * self.logprobs).sum(-1).detach()

    def reduce_vocab(self, fn, index, *extras):
        return fn(self.logprobs[index], *extras)


def distil(loss, samples, student, teachers, temperature):
    """(loss, gradient of the student's output matrix) at a temperature, from samples with signals."""
    weight = student.weight.clone().requires_grad_()
    logits = torch.cat([student.hidden(s) for s in samples]) @ weight.T
    targets = torch.cat([torch.from_numpy(s.tokens[s.trained]) for s in samples])
    out = Output(logits, targets, temperature)
    trow = torch.arange(len(samples)).repeat_interleave(torch.tensor([len(s.trained) for s in samples]))
    signals = {n: torch.from_numpy(np.concatenate([s.signals[n].values for s in samples])) for n in samples[0].signals}
    batch = Batch(tokens=targets, row=trow, pos=trow, index=torch.arange(len(trow)), trow=trow, signals=signals)
    batch.signals["behaviour_logp"] = out.logp.detach()
    batch.extras = {"teacher_heads": [t.head for t in distinct(teachers)], "temperature": temperature}
    total, _ = loss(out, batch)
    total.backward()
    return total.item(), weight.grad


def test_trap_domain_without_teacher_raises_naming_it_and_the_teachers_there_are():
    math = Bigram("rl-math")
    with pytest.raises(SpecError, match=r"'poetry'.*code \(rl-code\), math \(rl-math\)"):
        assign([sample("math"), sample("poetry")], {"math": math, "code": Bigram("rl-code")})
    assert math.calls == []  # before anything was scored


def test_trap_one_teacher_per_sample_never_an_average():
    teachers = {"math": Bigram("m", seed=1), "code": Bigram("c", seed=2)}
    samples = [sample("math", seed=3), sample("code", seed=4), sample("math", seed=5)]
    kept, _ = assign(samples, teachers)
    assert kept == samples
    for s in samples:
        (alone,) = teachers[s.domain].score([s], 1.0, "logp")
        assert np.array_equal(s.signals["teacher_logp"].values, alone.values)
        assert s.signals["teacher_logp"].provenance["model"] == teachers[s.domain].name


def test_each_teacher_is_asked_once_and_sorted_so_that_one_is_resident():
    shared, other = Bigram("shared"), Bigram("other", seed=1)
    order = shared.calls = other.calls = []
    samples = [sample("code", seed=i) if i % 2 else sample("math", seed=i) for i in range(4)] + [sample("zoo", seed=9)]
    assign(samples, {"zoo": shared, "math": other, "code": shared})
    assert [[s.domain for s in call[0]] for call in order] == [["code", "code", "zoo"], ["math", "math"]]


def test_a_teacher_without_samples_is_not_asked():
    idle = Bigram("idle")
    assign([sample("math")], {"math": Bigram(), "code": idle})
    assert idle.calls == []


def test_scored_off_the_event_loops_thread():
    teacher = Bigram()
    assign([sample("math")], {"math": teacher})
    assert teacher.calls[0][3] is not threading.main_thread()


def test_distinct_order_is_that_of_sorted_domains_each_teacher_once():
    a, b = Bigram("a"), Bigram("b")
    assert distinct({"zoo": a, "code": b, "math": a, "art": b}) == [b, a]


def test_hidden_states_of_different_width_are_padded_and_indexed():
    narrow, wide = Bigram("n", width=3, seed=1), Bigram("w", width=5, seed=2)
    samples = [sample("math", seed=3), sample("code", seed=4)]
    assign(samples, {"math": narrow, "code": wide}, want="hidden")
    math, code = (s.signals["teacher_hidden"].values for s in samples)
    assert math.shape == code.shape == (3, 5)
    assert np.array_equal(math[:, :3], narrow.hidden(samples[0]).numpy())
    assert not math[:, 3:].any()
    assert np.array_equal(code, wide.hidden(samples[1]).numpy())
    assert [s.signals["teacher"].values.tolist() for s in samples] == [[1, 1, 1], [0, 0, 0]]  # code before math
    assert all(np.array_equal(s.signals["teacher"].index, s.trained) for s in samples)


def test_samples_without_trained_tokens_are_dropped():
    samples = [sample("math"), sample("math", mask="....")]
    kept, _ = assign(samples, {"math": Bigram()})
    assert kept == samples[:1]


def test_token_share_by_domain_is_logged():
    samples = [sample("math"), sample("code", mask=".x"), sample("math", mask=".xxxxxx")]
    _, metrics = assign(samples, {"math": Bigram(), "code": Bigram(), "art": Bigram()})
    assert metrics == {"token_share/art": (0, 10), "token_share/code": (1, 10), "token_share/math": (9, 10)}


# --- traps through the loss ------------------------------------------------------------------------------------------

LOSSES = [(SampledReverseKL(), "logp"), (FullReverseKL(), "hidden")]


@pytest.mark.parametrize(("loss", "want"), LOSSES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trap_teacher_equal_to_student_gives_exactly_no_gradient(loss, want, temperature):
    student = Bigram(seed=3)
    samples = [sample("math", seed=i) for i in range(5)]
    teachers = {"math": Bigram(seed=3)}
    assign(samples, teachers, want, temperature)
    total, gradient = distil(loss, samples, student, teachers, temperature)
    assert total == pytest.approx(0, abs=1e-6)
    assert not gradient.any()


@pytest.mark.parametrize(("loss", "want"), LOSSES)
def test_a_different_teacher_does_move_the_student(loss, want):
    samples = [sample("math", seed=i) for i in range(5)]
    teachers = {"math": Bigram(seed=4, width=6)}
    assign(samples, teachers, want)
    assert distil(loss, samples, Bigram(seed=3), teachers, 1.0)[1].any()


def test_trap_teacher_is_asked_at_the_sampling_temperature():
    """The same model scored at another temperature than the student's is a different teacher."""
    samples, teacher = [sample("math", seed=i) for i in range(5)], Bigram(seed=3)
    assign(samples, {"math": teacher}, temperature=0.7)
    assert teacher.calls[0][1] == 0.7
    assert not distil(SampledReverseKL(), samples, Bigram(seed=3), {"math": teacher}, 0.7)[1].any()
    assert distil(SampledReverseKL(), samples, Bigram(seed=3), {"math": teacher}, 1.0)[1].abs().max() > 0.1


def test_trap_mismatch_of_stated_temperatures_is_an_error():
    s = sample("math")
    s.signals["behaviour_logp"] = Signal(np.zeros(3), s.trained, {"temperature": 0.7})
    with pytest.raises(ValueError, match=r"temperature 1\.0.*drawn at 0\.7"):
        assign([s], {"math": Bigram("t")})


@pytest.mark.parametrize("cut", [lambda s: (s.values[:-1], s.index[:-1]), lambda s: (s.values[:-1], s.index)])
def test_trap_teacher_must_speak_of_exactly_the_trained_tokens(cut):
    teacher = Bigram("sloppy")
    inner = teacher.score
    teacher.score = lambda *a: [Signal(*cut(s)) for s in inner(*a)]
    with pytest.raises(ValueError, match=r"'sloppy'.*trained tokens"):
        assign([sample("math")], {"math": teacher})


def test_declares_what_it_writes():
    assert Teacher().gives() == {"teacher_logp"}
    assert Teacher(want="hidden").gives() == {"teacher_hidden", "teacher"}
    assert Teacher(want="topk").gives() == {"teacher_topk", "teacher_topk_logp"}
