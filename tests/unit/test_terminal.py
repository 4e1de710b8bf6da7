"""Terminal views: safe text, honest time to the end, progress with a clock that the test holds."""

from __future__ import annotations

import io
import json
import unicodedata
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dare.core.recipe import Recipe, parse_recipe
from dare.core.text import Completion
from dare.evals.intervals import wilson
from dare.rollout.engine import StepEvent
from dare.terminal.canvas import CanvasView
from dare.terminal.completions import print_completions
from dare.terminal.eta import Eta, Remaining
from dare.terminal.metrics import labelled, time_split
from dare.terminal.progress import ConsoleReporter, NullReporter
from dare.terminal.rows import print_row
from dare.terminal.text import duration, number, rate, shorten, visible


@settings(max_examples=40)
@given(st.text(max_size=30))
def test_visible_text_is_one_harmless_line(text: str) -> None:
    shown = visible(text)
    assert not {unicodedata.category(character) for character in shown} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert len(shown.splitlines()) <= 1
    assert visible(shown) == shown


def test_visible_text_keeps_what_is_harmless() -> None:
    assert visible("a\nb\tc é 漢 →") == "a⏎b⇥c é 漢 →"
    assert visible("a\nb\x1b[31m", keep="\n") == "a\nb\\x1b[31m"
    assert visible("\u202eabc") == "\\u202eabc"


def test_numbers_read_well() -> None:
    values = (0.0, 1.0, 0.012345, 12.345, 123.45, 1234.5, 12345.6, 1e-6, float("nan"))
    assert [number(value) for value in values] == [
        "0",
        "1",
        "0.01235",
        "12.35",
        "123.5",
        "1234",
        "1.23e+04",
        "1.00e-06",
        "nan",
    ]
    assert [duration(seconds) for seconds in (0.0, 0.04, 1.44, 9.94, 9.96, 59.6, 185, 3599.6, 7620)] == [
        "0.0s",
        "40ms",
        "1.4s",
        "9.9s",
        "10s",
        "1m00s",
        "3m05s",
        "1h00m",
        "2h07m",
    ]
    assert [rate(value) for value in (12, 2100, 3.21e6)] == ["12", "2.1k", "3.2M"]
    assert [shorten("abcdef", width) for width in (6, 5, 1)] == ["abcdef", "abcd…", "…"]


@given(
    num_steps=st.integers(1, 60),
    evaluate_every=st.none() | st.integers(1, 70),
    save_every=st.none() | st.integers(1, 70),
    costs=st.tuples(st.floats(0.1, 10), st.floats(0.1, 10), st.floats(0.1, 10)),
    data=st.data(),
)
def test_time_left_is_exact_when_costs_are_constant(
    num_steps: int, evaluate_every: int | None, save_every: int | None, costs: tuple[float, float, float], data: Any
) -> None:
    """Against a simulation of the loop: each step, then its evaluation, then its save, where due."""
    step_cost, evaluation_cost, save_cost = costs
    now = data.draw(st.integers(0, num_steps))
    eta = Eta(num_steps, evaluate_every, save_every)
    eta.add_step(step_cost)
    eta.add_evaluation(evaluation_cost)
    eta.add_save(save_cost)
    expected = 0.0
    for step in range(now + 1, num_steps + 1):
        expected += step_cost
        expected += evaluation_cost * (step == num_steps or (evaluate_every is not None and step % evaluate_every == 0))
        expected += save_cost * (step == num_steps or (save_every is not None and step % save_every == 0))
    remaining = eta.remaining(now, is_evaluated=True, is_saved=True)
    assert remaining is not None
    assert remaining.seconds == pytest.approx(expected)
    assert not remaining.is_lower_bound


def test_time_left_is_a_lower_bound_until_everything_was_measured() -> None:
    eta = Eta(num_steps=10, evaluate_every=5, save_every=None)
    assert eta.remaining(0) is None
    eta.add_step(2.0)
    assert eta.remaining(1) == Remaining(18.0, is_lower_bound=True)
    eta.add_evaluation(7.0)
    assert eta.remaining(1) == Remaining(18.0 + 14.0, is_lower_bound=True)
    eta.add_save(1.0)
    assert eta.remaining(1) == Remaining(18.0 + 14.0 + 1.0, is_lower_bound=False)
    assert Eta(10, None, None, has_evaluations=False).remaining(3) is None


def test_time_left_follows_the_median_of_recent_steps() -> None:
    eta = Eta(num_steps=100, evaluate_every=None, save_every=None, has_evaluations=False)
    eta.add_save(0.0)
    for seconds in [50.0] + [1.0] * 6 + [30.0]:  # compilation at the start and one hiccup do not count
        eta.add_step(seconds)
    assert eta.remaining(8) == Remaining(92.0, is_lower_bound=False)
    for _ in range(20):
        eta.add_step(3.0)  # completions became longer
    assert eta.remaining(28) == Remaining(216.0, is_lower_bound=False)


