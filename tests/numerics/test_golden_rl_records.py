"""The authors' public code of MDPO, d-TreeRPO and TraceRL's value model: drafts, trees, values, losses, gradients."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dare.algorithms.dtreerpo import DTreeRPO, DTreeRPOOptions
from dare.algorithms.mdpo import MDPO, MDPOOptions
from dare.algorithms.tracerl_value import TraceRLValue, TraceRLValueOptions
from dare.core.rng import Key
from dare.core.types import Canvas, Drafts, Judgement, Samples, Tree, Views
from dare.families.weights import load_family
from dare.objectives.stepwise import stepwise_gae
from dare.objectives.tree import node_values, sibling_advantages

GOLDEN = Path(__file__).parent.parent / "golden"
MASK, EOS, PAD = 126, 120, 121


@functools.cache
def load(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return json.loads((GOLDEN / "rl" / f"{name}.json").read_text()), load_file(GOLDEN / "rl" / f"{name}.safetensors")


def case_of(algorithm: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    facts, tensors = load(algorithm)
    return facts[name], {key.split("/")[1]: value for key, value in tensors.items() if key.startswith(f"{name}/")}


@functools.cache
def golden_family() -> Any:
    return load_family(GOLDEN / "llada", torch.float32, "cpu")


def wide(value: Tensor, num_prompt: int, fill: float = 0) -> Tensor:
    """Completion columns widened to the canvas."""
    return torch.nn.functional.pad(value, (num_prompt, 0), value=fill)


def samples_of(
    input_BS: Tensor, num_prompt: int, is_real_BS: Tensor, is_scored_BS: Tensor | None = None, **more: Any
) -> Samples:
    is_completion_BS = torch.zeros_like(input_BS, dtype=torch.bool)
    is_completion_BS[:, num_prompt:] = True
    fields: dict[str, Any] = {"group_B": torch.zeros(len(input_BS), dtype=torch.int64), "mask_id": MASK}
    return Samples(
        canvas=Canvas(input_BS, is_completion_BS, is_real_BS, is_completion_BS.long() - 1, "full"),
        is_scored_BS=is_completion_BS if is_scored_BS is None else is_scored_BS,
        sample_id_B=torch.arange(len(input_BS)),
        advantage_B=torch.zeros(len(input_BS)),
        eos_ids=(EOS,),
        **{**fields, **more},
    )


def check_loss(value: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(value.detach().double(), expected.double(), rtol=1e-5, atol=5e-6)


def check_gradient(got: Tensor, expected: Tensor) -> None:
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(got.double(), expected.double(), rtol=0, atol=5e-6 * scale)


def mdpo_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Samples]:
    """All steps' drafts, sample-major; prompt padding was hidden there, and all rows have one prompt: it is cut off."""
    facts, tensors = case_of("mdpo", name)
    tensors["prompt_ids"] = tensors["prompt_ids"][:, tensors["prompt_mask"][0].bool()]
    prompt_BP, num_steps, num = tensors["prompt_ids"], facts["steps"], facts["group_size"]
    num_prompt = prompt_BP.shape[1]

    def by_sample(step_TBL: Tensor, fill: Tensor | None) -> Tensor:
        ids_BTL = step_TBL.transpose(0, 1)
        head_BTP = torch.zeros(num, num_steps, num_prompt) if fill is None else fill[:, None].expand(-1, num_steps, -1)
        return torch.cat([head_BTP.to(ids_BTL.dtype), ids_BTL], dim=-1).flatten(0, 1)

    seen_DS, target_DS = by_sample(tensors["step_inputs"], prompt_BP), by_sample(tensors["step_targets"], prompt_BP)
    is_masked_DS = seen_DS == MASK
    drafts = Drafts(
        sample_D=torch.arange(num).repeat_interleave(num_steps),
        step_D=torch.arange(num_steps).repeat(num),
        seen_DS=seen_DS,
        draft_DS=torch.where(is_masked_DS, target_DS, seen_DS),
        logp_DS=torch.where(is_masked_DS, by_sample(tensors["confidence"], None).clamp(min=1e-30).log(), 0.0),
        reward_D=tensors["step_rewards"].reshape(num, num_steps).flatten(),
    )
    input_BS = torch.cat([prompt_BP, tensors["completion_ids"]], dim=1)
    is_real_BS = torch.ones_like(input_BS, dtype=torch.bool)
    return facts, tensors, samples_of(input_BS, num_prompt, is_real_BS, drafts=drafts, rollout_temperature=0.4)


