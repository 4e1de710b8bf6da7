"""What a rollout records beside its trace: drafts hold what was read, also when tokens are taken back; trees branch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.rng import Key
from dare.core.types import Drafts, TraceBatch, Tree, Views
from dare.diffusion import unmask
from dare.diffusion.trace import canvas_before, draft_tokens
from dare.families.base import Family
from dare.rollout.engine import denoise
from dare.rollout.tree import grow_trees

FAMILIES = ["llada", "sdar"]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [3, 3]]
IDS = [11, 12, 13, 14]


def decode_of(**changes: Any) -> Decode:
    options = {"gen_length": 12, "block_length": 4, "steps_per_block": 2, "unmask": "max_prob", "temperature": 1.0}
    return Decode.model_validate({**options, **changes})


def rollout(family: Family, *, has_drafts: bool = True, **changes: Any) -> TraceBatch:
    return denoise(family, PROMPTS, decode_of(**changes), Key(3), IDS, has_drafts=has_drafts)


def drafts_of(trace: TraceBatch) -> Drafts:
    assert trace.drafts is not None
    return trace.drafts


def tree_of(trace: TraceBatch) -> Tree:
    assert trace.tree is not None
    return trace.tree


def equal_fields(one: Any, other: Any) -> bool:
    """Bit for bit, whatever fields there are."""
    for field in dataclasses.fields(one):
        left, right = getattr(one, field.name), getattr(other, field.name)
        if dataclasses.is_dataclass(left):
            if not equal_fields(left, right):
                return False
        elif isinstance(left, Tensor):
            if not torch.equal(left, right):
                return False
        elif field.name != "decode" and left != right:
            return False
    return True


@pytest.mark.parametrize("name", FAMILIES)
def test_recording_changes_nothing(families: dict[str, Family], name: str) -> None:
    """Log-probs up to rounding: without drafts the last layer runs on fewer rows, so its matmuls have other shapes."""
    plain, recorded = rollout(families[name], has_drafts=False), rollout(families[name])
    assert plain.drafts is None
    torch.testing.assert_close(recorded.logp_BS, plain.logp_BS, rtol=0, atol=1e-6)
    assert equal_fields(plain, dataclasses.replace(recorded, drafts=None, logp_BS=plain.logp_BS))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_draft_is_what_the_step_read_and_what_it_committed(families: dict[str, Family], name: str) -> None:
    trace = rollout(families[name])
    drafts = drafts_of(trace)
    assert drafts.sample_D.bincount().tolist() == trace.nfe_B.tolist()
    for index, (row, step) in enumerate(zip(drafts.sample_D.tolist(), drafts.step_D.tolist(), strict=True)):
        is_real_S = trace.canvas.is_real_BS[row]
        assert torch.equal(drafts.seen_DS[index][is_real_S], canvas_before(trace, step)[row][is_real_S])
        is_committed_S = trace.step_map_BS[row] == step
        assert torch.equal(drafts.draft_DS[index][is_committed_S], trace.canvas.input_BS[row][is_committed_S])
        assert torch.equal(drafts.logp_DS[index][is_committed_S], trace.logp_BS[row][is_committed_S])


@pytest.mark.parametrize("remask", ["none", "rcr"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_draft_scored_again_has_the_recorded_log_probs(families: dict[str, Family], name: str, remask: str) -> None:
    """Replay of everything a step predicted is exact, whether or not tokens were masked again."""
    family = families[name]
    trace = rollout(family, remask=remask, temperature=0.7)
    drafts = drafts_of(trace)
    is_real_DS = trace.canvas.is_real_BS[drafts.sample_D]
    is_target_DS = (drafts.seen_DS == trace.mask_id) & (drafts.draft_DS != trace.mask_id) & is_real_DS
    views = Views(
        noisy_RS=drafts.seen_DS,
        context_RS=drafts.draft_DS,
        target_RS=drafts.draft_DS,
        is_target_RS=is_target_DS,
        weight_RS=is_target_DS.float(),
        sample_R=drafts.sample_D,
        view_R=drafts.step_D,
        temperature=0.7,
    )
    with torch.no_grad():
        logp_RS = family.view_logp(views, trace.canvas.rows(drafts.sample_D))
    torch.testing.assert_close(logp_RS[is_target_DS], drafts.logp_DS[is_target_DS], rtol=0, atol=2e-5)
    if name == "llada":  # every mask of the canvas is predicted, in later blocks too
        is_masked_DS = (drafts.seen_DS == trace.mask_id) & is_real_DS
        assert torch.equal(is_masked_DS, is_target_DS)


@pytest.mark.parametrize("name", FAMILIES)
def test_running_confidence_keeps_to_the_schedule(families: dict[str, Family], name: str) -> None:
    """The step map says when a token took its final value; before that the step read a mask, after it the token."""
    trace = rollout(families[name], remask="rcr", steps_per_block=4, unmask="low_confidence")
    drafts, mask_id = drafts_of(trace), trace.mask_id
    num_taken_back = 0
    for row in range(len(PROMPTS)):
        seen_TS = drafts.seen_DS[drafts.sample_D == row]
        draft_TS = drafts.draft_DS[drafts.sample_D == row]
        is_sampled_S = trace.step_map_BS[row] >= 0
        for position in is_sampled_S.nonzero()[:, 0].tolist():
            step, token = int(trace.step_map_BS[row, position]), int(trace.canvas.input_BS[row, position])
            assert int(seen_TS[step, position]) == mask_id
            assert int(draft_TS[step, position]) == token
            assert bool((seen_TS[step + 1 :, position] == token).all())
        num_masked_T = ((seen_TS == mask_id) & is_sampled_S).sum(-1)
        assert bool((num_masked_T[1:] < num_masked_T[:-1]).all())
        num_taken_back += int(((seen_TS[:-1] != mask_id) & (seen_TS[1:] == mask_id)).sum())
    assert num_taken_back > 0
    with pytest.raises(ValueError, match="masked again"):
        canvas_before(trace, 0)


def test_running_confidence_by_hand() -> None:
    """A held token that is less sure than a new candidate gives way to it."""
    score_BK = torch.tensor([[0.9, 0.2, 0.5, 0.4]])
    is_held_BK = torch.tensor([[True, True, False, False]])
    committed, again = unmask.running_confidence(score_BK, ~is_held_BK, is_held_BK, torch.tensor([3]))
    assert committed.tolist() == [[False, False, True, True]]
    assert again.tolist() == [[False, True, False, False]]
    for num_masked, num_steps in ((4, 2), (5, 3), (2, 4), (7, 7)):
        sizes = [unmask.quota(torch.tensor([num_masked]), num_steps, torch.tensor([s])) for s in range(num_steps)]
        totals = [
            unmask.cumulative_quota(torch.tensor([num_masked]), num_steps, torch.tensor([s])) for s in range(num_steps)
        ]
        assert torch.equal(torch.cat(sizes).cumsum(0), torch.cat(totals))


@pytest.mark.parametrize("remask", ["none", "rcr"])
@pytest.mark.parametrize("name", FAMILIES)
def test_drafts_do_not_depend_on_the_batch(families: dict[str, Family], name: str, remask: str) -> None:
    whole = rollout(families[name], remask=remask)
    single = rollout(families[name], remask=remask, batch_size=1)
    for field in ("sample_D", "step_D", "seen_DS", "draft_DS"):
        got, expected = getattr(drafts_of(single), field), getattr(drafts_of(whole), field)
        is_real = whole.canvas.is_real_BS[drafts_of(whole).sample_D]
        if got.ndim == 2:
            got, expected = got[is_real], expected[is_real]
        assert torch.equal(got, expected), field
    torch.testing.assert_close(drafts_of(single).logp_DS, drafts_of(whole).logp_DS, rtol=0, atol=1e-5)


def test_the_text_of_a_draft_ends_with_its_first_eos(families: dict[str, Family]) -> None:
    trace = rollout(families["llada"])
    drafts = drafts_of(trace)
    first = int(trace.canvas.is_completion_BS[0].int().argmax())
    drafts.draft_DS[0, first : first + 3] = torch.tensor([5, trace.eos_ids[0], 7])
    assert draft_tokens(drafts, trace)[0] == [5, trace.eos_ids[0]]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("branching", [(2, 3), (3,), (2, 1, 2)])
def test_trees(families: dict[str, Family], name: str, branching: tuple[int, ...]) -> None:
    """The first leaf is a plain rollout; a node is what every leaf below it looked like at the branch point."""
    family, num_leaves = families[name], torch.tensor(branching).prod().item()
    prompts = [prompt for prompt in PROMPTS for _ in range(int(num_leaves))]
    ids = list(range(100, 100 + len(prompts)))
    trace = grow_trees(family, prompts, decode_of(), Key(5), ids, branching)
    tree = tree_of(trace)
    firsts = list(range(0, len(prompts), int(num_leaves)))
    plain = denoise(family, PROMPTS, decode_of(), Key(5), [ids[row] for row in firsts])
    width = min(plain.canvas.length, trace.canvas.length)
    for one, row in enumerate(firsts):
        is_real_S = plain.canvas.is_real_BS[one, :width]
        for field in ("step_map_BS", "logp_BS"):
            got, expected = getattr(trace, field)[row, :width], getattr(plain, field)[one, :width]
            torch.testing.assert_close(got[is_real_S], expected[is_real_S], rtol=0, atol=1e-5)
        assert torch.equal(trace.canvas.input_BS[row, :width][is_real_S], plain.canvas.input_BS[one, :width][is_real_S])
    assert tree.is_leaf_N.sum() == len(prompts)
    assert torch.equal(tree.state_NS[tree.is_leaf_N], trace.canvas.input_BS)
    levels: list[int] = []
    for node, parent in enumerate(tree.parent_N.tolist()):
        row = int(tree.sample_N[node])
        state_S, is_real_S = tree.state_NS[node], trace.canvas.is_real_BS[row]
        is_revealed_S = (state_S != trace.mask_id) & (trace.step_map_BS[row] >= 0)
        stop = int(trace.step_map_BS[row][is_revealed_S].max()) + 1 if bool(is_revealed_S.any()) else 0
        assert torch.equal(canvas_before(trace, stop)[row][is_real_S], state_S[is_real_S])
        level = 0 if parent < 0 else levels[parent] + 1
        levels.append(level)
        if name == "llada":  # every row takes all 6 steps; a block model may end early, with an EOS
            assert stop == 6 * level // len(branching)
        if parent >= 0:
            above_S = tree.state_NS[parent]
            is_given_S = (above_S != trace.mask_id) & is_real_S
            assert parent < node
            assert torch.equal(state_S[is_given_S], above_S[is_given_S])
            is_open_S = (above_S == trace.mask_id) & is_real_S  # nothing is, below a node that ended early
            assert bool((state_S != trace.mask_id)[is_open_S].any()) == bool(is_open_S.any())
    leaves = trace.canvas.input_BS[: int(num_leaves)].tolist()
    assert len({tuple(leaf) for leaf in leaves}) > 1  # siblings draw different numbers


@pytest.mark.parametrize("name", FAMILIES)
def test_a_tree_does_not_depend_on_the_batch(families: dict[str, Family], name: str) -> None:
    prompts = [prompt for prompt in PROMPTS for _ in range(4)]
    ids = list(range(16))
    whole, single = (
        grow_trees(families[name], prompts, decode_of(batch_size=size), Key(1), ids, (2, 2)) for size in (256, 4)
    )
    assert torch.equal(whole.canvas.input_BS, single.canvas.input_BS)
    assert torch.equal(whole.step_map_BS, single.step_map_BS)
    assert torch.equal(whole.nfe_B, single.nfe_B)
    heard: list[tuple[int, int]] = []
    decode = decode_of(batch_size=8)
    grow_trees(families[name], prompts, decode, Key(1), ids, (2, 2), on_progress=lambda *counts: heard.append(counts))
    assert heard == [(8, 16), (16, 16)]
    for field in ("parent_N", "sample_N", "is_leaf_N"):
        assert torch.equal(getattr(tree_of(whole), field), getattr(tree_of(single), field))
    is_real_NS = whole.canvas.is_real_BS[tree_of(whole).sample_N]
    assert torch.equal(tree_of(whole).state_NS[is_real_NS], tree_of(single).state_NS[is_real_NS])


def test_impossible_recordings_are_refused(families: dict[str, Family]) -> None:
    family = families["llada"]
    with pytest.raises(DareError, match="drafts need a plain forward"):
        rollout(family, cache="dual")
    with pytest.raises(DareError, match="edits replace tokens"):
        rollout(family, edit_threshold=0.5)
    for options in ({"edit_threshold": 0.5}, {"remask": "rcr"}):
        with pytest.raises(DareError, match="only ever gain tokens"):
            grow_trees(family, PROMPTS[:1] * 2, decode_of(**options), Key(0), [0, 1], (2,))
    with pytest.raises(DareError, match="fixed schedule"):
        decode = decode_of(unmask="threshold", steps_per_block=None)
        grow_trees(family, PROMPTS[:1] * 2, decode, Key(0), [0, 1], (2,))
    with pytest.raises(DareError, match="exact cache"):
        grow_trees(family, PROMPTS[:1] * 2, decode_of(cache="prefix"), Key(0), [0, 1], (2,))
    with pytest.raises(ValueError, match="one prompt"):
        grow_trees(family, PROMPTS[:2], decode_of(), Key(0), [0, 1], (2,))
    with pytest.raises(ValueError, match="remask: rcr"):
        decode_of(remask="rcr", unmask="left_to_right")
    with pytest.raises(ValueError, match="remove one of them"):
        decode_of(remask="rcr", edit_threshold=0.5)
    with pytest.raises(ValueError, match="even schedule"):
        decode_of(remask="rcr", schedule="timesteps")
