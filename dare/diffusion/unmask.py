"""Which masked positions a denoising step commits. B rows, K positions of each row's current block.

A policy names the score that it ranks positions by and the rule that turns scores into commits; the table
`POLICIES` at the end lists them all. Only masked positions are ever committed, and equal scores are committed from
left to right, so a policy has one answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, NamedTuple

from dare.core.decode import Decode
from dare.core.errors import unknown_name
from dare.core.lazy import torch
from dare.diffusion.sampling import ScoreName

if TYPE_CHECKING:
    from torch import Tensor

RankingName = ScoreName | Literal["uniform", "none"]
Rule = Callable[["Tensor", "Tensor", "Due", Decode], "Tensor"]

_THRESHOLD = 0.9
_FACTOR = 1.0
_ENTROPY_BOUND = 0.35


class Due(NamedTuple):
    """What the schedule asks of a step.

    quota_B  int64    tokens to commit
    share_B  float32  probability that a masked position is revealed, if each is on its own
    """

    quota_B: Tensor
    share_B: Tensor


def due(
    schedule: str, num_masked_B: Tensor, num_left_B: Tensor, num_steps: int, step_B: Tensor, t_min: float = 1e-3
) -> Due:
    """What step `step_B` of `num_steps` owes to a block that began with `num_masked_B` masks and has `num_left_B`.

    `t_min`: see `reveal_share`. Raises DareError for an unknown schedule.
    """
    if schedule not in SCHEDULES:
        raise unknown_name("schedule", schedule, SCHEDULES, where="decode.schedule")
    share_B = reveal_share(num_steps, step_B, t_min)
    return Due(SCHEDULES[schedule](num_masked_B, num_left_B, num_steps, step_B, share_B), share_B)


def quota(num_masked_B: Tensor, num_steps: int, step_B: Tensor) -> Tensor:
    """int64 [B]: tokens to commit at step `step_B` when `num_masked_B` masks are spread over `num_steps` steps.

    The remainder goes to the first steps (LLaDA, `get_num_transfer_tokens`). A block that begins with the end of a
    prompt has fewer masks than positions; SDAR's sampler plans for all positions instead and finishes it sooner.
    """
    return num_masked_B // num_steps + (step_B < num_masked_B % num_steps)


def cumulative_quota(num_masked_B: Tensor, num_steps: int, step_B: Tensor) -> Tensor:
    """int64 [B]: tokens that are committed once step `step_B` is done: the sum of `quota` over steps 0..step_B."""
    done_B = (step_B + 1).clamp(max=num_steps)
    return num_masked_B // num_steps * done_B + torch.minimum(done_B, num_masked_B % num_steps)


def reveal_share(num_steps: int, step_B: Tensor, t_min: float) -> Tensor:
    """float32 [B]: 1 - s / t for the times t > s around a step, evenly spaced from 1 to t_min; 1 from the last step on.

    The share of the masks at time t that the reverse process has revealed at time s (Dream, `diffusion_generate`).
    """
    time_T = torch.linspace(1.0, t_min, num_steps + 1)
    share_T = 1.0 - time_T[1:] / time_T[:-1]
    share_T[-1] = 1.0
    return share_T.to(step_B.device)[step_B.clamp(max=num_steps - 1)]


def _even(num_masked_B: Tensor, num_left_B: Tensor, num_steps: int, step_B: Tensor, share_B: Tensor) -> Tensor:
    return quota(num_masked_B, num_steps, step_B)


def _by_timesteps(num_masked_B: Tensor, num_left_B: Tensor, num_steps: int, step_B: Tensor, share_B: Tensor) -> Tensor:
    """Dream's counts: rounded down in float32, so as many steps as masks begin with an empty one."""
    return (num_left_B.float() * share_B).long()


def _carried(num_masked_B: Tensor, num_left_B: Tensor, num_steps: int, step_B: Tensor, share_B: Tensor) -> Tensor:
    """All that the even schedule has asked for so far and was not committed (Fast-dLLM for Dream, without a cache)."""
    return cumulative_quota(num_masked_B, num_steps, step_B) - (num_masked_B - num_left_B)


def _ascending(num_masked_B: Tensor, num_left_B: Tensor, num_steps: int, step_B: Tensor, share_B: Tensor) -> Tensor:
    """Twice as many at each step as at the one before, and at the last the rest (ASS; CJ-GRPO, Yang et al. 2025)."""
    doubled_B = torch.ones_like(step_B) << step_B.clamp(max=62)
    return torch.where(step_B < num_steps - 1, torch.minimum(doubled_B, num_left_B), num_left_B)