@pytest.mark.parametrize("name", ["no_kl", "kl", "shifted_model"])
def test_mdpo(name: str) -> None:
    facts, tensors, samples = mdpo_case(name)
    algorithm = MDPO(
        MDPOOptions(variant="faithful", eps=facts["epsilon"], beta=facts["beta"], top_steps=facts["top_steps"])
    )
    num, num_steps, chosen = facts["group_size"], facts["steps"], sorted(tensors["chosen_steps"].tolist())
    advantage_BT = algorithm.step_advantages(samples).view(num, num_steps)
    torch.testing.assert_close(advantage_BT, tensors["advantages"], rtol=0, atol=1e-5)
    views = algorithm.corrupt(samples, Key(0))
    assert sorted(set(views.view_R.tolist())) == chosen
    if facts["shifted_note"]:  # their loss drops slot 0 of a shifted family
        is_target_RS = views.is_target_RS.clone()
        is_target_RS[:, tensors["prompt_ids"].shape[1]] = False
        views.is_target_RS = is_target_RS
    order = tensors["chosen_steps"].tolist()

    def by_view(name: str) -> Tensor:
        rows = [
            tensors[name][order.index(step), sample]
            for sample, step in zip(views.sample_R.tolist(), views.view_R.tolist(), strict=True)
        ]
        return wide(torch.stack(rows), tensors["prompt_ids"].shape[1]) * views.is_target_RS

    logp_RS = by_view("logp").requires_grad_()
    reference_RS = by_view("logp_ref") if facts["beta"] else None
    loss = algorithm.loss(logp_RS, logp_RS.detach(), reference_RS, views, samples)
    check_loss(loss.value, tensors["step_losses"].double().mean())
    (grad_RS,) = torch.autograd.grad(loss.value, logp_RS)
    expected_RS = by_view("grad_logp") / len(order)
    check_gradient(grad_RS, expected_RS)
    for position, step in enumerate(order):
        is_masked_RL = views.noisy_RS[views.view_R == step][:, tensors["prompt_ids"].shape[1] :] == MASK
        assert torch.equal(is_masked_RL, tensors["view_mask"][position].bool())


@pytest.mark.parametrize("name", ["no_kl", "kl"])
def test_mdpo_log_probs_of_the_checkpoint(name: str) -> None:
    facts, tensors, samples = mdpo_case(name)
    views = MDPO(MDPOOptions(variant="faithful", top_steps=facts["top_steps"])).corrupt(samples, Key(0))
    assert views.temperature == facts["temperature"]
    with torch.no_grad():
        logp_RS = golden_family().view_logp(views, samples.canvas.rows(views.sample_R))
    order = tensors["chosen_steps"].tolist()
    for row, (sample, step) in enumerate(zip(views.sample_R.tolist(), views.view_R.tolist(), strict=True)):
        is_target_L = views.is_target_RS[row, tensors["prompt_ids"].shape[1] :]
        got_L = logp_RS[row, tensors["prompt_ids"].shape[1] :]
        expected_L = tensors["logp"][order.index(step), sample]
        torch.testing.assert_close(got_L[is_target_L], expected_L[is_target_L], rtol=0, atol=1e-4)


