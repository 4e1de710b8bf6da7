"""One optimizer step, the same for SFT, preference optimisation and every RL algorithm.

    score views without a graph -> loss on the [R, S] log-probs -> its gradient with respect to them
    -> micro-batched backward of sum(gradient * logp) -> optimizer step

By the chain rule this is exact for any loss, at any micro-batch size, with one micro-batch's graph in memory.
Condition: both passes compute the same function; their largest difference is the metric `replay_gap`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dare.algorithms.base import Algorithm
from dare.core.engine import Engine
from dare.core.errors import NonFiniteError
from dare.core.rng import Key
from dare.core.types import AuxLoss, Judgement, Loss, Samples, Views
from dare.training.mismatch import mismatch
from dare.training.noise import nll_by_noise


@dataclass
class Iteration:
    """The views of one inner iteration and what the fixed policies think of them."""

    views: Views
    old_RS: Tensor | None  # None: the first scoring pass of the update is the old policy's
    reference_RS: Tensor | None
    judgement: Judgement | None = None  # of the critic, before the first update
    is_first: bool = False  # the weights are those of the rollout
    num_forwards: int = 0  # views that were run forward for all this


def draw_views(engine: Engine, algorithm: Algorithm[Any], samples: Samples, key: Key) -> Views:
    """The views of one inner iteration, the policy's predictions in them where the algorithm asks for any."""
    views = algorithm.corrupt(samples, key)
    for _ in range(algorithm.num_predictions):
        views = algorithm.with_predictions(views, samples, engine.predict(views, samples))
    return views


def plan_iterations(
    engine: Engine,
    algorithm: Algorithm[Any],
    samples: Samples,
    key: Key,
    num: int,
    *,
    stored: Callable[[Views, Samples], Tensor] | None = None,
) -> list[Iteration]:
    """Draw all views of a rollout before any step; score them under the old and the reference policy.

    Only iterations after the first need a pass of their own for the old policy. `stored` stands in for the engine's
    reference policy.
    """
    plans = []
    for index in range(num):
        views = draw_views(engine, algorithm, samples, key.fold(index))
        needs_old = index > 0 and algorithm.needs_old
        old = engine.score(views, samples) if needs_old else None
        reference = None
        if algorithm.needs_reference:
            reference = (stored or partial(engine.score, is_reference=True))(views, samples)
        judgement = None
        if algorithm.critic_lr is not None:
            judgement = algorithm.judge(engine.score(views, samples, role="critic"), views, samples)
        is_scored = (needs_old, algorithm.needs_reference and stored is None, judgement is not None)
        num_forwards = views.num_views * (algorithm.num_predictions + sum(is_scored))
        plans.append(Iteration(views, old, reference, judgement, index == 0, num_forwards))
    return plans


