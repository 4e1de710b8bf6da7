"""The engine against plain samplers, under any capacity and company; and what it computes no more than once."""

from __future__ import annotations

import copy
import dataclasses
import math
import platform
import resource
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare.bench.reference import PlainRow, sample_plainly
from dare.core.decode import Decode
from dare.core.rng import Key
from dare.core.types import TraceBatch
from dare.diffusion.trace import to_completions
from dare.families.base import Family
from dare.families.layers import packing
from dare.families.layers.attention import Read
from dare.families.weights import create_family
from dare.rollout import engine
from dare.rollout.engine import StepEvent, denoise
from dare.rollout.heap import kept_heap
from dare.rollout.meter import Meter
from dare.rollout.plan import Plan, make_plan
from dare.rollout.seats import Seats
from tests.golden_checkpoints import golden_family

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9], [3], [2, 7, 1, 8, 2, 8], [9, 2]]
BASE: dict[str, Any] = {"gen_length": 12, "block_length": 4}


def run(
    family: Family, prompts: list[list[int]] = PROMPTS, *, meter: Meter | None = None, **options: Any
) -> TraceBatch:
    return denoise(family, prompts, Decode(**(BASE | options)), Key(0), list(range(len(prompts))), meter=meter)


def whole(trace: TraceBatch) -> list[PlainRow]:
    """Completions with what follows an EOS, and their step maps."""
    canvas = trace.canvas
    rows = zip(canvas.input_BS, trace.step_map_BS, canvas.is_completion_BS, strict=True)
    return [PlainRow(ids[here].tolist(), steps[here].tolist()) for ids, steps, here in rows]


def ending_early(family: Family, num_eos: int = 16) -> Family:
    """The same network with many EOS tokens, so that rows end at different times."""
    other = copy.copy(family)
    other.spec = dataclasses.replace(family.spec, eos_ids=tuple(range(10, 10 + num_eos)))
    return other


# --- equal to plain samplers


@pytest.mark.parametrize("options", [{}, {"steps_per_block": 3}, {"unmask": "threshold", "threshold": 0.2}], ids=str)
@pytest.mark.parametrize("batch_size", [2, 256])
@pytest.mark.parametrize(
    ("name", "cache"),
    [("llada", "none"), ("llada", "prefix"), ("llada", "dual"), ("sdar", "auto"), ("llada2_0", "auto")],
)
def test_greedy_tokens_and_steps_are_those_of_a_plain_sampler(
    name: str, cache: str, batch_size: int, options: dict[str, Any]
) -> None:
    family, decode = golden_family(name), Decode(**BASE | options | {"cache": cache, "batch_size": batch_size})
    trace = denoise(family, PROMPTS, decode, Key(0), list(range(len(PROMPTS))))
    assert whole(trace) == sample_plainly(family, PROMPTS, decode, batch_size=4)


# --- who sits where


@settings(max_examples=60, deadline=None)
@given(capacity=st.integers(1, 6), lengths=st.lists(st.integers(1, 5), min_size=1, max_size=14))
def test_every_row_is_seated_once_and_seats_have_no_gaps(capacity: int, lengths: list[int]) -> None:
    """Against a model that keeps what each seat of a cache holds, and moves it as it is told."""
    seats, left_of, holds = Seats(range(len(lengths)), capacity), dict(enumerate(lengths)), dict[int, int]()
    seen: list[int] = []
    change = seats.update([])
    while seats.rows:
        for target, source in change.moved:
            holds[target] = holds[source]
        holds |= {seat: seats.rows[seat] for seat in change.admitted}
        seen += [seats.rows[seat] for seat in change.admitted]
        assert [holds[seat] for seat in range(len(seats.rows))] == seats.rows
        assert len(seats.rows) == min(capacity, len(left_of))
        for row in seats.rows:
            left_of[row] -= 1
        ended = [row for row in seats.rows if not left_of[row]]
        change = seats.update([row not in ended for row in seats.rows])
        assert change.left == ended
        for row in ended:
            del left_of[row]
    assert seen == list(range(len(lengths)))