def tree_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Samples, Tensor]:
    """Their edges as a forest of parents with their children; leaf rewards are chosen to give the stored advantages."""
    facts, tensors = case_of("dtreerpo", name)
    parent_ES, child_ES, group_E = tensors["parent_ids"], tensors["child_ids"], tensors["group_ids"]
    groups = sorted(set(group_E.tolist()))
    first = torch.tensor([group_E.tolist().index(group) for group in groups])
    num_parents, num_edges = len(groups), len(group_E)
    tree = Tree(
        state_NS=torch.cat([parent_ES[first], child_ES]),
        parent_N=torch.cat(
            [torch.full((num_parents,), -1), torch.tensor([groups.index(group) for group in group_E.tolist()])]
        ),
        sample_N=torch.cat([first, torch.arange(num_edges)]),
        is_leaf_N=torch.arange(num_parents + num_edges) >= num_parents,
    )
    samples = samples_of(
        child_ES,
        facts["prompt_width"],
        torch.ones_like(child_ES, dtype=torch.bool),
        tree=tree,
        reward_B=torch.zeros(num_edges),
        progress=facts["global_step"] / facts["max_steps"],
    )
    return facts, tensors, samples, torch.cat([torch.zeros(num_parents), tensors["local_advantages"]])


def algorithm_of(facts: dict[str, Any], advantage_N: Tensor) -> DTreeRPO:
    """With the stored advantages: the edges are a part of a tree whose other nodes are unknown."""

    class Stored(DTreeRPO):
        def node_advantages(self, samples: Samples) -> Tensor:
            return advantage_N

    return Stored(
        DTreeRPOOptions(
            variant="faithful",
            eps=facts["epsilon"],
            beta=facts["beta"],
            lambda_max=facts["lambda_max"] if facts["self_distillation"] else 0.0,
        )
    )


TREE_CASES = ["onpolicy", "offpolicy_clip_kl", "self_distillation", "only_child"]


@pytest.mark.parametrize("name", TREE_CASES)
def test_dtreerpo(name: str) -> None:
    facts, tensors, samples, advantage_N = tree_case(name)
    algorithm = algorithm_of(facts, advantage_N)
    views = algorithm.corrupt(samples, Key(0))
    width = facts["prompt_width"]
    assert torch.equal(views.is_target_RS[:, width:], tensors["active_mask"].bool())

    def on_canvas(name: str) -> Tensor:
        return wide(tensors[name], width) * views.is_target_RS

    logp_RS = on_canvas("logp").requires_grad_()
    reference_RS = on_canvas("logp_ref") if facts["beta"] else None
    loss = algorithm.loss(logp_RS, on_canvas("logp_old"), reference_RS, views, samples)
    (grad_RS,) = torch.autograd.grad(loss.value, logp_RS)
    check_gradient(grad_RS, on_canvas("grad_logp"))
    auxiliary = algorithm.auxiliary(views, samples)
    assert (auxiliary is not None) == facts["self_distillation"]
    total = loss.value.detach()
    if auxiliary is not None:
        family = golden_family()
        with torch.no_grad():
            hidden_RTD = family.view_hidden(views, samples.canvas.rows(views.sample_R))
            terms_A = family.aux_terms(hidden_RTD, views, auxiliary, torch.arange(len(auxiliary.view_A)))
        assert float(terms_A.sum()) == pytest.approx(facts["reported"]["self_distillation_loss*lambda_t"], rel=1e-5)
        assert algorithm.distillation_weight(samples.progress) == pytest.approx(facts["reported"]["lambda_t"], rel=1e-6)
        total = total + terms_A.sum()
    check_loss(total, tensors["loss"])