def update(engine: Engine, algorithm: Algorithm[Any], samples: Samples, iteration: Iteration) -> dict[str, float]:
    """One optimizer step on one iteration's views; returns its metrics.

    Raises NonFiniteError if the loss or the gradient is not finite; no weight has changed then.
    """
    views = iteration.views
    samples = replace(samples, judgement=iteration.judgement)
    auxiliary = algorithm.auxiliary(views, samples)
    if algorithm.is_linear:
        # The gradient of a linear loss does not depend on where it is taken, so no scoring pass is needed.
        zero_RS = torch.zeros(views.noisy_RS.shape)
        _, grad_RS = _loss_and_grad(algorithm, zero_RS, zero_RS, iteration, samples)
        logp_RS = known_RS = engine.accumulate(views, samples, grad_RS, auxiliary=auxiliary)
        num_forwards = iteration.num_forwards + _num_run(logp_RS)
        logp_RS = torch.where(logp_RS.isnan() & (grad_RS == 0), 0.0, logp_RS)
        loss = algorithm.loss(logp_RS, logp_RS, iteration.reference_RS, views, samples)
        gap = 0.0
    else:
        logp_RS = known_RS = engine.score(views, samples)
        old_RS = logp_RS if iteration.old_RS is None else iteration.old_RS
        loss, grad_RS = _loss_and_grad(algorithm, logp_RS, old_RS, iteration, samples)
        replay_RS = engine.accumulate(views, samples, grad_RS, auxiliary=auxiliary)
        num_forwards = iteration.num_forwards + views.num_views + _num_run(replay_RS)
        is_replayed = (grad_RS != 0).any(-1, keepdim=True) & views.is_target_RS
        gap = float((replay_RS - logp_RS).abs()[is_replayed].max()) if bool(is_replayed.any()) else 0.0
    _require_finite(loss, logp_RS, views)
    metrics = {name: metric.mean for name, metric in loss.metrics.items()}
    if algorithm.kind == "offline":
        metrics |= {name: metric.mean for name, metric in nll_by_noise(logp_RS, views, samples).items()}
    value = float(loss.value.detach())
    if auxiliary is not None:
        metrics[auxiliary.name] = _aux_value(auxiliary)
        value += metrics[auxiliary.name]
    critic: dict[str, float] = {}
    if algorithm.critic_lr is not None:
        critic, num_critic = _accumulate_critic(engine, algorithm, samples, views)
        num_forwards += num_critic
    drift = mismatch(known_RS, views, samples) if iteration.is_first else {}
    counts = {"replay_gap": gap, "view_forwards": float(num_forwards)}
    metrics = {"loss": value, **metrics, **counts, **drift, **engine.step()}
    if critic:
        critic |= engine.step(role="critic")
    return {**metrics, **{f"critic/{name}": number for name, number in critic.items()}}


def _accumulate_critic(
    engine: Engine, algorithm: Algorithm[Any], samples: Samples, views: Views
) -> tuple[dict[str, float], int]:
    """The critic's gradient, as the policy's: score, loss on values, replayed backward. The loss's metrics, and how
    many views were run forward."""
    value_RS = engine.score(views, samples, role="critic").requires_grad_()
    loss = algorithm.value_loss(value_RS, views, samples)
    _require_finite(loss, value_RS.detach(), views)
    (grad_RS,) = torch.autograd.grad(loss.value, value_RS)
    num_forwards = views.num_views + _num_run(engine.accumulate(views, samples, grad_RS, role="critic"))
    metrics = {name: metric.mean for name, metric in loss.metrics.items()}
    return {"loss": float(loss.value.detach()), **metrics}, num_forwards


def _num_run(score_RS: Tensor) -> int:
    """How many views an accumulate ran: what it did not run is NaN."""
    return int((~score_RS.isnan()).any(-1).sum())


def _aux_value(auxiliary: AuxLoss) -> float:
    value = float(auxiliary.value_A.double().sum())
    if not math.isfinite(value):
        raise NonFiniteError("the auxiliary loss is not finite", where=auxiliary.name, got=value)
    return value


def _loss_and_grad(
    algorithm: Algorithm[Any], logp_RS: Tensor, old_RS: Tensor, iteration: Iteration, samples: Samples
) -> tuple[Loss, Tensor]:
    leaf = logp_RS.detach().clone().requires_grad_()
    loss = algorithm.loss(leaf, old_RS.detach(), iteration.reference_RS, iteration.views, samples)
    if not loss.value.requires_grad:  # nothing in this batch is trained on
        return loss, torch.zeros_like(leaf)
    (grad_RS,) = torch.autograd.grad(loss.value, leaf)
    return loss, grad_RS


def _require_finite(loss: Loss, logp_RS: Tensor, views: Views) -> None:
    if bool(loss.value.isfinite()):
        return
    bad = (~logp_RS.isfinite() & views.is_target_RS).any(-1).nonzero()[:, 0]
    culprit = f"log-probs of sample row {int(views.sample_R[bad[0]])}" if len(bad) else "finite log-probs"
    raise NonFiniteError(
        "the loss is not finite",
        where=culprit,
        got=float(loss.value),
        fix="lower optimizer.lr, or look at the samples of the last steps; the last checkpoint is intact",
    )
