"""What every row of the algorithms table keeps to, in every variant, on real tiny models of every family."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dare.algorithms.base import Algorithm
from dare.algorithms.policy import PolicyAlgorithm
from dare.core.checks import check, check_attention
from dare.core.errors import DareError
from dare.core.options import Options
from dare.core.recipe import Recipe, parse_recipe
from dare.core.registry import ALGORITHMS, FAMILIES, resolve
from dare.core.rng import Key
from dare.core.types import Loss, Samples, Views
from dare.families.base import Family
from dare.terminal.listing import listing

PROMPTS = [[1, 2], [3], [4, 5, 6, 7, 8], [9, 10, 11]]
COMPLETIONS = [[1, 2, 3, 4, 5, 6], [7, 8, 9, 10], [11, 12, 13, 14, 15, 16, 17], [18, 19, 1, 2, 3]]
SCORED = [6, 2, 5, 5]
ADVANTAGES = [1.0, -0.5, 0.75, -1.25]


def variants(name: str) -> list[str]:
    field = resolve("algorithms", name).Config.model_fields.get("variant")
    return ["clean", "faithful"] if field is not None else ["clean"]


def build(name: str, variant: str) -> Algorithm[Any]:
    plugin = resolve("algorithms", name)
    options = {"variant": variant} if "variant" in plugin.Config.model_fields else {}
    result: Algorithm[Any] = plugin(plugin.Config.model_validate(options))
    return result


def reads_a_canvas(name: str) -> bool:
    """Whether samples need nothing but the final canvas; test_records.py holds the others to the same promises."""
    algorithm = build(name, "clean")
    return not algorithm.needs and algorithm.critic_lr is None


ALL = [(name, variant) for name in ALGORITHMS for variant in variants(name)]
CASES = [case for case in ALL if reads_a_canvas(case[0])]
COMPARING = [case for case in CASES if "advantage" in resolve("algorithms", case[0]).Config.model_fields]
ONLINE = [case for case in CASES if resolve("algorithms", case[0]).kind == "online"]
RATIO = [case for case in CASES if issubclass(resolve("algorithms", case[0]), PolicyAlgorithm)]
every_row, every, online, comparing, ratio = (
    pytest.mark.parametrize(("name", "variant"), cases, ids=["-".join(case) for case in cases])
    for cases in (ALL, CASES, ONLINE, COMPARING, RATIO)
)
both = pytest.mark.parametrize("family_name", ["llada", "sdar"])


def samples_of(family: Family, rows: tuple[int, ...] = (0, 1, 2, 3), *, num_padding: int = 0) -> Samples:
    """Two groups of two; unequal lengths; tails after the first EOS; three tokens per denoising step."""
    canvas = family.canvas([PROMPTS[row] for row in rows], [COMPLETIONS[row] for row in rows])
    if num_padding:
        padding = [torch.nn.functional.pad(value, (0, num_padding)) for value in (canvas.input_BS, canvas.block_BS)]
        flags = [
            torch.nn.functional.pad(value, (0, num_padding)) for value in (canvas.is_completion_BS, canvas.is_real_BS)
        ]
        canvas = type(canvas)(padding[0], flags[0], flags[1], padding[1], canvas.attention)
    start_B1 = canvas.is_completion_BS.long().argmax(-1, keepdim=True)
    offset_BS = torch.arange(canvas.length)[None] - start_B1
    length_B1 = torch.tensor([[SCORED[row]] for row in rows])
    is_completion_BS = canvas.is_completion_BS
    return Samples(
        canvas=canvas,
        is_scored_BS=is_completion_BS & (offset_BS < length_B1),
        sample_id_B=torch.tensor(rows) + 50,
        advantage_B=torch.tensor([ADVANTAGES[row] for row in rows]),
        group_B=torch.tensor([row // 2 for row in rows]),
        mask_id=family.spec.mask_id,
        step_map_BS=torch.where(is_completion_BS, (offset_BS * 5 % 7) // 3 + 3 * canvas.block_BS.clamp(min=0), -1),
        rollout_logp_BS=torch.zeros(canvas.input_BS.shape),
        reward_B=torch.tensor([1.0 - row % 2 for row in rows]),
    )


def logp_of(family: Family, views: Views, samples: Samples) -> Tensor:
    with torch.no_grad():
        result: Tensor = family.view_logp(views, samples.canvas.rows(views.sample_R))
    return result


def loss_of(
    algorithm: Algorithm[Any], logp_RS: Tensor, views: Views, samples: Samples, *, is_on_policy: bool = False
) -> tuple[Loss, Tensor]:
    """The loss and its gradient; off policy the old log-probs are moved by a function of the token's place."""
    leaf = logp_RS.clone().requires_grad_()
    start_R1 = samples.canvas.is_completion_BS.long().argmax(-1, keepdim=True)[views.sample_R]
    offset_RS = torch.arange(logp_RS.shape[1])[None] - start_R1
    moved_RS = 0.1 * torch.sin(offset_RS + 3.0 * views.view_R[:, None]) * views.is_target_RS
    old_RS = logp_RS if is_on_policy else logp_RS + moved_RS
    reference_RS = (logp_RS if is_on_policy else 0.9 * logp_RS) if algorithm.needs_reference else None
    loss = algorithm.loss(leaf, old_RS, reference_RS, views, samples)
    (grad_RS,) = torch.autograd.grad(loss.value, leaf)
    return loss, grad_RS


