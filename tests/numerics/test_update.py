"""The trainer: replay equals full-graph autograd, whatever the loss and the micro-batch; faults stop it cleanly."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dare.algorithms.base import Algorithm
from dare.algorithms.policy import PolicyAlgorithm
from dare.algorithms.tracerl_value import TraceRLValue, TraceRLValueOptions
from dare.core.errors import NonFiniteError
from dare.core.recipe import Recipe, parse_recipe
from dare.core.registry import ALGORITHMS, resolve
from dare.core.rng import Key
from dare.core.types import AuxLoss, Samples, Views
from dare.diffusion import corrupt
from dare.executors.local import LocalEngine
from dare.families.base import Family
from dare.training.update import plan_iterations, update
from tests.numerics.records import with_records

RATIO = [name for name in ALGORITHMS if issubclass(resolve("algorithms", name), PolicyAlgorithm)]


def _recipe(algorithm: str, micro_batch_views: int) -> Recipe:
    data: dict[str, Any] = {
        "name": "test",
        "model": {"create": {"family": "llada"}},
        "algorithm": {"name": algorithm},
        "task": {"name": "countdown"},
        "train": {"micro_batch_views": micro_batch_views},
        "optimizer": {"lr": 1e-2, "max_grad_norm": 1e9},
    }
    return parse_recipe(data, where="test")


def _samples(family: Family, num: int = 6) -> Samples:
    """Ragged fixed samples with a step map of two tokens per step, advantages of both signs, two groups."""
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(0, 20, (2 + row,), generator=generator).tolist() for row in range(2)]
    prompts = [prompts[row // 3] for row in range(num)]
    completions = [torch.randint(0, 20, (6 + 2 * (row // 3),), generator=generator).tolist() for row in range(num)]
    canvas = family.canvas(prompts, completions)
    order_BS = torch.rand(canvas.input_BS.shape, generator=generator).masked_fill(~canvas.is_completion_BS, 9.0)
    rank_BS = order_BS.argsort(-1).argsort(-1) // 2
    samples = Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS.clone(),
        sample_id_B=torch.arange(num) + 100,
        advantage_B=torch.tensor([1.0, -0.5, 0.25, -1.0, 0.75, -0.5])[:num],
        group_B=torch.arange(num) // 3,
        mask_id=family.spec.mask_id,
        step_map_BS=torch.where(canvas.is_completion_BS, rank_BS, -1),
        rollout_logp_BS=torch.zeros(canvas.input_BS.shape),
        eos_ids=family.spec.eos_ids,
    )
    return with_records(samples)


def _samples_for(algorithm: Algorithm[Any], family: Family) -> Samples:
    """The fixed samples; as pairs, the chosen one first, where the algorithm reads pairs."""
    samples = _samples(family)
    if algorithm.row_kind == "completions":
        return samples
    row_B = torch.arange(samples.canvas.batch_size)
    return replace(samples, group_B=row_B // 2, reward_B=1.0 - row_B % 2)


def _engine(family: Family, recipe: Recipe, *, needs_reference: bool = False) -> LocalEngine:
    critic_lr = recipe.algorithm.build().critic_lr
    copied = copy.deepcopy(family)
    return LocalEngine(recipe, copied, num_updates=10, needs_reference=needs_reference, critic_lr=critic_lr)


def _judged(engine: LocalEngine, algorithm: Algorithm[Any], views: Views, samples: Samples) -> Samples:
    """With the critic's opinion, where the algorithm has a critic."""
    if algorithm.critic_lr is None:
        return samples
    return replace(samples, judgement=algorithm.judge(engine.score(views, samples, role="critic"), views, samples))


def _full_graph_auxiliary(family: Family, auxiliary: AuxLoss, views: Views, samples: Samples) -> Tensor:
    """The auxiliary loss from all logits of all views at once."""
    hidden_RTD = family.view_hidden(views, samples.canvas.rows(views.sample_R))
    logits_RTV = (hidden_RTD @ family.network.head_weight.T) * family.network.logit_scale / views.temperature
    chosen_AV = logits_RTV[auxiliary.view_A, auxiliary.position_A]
    return auxiliary.term(chosen_AV, torch.arange(len(chosen_AV))).sum()


