"""DPO against the naive loop over pairs and against TRL's own trainer code; pairs that are not whole."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tests.losses.plain import case, noise, tokens
from tutelage.learn.batch import collate, counts, split
from tutelage.losses.preference import DPO
from tutelage.types import Sample

PICTURES = (".xx", "..xxx.x", ".x", "..xx")
"""Four rows; pairs are (2, 0) and (1, 3), so not side by side."""
PAIR = [1, 0, 1, 0]


def pair_case(seed=0, pictures=PICTURES, pair=PAIR):
    c = case(*pictures, seed=seed)
    c.batch.pair = torch.tensor(pair)
    c.batch.counts["pairs"] = len(pair) / 2
    c.batch.signals["ref_logp"] = c.logp + noise(c, 0.5, seed)
    return c


def naive(c, loss, chosen_and_rejected):
    found = tokens(c)
    gain, nll = {}, {}
    for row in range(len(c.batch.pair)):
        mine = [t for t in found if t.row == row]
        gain[row] = sum(t.logp - t.signals["ref_logp"] for t in mine) / (len(mine) if loss.normalise else 1)
        nll[row] = -sum(t.logp for t in mine) / len(mine)
    total = 0.0
    for w, l in chosen_and_rejected:  # noqa: E741
        total += math.log1p(math.exp(-loss.beta * (gain[w] - gain[l]))) + loss.nll * nll[w]
    return total


LOSSES = [DPO(), DPO(beta=2.0, normalise=True), DPO(nll=0.3), DPO(beta=0.7, normalise=True, nll=1.0)]


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("seed", [0, 1])
def test_value_is_the_naive_sum_over_pairs(loss, seed):
    c = pair_case(seed)
    assert c.run(loss)[0] == pytest.approx(naive(c, loss, [(1, 3), (0, 2)]), rel=1e-12)


def test_at_the_reference_the_loss_is_log_2_and_its_gradient_pulls_by_half_of_beta():
    c = pair_case()
    c.batch.signals["ref_logp"] = c.logp
    value, gradient, metrics = c.run(DPO(beta=0.4))
    assert value == pytest.approx(2 * math.log(2))
    chosen = torch.tensor([1.0, 1.0, -1.0, -1.0])[c.batch.trow]  # rows 0 and 1 are preferred
    for i, t in enumerate(tokens(c)):
        expected = -0.2 * chosen[i] * torch.tensor(t.score_function(1.0), dtype=torch.float64)
        torch.testing.assert_close(gradient[i], expected)
    assert metrics["margin"] == 0


def test_the_other_order_of_a_pair_wants_the_other_reply():
    c = pair_case(3)
    right = c.run(DPO())[2]["margin"]
    c.batch.pair = torch.tensor([0, 1, 1, 0])
    assert c.run(DPO())[0] == pytest.approx(naive(c, DPO(), [(0, 3), (1, 2)]), rel=1e-12)
    assert right != c.run(DPO())[2]["margin"]


@pytest.mark.parametrize("pair", [[0, 0, 1, 2], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, -1, -1]])
def test_a_pair_that_is_not_whole(pair):
    with pytest.raises(ValueError, match="exactly two rows"):
        pair_case(pair=pair).run(DPO())


def test_pairs_stay_in_one_micro_batch_whatever_their_lengths():
    import numpy as np

    rows = []
    for i, (a, b) in enumerate([(3, 90), (50, 4), (5, 6), (70, 71)]):
        for n in (a, b):
            rows.append(Sample(np.arange(n), np.arange(n) > 0, pair=str(i)))
    parts = split(rows, 100)
    assert len(parts) == 3  # (5, 6) goes with (50, 4)
    for part in parts:
        assert counts(part)["rows"] == 2 * counts(part)["pairs"]
        names = [s.pair for s in part]
        assert all(names.count(n) == 2 for n in names)
    assert sorted(id(s) for part in parts for s in part) == sorted(map(id, rows))
    for row in rows:
        row.pair = ""
    assert len(split(rows, 100)) == 4  # rows alone, by length: 3, 4, 5, 6, 50 | 70 | 71 | 90


def test_a_pair_that_comes_twice_in_a_batch_is_two_pairs():
    import numpy as np

    pair = [Sample(np.arange(n), np.arange(n) > 0, pair="a") for n in (3, 5)]
    assert collate(pair * 2).pair.tolist() == [0, 0, 1, 1]
    assert counts(pair * 2)["pairs"] == 2


# --- against TRL -----------------------------------------------------------------------------------------------------------


def theirs(c, leaf, kinds, beta, weights=None):
    """`DPOTrainer._compute_loss` on padded log-probs scattered from ``leaf`` [M, V]: chosen rows first, then rejected."""
    dpo_trainer = pytest.importorskip("trl.trainer.dpo_trainer")
    batch = c.batch
    order = torch.tensor([1, 0, 3, 2])  # rows: chosen of pair 0 and 1, then rejected of pair 0 and 1
    R, width = len(batch.pair), int(batch.pos.max()) + 1

    def pad(x):
        return x.new_zeros(R, width).index_put((batch.trow, batch.pos[batch.index]), x)[order]

    logp = torch.log_softmax(leaf, -1)[torch.arange(len(leaf)), batch.tokens[batch.index]]
    per_token = pad(logp)[:, 1:]
    outputs = SimpleNamespace(
        log_probs=per_token, entropy=per_token.detach(), is_top1=per_token > 0, mean_logits=per_token.detach()
    )
    trainer = SimpleNamespace(
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        accelerator=SimpleNamespace(
            device="cpu", num_processes=1, gather_for_metrics=lambda x: x, gather=lambda x: x, reduce=lambda x, **_: x
        ),
        aux_loss_enabled=False,
        beta=beta,
        f_divergence_type="reverse_kl",
        ld_alpha=None,
        loss_types=kinds,
        loss_weights=weights or [1.0] * len(kinds),
        model=SimpleNamespace(training=True),
        precompute_ref_logps=True,
        use_weighting=False,
    )
    ref = pad(batch.signals["ref_logp"]).sum(1)
    mask = pad(torch.ones(len(leaf), dtype=torch.float64)).long()
    ids = torch.zeros(R, width, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "completion_mask": mask}
    inputs |= {"ref_chosen_logps": ref[: R // 2], "ref_rejected_logps": ref[R // 2 :]}
    return dpo_trainer.DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False), trainer._metrics["train"]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(
    ("loss", "kinds", "weights"),
    [
        (DPO(beta=0.3), ["sigmoid"], None),
        (DPO(beta=3.0, normalise=True), ["sigmoid_norm"], None),
        (DPO(beta=0.3, nll=0.2), ["sigmoid", "sft"], [1.0, 0.2]),
    ],
)
def test_dpo_is_trls(loss, kinds, weights, seed):
    # TRL's NLL term is a mean over all chosen tokens, ours over replies: chosen replies of equal length make them one
    pictures = (".xx", "..x.x", ".xxx", "..xxxx") if loss.nll else PICTURES
    c = pair_case(seed, pictures)
    leaf = c.logits.clone().requires_grad_()
    expected, logged = theirs(c, leaf, kinds, loss.beta, weights)
    value, gradient, metrics = c.run(loss)
    assert value / 2 == pytest.approx(expected.item(), rel=1e-10)
    torch.testing.assert_close(gradient / 2, torch.autograd.grad(expected, leaf)[0])
    assert metrics["accuracy"] == logged["rewards/accuracies"][0]
    if not loss.normalise:
        assert metrics["margin"] == pytest.approx(logged["rewards/margins"][0], rel=1e-6)