@every
@both
def test_views_are_well_formed(families: dict[str, Family], name: str, variant: str, family_name: str) -> None:
    """No target outside real completion positions; a target holds the mask, and all else the sample's own tokens."""
    samples = samples_of(families[family_name], num_padding=2)
    state = torch.random.get_rng_state()
    views = build(name, variant).corrupt(samples, Key(1))
    assert torch.equal(state, torch.random.get_rng_state())
    clean_RS, canvas = samples.canvas.input_BS[views.sample_R], samples.canvas.rows(views.sample_R)
    is_masked_RS = views.noisy_RS == samples.mask_id
    assert bool(is_masked_RS[views.is_target_RS].all())
    assert torch.equal(views.noisy_RS[~is_masked_RS], clean_RS[~is_masked_RS])
    assert torch.equal(views.target_RS, clean_RS)
    assert not bool((views.is_target_RS & ~(canvas.is_completion_BS & canvas.is_real_BS)).any())
    assert not bool((is_masked_RS & ~canvas.is_real_BS).any())
    assert torch.equal(views.weight_RS > 0, views.is_target_RS)
    assert views.sample_R.tolist() == sorted(views.sample_R.tolist())
    assert set(views.sample_R.tolist()) == {0, 1, 2, 3}


@every
@both
def test_views_are_a_function_of_key_and_sample(
    families: dict[str, Family], name: str, variant: str, family_name: str
) -> None:
    algorithm, family = build(name, variant), families[family_name]
    whole = samples_of(family)
    reference = algorithm.corrupt(whole, Key(5))
    for rows, num_padding in (((2, 0), 0), ((3, 1, 0, 2), 5)):
        samples = samples_of(family, rows, num_padding=num_padding)
        views = algorithm.corrupt(samples, Key(5))
        for index, row in enumerate(rows):
            own = views.rows(views.sample_R == index)
            expected = reference.rows(reference.sample_R == row)
            length = int(samples.canvas.is_real_BS[index].sum())
            for field in ("noisy_RS", "context_RS", "is_target_RS", "weight_RS"):
                assert torch.equal(getattr(own, field)[:, :length], getattr(expected, field)[:, :length]), field
            assert torch.equal(own.view_R, expected.view_R)


@every
@both
def test_order_and_padding_change_nothing(
    families: dict[str, Family], name: str, variant: str, family_name: str
) -> None:
    """Loss, metrics and gradient of the whole batch, to float32."""
    algorithm, family = build(name, variant), families[family_name]
    results = []
    for rows, num_padding in (((0, 1, 2, 3), 0), ((3, 1, 0, 2), 0), ((0, 1, 2, 3), 4)):
        samples = samples_of(family, rows, num_padding=num_padding)
        views = algorithm.corrupt(samples, Key(5))
        loss, grad_RS = loss_of(algorithm, logp_of(family, views, samples), views, samples)
        results.append(
            (float(loss.value.detach()), float(grad_RS.norm()), {k: m.mean for k, m in loss.metrics.items()})
        )
    value, norm, metrics = results[0]
    for other_value, other_norm, other_metrics in results[1:]:
        assert other_value == pytest.approx(value, rel=1e-5, abs=1e-6)
        assert other_norm == pytest.approx(norm, rel=1e-5)
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-5)


@every
@both
def test_loss_and_gradient_are_finite_and_only_at_targets(
    families: dict[str, Family], name: str, variant: str, family_name: str
) -> None:
    algorithm, samples = build(name, variant), samples_of(families[family_name])
    views = algorithm.corrupt(samples, Key(9))
    base_RS = logp_of(families[family_name], views, samples)
    for logp_RS in (base_RS, 30 * base_RS):  # the latter: nearly 100 nats per token
        loss, grad_RS = loss_of(algorithm, logp_RS, views, samples)
        assert bool(loss.value.isfinite())
        assert bool(grad_RS.isfinite().all())
        assert bool((grad_RS != 0).any())
        assert not bool((grad_RS[~views.is_target_RS] != 0).any())