def _grads(engine: LocalEngine) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in engine.family.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family_name", ["llada", "sdar"])
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_replay_equals_the_gradient_of_the_full_graph(
    families: dict[str, Family], monkeypatch: pytest.MonkeyPatch, name: str, family_name: str
) -> None:
    monkeypatch.setattr("dare.families.base.chunk_rows", lambda vocab_size: 3)
    family = families[family_name]
    recipe = _recipe(name, micro_batch_views=4)
    algorithm = recipe.algorithm.build()
    samples = _samples_for(algorithm, family)
    views = algorithm.corrupt(samples, Key(3))
    old_RS = None

    direct = _engine(family, recipe)
    samples = _judged(direct, algorithm, views, samples)
    logp_RS = direct.family.view_logp(views, samples.canvas.rows(views.sample_R))
    # An old policy away from the new one, so that ratios and clipping matter.
    old_RS = (logp_RS + 0.3 * torch.sin(torch.arange(logp_RS.numel()).view_as(logp_RS))).detach() * views.is_target_RS
    reference_RS = logp_RS.detach() * 0.9
    total = algorithm.loss(logp_RS, old_RS, reference_RS, views, samples).value
    auxiliary = algorithm.auxiliary(views, samples)
    if auxiliary is not None:
        auxiliary_value = _full_graph_auxiliary(direct.family, auxiliary, views, samples)
        total = total + auxiliary_value
    total.backward()

    replay = _engine(family, recipe)
    leaf = replay.score(views, samples).requires_grad_()
    loss = algorithm.loss(leaf, old_RS, reference_RS, views, samples)
    (grad_RS,) = torch.autograd.grad(loss.value, leaf)
    replay.accumulate(views, samples, grad_RS, auxiliary=auxiliary)
    if auxiliary is not None:
        torch.testing.assert_close(auxiliary.value_A.sum(), auxiliary_value.detach(), rtol=1e-5, atol=1e-7)
        assert float(auxiliary_value.detach()) > 0

    expected, got = _grads(direct), _grads(replay)
    assert expected.keys() == got.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    assert scale > 0
    for parameter in expected:
        torch.testing.assert_close(got[parameter], expected[parameter], rtol=1e-4, atol=2e-6 * scale)