GROUPS = {"llada": {"eos_stop": True}, "sdar": {}, "llada2_1": {"edit_threshold": 0.2, "max_post_steps": 2}}


@settings(max_examples=6, deadline=None)
@given(
    name=st.sampled_from(sorted(GROUPS)),
    cache=st.sampled_from(["auto", "none", "dual"]),
    policy=st.sampled_from(["low_confidence", "threshold", "random"]),
    group=st.integers(1, 4),
    capacity=st.integers(1, 7),
)
def test_groups_and_capacity_change_nothing(name: str, cache: str, policy: str, group: int, capacity: int) -> None:
    family = ending_early(golden_family(name))
    cache = "auto" if cache == "dual" and name != "llada" else cache
    options = BASE | GROUPS[name] | {"unmask": policy, "cache": cache, "temperature": 1.0}
    decode = Decode(**options | ({"threshold": 0.3} if policy == "threshold" else {}))
    prompts = [prompt for prompt in PROMPTS[:3] for _ in range(group)]
    ids = [50 + row for row in range(len(prompts))]
    narrow = decode.model_copy(update={"batch_size": capacity})
    together = denoise(family, prompts, narrow, Key(1), ids)
    for row, found in enumerate(to_completions(together)):
        (alone,) = to_completions(denoise(family, [prompts[row]], decode, Key(1), [ids[row]]))
        assert (found.tokens, found.step_map, found.nfe) == (alone.tokens, alone.step_map, alone.nfe)
        assert found.logp == pytest.approx(alone.logp, abs=1e-4)


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_a_seat_is_never_empty_while_rows_are_waiting(name: str) -> None:
    """No barrier: each forward but the last ones serves as many rows as there are seats."""
    family, events, capacity = ending_early(golden_family(name)), list[StepEvent](), 3
    decode = Decode(**BASE | {"temperature": 1.0, "batch_size": capacity, "eos_stop": True})
    prompts = [prompt for prompt in PROMPTS for _ in range(3)]
    trace = denoise(family, prompts, decode, Key(2), list(range(len(prompts))), on_step=events.append)
    assert len(set(trace.nfe_B.tolist())) > 1
    num_rows = [len(event.rows) for event in events]
    first_short = next(index for index, num in enumerate(num_rows) if num < capacity)
    started = {row for event in events[: first_short + 1] for row in event.rows}
    assert started == set(range(len(prompts)))
    assert sum(num_rows) == int(trace.nfe_B.sum())


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_rows_are_handed_over_as_they_end(name: str) -> None:
    family, heard = ending_early(golden_family(name)), dict[int, Any]()

    def hear(rows: list[int], part: TraceBatch) -> None:
        assert not set(rows) & heard.keys()
        heard.update(zip(rows, to_completions(part), strict=True))

    decode = Decode(**BASE | {"temperature": 1.0, "batch_size": 2, "eos_stop": True})
    trace = denoise(family, PROMPTS, decode, Key(0), list(range(len(PROMPTS))), on_finished=hear)
    assert [heard[row] for row in range(len(PROMPTS))] == to_completions(trace)
    assert list(heard) != sorted(heard)


# --- computed once


def test_the_prompt_of_a_group_is_stored_once() -> None:
    family, prompt = golden_family("sdar"), list(range(1, 25))
    tokens = []
    for group in (1, 2, 6):
        for batch_size in (1, 4, 256):
            meter = Meter()
            run(family, [prompt] * group, meter=meter, batch_size=batch_size, eos_stop=False, temperature=1.0)
            tokens.append(meter.num_tokens - 24)
            assert meter.num_tokens == 24 + group * (12 + 2) * 4  # 12 steps and 2 stored blocks of 4 tokens
    assert len(tokens) == 9


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_the_first_forward_of_a_group_runs_once(batch_size: int) -> None:
    family, group, length = golden_family("llada"), 5, len(PROMPTS[0]) + 12
    meter = Meter()
    run(family, [PROMPTS[0]] * group, meter=meter, batch_size=batch_size, temperature=1.0)
    assert meter.num_tokens == length * (1 + group * 11)
    meter = Meter()
    run(family, [PROMPTS[0]] * group, meter=meter, cache="dual", temperature=1.0)
    assert meter.num_tokens == length * (1 + group * 2) + group * 3 * 3 * 4


