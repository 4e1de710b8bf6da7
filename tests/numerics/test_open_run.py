"""A row of an open run is the row that `denoise` gives, whoever joins and leaves around it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.rng import Key, KeyTable
from dare.core.text import Completion
from dare.diffusion.trace import to_completions
from dare.families.base import Family
from dare.rollout.engine import denoise
from dare.rollout.open_run import OpenRun, RowRequest
from dare.rollout.plan import make_plan

WIDTH = 40
DECODES = {
    "llada": [
        Decode(block_length=4, temperature=1.0),
        Decode(block_length=8, unmask="threshold", threshold=0.08, cache="dual"),
        Decode(block_length=4, temperature=0.7, cache="prefix", steps_per_block=2),
        Decode(block_length=8, unmask="random", cfg_scale=0.5, temperature=1.0),
        Decode(block_length=4, temperature=1.0, remask="rcr"),
    ],
    "sdar": [
        Decode(temperature=1.0),
        Decode(temperature=1.0, edit_threshold=0.05),
        Decode(block_length=8, steps_per_block=3, eos_stop=False),
    ],
}
CASES = [(name, decode) for name, decodes in DECODES.items() for decode in decodes]


def alone(family: Family, decode: Decode, request: RowRequest) -> Completion:
    chosen = decode.model_copy(update={"gen_length": request.gen_length})
    trace = denoise(family, [list(request.prompt)], chosen, request.key, [request.sample_id])
    return to_completions(trace)[0]


def drain(run: OpenRun, places: dict[int, int], found: dict[int, Completion]) -> None:
    for place in run.step():
        found[places.pop(place)] = run.take(place)


def same(mine: Completion, other: Completion) -> bool:
    return (mine.tokens, mine.step_map, mine.nfe, mine.finish) == (
        other.tokens,
        other.step_map,
        other.nfe,
        other.finish,
    ) and torch.allclose(torch.tensor(mine.logp), torch.tensor(other.logp), atol=1e-5)


row_requests = st.builds(
    RowRequest,
    prompt=st.lists(st.integers(0, 20), min_size=1, max_size=9).map(tuple),
    gen_length=st.sampled_from([8, 16]),
    key=st.integers(0, 5).map(lambda seed: Key(seed).fold("generate")),
    sample_id=st.integers(0, 2**63 - 1),
)


@pytest.mark.parametrize(("name", "decode"), CASES)
@settings(max_examples=4, deadline=None)
@given(data=st.data())
def test_rows_do_not_depend_on_company(
    families: dict[str, Family], name: str, decode: Decode, data: st.DataObject
) -> None:
    family = families[name]
    requests = data.draw(st.lists(row_requests, min_size=1, max_size=6))
    pauses = data.draw(st.lists(st.integers(0, 4), min_size=len(requests), max_size=len(requests)))
    left = data.draw(st.sets(st.sampled_from(range(len(requests)))))
    run = OpenRun(family, make_plan(family, decode), num_seats=2, width=WIDTH)
    places: dict[int, int] = {}
    found: dict[int, Completion] = {}
    with torch.no_grad():
        for index, (request, pause) in enumerate(zip(requests, pauses, strict=True)):
            while not run.num_free:
                drain(run, places, found)
            places[run.join(request)] = index
            for _ in range(pause):
                drain(run, places, found)
        for place in [place for place, index in places.items() if index in left]:
            run.leave(place)
        while not run.is_empty:
            drain(run, places, found)
    assert sorted(found) == list(range(len(requests)))
    for index, request in enumerate(requests):
        if index not in left:
            assert same(found[index], alone(family, decode, request)), index


def test_what_is_settled_stays(families: dict[str, Family]) -> None:
    family, decode = families["sdar"], Decode(temperature=1.0, eos_stop=False)
    request = RowRequest((1, 2, 3), 12, Key(0), 7)
    run = OpenRun(family, make_plan(family, decode), num_seats=1, width=WIDTH)
    place, seen, canvases = run.join(request), [], []
    with torch.no_grad():
        while place not in run.step():
            seen += run.advanced().values()
            canvases.append(run.canvas(place))
        _, tokens = run.canvas(place)
        completion = run.take(place)
    assert all(tokens[: len(part)] == part for part in seen)
    assert [len(part) for part in seen] == [1, 5, 9]  # the first block begins with the prompt
    assert [step for step, _ in canvases] == list(range(1, len(canvases) + 1))
    assert all(family.spec.mask_id in canvas for _, canvas in canvases)
    assert tokens[: len(completion.tokens)] == completion.tokens


def test_what_does_not_fit_never_joins(families: dict[str, Family]) -> None:
    family = families["llada"]
    run = OpenRun(family, make_plan(family, Decode(block_length=4)), num_seats=1, width=WIDTH)
    for prompt, gen_length in (((1,) * 37, 4), ((99,), 4), ((family.spec.mask_id,), 4), ((1,), 5)):
        with pytest.raises(DareError):
            run.join(RowRequest(prompt, gen_length, Key(0), 0))
    assert run.is_empty
    assert run.num_free == 2


@given(st.lists(st.tuples(st.integers(0, 2**64), st.integers(0, 2**63 - 1)), min_size=1, max_size=4))
def test_a_table_draws_what_each_key_draws(entries: list[tuple[int, int]]) -> None:
    table = KeyTable([(Key(0), 0)] * len(entries))
    position_N = torch.arange(len(entries)) * 3
    table.fold("token").uniform(position_N * 0, position_N)
    for place, (seed, sample_id) in enumerate(entries):
        table.put(place, Key(seed), sample_id)
    drawn_N = table.fold("token").uniform(torch.arange(len(entries)), position_N)
    for place, (seed, sample_id) in enumerate(entries):
        alone_1 = Key(seed).fold("token").uniform(torch.tensor([sample_id]), position_N[place : place + 1])
        assert torch.equal(drawn_N[place : place + 1], alone_1)