def test_metrics_have_one_order_and_their_units() -> None:
    metrics = {"zzz": 2.0, "eos_rate": 0.5, "reward": 0.25, "solve_rate": 0.125}
    assert labelled(metrics, has_others=False) == [("reward", "0.25"), ("solved", "12.5%"), ("EOS", "50.0%")]
    assert labelled(metrics, has_others=True)[-1] == ("zzz", "2")
    timings = {"seconds": 4.0, "rollout_s": 3.0, "update_s": 1.0, "tokens_per_s": 50.0, "peak_memory_mb": 9.0}
    assert time_split(timings) == [("rollout", 0.75), ("update", 0.25)]
    assert time_split({"seconds": 0.0}) == []


@dataclass
class Clock:
    """Seconds that pass only when the test says so."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def recipe(**sections: Any) -> Recipe:
    data: dict[str, Any] = {
        "name": "tiny",
        "model": {"create": {"family": "llada"}},
        "algorithm": "espo",
        "task": "chain_sum",
        "train": {"steps": 4},
        "evaluation": {"every": 2},
    }
    return parse_recipe({**data, **sections}, where="test")


def evaluation_result(num_solved: int) -> dict[str, Any]:
    low, high = wilson(num_solved, 50)
    counts = {"task": "chain_sum", "split": "eval", "num": 50, "num_solved": num_solved, "solve_rate": num_solved / 50}
    return {
        **counts,
        "low": low,
        "high": high,
        "reward_mean": 0.3,
        "nfe": 8.0,
        "tokens_per_forward": 1.25,
        "eos_rate": 1.0,
    }


def run_four_steps(reporter: ConsoleReporter, clock: Clock, plan: Recipe) -> None:
    """What the training loop calls: steps of 10 s, evaluations of 7 s, one save of 3 s."""

    def evaluate(step: int) -> None:
        reporter.phase("evaluate")
        clock.now += 7.0
        reporter.evaluation(step, evaluation_result(5 * (step + 1)))

    reporter.start(plan, Path("runs/tiny"), 0, 4)
    evaluate(0)
    for step in range(1, 5):
        for name, seconds in (("rollout", 6.0), ("reward", 1.0), ("update", 3.0)):
            reporter.phase(name)
            reporter.advance(1, 2)
            clock.now += seconds
        timings = {"seconds": 10.0, "rollout_s": 6.0, "reward_s": 1.0, "update_s": 3.0, "tokens_per_s": 1500.0}
        reporter.step(step, {"loss": 0.5 / step, "reward": 0.1 * step, "kl": 0.001}, timings)
        reporter.samples([("1+1=\x1b[2J", "[red]3[/red]", {"correct": 0.0})])
        if step % 2 == 0:
            evaluate(step)
    reporter.phase("save")
    clock.now += 3.0
    reporter.finish({"status": "finished", "checkpoint": "runs/tiny/checkpoints/step-000004"})


def test_progress_without_a_terminal_is_one_line_per_interval() -> None:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=60, force_terminal=False)
    run_four_steps(ConsoleReporter(console, clock), clock, recipe(log={"every": 2}))
    lines = out.getvalue().splitlines()
    assert lines[0] == "tiny: espo on chain_sum → runs/tiny"
    assert lines[1] == (
        "evaluation at step 0: chain_sum (eval)  5/50 solved = 10.0% [4.3%, 21.4%]  "
        "reward 0.3  NFE 8  tokens/forward 1.25  EOS 100.0%"
    )
    steps = [line for line in lines if line.startswith("step ")]
    assert steps == [
        "step 2/4  reward 0.2  loss 0.25  KL 0.001  |  "
        "10s: rollout 60% reward 10% update 30%  1.5k tokens/s  |  at least 34s left",
        "step 4/4  reward 0.4  loss 0.125  KL 0.001  |  "
        "10s: rollout 60% reward 10% update 30%  1.5k tokens/s  |  at least 7.0s left",
    ]
    assert "  1+1=\\x1b[2J → [red]3[/red]  correct=0" in lines
    assert lines[-1] == "finished after step 4 of 4, 1m04s; model: runs/tiny/checkpoints/step-000004"


def test_progress_on_a_terminal_is_live_and_leaves_the_evaluations() -> None:
    clock, out = Clock(), io.StringIO()
    console = Console(file=out, width=120, force_terminal=True, color_system=None, legacy_windows=False)
    run_four_steps(ConsoleReporter(console, clock), clock, recipe())
    text = out.getvalue()
    assert "step 3/4" in text
    assert text.count("evaluation at step") >= 3
    assert "\x1b[2J" not in text.replace("\\x1b[2J", "")
    assert "finished after step 4 of 4" in text


def test_stopped_run_and_resumed_run_say_so() -> None:
    clock, out = Clock(), io.StringIO()
    reporter = ConsoleReporter(Console(file=out, width=200, force_terminal=False), clock)
    reporter.start(recipe(), Path("runs/tiny"), 2, 4)
    reporter.message("warning: [bold]doubtful[/bold]")
    reporter.phase("rollout")
    clock.now += 5.0
    reporter.finish({"status": "stopped"})
    lines = out.getvalue().splitlines()
    assert lines[1:] == [
        "resumed after step 2 of 4",
        "warning: [bold]doubtful[/bold]",
        "stopped after step 2 of 4, 5.0s",
    ]


def canvas_frames(console: Console) -> None:
    """Two prompts of unequal length; the second one is padded and starts a step later."""
    names = dict(enumerate("0123456789"))
    mask, eos, pad = 10, 11, 12
    with CanvasView(lambda token: names.get(token, f"<{token}>"), mask, [eos], console) as view:
        first = StepEvent(
            rows=[0],
            step_N=torch.tensor([0]),
            ids_NS=torch.tensor([[1, 2, mask, 7, mask]]),
            is_committed_NS=torch.tensor([[False, False, False, True, False]]),
            logp_NS=torch.tensor([[0.0, 0.0, 0.0, -0.01, 0.0]]),
        )
        second = StepEvent(
            rows=[1, 0],
            step_N=torch.tensor([0, 1]),
            ids_NS=torch.tensor([[3, mask, 4, pad, 0], [1, 2, 5, 7, eos]]),
            is_committed_NS=torch.tensor([[False, False, True, False, False], [False, False, True, False, True]]),
            logp_NS=torch.tensor([[0.0, 0.0, -5.0, 0.0, 0.0], [0.0, 0.0, -0.5, -0.01, 0.0]]),
        )
        view.on_step(first)
        view.on_step(second)


def test_canvas_frames_without_a_terminal() -> None:
    out = io.StringIO()
    canvas_frames(Console(file=out, width=80, force_terminal=False, highlight=False))
    assert out.getvalue().splitlines()[1:] == ["step 1", "  1  12░7░", "step 2", "  1  1257∎", "  2  3░4", ""]


def test_canvas_colours_say_how_sure_a_commit_was() -> None:
    """Green from 0.9, yellow from 0.5, red below; bold is new, dim was given."""
    out = io.StringIO()
    console = Console(file=out, width=40, force_terminal=True, color_system="standard", legacy_windows=False)
    canvas_frames(console)
    last = out.getvalue().rpartition("\x1b[2K")[2]
    dim, green, bold_green, bold_yellow, bold_red = "\x1b[2m", "\x1b[32m", "\x1b[1;32m", "\x1b[1;33m", "\x1b[1;31m"
    for cell in (f"{dim}1", f"{dim}2", f"{bold_yellow}5", f"{green}7", f"{bold_green}∎", f"{dim}3", f"{bold_red}4"):
        assert cell in last


def test_rows_show_which_positions_carry_loss() -> None:
    out = io.StringIO()
    tokens = [
        ("1", True, False),
        (" ", True, False),
        ("\x1b", True, False),
        ("14", False, True),
        ("<eos>", False, False),
    ]
    print_row("task/0", tokens, Console(file=out, width=16, force_terminal=False, highlight=False))
    assert [line.rstrip() for line in out.getvalue().splitlines()[-4:]] == [
        "1 ␣ \\x1b 14",
        "· · ···· ^^",
        "<eos>",
        "-----",
    ]
    heading = " ".join(" ".join(out.getvalue().splitlines()[:-4]).split())
    assert heading == "task/0 3 prompt + 2 completion tokens, 1 carry loss"


def test_completions_as_text_and_as_json() -> None:
    completion = Completion([1, 2, 9], "a\nb\x1b[31m", [0, 0, 1], [-0.5, -0.25, 0.0], nfe=2, finish="eos")
    out = io.StringIO()
    console = Console(file=out, width=20, force_terminal=False, highlight=False)
    print_completions(["[b]1+1=", [4, 5]], [completion, replace(completion, text=None)], is_json=False, console=console)
    cost = "[3 tokens, 2 forwards, 1.50 tokens/forward, ended by EOS]"
    assert out.getvalue().splitlines() == ["[b]1+1=", "a", "b\\x1b[31m", cost, "4 5", "1 2 9", cost]
    out.truncate(out.seek(0))
    print_completions(["[b]1+1="], [completion], is_json=True, console=console)
    (line,) = out.getvalue().splitlines()
    assert json.loads(line) == {"prompt": "[b]1+1=", **asdict(completion)}


def test_null_reporter_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = NullReporter()
    reporter.start(recipe(), Path("runs/tiny"), 0, 4)
    reporter.message("x")
    reporter.finish({"status": "finished"})
    assert capsys.readouterr() == ("", "")
