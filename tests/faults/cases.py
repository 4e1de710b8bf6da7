"""The table of the crash matrix: which fault, where, and how the command has to end."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from tests.faults import faults, places, servers, workers
from tests.faults.places import PLACES, change_result, strike

KILLED, SIGINT, SIGTERM, MISTAKE, HUNG, FINISHED = -9, 130, 143, 2, 75, 0


@dataclass(frozen=True)
class Case:
    """`inject` is called in the process of the command, with the folder of the case.

    code       how the command has to end
    message    what it has to say
    verb       train or export
    recipe     a row of RECIPES, or remote, or verl, where `tests.faults.workers` does the fault instead of `inject`
    damage     done to the run folder after the command
    volume     size of the file system that the case needs to have for itself; None: it needs none
    """

    fault: str
    place: str
    inject: Callable[[Path], None]
    code: int
    message: str = ""
    verb: str = "train"
    recipe: str = "rl"
    options: tuple[str, ...] = ()
    damage: Callable[[Path], None] | None = None
    volume: str | None = None

    @property
    def name(self) -> str:
        return f"{self.fault} | {self.recipe if self.verb == 'train' else self.verb} | {self.place}"


def _at(place: str, fault: places.Fault) -> Callable[[Path], None]:
    return lambda folder: strike(PLACES[place], fault)


def _on_volume(place: str, fault: Callable[[Path], places.Fault]) -> Callable[[Path], None]:
    return lambda folder: strike(PLACES[place], fault(folder))


def _nothing(folder: Path) -> None:
    """No fault while the command runs."""


RL_PLACES = ("load", "first evaluation", "rollout", "reward", "update", "evaluate", "save")
EXPORT_PLACES = ("export, load", "export")


def _kills() -> list[Case]:
    everywhere = [
        *RL_PLACES,
        "update, weights changed",
        "log",
        "save, weights written",
        "save, renamed",
        "prune",
        "finish",
    ]
    cases = [Case("kill -9", place, _at(place, faults.kill), KILLED) for place in everywhere]
    cases += [
        Case("kill -9", place, _at(place, faults.kill), KILLED, recipe="sft")
        for place in ("data", "update", "validate", "save the best")
    ]
    # The best one so far has been moved aside, the better one is not there yet.
    aside = replace(PLACES["best, old one aside"], count=2)
    cases.append(Case("kill -9", "best, old one aside", lambda _: strike(aside, faults.kill), KILLED, recipe="sft"))
    return cases + [
        Case("kill -9", place, _at(place, faults.kill), KILLED, verb="export")
        for place in (*EXPORT_PLACES, "export, written")
    ]


def _signals() -> list[Case]:
    cases = []
    for name, fault, code in (("SIGTERM", faults.terminate, SIGTERM), ("SIGINT", faults.interrupt, SIGINT)):
        says = {"load": "interrupted", "first evaluation": "nothing was done yet"}
        saved = {"evaluate": 2, "save": 2, "update": 2, "update, weights changed": 2}
        for place in (*RL_PLACES, "update, weights changed"):
            message = says.get(place, f"step {saved.get(place, 1)} is saved")
            cases.append(Case(name, place, _at(place, fault), code, message))
        cases += [
            Case(name, "validate", _at("validate", fault), code, "step 2 is saved", recipe="sft"),
            Case(name, "data", _at("data", fault), code, "step 1 is saved", recipe="sft"),
        ]
    for place in EXPORT_PLACES:
        cases.append(Case("SIGINT", place, _at(place, faults.interrupt), SIGINT, "interrupted", verb="export"))
    for place in ("rollout", "update", "evaluate", "save"):
        twice = _at(place, faults.terminate_twice)
        cases.append(Case("SIGTERM twice", place, twice, SIGTERM, "stopped at once by a second signal"))
    for place in ("update", "evaluate"):
        stall = _at(place, faults.terminate_and_stall)
        short = ("checkpoint.stop_within_s=0.5",)
        cases.append(Case("SIGTERM, then stalls", place, stall, SIGTERM, "not saved within 0.5 s", options=short))
    return cases


def _disks() -> list[Case]:
    full = "no room left"
    saying = {"save": "cannot be written", "save, weights written": full}
    cases = []
    for place in (*RL_PLACES, "log", "save, weights written"):
        fault = _on_volume(place, lambda folder: faults.fill_disk(folder))
        cases.append(Case("disk full", place, fault, MISTAKE, saying.get(place, ""), volume="4m"))
    almost = _on_volume("save", lambda folder: faults.fill_disk(folder, left=8192))
    cases.append(Case("disk almost full", "save", almost, MISTAKE, "cannot be written", volume="4m"))
    cases.append(
        Case(
            "disk full",
            "save the best",
            _on_volume("save the best", faults.fill_disk),
            MISTAKE,
            recipe="sft",
            volume="4m",
        )
    )
    cases.append(
        Case("disk full", "export", _on_volume("export", faults.fill_disk), MISTAKE, verb="export", volume="4m")
    )
    read_only = ("load", "rollout", "update", "save", "save, weights written")
    for place in read_only:
        fault = _on_volume(place, faults.make_read_only)
        cases.append(Case("read-only folder", place, fault, MISTAKE, volume="4m"))
    fault = _on_volume("export, load", faults.make_read_only)
    return [
        *cases,
        Case("read-only folder", "export, load", fault, MISTAKE, "no permission", verb="export", volume="4m"),
    ]


def _memory() -> list[Case]:
    kinds = {"reward": faults.exhaust_python, "save": faults.exhaust_python}
    cases = [
        Case("out of memory", place, _at(place, kinds.get(place, faults.exhaust_torch)), MISTAKE, "out of memory")
        for place in (*RL_PLACES, "update, weights changed")
    ]
    torch_export = _at("export, load", faults.exhaust_torch)
    return [*cases, Case("out of memory", "export, load", torch_export, MISTAKE, "out of memory", verb="export")]


def _numbers() -> list[Case]:
    def reward(folder: Path) -> None:
        nan = torch.nan
        change_result("tests.even_digits:EvenDigits.reward", "step 2, reward", lambda found: replace(found, value=nan))

    def part(folder: Path) -> None:
        change_result(
            "tests.even_digits:EvenDigits.reward",
            "step 2, reward",
            lambda found: replace(found, parts={"even": torch.inf}),
        )

    def loss(folder: Path) -> None:
        change_result(
            "dare.algorithms.cj_grpo:CJGRPO.loss",
            "step 2, update",
            lambda found: replace(found, value=found.value * torch.nan),
        )

    def gradient(folder: Path) -> None:
        change_result("dare.training.optim:total_norm", "step 2, update", lambda norm: norm * torch.inf)

    def logits(folder: Path) -> None:
        change_result("dare.families.base:Family.view_logp", "step 2, update", lambda logp: logp * torch.nan)

    return [
        Case("NaN", "reward", reward, MISTAKE, "not finite"),
        Case("infinite", "part of a reward", part, MISTAKE, "not finite"),
        Case("NaN", "loss", loss, MISTAKE, "the loss is not finite"),
        Case("NaN", "log-probs", logits, MISTAKE, "the loss is not finite"),
        Case("infinite", "gradient", gradient, MISTAKE, "the gradient is not finite"),
    ]


def _hangs() -> list[Case]:
    soon = ("train.step_timeout_s=1",)
    places_ = ("first evaluation", "rollout", "reward", "update", "evaluate", "save")
    cases = [Case("hangs", place, _at(place, faults.hang), HUNG, "the run hangs", options=soon) for place in places_]
    return [*cases, Case("hangs in C", "reward", _at("reward", faults.hang_in_c), 1, options=soon)]


def _clocks() -> list[Case]:
    return [
        Case(f"clock {name}", place, _at(place, fault), FINISHED)
        for name, fault in (("+1 day", faults.clock_forward), ("-1 day", faults.clock_back))
        for place in ("load", "rollout", "save")
    ]


def _damages() -> list[Case]:
    """After a run was killed, its newest checkpoint or its logs are not what they were."""

    def newest(folder: Path) -> Path:
        return max((folder / "run" / "checkpoints").glob("step-*"))

    def cut(name: str) -> Callable[[Path], None]:
        def damage(folder: Path) -> None:
            file = newest(folder) / name
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

        return damage

    def remove(name: str) -> Callable[[Path], None]:
        return lambda folder: (newest(folder) / name).unlink()

    def replace_by(name: str, text: str) -> Callable[[Path], None]:
        return lambda folder: _ignore((newest(folder) / name).write_text(text))

    def shorten_log(folder: Path) -> None:
        log = folder / "run" / "metrics.jsonl"
        log.write_bytes(log.read_bytes()[:-20])

    def cut_everything(folder: Path) -> None:
        for checkpoint in (folder / "run" / "checkpoints").glob("step-*"):
            (checkpoint / "config.json").write_text("")

    damages: dict[str, Callable[[Path], None]] = {
        "weights cut": cut("model.safetensors"),
        "moments cut": cut("trainer/optimizer.safetensors"),
        "weights gone": remove("model.safetensors"),
        "state gone": remove("trainer/state.json"),
        "state empty": replace_by("trainer/state.json", ""),
        "state is a list": replace_by("trainer/state.json", "[]"),
        "state lacks fields": replace_by("trainer/state.json", '{"format": 1}'),
        "log cut": shorten_log,
        "every checkpoint damaged": cut_everything,
    }
    kill = replace(PLACES["rollout"], phase="step 3, rollout")
    return [
        Case("damage", name, lambda _: strike(kill, faults.kill), KILLED, damage=damage)
        for name, damage in damages.items()
    ]


def _servers() -> list[Case]:
    """The rollout server is lost for good; the second command finds a new one at the same address."""
    lost = {"server killed": signal.SIGKILL, "server stopped": signal.SIGSTOP, "server refuses": servers.REFUSE}
    says = {"weights to server": "loading weights", "row of server": "generating row"}
    where = [(fault, place) for fault in lost for place in says]
    where += [("server killed", place) for place in ("load", "update", "row of server, evaluate")]

    def case(fault: str, place: str) -> Case:
        doing = says.get(place, "the rollout server does not answer")

        def inject(folder: Path) -> None:
            strike(PLACES[place], servers.signal_server(folder, lost[fault]))

        return Case(fault, place, inject, MISTAKE, doing, recipe="remote")

    return [case(fault, place) for fault, place in where]


def _workers() -> list[Case]:
    """A worker that is stopped instead is in tests/scale/test_faults.py."""
    return [
        Case("worker killed", place, _nothing, MISTAKE, "a worker died during", recipe="verl")
        for place in workers.PLACES
    ]


def _ignore(value: Any) -> None:
    """For expressions that are called for what they do."""


QUICK = (
    "kill -9 | rl | save, weights written",
    "kill -9 | sft | best, old one aside",
    "SIGTERM | rl | rollout",
    "SIGINT | rl | update",
    "SIGTERM twice | rl | evaluate",
    "SIGTERM, then stalls | rl | update",
    "disk full | rl | save",
    "disk full | export | export",
    "read-only folder | rl | save",
    "out of memory | rl | update",
    "NaN | rl | reward",
    "hangs | rl | rollout",
    "damage | rl | weights cut",
    "damage | rl | log cut",
    "server killed | remote | row of server",
)


def all_cases() -> list[Case]:
    """Every row, faults in the order of the table."""
    return [
        *_kills(),
        *_signals(),
        *_disks(),
        *_memory(),
        *_numbers(),
        *_hangs(),
        *_clocks(),
        *_damages(),
        *_servers(),
        *_workers(),
    ]