def progress(schedule: str, num_steps: int, step_B: Tensor) -> Tensor:
    """float32 [B]: how far a block is at its step `step_B` of `num_steps`, from 0 or little to 1 or nearly.

    Steps done over all but one; on the ascending schedule tokens committed after the step over 2^num_steps. The public
    code counts the steps of all blocks together, so that with several blocks it never comes near 1.
    """
    step_B = step_B.clamp(max=num_steps - 1).float()
    if schedule == "ascending":
        return (torch.exp2(step_B + 1.0) - 1.0) / 2.0**num_steps
    return step_B / (num_steps - 1) if num_steps > 1 else torch.ones_like(step_B)


SCHEDULES: dict[str, Callable[[Tensor, Tensor, int, Tensor, Tensor], Tensor]] = {
    "even": _even,
    "timesteps": _by_timesteps,
    "carried": _carried,
    "ascending": _ascending,
}


def commits(
    policy: str,
    score_BK: Tensor,
    is_masked_BK: Tensor,
    quota_B: Tensor,
    decode: Decode,
    share_B: Tensor | None = None,
) -> Tensor:
    """bool [B, K]: the positions to commit, a subset of `is_masked_BK`.

    score_BK  the score `POLICIES[policy].score`; ignored where not masked
    quota_B   what the schedule asks for; policies that decide by themselves ignore it
    share_B   see `Due`; read by `independent` only, None reveals everything
    Raises DareError for an unknown policy.
    """
    due = Due(quota_B, torch.ones(len(quota_B), device=score_BK.device) if share_B is None else share_B)
    return find_policy(policy).rule(score_BK, is_masked_BK, due, decode)


def running_confidence(
    score_BK: Tensor, is_masked_BK: Tensor, is_held_BK: Tensor, num_kept_B: Tensor
) -> tuple[Tensor, Tensor]:
    """bool [B, K] each: the masked positions to commit, and the held ones to mask again (RCR; MDPO, He et al. 2025).

    Every masked position has a new candidate, every held one the score it was committed with; the `num_kept_B` best of
    both stay. A token that is masked again is scored anew at its next prediction (the public code overwrites the score
    too; a maximum over its predictions is not kept).
    """
    is_kept_BK = _best(score_BK, is_masked_BK | is_held_BK, num_kept_B)
    return is_kept_BK & is_masked_BK, is_held_BK & ~is_kept_BK


def drawn_order(score_N: Tensor, temperature: float, uniform_N: Tensor) -> Tensor:
    """float64 [N]: scores whose `n` highest of a row are a draw without replacement from softmax(score / temperature).

    Adding Gumbel noise to the logits makes the order of the sums that of successive draws (Gumbel-top-k; Kool et al.
    2019). Dream calls the temperature `alg_temp` and draws with `torch.multinomial`: the same distribution. At
    temperature 0 the scores themselves.
    """
    score_N = score_N.double()
    return score_N if temperature == 0.0 else score_N / temperature - (-uniform_N.double().log()).log()


def is_distribution_only(policy: str) -> bool:
    """Whether positions are chosen without regard to the tokens that were sampled for them.

    Only then is the likelihood of a trace the product of its tokens' probabilities: a choice that looks at the
    candidates rejects some of them.
    """
    return find_policy(policy).score != "confidence"


def has_quota(policy: str) -> bool:
    """Whether the schedule says how many positions the policy commits."""
    return "{quota}" in find_policy(policy).words


def is_first_forced(cache: str, *, is_shifted: bool) -> bool:
    """Whether the first step of a block commits its first position, whatever the policy says.

    With an approximate cache, later steps read a block from its own positions only, and under a shift none of them
    scores the first (Fast-dLLM for Dream).
    """
    return is_shifted and cache in ("prefix", "dual")


def rule_in_words(decode: Decode) -> str:
    """What the unmask policy commits, with the options filled in and "{quota}" left open."""
    if decode.remask != "none":
        return "the {quota} of highest score stay, of new candidates and of tokens that the block holds"
    return find_policy(decode.unmask).words.format(
        quota="{quota}",
        threshold=_THRESHOLD if decode.threshold is None else decode.threshold,
        min_commit=decode.min_commit or 1,
        factor=decode.factor or _FACTOR,
        entropy_bound=decode.entropy_bound or _ENTROPY_BOUND,
    )


def find_policy(name: str) -> Policy:
    """The row `name` of the table. Raises DareError for an unknown name."""
    if name not in POLICIES:
        raise unknown_name("unmask policy", name, POLICIES, where="decode.unmask")
    return POLICIES[name]


def _top_quota(score_BK: Tensor, is_masked_BK: Tensor, due: Due, decode: Decode) -> Tensor:
    """As many of the best as are due."""
    return _best(score_BK, is_masked_BK, due.quota_B)


def _on_its_own(score_BK: Tensor, is_masked_BK: Tensor, due: Due, decode: Decode) -> Tensor:
    """Each masked position with the same probability, whatever the others do (Dream: `origin`); scores are uniform."""
    return is_masked_BK & (score_BK < due.share_B[:, None])


