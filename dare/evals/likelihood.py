"""Monte-Carlo likelihood of a completion: exact mask counts, stratified over all draws, keyed by content."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from dare.core.errors import DareError
from dare.core.options import Options
from dare.core.rng import Key, stable_id
from dare.core.types import Canvas, Samples, Views
from dare.diffusion import corrupt
from dare.diffusion.likelihood import per_sequence
from dare.families.base import Family

_LOGIT_ROWS = 256  # positions whose whole-vocabulary logits exist at a time, with guidance


class Likelihood(Options):
    """How log-likelihoods are estimated; the batch size is no part of the estimator."""

    num_samples: int = Field(128, ge=1, description="Monte-Carlo draws per continuation; one token needs only one")
    cfg_scale: float = Field(0.0, ge=0.0, description="classifier-free guidance: u + (1 + w)(c - u); masked models")
    batch_size: int = Field(32, ge=1, description="views per forward; never changes a result")


@dataclass(frozen=True, slots=True)
class Request:
    """A continuation to score. `sample_id` keys its masks: equal ids and lengths give equal masks."""

    context: list[int]
    completion: list[int]
    sample_id: int


def log_likelihood(family: Family, context: list[int], completion: list[int], num_samples: int, key: Key) -> float:
    """The ELBO of `completion` given `context`, nats. See `log_likelihoods`."""
    request = Request(context, completion, stable_id("likelihood", *context, "->", *completion))
    if num_samples < 1:
        raise DareError("num_samples must be at least 1", got=num_samples)
    return log_likelihoods(family, [request], Likelihood(num_samples=num_samples), key)[0]


def log_likelihoods(
    family: Family,
    requests: Sequence[Request],
    options: Likelihood,
    key: Key,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """The ELBO of each completion given its context, nats, in order.

    Each draw masks exactly l tokens, l uniform on {1..L} and stratified over the draws, weight L / l. Unlike the
    public LLaDA evaluation the batch size is no part of the estimator (there it sets the strata). A completion of
    one token is exact with one draw. Block models: the same per block, all blocks of a draw in one forward.
    `on_progress` is called with (requests done, all requests).
    Raises DareError for an empty completion, one that holds the mask token, one that does not fit the model, and for
    guidance of a block model.
    """
    for request in requests:
        check_request(family, request, options)
    result = [0.0] * len(requests)
    singles = [index for index, request in enumerate(requests) if len(request.completion) == 1]
    others = [index for index, request in enumerate(requests) if len(request.completion) > 1]
    num_done = 0
    for indices, num_draws in ((singles, 1), (others, options.num_samples)):
        # Rows of similar length share a forward: padding costs time.
        indices = sorted(indices, key=lambda index: len(requests[index].context) + len(requests[index].completion))
        per_chunk = max(1, options.batch_size // num_draws)
        for start in range(0, len(indices), per_chunk):
            chunk = indices[start : start + per_chunk]
            for index, value in zip(
                chunk, _score(family, [requests[i] for i in chunk], num_draws, options, key), strict=True
            ):
                result[index] = value
            num_done += len(chunk)
            if on_progress is not None:
                on_progress(num_done, len(requests))
    return result


def _score(family: Family, requests: list[Request], num_draws: int, options: Likelihood, key: Key) -> list[float]:
    canvas = family.canvas([request.context for request in requests], [request.completion for request in requests])
    samples = Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS,
        sample_id_B=torch.tensor([request.sample_id for request in requests]),
        advantage_B=torch.zeros(len(requests)),
        group_B=torch.zeros(len(requests), dtype=torch.int64),
        mask_id=family.spec.mask_id,
    )
    views = corrupt.exact_count(samples, key, num_views=num_draws)
    total_B = torch.zeros(len(requests), dtype=torch.float64)
    with torch.no_grad():
        for part in torch.split(torch.arange(views.num_views), options.batch_size):
            chosen = views.rows(part)
            rows = canvas.rows(chosen.sample_R)
            if options.cfg_scale:
                logp_RS = _guided_logp(family, chosen, rows, options.cfg_scale)
            else:
                logp_RS = family.view_logp(chosen, rows)
            total_B += per_sequence(logp_RS.cpu(), chosen.weight_RS, chosen.sample_R, len(requests))
    return [float(value) for value in total_B]


def _guided_logp(family: Family, views: Views, canvas: Canvas, scale: float) -> Tensor:
    """float32 [R, S]: `Family.view_logp` under logits u + (1 + scale)(c - u); u sees masks instead of the prompt."""
    is_prompt_RS = canvas.is_real_BS & ~canvas.is_completion_BS
    blind = dataclasses.replace(views, noisy_RS=torch.where(is_prompt_RS, family.spec.mask_id, views.noisy_RS))
    is_read_RS = views.is_target_RS
    hidden_RTD, blind_RTD = (family.view_hidden(shown, canvas, is_read_RS=is_read_RS) for shown in (views, blind))
    is_target_RT = views.is_target_RS[:, : hidden_RTD.shape[1]].to(family.device)
    target_N = views.target_RS[views.is_target_RS].to(family.device)
    logp_N = []
    for hidden_CD, blind_CD, target_C in zip(
        torch.split(hidden_RTD[is_target_RT], _LOGIT_ROWS),
        torch.split(blind_RTD[is_target_RT], _LOGIT_ROWS),
        torch.split(target_N, _LOGIT_ROWS),
        strict=True,
    ):
        conditional_CV, unconditional_CV = family.row_logits(hidden_CD), family.row_logits(blind_CD)
        guided_CV = unconditional_CV + (1.0 + scale) * (conditional_CV - unconditional_CV)
        logp_N.append(guided_CV.log_softmax(-1).gather(-1, target_C[:, None])[:, 0])
    logp_RS = torch.zeros(views.noisy_RS.shape, dtype=torch.float32, device=family.device)
    return logp_RS.index_put(is_target_RT.nonzero(as_tuple=True), torch.cat(logp_N))


def check_request(family: Family, request: Request, options: Likelihood) -> None:
    """Raise DareError for what `log_likelihoods` would refuse."""
    if not request.completion:
        raise DareError("the completion is empty, so it has no likelihood", fix="give at least one token")
    if family.spec.mask_id in request.completion:
        raise DareError("the completion holds the mask token, which has no likelihood", fix="give real tokens only")
    if options.cfg_scale and family.spec.attention != "full":
        raise DareError(
            "classifier-free guidance needs a masked model",
            where="likelihood.cfg_scale",
            got=f"family {family.spec.name}",
            fix="set cfg_scale to 0",
        )
    family.canvas([request.context], [request.completion])
