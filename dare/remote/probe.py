"""Do the servers run the model that is trained, and does the temperature act? Found out on a few rows of a probe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.core.types import Samples, TraceBatch, Views
from dare.diffusion import corrupt
from dare.diffusion.trace import scored_mask
from dare.training.mismatch import mismatch

if TYPE_CHECKING:
    from torch import Tensor

Score = Callable[[Views, Samples], "Tensor"]
_NUM_ROWS = 8
_NUM_BLOCKS = 2
_PROMPT_LENGTH = 5
_MOVED = 1e-3  # nats: what an update has to change before a server that changes nothing is called stale
_MIN_DISTINCT = _NUM_ROWS // 2 + 1


@dataclass(frozen=True)
class Reading:
    """A probe as the servers answered it and as the trainer scores it: float32 [B, S] of the same tokens."""

    trace: TraceBatch
    scored_BS: Tensor


def probe_prompts(spec: FamilySpec) -> list[list[int]]:
    """The same short prompt for every row: ids that stand for text, drawn by a key of their own."""
    special = {spec.mask_id, spec.pad_id, *spec.eos_ids}
    plain = [token for token in range(min(spec.vocab_size, 4096)) if token not in special]
    position_P = torch.arange(_PROMPT_LENGTH)
    prompt = [plain[int(i)] for i in Key(0).fold("probe prompt").integers(0, len(plain), position_P)]
    return [prompt] * _NUM_ROWS


def probe_decode(decode: Decode, block_length: int, temperature: float) -> Decode:
    """The recipe's options for a completion of two blocks at another temperature."""
    return decode.model_copy(update={"gen_length": _NUM_BLOCKS * block_length, "temperature": temperature})


def commit_logp(trace: TraceBatch, score: Score) -> tuple[Tensor, Views, Samples]:
    """float32 [B, S]: the log-prob of every token on the canvas that it was committed from, scored by the trainer from
    the step map; 0 elsewhere. Also the views and samples that were scored for it."""
    num = trace.canvas.batch_size
    samples = Samples(
        canvas=trace.canvas,
        is_scored_BS=scored_mask(trace),
        sample_id_B=trace.sample_id_B,
        advantage_B=torch.zeros(num),
        group_B=torch.arange(num),
        mask_id=trace.mask_id,
        step_map_BS=trace.step_map_BS,
        rollout_logp_BS=trace.logp_BS,
        rollout_temperature=trace.temperature or 1.0,
        eos_ids=trace.eos_ids,
    )
    views = corrupt.trace_replay(samples, trace.canvas.is_completion_BS, temperature=samples.rollout_temperature)
    logp_RS = score(views, samples)
    logp_BS = torch.zeros_like(trace.logp_BS).index_add(0, views.sample_R, logp_RS * views.is_target_RS)
    return logp_BS, views, samples


def with_scored_logp(trace: TraceBatch, score: Score) -> TraceBatch:
    """The trace with the trainer's own log-probs at commit in the place of the server's."""
    logp_BS, _, _ = commit_logp(trace, score)
    return dataclasses.replace(trace, logp_BS=logp_BS, missing=tuple(part for part in trace.missing if part != "logp"))


def check_model(trace: TraceBatch, score: Score, max_gap: float, where: str, before: Reading | None) -> Reading | None:
    """Compare a probe's log-probs with the trainer's; None if the server returned no log-probs or no step map.

    before  the last probe, for servers that do not say which weights they have
    Raises DareError if they are too far apart for the same model, or if the servers have not followed an update.
    """
    if trace.missing:
        return None
    scored_BS, views, samples = commit_logp(trace, score)
    logp_RS = scored_BS[views.sample_R] * views.is_target_RS
    gap = mismatch(logp_RS, views, samples).get("rollout_gap", 0.0)
    if gap > max_gap:
        raise DareError(
            "the rollout server does not run the model that is trained",
            where=where,
            got=f"its log-probs of a probe differ by {gap:.3g} nats per token",
            expected=f"at most {max_gap:g} (rollout.max_gap)",
            fix="start it with the checkpoint in model.path and the block length of decode, and see that "
            "rollout.weights_dir is the same folder for both",
        )
    if before is not None and _is_stale(trace, scored_BS, before):
        raise DareError(
            "the rollout server has not loaded the updated weights",
            where=where,
            got="log-probs of a probe as before the update",
            fix="see that rollout.weights_dir is the same folder for both, and look at its log",
        )
    return Reading(trace, scored_BS)


def _is_stale(trace: TraceBatch, scored_BS: Tensor, before: Reading) -> bool:
    """Whether the servers' numbers are still nearer to the trainer's of before, although those have clearly moved."""
    if not torch.equal(trace.canvas.input_BS, before.trace.canvas.input_BS):
        return False
    noise = float((before.scored_BS - before.trace.logp_BS).abs().max())
    if float((scored_BS - before.scored_BS).abs().max()) <= max(_MOVED, 4 * noise):
        return False
    to_new, to_old = (float((trace.logp_BS - other_BS).abs().sum()) for other_BS in (scored_BS, before.scored_BS))
    return to_new > to_old


def has_collapsed(trace: TraceBatch, prompts: list[list[int]]) -> bool:
    """Whether every prompt that was completed more than once was completed the same way each time."""
    groups: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    counts: dict[tuple[int, ...], int] = {}
    for prompt, ids_S, is_completion_S in zip(
        prompts, trace.canvas.input_BS, trace.canvas.is_completion_BS, strict=True
    ):
        place = tuple(prompt)
        groups.setdefault(place, set()).add(tuple(ids_S[is_completion_S].tolist()))
        counts[place] = counts.get(place, 0) + 1
    repeated = [place for place, count in counts.items() if count > 1]
    return bool(repeated) and all(len(groups[place]) == 1 for place in repeated)


def num_distinct(trace: TraceBatch) -> int:
    """Different rows of a trace whose prompts are equal."""
    return len({tuple(row) for row in trace.canvas.input_BS.tolist()})


def check_temperature(remote: TraceBatch, local: TraceBatch, where: str) -> None:
    """Raise DareError if a server gave equal completions where the trainer's own engine, as often, gives many."""
    num = num_distinct(local)
    if num_distinct(remote) == 1 and num >= _MIN_DISTINCT:
        raise DareError(
            "the temperature does not act on the rollout server",
            where=where,
            got=f"{_NUM_ROWS} equal completions of a probe at temperature {remote.temperature:g}",
            expected=f"about {num} different ones, as the trainer's own engine gives",
            fix="use a server that samples: several dLLM algorithms of published servers are greedy whatever is asked",
        )