def test_only_states_that_are_read_are_computed() -> None:
    meter = Meter()
    run(golden_family("llada"), PROMPTS[:1], meter=meter)
    assert meter.num_read == meter.num_logit_rows == 3 * (4 + 3 + 2 + 1)


@pytest.mark.parametrize("options", [{}, {"edit_threshold": 0.2, "unmask": "threshold", "threshold": 0.3}], ids=str)
@pytest.mark.parametrize("name", ["sdar", "llada2_1"])
def test_storing_a_block_on_its_own_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any]
) -> None:
    family, meters = golden_family(name), (Meter(), Meter())
    merged = run(family, meter=meters[0], batch_size=3, temperature=1.0, **options)

    def unmerged(family: Family, decode: Decode) -> Plan:
        return dataclasses.replace(make_plan(family, decode), is_merged=False)

    monkeypatch.setattr(engine, "make_plan", unmerged)
    apart = run(family, meter=meters[1], batch_size=3, temperature=1.0, **options)
    assert torch.equal(merged.canvas.input_BS, apart.canvas.input_BS)
    assert torch.equal(merged.step_map_BS, apart.step_map_BS)
    assert torch.equal(merged.nfe_B, apart.nfe_B)
    torch.testing.assert_close(merged.logp_BS, apart.logp_BS, rtol=0, atol=1e-5)
    assert meters[0].num_tokens == meters[1].num_tokens
    assert meters[0].num_forwards < meters[1].num_forwards


