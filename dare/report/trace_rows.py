"""A trace file as rows and steps: every canvas that a rollout saw, and why each token was committed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dare.core.errors import DareError
from dare.rollout.trace_file import TraceFile

_SCORES = {
    "confidence": "confidence",
    "max_prob": "highest probability",
    "margin": "margin",
    "negative_entropy": "minus entropy",
    "uniform": "random number",
}


@dataclass(frozen=True)
class Candidate:
    """What a step made of one open position.

    held          the token that stood there before: the mask id, or a token that may be edited
    prob          of the candidate, at temperature 1; None if it was not recorded
    rank          1-based by score among the masked positions, ties from left to right; None where not ranked
    alternatives  (token, probability), the most probable first
    """

    position: int
    held: int
    token: int
    prob: float | None
    score: float | None
    rank: int | None
    is_written: bool
    alternatives: list[tuple[int, float]]


@dataclass(frozen=True)
class Step:
    """One denoising step. `start` is the first position of its block; `quota` what was due, None if nothing was."""

    start: int | None
    quota: int | None
    candidates: list[Candidate]
    remasked: list[int]

    @property
    def written(self) -> dict[int, int]:
        """The token that the step wrote, by position."""
        return {c.position: c.token for c in self.candidates if c.is_written}


@dataclass(frozen=True)
class Row:
    """One sequence without its padding. `first` is the canvas before any step; `order` the step map."""

    label: str
    first: list[int]
    final: list[int]
    is_completion: list[bool]
    blocks: list[int]
    order: list[int]
    steps: list[Step]

    def canvas(self, num_steps: int, mask_id: int) -> list[int]:
        """The canvas after `num_steps` steps (0 = before any)."""
        ids = list(self.first)
        for step in self.steps[:num_steps]:
            for position in step.remasked:
                ids[position] = mask_id
            for position, token in step.written.items():
                ids[position] = token
        return ids

    @property
    def borders(self) -> list[int]:
        """Positions at which a block of the completion starts, the first one apart."""
        pairs = zip(range(1, len(self.blocks)), self.blocks, self.blocks[1:], strict=False)
        return [position for position, before, block in pairs if block != before and self.is_completion[position]]


def read_row(file: TraceFile, index: int) -> Row:
    """Row `index` (0-based) of a trace. Raises DareError if the file has fewer."""
    if not 0 <= index < file.num_rows:
        raise DareError("there is no such row", where=str(file.path), got=index + 1, expected=f"1 to {file.num_rows}")
    arrays = file.arrays
    is_real = arrays["is_real_BS"][index]
    is_completion = [bool(value) for value in arrays["is_completion_BS"][index][is_real]]
    final = [int(token) for token in arrays["input_BS"][index][is_real]]
    mask_id = int(file.info["mask_id"])
    labels = file.info.get("labels", [])
    return Row(
        label=str(labels[index]) if index < len(labels) else f"row {index + 1}",
        first=[mask_id if is_open else token for token, is_open in zip(final, is_completion, strict=True)],
        final=final,
        is_completion=is_completion,
        blocks=[int(block) for block in arrays["block_BS"][index][is_real]],
        order=[int(step) for step in arrays["step_map_BS"][index][is_real]],
        steps=_recorded_steps(file, index) if file.has_predictions else _steps_from_map(file, index),
    )


def rule(info: Mapping[str, Any], step: Step) -> str:
    """What the unmask policy commits at a step, in words; "" where that was not recorded."""
    policy = info.get("policy", {})
    if "rule" not in policy or step.start is None:
        return ""
    words = str(policy["rule"]).replace("{quota}", "?" if step.quota is None else str(step.quota))
    return f"policy {policy.get('name', '?')}: {words}"


def verdict(info: Mapping[str, Any], step: Step, candidate: Candidate) -> str:
    """What the step did with a candidate, and what it went by."""
    policy = info.get("policy", {})
    if candidate.held != info["mask_id"]:
        threshold = info.get("decode", {}).get("edit_threshold")
        comparison = f"its probability {_number(candidate.prob)}, the edit threshold {threshold}"
        same = "the candidate is the token itself" if candidate.token == candidate.held else comparison
        return f"replaced: {comparison}" if candidate.is_written else f"kept: {same}"
    verb = "committed" if candidate.is_written else "not committed"
    if candidate.score is None:
        return f"{verb}; scores were not recorded"
    if policy.get("is_first_forced") and candidate.is_written and candidate.position == step.start:
        return f"{verb}: the first position of a block goes first, because steps with this cache cannot score it later"
    num_masked = sum(c.rank is not None for c in step.candidates)
    score = _SCORES.get(str(policy.get("score")))
    by = f" by {score} {_number(candidate.score)}" if score else " from the left"
    return f"{verb}: rank {candidate.rank} of {num_masked}{by}"


def _recorded_steps(file: TraceFile, index: int) -> list[Step]:
    arrays, mask_id = file.arrays, int(file.info["mask_id"])
    num_steps = int(arrays["nfe_B"][index])
    opened: list[list[Candidate]] = [[] for _ in range(num_steps)]
    for entry in (arrays["row_P"] == index).nonzero()[0]:
        tops = zip(arrays["top_PA"][entry].tolist(), arrays["top_prob_PA"][entry].tolist(), strict=True)
        candidate = Candidate(
            position=int(arrays["position_P"][entry]),
            held=int(arrays["held_P"][entry]),
            token=int(arrays["token_P"][entry]),
            prob=float(arrays["prob_P"][entry]),
            score=float(arrays["score_P"][entry]),
            rank=None,
            is_written=bool(arrays["is_written_P"][entry]),
            alternatives=list(tops),
        )
        _at(opened, int(arrays["step_P"][entry]), file).append(candidate)
    remasked: list[list[int]] = [[] for _ in range(num_steps)]
    for entry in (arrays["row_M"] == index).nonzero()[0]:
        _at(remasked, int(arrays["step_M"][entry]), file).append(int(arrays["position_M"][entry]))
    of_step: dict[int, tuple[int, int]] = {}
    for entry in (arrays["row_D"] == index).nonzero()[0]:
        of_step[int(arrays["step_D"][entry])] = (int(arrays["start_D"][entry]), int(arrays["quota_D"][entry]))
    steps = []
    for number, candidates in enumerate(opened):
        start, quota = of_step.get(number, (None, -1))
        steps.append(Step(start, quota if quota >= 0 else None, _ranked(candidates, mask_id), remasked[number]))
    return steps


def _at(lists: list[list[Any]], step: int, file: TraceFile) -> list[Any]:
    if not 0 <= step < len(lists):
        raise DareError("the trace is malformed", where=str(file.path), got=f"step {step} of {len(lists)}")
    return lists[step]


def _ranked(candidates: list[Candidate], mask_id: int) -> list[Candidate]:
    masked = [c for c in candidates if c.held == mask_id]
    order = sorted(masked, key=lambda c: (-(c.score or 0.0), c.position))
    ranks = {candidate.position: rank for rank, candidate in enumerate(order, start=1)}
    return [
        Candidate(c.position, c.held, c.token, c.prob, c.score, ranks.get(c.position), c.is_written, c.alternatives)
        for c in candidates
    ]


def _steps_from_map(file: TraceFile, index: int) -> list[Step]:
    """What a step map and a log of edits say: which tokens came when, and how probable they were."""
    arrays, mask_id = file.arrays, int(file.info["mask_id"])
    written: list[list[Candidate]] = [[] for _ in range(int(arrays["nfe_B"][index]))]

    def write(step: int, position: int, token: int, logp: float | None) -> None:
        prob = None if logp is None else math.exp(logp)
        _at(written, step, file).append(Candidate(position, mask_id, token, prob, None, None, True, []))

    logps = arrays["logp_BS"][index].tolist() if "logp_BS" in arrays else None
    for position, step in enumerate(arrays["step_map_BS"][index].tolist()):
        if step >= 0:
            write(step, position, int(arrays["input_BS"][index][position]), logps[position] if logps else None)
    if "row_E" in arrays:
        for entry in (arrays["row_E"] == index).nonzero()[0]:
            names = ("since_E", "position_E", "token_E")
            since, position, token = (int(arrays[name][entry]) for name in names)
            write(since, position, token, float(arrays["logp_E"][entry]))
    return [Step(None, None, sorted(found, key=lambda c: c.position), []) for found in written]


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"