@pytest.mark.parametrize("name", ["onpolicy", "self_distillation"])
def test_dtreerpo_gradients_of_the_checkpoint(name: str) -> None:
    """Both terms through the network, evaluated in a replay: parameter gradients are theirs."""
    facts, tensors, samples, advantage_N = tree_case(name)
    algorithm = algorithm_of(facts, advantage_N)
    views = algorithm.corrupt(samples, Key(0))
    family = load_family(GOLDEN / "llada", torch.float32, "cpu")
    canvas = samples.canvas.rows(views.sample_R)
    hidden_RTD = family.view_hidden(views, canvas)
    logp_RS = family.target_logp(hidden_RTD, views)
    width = facts["prompt_width"]
    expected_RS = wide(tensors["logp"], width) * views.is_target_RS
    torch.testing.assert_close(logp_RS, expected_RS, rtol=0, atol=1e-4)
    old_RS = wide(tensors["logp_old"], width) * views.is_target_RS
    reference_RS = wide(tensors["logp_ref"], width) * views.is_target_RS if facts["beta"] else None
    total = algorithm.loss(logp_RS, old_RS, reference_RS, views, samples).value
    auxiliary = algorithm.auxiliary(views, samples)
    if auxiliary is not None:
        total = total + family.aux_terms(hidden_RTD, views, auxiliary, torch.arange(len(auxiliary.view_A))).sum()
    total.backward()  # type: ignore[no-untyped-call]
    for parameter, expected in facts["grad_norms"].items():
        grad = family.network.get_parameter(parameter).grad
        assert grad is not None
        assert float(grad.norm()) == pytest.approx(expected, rel=2e-4), parameter


@pytest.mark.parametrize("name", TREE_CASES)
def test_tree_advantages(name: str) -> None:
    _, tensors = case_of("dtreerpo", name)
    reward_ACP = tensors["tree_leaf_rewards"]  # root child, its child, prompt
    num_children, num_leaves, _ = reward_ACP.shape
    for prompt in range(reward_ACP.shape[2]):
        parents = [-1, *[0] * num_children]
        parents += [1 + child for child in range(num_children) for _ in range(num_leaves)]
        parent_N = torch.tensor(parents)
        is_leaf_N = torch.arange(len(parents)) > num_children
        reward_N = torch.zeros(len(parents))
        reward_N[is_leaf_N] = reward_ACP[:, :, prompt].flatten()
        value_N = node_values(reward_N, parent_N, is_leaf_N)
        advantage_N = sibling_advantages("loo", value_N, parent_N, only_child="value")
        level = tensors["tree_advantages_level1"][:, prompt]
        torch.testing.assert_close(advantage_N[1 : 1 + num_children], level, rtol=0, atol=1e-5)
        leaves = tensors["tree_advantages_leaves"][:, :, prompt].flatten()
        torch.testing.assert_close(advantage_N[1 + num_children :], leaves, rtol=0, atol=1e-5)
        clean_N = sibling_advantages("loo", value_N, parent_N)
        assert bool((clean_N[1 + num_children :] == 0).all()) == (num_leaves == 1)


VALUE_CASES = ["outcome", "outcome_discounted", "process_rewards", "td0"]