@pytest.mark.parametrize("name", ["llada", "llada_moe", "dream", "sdar", "sdar_moe", "llada2_0", "llada2_1"])
def test_chosen_states_are_those_of_the_whole_forward(name: str) -> None:
    family = golden_family(name)
    ids_BT = torch.randint(0, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    position_BT = torch.arange(9).expand(3, 9)
    column_RQ, place_N = torch.tensor([[8, 2, 3], [0, 5, 5]]), torch.tensor([0, 2, 4, 5])
    is_real_BT = torch.ones(3, 9, dtype=torch.bool)
    is_real_BT[1, 6:] = False
    causal = (position_BT[:, None, :] // 4 <= position_BT[:, :, None] // 4)[:, None]
    with torch.no_grad():
        for visible in (None, is_real_BT[:, None, None], causal):
            every_BTD = family.hidden(ids_BT, position_BT, visible)
            expected_ND = every_BTD[:2].gather(1, column_RQ[..., None].expand(-1, -1, every_BTD.shape[-1]))
            got_ND = family.hidden_at(ids_BT, position_BT, visible, None, Read(2, column_RQ, place_N))
            torch.testing.assert_close(got_ND, expected_ND.flatten(0, 1)[place_N], rtol=0, atol=2e-5)


# --- packed weights


@pytest.fixture(scope="module")
def wide_family() -> Family:
    """Wide enough for its matrices to be packed."""
    sizes = {"vocab_size": 300, "hidden_size": 256, "num_layers": 2, "num_heads": 4, "mlp_size": 256, "max_length": 64}
    return create_family("llada", **sizes, mask_id=299, eos_id=298, pad_id=297, seed=0)  # type: ignore[arg-type]


def test_packed_weights_give_the_same_and_follow_updates(monkeypatch: pytest.MonkeyPatch, wide_family: Family) -> None:
    if not packing.is_faster(torch.float32):
        pytest.skip("no packed matmul on this machine")
    family = copy.deepcopy(wide_family)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    for module in family.network.modules():
        multiply = packing.pack(module.weight) if isinstance(module, torch.nn.Linear) else None
        if isinstance(module, torch.nn.Linear):
            assert multiply is not None
            if module.in_features == 256:
                torch.testing.assert_close(multiply(x), module(x), rtol=0, atol=1e-5)
    packed = []
    for _ in range(2):
        packed.append(run(family))
        with torch.no_grad():
            for parameter in family.network.parameters():
                parameter.data.mul_(1.0 + 0.5 * torch.sin(torch.arange(parameter.numel())).view_as(parameter))
    assert not torch.equal(packed[0].canvas.input_BS, packed[1].canvas.input_BS)
    assert all("forward" not in vars(module) for module in family.network.modules())
    monkeypatch.setattr(packing, "is_faster", lambda dtype: False)
    plain = run(wide_family)
    assert torch.equal(plain.canvas.input_BS, packed[0].canvas.input_BS)
    torch.testing.assert_close(plain.logp_BS, packed[0].logp_BS, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_packed_again_when_a_single_bit_has_changed(dtype: torch.dtype) -> None:
    if not packing.is_faster(dtype):
        pytest.skip("no packed matmul on this machine")
    weight = torch.nn.Parameter(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(dtype))
    packs, eye = packing.PackedWeights(), torch.eye(256, dtype=dtype)
    first = packs._packed(weight)
    assert packs._packed(weight) is first
    for row, column, update in ((0, 0, 1), (255, 255, 1), (17, 100, -3)):
        unit = torch.int32 if dtype == torch.float32 else torch.int16
        weight.data.view(unit)[row, column] += update
        multiply = packs.multiplier(weight)
        assert multiply is not None
        assert torch.equal(multiply(eye), weight.data.T)
    weight.data.copy_(weight.data[torch.arange(256).roll(1)])
    multiply = packs.multiplier(weight)
    assert multiply is not None
    assert torch.equal(multiply(eye), weight.data.T)


def test_packed_copies_stay_behind_and_follow_the_bias(wide_family: Family) -> None:
    if not packing.is_faster(torch.float32):
        pytest.skip("no packed matmul on this machine")
    family = copy.deepcopy(wide_family)
    run(family)
    kept = dict(family.packs._kept)
    assert kept
    assert not copy.deepcopy(family).packs._kept
    run(family)
    assert all(family.packs._kept[weight][1] is pair[1] for weight, pair in kept.items())
    family.packs.drop()
    assert not family.packs._kept
    linear = torch.nn.Linear(256, 256)
    for _ in range(2):
        multiply = family.packs.multiplier(linear.weight, linear.bias)
        assert multiply is not None
        torch.testing.assert_close(multiply(torch.ones(256)), linear(torch.ones(256)), rtol=0, atol=1e-4)
        linear.bias = torch.nn.Parameter(torch.full((256,), 7.0))


def test_weights_are_unpacked_after_a_failure(wide_family: Family) -> None:
    def fail(event: StepEvent) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        denoise(wide_family, PROMPTS, Decode(**BASE), Key(0), list(range(len(PROMPTS))), on_step=fail)
    assert all("forward" not in vars(module) for module in wide_family.network.modules())
    hidden = torch.ones(1, 256, requires_grad=True)
    wide_family.row_logits(hidden).sum().backward()
    assert hidden.grad is not None
    assert math.isfinite(float(hidden.grad.sum()))


def test_freed_memory_is_used_again() -> None:
    """Page faults of blocks that come and go: with what glibc does by itself, each one costs its pages anew."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")

    def num_faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            blocks = [torch.zeros(2 << 20) for _ in range(12)]  # 8 MiB each
            del blocks
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with kept_heap():
        num_faults()
        assert num_faults() < 2048  # 8 MiB