@ratio
@both
def test_ratio_one_on_policy(families: dict[str, Family], name: str, variant: str, family_name: str) -> None:
    algorithm, samples = build(name, variant), samples_of(families[family_name])
    views = algorithm.corrupt(samples, Key(3))
    loss, grad_RS = loss_of(
        algorithm, logp_of(families[family_name], views, samples), views, samples, is_on_policy=True
    )
    assert loss.metrics["ratio"].mean == pytest.approx(1.0, abs=1e-9)
    assert loss.metrics["clip_fraction"].mean == 0.0
    if "kl" in loss.metrics:
        assert loss.metrics["kl"].mean == pytest.approx(0.0, abs=1e-9)
    sign_RS = torch.sign(samples.advantage_B)[views.sample_R, None].expand_as(grad_RS)
    is_moved = grad_RS != 0
    assert torch.equal(torch.sign(grad_RS[is_moved]), -sign_RS[is_moved])


@online
@both
def test_zero_advantages_teach_nothing(families: dict[str, Family], name: str, variant: str, family_name: str) -> None:
    algorithm, samples = build(name, variant), samples_of(families[family_name])
    samples.advantage_B.zero_()
    views = algorithm.corrupt(samples, Key(3))
    logp_RS = logp_of(families[family_name], views, samples)
    _, grad_RS = loss_of(algorithm, logp_RS, views, samples, is_on_policy=True)
    assert float(grad_RS.abs().max()) < 1e-8


@comparing
def test_advantages_are_those_of_a_group(name: str, variant: str) -> None:
    algorithm = build(name, variant)
    group_B = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    advantage_B = algorithm.advantages(torch.tensor([1.0, 0.0, 0.0, 5.0, 5.0, 5.0, 3.0]), group_B)
    assert float(advantage_B[:3].sum()) == pytest.approx(0.0, abs=1e-6)
    assert bool((advantage_B[:3] != 0).all())
    assert advantage_B[3:].tolist() == [0.0] * 4  # equal rewards, and a group of one


@every_row
def test_an_algorithm_is_light_and_described(name: str, variant: str) -> None:
    plugin = resolve("algorithms", name)
    for field in plugin.Config.model_fields.values():
        assert field.description
        assert not field.is_required()
    assert plugin.__doc__
    assert set(plugin.forbidden) <= {"full", "block_causal"}


def test_no_algorithm_loads_torch() -> None:
    modules = "; ".join(f"import {row.target.split(':')[0]}" for row in ALGORITHMS.values())
    code = f"{modules}; import sys; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class Picky(Algorithm[Options]):
    """Trains masked models only."""

    Config = Options
    kind = "offline"
    forbidden = {"block_causal": "it needs both neighbours of a token"}  # noqa: RUF012

    def corrupt(self, samples: Samples, key: Key) -> Views:
        raise AssertionError

    def loss(self, logp_RS: Any, old_RS: Any, reference_RS: Any, views: Views, samples: Samples) -> Loss:
        raise AssertionError


def recipe_of(algorithm: str, family: str) -> Recipe:
    data = {"name": "test", "model": {"create": {"family": family}}, "algorithm": algorithm, "task": "countdown"}
    return parse_recipe(data, where="test")


def test_a_forbidden_pair_is_refused_with_its_reason() -> None:
    name = f"{__name__}:Picky"
    check(recipe_of(name, "llada"))
    with pytest.raises(DareError, match="needs both neighbours"):
        check(recipe_of(name, "sdar"))
    check_attention("picky", Picky(Options()), "full")


def test_the_matrix_lists_every_algorithm(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = listing("algorithms").splitlines()
    assert lines[0].split() == ["masked", "block"]
    assert [line.split()[0] for line in lines[1:]] == list(ALGORITHMS)
    monkeypatch.setattr(resolve("algorithms", "espo"), "forbidden", {"block_causal": "a reason"})
    text = listing("algorithms")
    assert next(line for line in text.splitlines() if line.startswith("espo")).split()[1:3] == ["yes", "no"]
    assert "not on block models: a reason" in text


def test_the_families_table_knows_their_attention(families: dict[str, Family]) -> None:
    for name, family in families.items():
        assert FAMILIES[name].attention == family.spec.attention


def test_the_tutorial_runs(families: dict[str, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The algorithm of docs/adding.md, by its import path: d loss / d logp is -A over the scored tokens."""
    page = (Path(__file__).parents[2] / "docs" / "adding.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.splitlines()) <= 60
    (tmp_path / "tutorial_of_adding.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    algorithm = recipe_of("tutorial_of_adding:Mine", "sdar").algorithm.build()
    for family in families.values():
        samples = samples_of(family)
        views = algorithm.corrupt(samples, Key(0))
        _, grad_RS = loss_of(algorithm, logp_of(family, views, samples), views, samples)
        expected_R1 = -samples.advantage_B[:, None] / samples.is_scored_BS.sum()
        torch.testing.assert_close(grad_RS, expected_R1 * samples.is_scored_BS)
