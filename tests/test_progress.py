"""Progress: what fits in 80 columns, what is left out, and how rarely plain lines speak."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from tests import toy
from tutelage import progress
from tutelage.estimate import Estimator
from tutelage.graph import Plan, plan
from tutelage.progress import Bars, Lines, clock, number, watch


def planned() -> Plan:
    return plan([toy.small()], set().__contains__)


def screen(width: int = 120, terminal: bool = False) -> Console:
    return Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)


def text(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined]


def feed(look: progress.Progress, made: Plan, steps: int, label: str = "base", **shown: float) -> None:
    node = next(n for n in made.nodes.values() if n.label == label)
    if node.key not in look.lanes:
        look.event(node, {"event": "started"})
    for step in range(steps):
        event = {"event": "progress", "step": step + 1, "total": 400, "shown": shown, "tokens": 1000 * step}
        look.event(node, event)


@pytest.fixture
def clockwork(monkeypatch):
    """Time that stands still unless told."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize("width", [80, 120])
def test_bars_fit_one_line_a_stage(width, clockwork):
    made, out = planned(), screen(width)
    look = Bars(made, Estimator(), 2, out)
    feed(look, made, 1, reward=0.41234, kl=0.00123, entropy=1.234, length=33.4, informative=0.75, share=0.25, clipped=0.01)
    clockwork[0] += 2
    feed(look, made, 3, reward=0.41234, kl=0.00123, entropy=1.234, length=33.4, informative=0.75, share=0.25, clipped=0.01)
    out.print(look)
    lines = text(out).splitlines()
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    for part in ("base", "3/400", "reward 0.412", "kl 0.00123", "tok/s"):
        assert part in lines[0]
    assert "0/7 stages" in lines[1]


def test_long_names_are_cut_and_numbers_dropped_whole(clockwork):
    made, out = planned(), screen(80)
    next(n for n in made.nodes.values() if n.label == "base").label = "specialist for a very long domain name"
    look = Bars(made, Estimator(), 2, out)
    feed(look, made, 2, "specialist for a very long domain name", reward=0.5, something_long_winded=12345.678, kl=0.1)
    out.print(look)
    line = text(out).splitlines()[0]
    assert len(line) <= 80
    assert "specialist for a ve…" in line
    assert "reward 0.5" in line
    assert "some" not in line


def test_time_left_is_by_pace_since_the_first_step_seen(clockwork):
    """A resumed stage begins at step 100: the hundred steps it did not do here must not make it look fast."""
    made = planned()
    look = Lines(made, Estimator(), 2, screen())
    node = next(n for n in made.nodes.values() if n.label == "base")
    look.event(node, {"event": "resumed", "step": 100})
    look.event(node, {"event": "progress", "step": 100, "total": 400, "shown": {}})
    clockwork[0] += 10
    look.event(node, {"event": "progress", "step": 110, "total": 400, "shown": {}})
    assert look.lanes[node.key].remaining == pytest.approx(290)


def test_both_looks_say_where_a_resumed_stage_goes_on(clockwork):
    made = planned()
    node = next(n for n in made.nodes.values() if n.label == "base")
    for look in (Lines, Bars):
        out = screen()
        look(made, Estimator(), 2, out).event(node, {"event": "resumed", "step": 100})
        assert "base goes on from step 100" in text(out)


def test_tokens_a_second_are_of_late(clockwork):
    lane = progress.Lane(next(iter(planned().nodes.values())))
    for second in range(100):
        clockwork[0] += 1
        rate = 1000 if second < 50 else 10
        lane.update({"step": second, "total": 100, "shown": {}, "tokens": (lane._tokens[-1][1] if lane._tokens else 0) + rate})
    assert lane.rate == pytest.approx(10, rel=0.2)


def test_plain_lines_speak_at_most_once_in_ten_seconds(clockwork):
    made, out = planned(), screen()
    look = Lines(made, Estimator(), 2, out)
    for _ in range(25):
        clockwork[0] += 1
        feed(look, made, 1, reward=0.5)
    node = next(n for n in made.todo if n.label == "base")
    look.event(node, {"event": "finished", "made": True, "seconds": 25.0})
    lines = text(out).splitlines()
    assert lines[0] == "base starts"
    assert len([line for line in lines if "/400" in line]) == 2
    assert lines[-1].startswith("base done in 25 s  reward 0.5  [1/7 stages")


def test_failures_go_to_standard_error_in_one_line(capsys):
    made = planned()
    look = Lines(made, Estimator(), 2, screen())
    node = next(iter(made.nodes.values()))
    look.event(node, {"event": "failed", "message": "the dataset is empty", "log": "/x/log.txt"})
    assert capsys.readouterr().err == f"stage {node.label!r} failed: the dataset is empty (log: /x/log.txt)\n"


def test_bars_on_a_terminal_and_lines_elsewhere():
    made = planned()
    assert isinstance(watch(made, Estimator(), 2, screen(terminal=True), False), Bars)
    assert isinstance(watch(made, Estimator(), 2, screen(terminal=True), True), Lines)
    assert isinstance(watch(made, Estimator(), 2, screen(), False), Lines)


def test_bars_draw_and_leave_what_has_ended(capsys):
    made, out = planned(), screen(80, terminal=True)
    look = watch(made, Estimator(), 2, out, False)
    with look:
        feed(look, made, 3, reward=0.5)
        look.tick()
        node = next(n for n in made.todo if n.label == "base")
        look.event(node, {"event": "finished", "made": True, "seconds": 61.0})
        time.sleep(0.3)
    assert "✓ base" in text(out)
    assert "1.0 min" in text(out)


def test_numbers_and_clocks():
    assert [number(v) for v in (0.123456, 12345.6, float("nan"), 3, "x")] == ["0.123", "12346", "nan", "3", "x"]
    assert [clock(s) for s in (None, 0, 65, 3725)] == ["", "0:00", "1:05", "1:02:05"]


@pytest.mark.parametrize(("still", "lines"), [(0, 1), (60, 2)])
def test_whom_a_stage_waits_for_and_whether_they_live(still, lines):
    made, out = planned(), screen()
    look, node = Lines(made, Estimator(), 1, out), made.todo[0]
    look.event(node, {"event": "waiting", "key": node.key, "holder": "other-1 (process 7 on host)", "still": still})
    look.event(node, {"event": "finished", "key": node.key, "made": False})
    said = text(out).splitlines()
    assert said[0] == f"{node.label}: waits for other-1 (process 7 on host), which is making it"
    assert len(said) == lines + 1
    assert said[-1] == f"{node.label}: made by another process meanwhile"