def value_case(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """Also which slots take part in returns: answer tokens and each sample's first `post_num` pads, where trained."""
    facts, tensors = case_of("tracerl_value", name)
    is_pad_BL = tensors["input_ids"][:, facts["prompt_width"] :] == PAD
    is_judged_BL = tensors["trained"].bool() & (~is_pad_BL | (is_pad_BL.long().cumsum(-1) <= facts["post_num"]))
    return facts, tensors, is_judged_BL


@pytest.mark.parametrize("name", VALUE_CASES)
def test_tracerl_returns_and_advantages(name: str) -> None:
    facts, tensors, is_judged_BL = value_case(name)
    step_BL = tensors["step_map"]
    reward_BL = tensors["process_rewards"]
    if not facts["process_rewards"]:
        last_B1 = torch.where(is_judged_BL, step_BL, -1).amax(-1, keepdim=True)
        reward_BL = torch.where(step_BL == last_B1, tensors["outcome_rewards"][:, None], 0.0)
    got = stepwise_gae(reward_BL, tensors["values"], step_BL, is_judged_BL, facts["gamma"], facts["lam"])
    for value_BL, expected in zip(got, ("returns", "token_advantages"), strict=True):
        torch.testing.assert_close(value_BL.float(), tensors[expected], rtol=0, atol=1e-5)


def value_samples(name: str) -> tuple[dict[str, Any], dict[str, Tensor], Samples]:
    facts, tensors, _ = value_case(name)
    width, input_BS = facts["prompt_width"], tensors["input_ids"]
    canvas_block = (torch.arange(facts["response_width"]) // facts["block_size"]).expand(len(input_BS), -1)
    samples = samples_of(
        input_BS,
        width,
        torch.ones_like(input_BS, dtype=torch.bool),
        wide(tensors["trained"], width).bool(),
        step_map_BS=wide(tensors["step_map"], width, -1),
        reward_B=tensors["outcome_rewards"],
        judgement=Judgement(*(wide(tensors[field], width) for field in ("values", "returns", "token_advantages"))),
    )
    canvas = samples.canvas
    samples.canvas = Canvas(
        canvas.input_BS, canvas.is_completion_BS, canvas.is_real_BS, wide(canvas_block, width, -1), "block_causal"
    )
    return facts, tensors, samples


def tracerl_of(facts: dict[str, Any]) -> TraceRLValue:
    return TraceRLValue(
        TraceRLValueOptions(
            variant="faithful",
            beta=0.0,
            eps=facts["epsilon"],
            value_clip=facts["value_clip"],
            gamma=facts["gamma"],
            lam=facts["lam"],
        )
    )


def row_order(views: Views, tensors: dict[str, Tensor]) -> list[int]:
    """For each of our views, their row with the same sample and targets."""
    theirs = [
        (sample, tuple(mask.tolist()))
        for sample, mask in zip(tensors["row_sample"].tolist(), tensors["target_mask"].bool(), strict=True)
    ]
    ours = [
        (sample, tuple(mask.tolist())) for sample, mask in zip(views.sample_R.tolist(), views.is_target_RS, strict=True)
    ]
    return [theirs.index(row) for row in ours]


@pytest.mark.parametrize("name", VALUE_CASES)
def test_tracerl_value_losses(name: str) -> None:
    facts, tensors, samples = value_samples(name)
    algorithm, width = tracerl_of(facts), facts["prompt_width"]
    views = algorithm.corrupt(samples, Key(0))
    order = row_order(views, tensors)
    assert sorted(order) == list(range(len(tensors["row_sample"])))
    noisy_RL = tensors["extended_input_ids"][order][:, -facts["response_width"] :]
    is_answer_RL = tensors["step_map"][views.sample_R] >= 0
    assert torch.equal(views.noisy_RS[:, width:][is_answer_RL], noisy_RL[is_answer_RL])

    logp_RS = (tensors["logp"][order] * views.is_target_RS).requires_grad_()
    loss = algorithm.loss(logp_RS, tensors["logp_old"][order] * views.is_target_RS, None, views, samples)
    check_loss(loss.value, tensors["loss"])

    value_RS = (wide(tensors["value_new"][order], width) * views.is_target_RS).requires_grad_()
    value_loss = algorithm.value_loss(value_RS, views, samples)
    check_loss(value_loss.value, tensors["value_loss"])
    (grad_RS,) = torch.autograd.grad(value_loss.value, value_RS)
    check_gradient(grad_RS, wide(tensors["grad_value_new"][order], width))


@pytest.mark.parametrize("name", ["outcome", "outcome_discounted", "td0"])
def test_tracerl_judges_as_they_do(name: str) -> None:
    facts, tensors, samples = value_samples(name)
    algorithm = tracerl_of(facts)
    views = algorithm.corrupt(samples, Key(0))
    value_RS = wide(tensors["values"], facts["prompt_width"])[views.sample_R] * views.is_target_RS
    judgement = algorithm.judge(value_RS, views, samples)
    for field, expected in (("return_BS", "returns"), ("advantage_BS", "token_advantages")):
        got_BS = getattr(judgement, field)
        torch.testing.assert_close(got_BS, wide(tensors[expected], facts["prompt_width"]), rtol=0, atol=1e-5)
