"""The profile of a bench: our side alone, by op."""

import torch

from bench.profile import looked_at


def test_our_side_is_shown_by_op_and_its_peers_do_not_run(capsys):
    a, calls = torch.randn(64, 64), []
    sides = {"ours": lambda: calls.append("ours") or a @ a, "TRL": lambda: calls.append("TRL")}
    timing = looked_at(sides, 5, "cpu")
    said = capsys.readouterr().out
    assert calls == ["ours", "ours"]
    assert "ours, " in said
    assert "aten::mm" in said
    assert timing.ratio("ours", "TRL") == (1.0, 1.0, 1.0)