def _above_threshold_when_due(score_BK: Tensor, is_masked_BK: Tensor, due: Due, decode: Decode) -> Tensor:
    """Of as many of the best as are due, those above the threshold, and always the first."""
    is_due_BK = _best(score_BK, is_masked_BK, due.quota_B.clamp(min=1))
    return _above_threshold(score_BK, is_due_BK, due, decode)


def _above_threshold(score_BK: Tensor, is_masked_BK: Tensor, due: Due, decode: Decode) -> Tensor:
    """Every confidence above the threshold, and at least the `min_commit` best."""
    threshold = _THRESHOLD if decode.threshold is None else decode.threshold
    num_above_B = ((score_BK > threshold) & is_masked_BK).sum(-1)
    return _best(score_BK, is_masked_BK, num_above_B.clamp(min=decode.min_commit or 1))


def _by_factor(score_BK: Tensor, is_masked_BK: Tensor, due: Due, decode: Decode) -> Tensor:
    """The longest run of ranks r = 1, 2, ... with confidence >= 1 - factor / (r + 1); the first always passes.

    Fast-dLLM (Wu et al. 2025), including a behaviour of its code: when only the very last rank fails, it is
    committed too.
    """
    factor = decode.factor or _FACTOR
    num_masked_B = is_masked_BK.sum(-1)
    sorted_BK = score_BK.masked_fill(~is_masked_BK, -math.inf).sort(dim=-1, descending=True).values
    rank_K = torch.arange(1, score_BK.shape[1] + 1, device=score_BK.device)
    is_passing_BK = sorted_BK >= 1.0 - factor / (rank_K + 1.0)
    is_passing_BK[:, 0] = True
    num_passing_B = is_passing_BK.long().cumprod(-1).sum(-1)
    is_last_failing_B = num_passing_B == num_masked_B - 1
    return _best(score_BK, is_masked_BK, num_passing_B + is_last_failing_B)


def _by_entropy_bound(score_BK: Tensor, is_masked_BK: Tensor, due: Due, decode: Decode) -> Tensor:
    """The lowest entropies while their sum stays below the bound, at least one (JetEngine; Ben-Hamu et al. 2025).

    JetEngine takes entropies at the sampling temperature, we at temperature 1.
    """
    bound = decode.entropy_bound or _ENTROPY_BOUND
    entropy_BK = (-score_BK).masked_fill(~is_masked_BK, math.inf).sort(dim=-1).values
    num_below_B = (entropy_BK.cumsum(-1) < bound).sum(-1)
    return _best(score_BK, is_masked_BK, num_below_B.clamp(min=1))


def _best(score_BK: Tensor, is_masked_BK: Tensor, num_B: Tensor) -> Tensor:
    """The `num_B` highest-scored masked positions of each row, or all that there are."""
    order_BK = score_BK.masked_fill(~is_masked_BK, -math.inf).argsort(dim=-1, descending=True, stable=True)
    is_chosen_BK = torch.arange(score_BK.shape[1], device=score_BK.device) < num_B[:, None]
    return torch.zeros_like(is_masked_BK).scatter(-1, order_BK, is_chosen_BK) & is_masked_BK


class Policy(NamedTuple):
    """score  what positions are ranked by; "uniform" a keyed random number, "none" nothing: from left to right
    rule      (score_BK, is_masked_BK, due, decode) -> bool [B, K]
    words     the rule, for people who look at a trace; "{quota}" stands for what is due, other names for the options
    """

    score: RankingName
    rule: Rule
    words: str


_RANKED = "the schedule asks for {quota}, highest score first"
POLICIES: dict[str, Policy] = {
    "low_confidence": Policy("confidence", _top_quota, _RANKED),
    "max_prob": Policy("max_prob", _top_quota, _RANKED),
    "entropy": Policy("negative_entropy", _top_quota, _RANKED),
    "margin": Policy("margin", _top_quota, _RANKED),
    "random": Policy("uniform", _top_quota, "the schedule asks for {quota}, at random"),
    "left_to_right": Policy("none", _top_quota, "the schedule asks for {quota}, from left to right"),
    "independent": Policy("uniform", _on_its_own, "each is revealed with the probability that the schedule asks for"),
    "capped_threshold": Policy(
        "confidence",
        _above_threshold_when_due,
        "the schedule asks for {quota}, highest score first; of these those above {threshold}, and at least the first",
    ),
    "threshold": Policy(
        "confidence", _above_threshold, "all above {threshold}, and at least the {min_commit} of highest score"
    ),
    "factor": Policy(
        "confidence",
        _by_factor,
        "rank r passes while its score is at least 1 - {factor} / (r + 1); the first always does",
    ),
    "entropy_bound": Policy(
        "negative_entropy",
        _by_entropy_bound,
        "the lowest entropies while their sum stays below {entropy_bound} nats, and at least one",
    ),
}
