"""The algorithms that read more of a rollout than its final canvas: the promises of every algorithm, kept by them."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dare.algorithms.base import Algorithm
from dare.algorithms.dtreerpo import DTreeRPO, DTreeRPOOptions
from dare.core.checks import check
from dare.core.errors import DareError
from dare.core.recipe import Recipe, parse_recipe
from dare.core.registry import resolve
from dare.core.rng import Key
from dare.core.types import AuxLoss, Canvas, Drafts, Loss, Samples, Tree, Views
from dare.families.base import Family
from dare.families.critic import Critic
from tests.numerics.records import with_records

CASES = [(name, variant) for name in ("mdpo", "dtreerpo", "tracerl_value") for variant in ("clean", "faithful")]
every = pytest.mark.parametrize(("name", "variant"), CASES, ids=["-".join(case) for case in CASES])
both = pytest.mark.parametrize("family_name", ["llada", "sdar"])
LENGTHS = [7, 9]


def build(name: str, variant: str, **options: Any) -> Algorithm[Any]:
    plugin = resolve("algorithms", name)
    result: Algorithm[Any] = plugin(plugin.Config.model_validate({"variant": variant, **options}))
    return result


def samples_of(family: Family) -> Samples:
    """Two groups of three rows, three tokens per denoising step, a tail after the first EOS in some rows."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, 20, (2 + row,), generator=generator).tolist() for row in range(2)]
    rows = [torch.randint(0, 20, (LENGTHS[row // 3],), generator=generator).tolist() for row in range(6)]
    rows[1][4] = rows[4][6] = family.spec.eos_ids[0]
    canvas = family.canvas([prompts[row // 3] for row in range(6)], rows)
    start_B1 = canvas.is_completion_BS.long().argmax(-1, keepdim=True)
    offset_BS = torch.arange(canvas.length)[None] - start_B1
    is_eos_BS = (canvas.input_BS == family.spec.eos_ids[0]) & canvas.is_completion_BS
    samples = Samples(
        canvas=canvas,
        is_scored_BS=canvas.is_completion_BS & (is_eos_BS.long().cumsum(-1) == is_eos_BS.long()),
        sample_id_B=torch.arange(6) + 50,
        advantage_B=torch.tensor([1.0, -0.5, 0.75, -1.25, 0.5, 0.25]),
        group_B=torch.arange(6) // 3,
        mask_id=family.spec.mask_id,
        step_map_BS=torch.where(
            canvas.is_completion_BS, (offset_BS * 5 % 7) // 3 + 3 * canvas.block_BS.clamp(min=0), -1
        ),
        rollout_logp_BS=torch.zeros(canvas.input_BS.shape),
        eos_ids=family.spec.eos_ids,
    )
    return with_records(samples)


def reordered(samples: Samples, rows: list[int]) -> Samples:
    """The same samples in another order."""
    index_B, place_B = torch.tensor(rows), torch.tensor(rows).argsort()
    drafts, tree = samples.drafts, samples.tree
    assert drafts is not None
    assert tree is not None
    order_D = place_B[drafts.sample_D].argsort(stable=True)
    fields = {f: getattr(drafts, f)[order_D] for f in ("step_D", "seen_DS", "draft_DS", "logp_DS", "reward_D")}
    names = ("is_scored_BS", "sample_id_B", "advantage_B", "group_B", "step_map_BS", "rollout_logp_BS", "reward_B")
    return replace(
        samples,
        canvas=samples.canvas.rows(index_B),
        drafts=Drafts(sample_D=place_B[drafts.sample_D[order_D]], **fields),
        tree=replace(tree, sample_N=place_B[tree.sample_N]),
        **{name: getattr(samples, name)[index_B] for name in names},
    )


def padded(samples: Samples, num: int, pad_id: int) -> Samples:
    """The same samples on a wider canvas."""
    drafts, tree, canvas = samples.drafts, samples.tree, samples.canvas
    assert drafts is not None
    assert tree is not None

    def wide(value: Any, fill: float = 0) -> Tensor:
        return functional.pad(value, (0, num), value=fill)

    return replace(
        samples,
        canvas=Canvas(
            wide(canvas.input_BS, pad_id),
            wide(canvas.is_completion_BS),
            wide(canvas.is_real_BS),
            torch.cat([canvas.block_BS, canvas.block_BS[:, -1:].expand(-1, num) + 1], dim=1),
            canvas.attention,
        ),
        is_scored_BS=wide(samples.is_scored_BS),
        step_map_BS=wide(samples.step_map_BS, -1),
        rollout_logp_BS=wide(samples.rollout_logp_BS),
        drafts=replace(drafts, **{f: wide(getattr(drafts, f), pad_id if f != "logp_DS" else 0) for f in DRAFT_TENSORS}),
        tree=Tree(wide(tree.state_NS, pad_id), tree.parent_N, tree.sample_N, tree.is_leaf_N),
    )


DRAFT_TENSORS = ("seen_DS", "draft_DS", "logp_DS")


def judged(algorithm: Algorithm[Any], family: Family, views: Views, samples: Samples) -> Samples:
    if algorithm.critic_lr is None:
        return samples
    critic = Critic(family)
    with torch.no_grad():
        critic.head.copy_(torch.linspace(-0.5, 0.5, len(critic.head)))
        value_RS = critic.view_value(views, samples.canvas.rows(views.sample_R))
    return replace(samples, judgement=algorithm.judge(value_RS, views, samples))


def loss_of(
    algorithm: Algorithm[Any], family: Family, samples: Samples, *, is_on_policy: bool = False
) -> tuple[Loss, Tensor, Views]:
    """The loss and its gradient; off policy the old log-probs are moved by a function of the token's place."""
    views = algorithm.corrupt(samples, Key(5))
    samples = judged(algorithm, family, views, samples)
    with torch.no_grad():
        logp_RS = family.view_logp(views, samples.canvas.rows(views.sample_R))
    moved_RS = 0.1 * torch.sin(torch.arange(logp_RS.shape[1]) + 1.0) * views.is_target_RS
    old_RS = logp_RS if is_on_policy else logp_RS + moved_RS
    reference_RS = (logp_RS if is_on_policy else 0.9 * logp_RS) if algorithm.needs_reference else None
    leaf = logp_RS.clone().requires_grad_()
    loss = algorithm.loss(leaf, old_RS, reference_RS, views, samples)
    (grad_RS,) = torch.autograd.grad(loss.value, leaf)
    return loss, grad_RS, views


@every
@both
def test_views_are_well_formed(families: dict[str, Family], name: str, variant: str, family_name: str) -> None:
    samples = samples_of(families[family_name])
    state = torch.random.get_rng_state()
    views = build(name, variant).corrupt(samples, Key(1))
    assert torch.equal(state, torch.random.get_rng_state())
    canvas = samples.canvas.rows(views.sample_R)
    assert bool((views.noisy_RS == samples.mask_id)[views.is_target_RS].all())
    assert not bool((views.target_RS == samples.mask_id)[views.is_target_RS].any())
    assert not bool((views.is_target_RS & ~(canvas.is_completion_BS & canvas.is_real_BS)).any())
    assert torch.equal(views.weight_RS > 0, views.is_target_RS)
    assert views.sample_R.tolist() == sorted(views.sample_R.tolist())


@every
@both
def test_order_and_padding_change_nothing(
    families: dict[str, Family], name: str, variant: str, family_name: str
) -> None:
    """Loss, metrics and gradient norm of the whole batch, and of the auxiliary loss."""
    algorithm, family, samples = build(name, variant), families[family_name], samples_of(families[family_name])
    results = []
    for changed in (
        samples,
        reordered(samples, [3, 1, 0, 5, 4, 2]),
        padded(samples, 3, family.spec.pad_id),
    ):
        loss, grad_RS, views = loss_of(algorithm, family, changed)
        auxiliary = algorithm.auxiliary(views, changed)
        terms = 0.0
        if auxiliary is not None:
            with torch.no_grad():
                hidden_RTD = family.view_hidden(views, changed.canvas.rows(views.sample_R))
                everything_A = torch.arange(len(auxiliary.view_A))
                terms = float(family.aux_terms(hidden_RTD, views, auxiliary, everything_A).sum())
        metrics = {key: metric.mean for key, metric in loss.metrics.items()}
        results.append((float(loss.value.detach()), float(grad_RS.norm()), terms, metrics))
    value, norm, terms, metrics = results[0]
    assert norm > 0
    for other_value, other_norm, other_terms, other_metrics in results[1:]:
        assert other_value == pytest.approx(value, rel=1e-5, abs=1e-6)
        assert other_norm == pytest.approx(norm, rel=1e-5)
        assert other_terms == pytest.approx(terms, rel=1e-4, abs=1e-8)
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@every
@both
def test_on_policy_the_ratio_is_one_and_only_targets_move(
    families: dict[str, Family], name: str, variant: str, family_name: str
) -> None:
    family = families[family_name]
    loss, grad_RS, views = loss_of(build(name, variant), family, samples_of(family), is_on_policy=True)
    assert loss.metrics["ratio"].mean == pytest.approx(1.0, abs=1e-9)
    assert loss.metrics["clip_fraction"].mean == 0.0
    assert loss.metrics.get("kl", loss.metrics["clip_fraction"]).mean == pytest.approx(0.0, abs=1e-9)
    assert bool((grad_RS != 0).any())
    assert not bool((grad_RS[~views.is_target_RS] != 0).any())


@both
@pytest.mark.parametrize(("name", "variant"), CASES[:4])
def test_equal_rewards_teach_nothing(families: dict[str, Family], name: str, variant: str, family_name: str) -> None:
    """Nothing to compare within a group or among siblings (an only child aside, which has a value of its own)."""
    family = families[family_name]
    samples = samples_of(family)
    assert samples.drafts is not None
    drafts = replace(samples.drafts, reward_D=torch.ones_like(samples.drafts.reward_D))
    samples = replace(samples, reward_B=torch.zeros(6), drafts=drafts)
    algorithm = build(name, variant)
    loss, grad_RS, views = loss_of(algorithm, family, samples, is_on_policy=True)
    assert float(grad_RS.abs().max()) == 0.0
    assert float(loss.value.detach()) == 0.0
    assert algorithm.auxiliary(views, samples) is None


def test_top_steps_are_chosen_over_the_whole_batch(families: dict[str, Family]) -> None:
    """Every sample trains the same steps: those on which groups disagree most."""
    samples = samples_of(families["llada"])
    drafts = samples.drafts
    assert drafts is not None
    algorithm = resolve("algorithms", "mdpo")(resolve("algorithms", "mdpo").Config(top_steps=1))
    weight_T = torch.zeros(int(drafts.step_D.max()) + 1).index_add(
        0, drafts.step_D, algorithm.step_advantages(samples).abs()
    )
    views = algorithm.corrupt(samples, Key(0))
    step = int(weight_T.argmax())
    assert views.view_R.unique().tolist() == [step]
    assert views.sample_R.tolist() == drafts.sample_D[drafts.step_D == step].tolist()


def test_self_distillation_is_a_divergence_that_ends_at_its_own_mixture(families: dict[str, Family]) -> None:
    """Zero where the policy is the mixture, positive elsewhere; its weight grows with the run from 0."""
    algorithm = DTreeRPO(DTreeRPOOptions(lambda_max=1.0))
    samples = samples_of(families["llada"])
    views = algorithm.corrupt(samples, Key(0))
    auxiliary = algorithm.auxiliary(views, samples)
    assert auxiliary is not None
    num = len(auxiliary.view_A)
    generator = torch.Generator().manual_seed(0)
    logits_AV = torch.randn((num, 24), generator=generator).requires_grad_()
    optimizer = torch.optim.Adam([logits_AV], lr=0.3)
    first_A = auxiliary.term(logits_AV.detach(), torch.arange(num))
    assert float(first_A.min()) > 0
    for _ in range(150):
        optimizer.zero_grad()
        auxiliary.term(logits_AV, torch.arange(num)).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    last_A = auxiliary.term(logits_AV.detach(), torch.arange(num))
    assert -1e-5 < float(last_A.sum()) < 0.05 * float(first_A.sum())
    assert algorithm.distillation_weight(0.0) == 0.0
    assert algorithm.distillation_weight(1.0) == pytest.approx(1.0)
    assert algorithm.auxiliary(views, replace(samples, progress=0.0)) is None


def test_an_auxiliary_loss_never_holds_more_than_a_chunk(
    families: dict[str, Family], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward see a few rows of logits at a time, and none is kept between the two."""
    family = copy.deepcopy(families["llada"])
    samples = samples_of(family)
    views = DTreeRPO(DTreeRPOOptions()).corrupt(samples, Key(0))
    place_A = views.is_target_RS.nonzero()
    sizes: list[int] = []

    def term(logits_CV: Tensor, entry_C: Tensor) -> Tensor:
        sizes.append(len(logits_CV))
        return -torch.special.entr(logits_CV.softmax(-1)).sum(-1)

    auxiliary = AuxLoss(place_A[:, 0], place_A[:, 1], term, "entropy")
    monkeypatch.setattr("dare.families.base.chunk_rows", lambda vocab_size: 4)
    kept: list[tuple[int, ...]] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.no_grad():
        hidden_RTD = family.view_hidden(views, samples.canvas.rows(views.sample_R))
    hidden_RTD.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        terms_A = family.aux_terms(hidden_RTD, views, auxiliary, torch.arange(len(place_A)))
    assert len(terms_A) == len(place_A) > 20
    assert max(sizes) == 4
    assert not [shape for shape in kept if shape[-1:] == (family.spec.vocab_size,)]
    terms_A.sum().backward()  # type: ignore[no-untyped-call]
    logits_AV = family.row_logits(hidden_RTD.detach()[place_A[:, 0], place_A[:, 1]])
    torch.testing.assert_close(terms_A.detach(), term(logits_AV, torch.arange(len(place_A))), rtol=1e-5, atol=1e-6)
    assert hidden_RTD.grad is not None
    assert bool((hidden_RTD.grad != 0).any())


def recipe_of(algorithm: dict[str, Any], **changes: Any) -> Recipe:
    data: dict[str, Any] = {
        "name": "test",
        "model": {"create": {"family": "llada"}},
        "algorithm": algorithm,
        "task": "countdown",
        "decode": {"temperature": 1.0, "block_length": 8, "steps_per_block": 2, "unmask": "max_prob"},
    }
    for key, value in changes.items():
        data[key] = {**data.get(key, {}), **value}
    return parse_recipe(data, where="test")


@pytest.mark.parametrize(
    ("algorithm", "changes", "message"),
    [
        ({"name": "cj_grpo"}, {"decode": {"remask": "rcr"}}, "takes tokens back"),
        ({"name": "tracerl_value"}, {"decode": {"remask": "rcr"}}, "takes tokens back"),
        ({"name": "dtreerpo"}, {"decode": {"remask": "rcr"}}, "takes tokens back"),
        *(({"name": name}, {"decode": {"edit_threshold": 0.5}}, "edits replace") for name in ("mdpo", "dtreerpo")),
        ({"name": "mdpo"}, {"decode": {"cache": "dual"}}, "plain forward"),
        ({"name": "mdpo"}, {"decode": {"cfg_scale": 1.0}}, "plain forward"),
        ({"name": "dtreerpo", "branching": [4, 4]}, {"train": {"completions_per_prompt": 8}}, "leaves of a tree"),
        ({"name": "dtreerpo"}, {"decode": {"unmask": "threshold", "steps_per_block": None}}, "fixed schedule"),
    ],
)
def test_rollouts_that_do_not_fit_are_refused(algorithm: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DareError, match=message):
        check(recipe_of(algorithm, **changes))


def test_what_fits_is_accepted() -> None:
    for name in ("mdpo", "espo"):
        check(recipe_of({"name": name}, decode={"remask": "rcr"}))
    for num in (2, 4, 7, 12, 16):
        recipe = recipe_of({"name": "dtreerpo"}, train={"completions_per_prompt": num})
        check(recipe)
        branching = recipe.algorithm.build().branching(num)
        assert torch.tensor(branching).prod().item() == num
        assert branching == {2: (2,), 4: (2, 2), 7: (7,), 12: (4, 3), 16: (4, 4)}[num]