@pytest.mark.parametrize("family_name", ["llada", "sdar"])
@pytest.mark.parametrize("name", list(ALGORITHMS))
def test_an_update_does_not_depend_on_micro_batches(families: dict[str, Family], name: str, family_name: str) -> None:
    results = []
    for micro_batch_views in (1, 3, 1000):
        recipe = _recipe(name, micro_batch_views)
        algorithm = recipe.algorithm.build()
        engine = _engine(families[family_name], recipe, needs_reference=algorithm.needs_reference)
        samples = _samples_for(algorithm, families[family_name])
        iterations = plan_iterations(engine, algorithm, samples, Key(0), 1)
        metrics = update(engine, algorithm, samples, iterations[0])
        results.append(metrics)
    for metrics in results[1:]:
        assert metrics["loss"] == pytest.approx(results[0]["loss"], rel=1e-5, abs=1e-6)
        assert metrics["grad_norm"] == pytest.approx(results[0]["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("family_name", ["llada", "sdar"])
def test_predictions_are_the_most_likely_tokens(families: dict[str, Family], family_name: str) -> None:
    """At targets, however the views are divided; a part without views counts for nothing."""
    family = families[family_name]
    engine, samples = _engine(family, _recipe("sft", micro_batch_views=2)), _samples(family)
    views = corrupt.bernoulli(samples, Key(0), num_views=2)
    hidden_RTD = family.view_hidden(views, samples.canvas.rows(views.sample_R))
    expected_RS = (hidden_RTD @ family.network.head_weight.T).argmax(-1) * views.is_target_RS
    assert torch.equal(engine.predict(views, samples), expected_RS)
    parts = [torch.arange(5), torch.arange(0), torch.arange(5, views.num_views)]
    assert torch.equal(engine.predict_parts(views, samples.canvas, parts), expected_RS)


def test_training_on_own_drafts_and_confidence(families: dict[str, Family]) -> None:
    """Both ask for predictions; views multiply, the entropy is reported, and a step lowers the loss of its views."""
    family = families["sdar"]
    recipe = _recipe("sft", micro_batch_views=4)
    options = {"name": "sft", "preset": "llada2_edit", "draft_turns": 2, "confidence_weight": 1.0}
    algorithm = recipe.algorithm.model_validate(options).build().adapted(family.spec)
    engine, samples = _engine(family, recipe), _samples(family)
    (iteration,) = plan_iterations(engine, algorithm, samples, Key(0), 1)
    assert iteration.views.num_views == 3 * samples.canvas.batch_size
    assert iteration.views.predicted_RS is not None
    first = update(engine, algorithm, samples, iteration)
    for _ in range(5):
        last = update(engine, algorithm, samples, iteration)
    assert last["loss"] < first["loss"]
    assert first["nll_visible"] > 0
    has_right = bool((iteration.views.predicted_RS == iteration.views.target_RS).any())
    assert ("confidence" in first) == has_right


@pytest.mark.parametrize("name", RATIO)
def test_first_update_is_on_policy_and_both_passes_agree(families: dict[str, Family], name: str) -> None:
    recipe = _recipe(name, 5)
    algorithm = recipe.algorithm.build()
    engine = _engine(families["sdar"], recipe, needs_reference=algorithm.needs_reference)
    samples = _samples(families["sdar"])
    first, second = plan_iterations(engine, algorithm, samples, Key(0), 2)
    metrics = update(engine, algorithm, samples, first)
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["clip_fraction"] == 0.0
    assert metrics["replay_gap"] < 1e-5
    later = update(engine, algorithm, samples, second)
    assert later["ratio"] != pytest.approx(1.0, abs=1e-6)  # the policy has moved


@pytest.mark.parametrize("family_name", ["llada", "sdar"])
def test_the_critic_is_replayed_like_the_policy(families: dict[str, Family], family_name: str) -> None:
    """Its gradient is that of the full graph, and its steps bring values nearer to the returns."""
    family, recipe = families[family_name], _recipe("tracerl_value", micro_batch_views=3)
    algorithm, samples = recipe.algorithm.build(), _samples(family)
    engine = _engine(family, recipe)
    views = algorithm.corrupt(samples, Key(0))
    samples = _judged(engine, algorithm, views, samples)
    assert engine.critic is not None
    with torch.no_grad():  # a head of zeros has no gradient into the backbone
        engine.critic.head.copy_(torch.linspace(-0.3, 0.3, len(engine.critic.head)))
    value_RS = engine.critic.view_value(views, samples.canvas.rows(views.sample_R))
    algorithm.value_loss(value_RS, views, samples).value.backward()
    expected = {n: p.grad.clone() for n, p in engine.critic.named_parameters() if p.grad is not None}
    engine.critic_optimizer.adam.zero_grad(set_to_none=True)
    leaf = engine.score(views, samples, role="critic").requires_grad_()
    torch.testing.assert_close(leaf.detach(), value_RS.detach(), rtol=1e-5, atol=1e-6)
    (grad_RS,) = torch.autograd.grad(algorithm.value_loss(leaf, views, samples).value, leaf)
    engine.accumulate(views, samples, grad_RS, role="critic")
    got = {n: p.grad for n, p in engine.critic.named_parameters() if p.grad is not None}
    assert expected.keys() == got.keys()
    assert "value_head" in got
    scale = max(float(grad.abs().max()) for grad in expected.values())
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=2e-6 * scale)
    assert not _grads(engine)  # the policy is another network


def test_the_critic_learns_the_returns(families: dict[str, Family]) -> None:
    recipe = _recipe("tracerl_value", micro_batch_views=100)
    algorithm, samples = TraceRLValue(TraceRLValueOptions(value_clip=1e9)), _samples(families["sdar"])
    engine = LocalEngine(recipe, copy.deepcopy(families["sdar"]), num_updates=30, needs_reference=False, critic_lr=1e-2)
    views = algorithm.corrupt(samples, Key(0))
    samples = _judged(engine, algorithm, views, samples)
    errors = []
    for _ in range(12):
        leaf = engine.score(views, samples, role="critic").requires_grad_()
        loss = algorithm.value_loss(leaf, views, samples)
        errors.append(loss.metrics["squared_error"].mean)
        (grad_RS,) = torch.autograd.grad(loss.value, leaf)
        engine.accumulate(views, samples, grad_RS, role="critic")
        engine.step(role="critic")
    assert errors[-1] < 0.5 * errors[0]


def test_a_non_finite_weight_stops_the_step_and_names_the_place(families: dict[str, Family]) -> None:
    recipe = _recipe("sft", 4)
    algorithm = recipe.algorithm.build()
    engine = _engine(families["llada"], recipe)
    samples = _samples(families["llada"])
    with torch.no_grad():
        next(iter(engine.family.network.parameters()))[3, 0] = torch.nan
    before = [parameter.clone() for parameter in engine.family.network.parameters()]
    (iteration,) = plan_iterations(engine, algorithm, samples, Key(0), 1)
    with pytest.raises(NonFiniteError, match="not finite"):
        update(engine, algorithm, samples, iteration)
    after = list(engine.family.network.parameters())
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
