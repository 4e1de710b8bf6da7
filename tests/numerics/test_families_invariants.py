"""What must hold of any family: padding, caches, streams, masks and shifts change the cost, never the numbers."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dare.core.registry import FAMILIES
from dare.core.types import Canvas, Views
from dare.diffusion import blocks
from dare.families.base import Family
from dare.families.layers.attention import KVCache
from dare.families.weights import create_family

NAMES = tuple(FAMILIES)
MIXTURES = ("llada_moe", "sdar_moe", "llada2")
VOCAB, MASK = 24, 23
ATOL = 2e-5  # float32; log-probs and logits of these models are of order 1
FEW = settings(max_examples=25, deadline=None)


@cache
def tiny(name: str, *, is_tied: bool = False) -> Family:
    return create_family(
        name,
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mlp_size=48,
        max_length=64,
        mask_id=MASK,
        eos_id=VOCAB - 2,
        pad_id=VOCAB - 3,
        block_length=4,
        tie_embeddings=is_tied,
        seed=3,
    )


BLOCK = tuple(name for name in NAMES if tiny(name).spec.attention == "block_causal")


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0.0)


def unchanged(name: str, got: Tensor, expected: Tensor) -> None:
    """Bit by bit; but one matmul of an expert spans the tokens of all rows, and its rounding their number."""
    if name in MIXTURES:
        close(got, expected)
    else:
        assert torch.equal(got, expected)


tokens = st.integers(0, MASK - 1)
rows_of_tokens = st.lists(st.lists(st.integers(0, MASK), min_size=1, max_size=14), min_size=1, max_size=4)


@st.composite
def noised_rows(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]]]:
    """Clean rows of different lengths and the same rows with some tokens masked."""
    clean = draw(st.lists(st.lists(tokens, min_size=2, max_size=13), min_size=1, max_size=3))
    noisy = [[MASK if draw(st.booleans()) else token for token in row] for row in clean]
    return clean, noisy


def padded(rows: list[list[int]], value: int) -> Tensor:
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def views(noisy: Tensor, context: Tensor, is_target: Tensor, temperature: float = 1.0) -> Views:
    index = torch.arange(noisy.shape[0])
    return Views(noisy, context, context, is_target, is_target.float(), index, index * 0, temperature)


def score(family: Family, clean: list[list[int]], noisy: list[list[int]], block_length: int | None = None) -> Tensor:
    """view_logp of every real position."""
    canvas = family.canvas([[] for _ in clean], clean, block_length)
    return family.view_logp(views(padded(noisy, MASK), canvas.input_BS, canvas.is_real_BS), canvas)


# --- padding and batch mates


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("side", ["left", "right"])
@FEW
@given(rows=rows_of_tokens, extra=st.integers(0, 3), filler=st.integers(0, MASK))
def test_padding_and_batch_mates_do_not_change_logits(
    name: str, side: str, rows: list[list[int]], extra: int, filler: int
) -> None:
    family, width = tiny(name), max(map(len, rows)) + extra
    ids_BS = torch.full((len(rows), width), filler)
    is_real_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    for index, row in enumerate(rows):
        part = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids_BS[index, part] = torch.tensor(row)
        is_real_BS[index, part] = True
    together = family.logits(ids_BS, is_real_BS)
    assert bool(together.isfinite().all())
    for index, row in enumerate(rows):
        alone = family.logits(torch.tensor([row]))[0]
        close(together[index, is_real_BS[index]], alone)


@pytest.mark.parametrize("name", NAMES)
@FEW
@given(pair=noised_rows(), extra=st.integers(1, 5))
def test_views_do_not_depend_on_padding_or_batch_mates(
    name: str, pair: tuple[list[list[int]], list[list[int]]], extra: int
) -> None:
    clean, noisy = pair
    family = tiny(name)
    canvas = family.canvas([[] for _ in clean], clean)
    plain = views(padded(noisy, MASK), canvas.input_BS, canvas.is_real_BS)
    together = family.view_logp(plain, canvas)

    def wider(value_RS: Tensor) -> Tensor:
        return torch.nn.functional.pad(value_RS, (0, extra))

    wide_canvas = Canvas(
        wider(canvas.input_BS),
        wider(canvas.is_completion_BS),
        wider(canvas.is_real_BS),
        wider(canvas.block_BS),
        canvas.attention,
    )
    wide = views(wider(plain.noisy_RS), wider(plain.context_RS), wider(plain.is_target_RS))
    assert torch.equal(family.view_logp(wide, wide_canvas), wider(together))  # bitwise: such columns are cut off
    for index in range(len(clean)):
        close(score(family, [clean[index]], [noisy[index]])[0], together[index, : len(clean[index])])


# --- one number, several ways to compute it


@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_view_logp_is_the_log_softmax_of_logits(name: str, is_tied: bool, temperature: float) -> None:
    """In value and in the gradient of every parameter; one block spans the row, so both families are comparable."""
    family = tiny(name, is_tied=is_tied)
    clean = torch.arange(20).view(2, 10)
    noisy = clean.clone()
    noisy[:, ::3] = MASK
    is_target = noisy == MASK
    canvas = family.canvas([[], []], clean.tolist(), 10)
    weight = torch.linspace(-1, 2, 20).view(2, 10)

    logp = family.view_logp(views(noisy, clean, is_target, temperature), canvas)
    assert logp.dtype == torch.float32
    assert bool((logp[~is_target] == 0).all())
    parameters = list(family.network.parameters())
    grads = torch.autograd.grad((weight * logp).sum(), parameters)

    logits = family.logits(noisy, block_length=10)
    plain = (logits / temperature).log_softmax(-1).gather(-1, clean[..., None])[..., 0]
    expected = torch.autograd.grad((weight * plain)[is_target].sum(), parameters)
    close(logp[is_target], plain[is_target])
    for grad, reference in zip(grads, expected, strict=True):
        assert (grad - reference).norm() <= 5e-6 * reference.norm()


@pytest.mark.parametrize("name", BLOCK)
@settings(max_examples=8, deadline=None)
@given(pair=noised_rows(), block_length=st.integers(1, 6))
def test_two_streams_equal_cached_and_uncached_blocks(
    name: str, pair: tuple[list[list[int]], list[list[int]]], block_length: int
) -> None:
    family = tiny(name)
    clean, noisy = pair
    two_stream = score(family, clean, noisy, block_length)
    for row, (clean_row, noisy_row) in enumerate(zip(clean, noisy, strict=True)):
        cached = score_with_cache(family, clean_row, noisy_row, block_length)
        uncached = score_without_cache(family, clean_row, noisy_row, block_length)
        close(cached, uncached)
        close(two_stream[row, : len(clean_row)], uncached)


def score_without_cache(family: Family, clean: list[int], noisy: list[int], block_length: int) -> Tensor:
    """Block by block: [clean blocks before, noisy block], block-causal."""
    parts = []
    for start in range(0, len(clean), block_length):
        stop = min(start + block_length, len(clean))
        logits = family.logits(torch.tensor([clean[:start] + noisy[start:stop]]), block_length=block_length)
        parts.append(pick(logits[0, start:], clean[start:stop]))
    return torch.cat(parts)


def score_with_cache(family: Family, clean: list[int], noisy: list[int], block_length: int) -> Tensor:
    """Block by block: the noisy block against the cache, then its clean version over the same slots."""
    memory, slot_S, parts = family.cache(1, len(clean)), torch.arange(len(clean)), []
    with torch.no_grad():
        for start in range(0, len(clean), block_length):
            stop = min(start + block_length, len(clean))
            position = torch.arange(start, stop)[None]
            visible = (slot_S < stop)[None, None, None]
            hidden = family.hidden(torch.tensor([noisy[start:stop]]), position, visible, memory)
            parts.append(pick(family.row_logits(hidden[0]), clean[start:stop]))
            family.hidden(torch.tensor([clean[start:stop]]), position, visible, memory)
    return torch.cat(parts)


def pick(logits: Tensor, target: list[int]) -> Tensor:
    return logits.log_softmax(-1).gather(-1, torch.tensor(target)[:, None])[:, 0]


@pytest.mark.parametrize("name", BLOCK)
def test_blocks_of_one_are_autoregressive(name: str) -> None:
    """Everything masked: the sum over the row is the chain rule, one token at a time, and so is its gradient."""
    family, clean = tiny(name), [5, 0, 17, 9, 2, 11]
    parameters = list(family.network.parameters())
    two_stream = score(family, [clean], [[MASK] * len(clean)], 1)[0]
    chain = score_without_cache(family, clean, [MASK] * len(clean), 1)
    close(two_stream, chain)
    grads = torch.autograd.grad(two_stream.sum(), parameters)
    for grad, expected in zip(grads, torch.autograd.grad(chain.sum(), parameters), strict=True):
        torch.testing.assert_close(grad, expected, atol=2e-5, rtol=1e-4)


# --- what is hidden stays hidden


@pytest.mark.parametrize("name", BLOCK)
@FEW
@given(data=st.data(), length=st.integers(2, 12), block_length=st.integers(1, 5))
def test_a_block_sees_no_later_block(name: str, data: st.DataObject, length: int, block_length: int) -> None:
    family = tiny(name)
    ids = torch.tensor([data.draw(st.lists(tokens, min_size=length, max_size=length))])
    changed = data.draw(st.integers(0, length - 1))
    other = ids.clone()
    other[0, changed] = (ids[0, changed] + 1) % MASK
    before, after = family.logits(ids, block_length=block_length), family.logits(other, block_length=block_length)
    block_S = torch.arange(length) // block_length
    is_blind = block_S < block_S[changed]
    unchanged(name, after[0, is_blind], before[0, is_blind])
    assert bool((before[0, ~is_blind] != after[0, ~is_blind]).any(-1).all())


@FEW
@given(data=st.data(), length=st.integers(2, 12), block_length=st.integers(1, 5))
def test_a_noisy_block_sees_itself_and_earlier_context_only(
    data: st.DataObject, length: int, block_length: int
) -> None:
    family = tiny("sdar")
    clean = data.draw(st.lists(tokens, min_size=length, max_size=length))
    noisy = [MASK] * length
    changed = data.draw(st.integers(0, length - 1))
    is_target = torch.ones(1, length, dtype=torch.bool)
    canvas = family.canvas([[]], [clean], block_length)
    target = torch.tensor([clean])

    def logp(noisy_row: list[int], context_row: list[int]) -> Tensor:
        view = views(torch.tensor([noisy_row]), torch.tensor([context_row]), is_target)
        return family.view_logp(dataclasses.replace(view, target_RS=target), canvas)[0].detach()

    def with_change(row: list[int]) -> list[int]:
        return [*row[:changed], (row[changed] + 1) % MASK, *row[changed + 1 :]]

    block_S = torch.arange(length) // block_length
    plain = logp(noisy, clean)
    context_moved = logp(noisy, with_change(clean)) != plain
    noisy_moved = logp(with_change(noisy), clean) != plain
    assert torch.equal(context_moved, block_S > block_S[changed])
    assert torch.equal(noisy_moved, block_S == block_S[changed])


@pytest.mark.parametrize("name", NAMES)
def test_the_contents_of_padding_never_matter(name: str) -> None:
    family = tiny(name)
    is_real = torch.tensor([[True] * 5 + [False] * 3, [False] * 2 + [True] * 6])
    ids = torch.arange(16).view(2, 8)
    other = torch.where(is_real, ids, (ids * 7 + 3) % VOCAB)
    unchanged(name, family.logits(other, is_real)[is_real], family.logits(ids, is_real)[is_real])


@FEW
@given(data=st.data(), num_rows=st.integers(1, 2), width=st.integers(1, 12), block_length=st.integers(1, 4))
def test_masks_are_their_definition(data: st.DataObject, num_rows: int, width: int, block_length: int) -> None:
    pads = [data.draw(st.integers(0, width - 1)) for _ in range(num_rows)]
    is_left = data.draw(st.booleans())
    real = torch.tensor([[(i >= pad) if is_left else (i < width - pad) for i in range(width)] for pad in pads])
    block = blocks.positions(real) // block_length
    causal, streams = blocks.block_causal_mask(block, real), blocks.two_stream_mask(block, real)
    for b in range(num_rows):
        for i in range(2 * width):
            for j in range(2 * width):
                q, k = i % width, j % width
                if not (real[b, q] and real[b, k]):
                    expected = i == j and not bool(real[b, q])
                elif i < width:
                    expected = bool(block[b, q] == block[b, k] if j < width else block[b, q] > block[b, k])
                else:
                    expected = j >= width and bool(block[b, q] >= block[b, k])
                assert bool(streams[b, 0, i, j]) is expected
                if i >= width and j >= width:
                    assert bool(causal[b, 0, q, k]) is expected


# --- shifts


def shifted(name: str) -> Family:
    family = tiny(name)
    return Family(dataclasses.replace(family.spec, is_shifted=True), family.network, family.config)


def test_a_shift_is_undone_from_the_first_real_position() -> None:
    plain, moved = tiny("llada"), shifted("llada")
    ids = torch.arange(16).view(2, 8)
    is_real = torch.tensor([[True] * 6 + [False] * 2, [False] * 3 + [True] * 5])
    raw, aligned = plain.logits(ids, is_real), moved.logits(ids, is_real)
    for row, (first, stop) in enumerate([(0, 6), (3, 8)]):
        assert torch.equal(aligned[row, first], raw[row, first])
        assert torch.equal(aligned[row, first + 1 : stop], raw[row, first : stop - 1])


@pytest.mark.parametrize("family", [shifted("llada"), tiny("dream")], ids=["llada", "dream"])
def test_shifted_views_agree_with_shifted_logits(family: Family) -> None:
    clean = [[4, 8, 15, 16, 2], [3, 4, 2]]
    noisy = [[4, MASK, 15, MASK, MASK], [MASK, 4, MASK]]
    logp = score(family, clean, noisy)
    for row in range(2):
        close(logp[row, : len(clean[row])], pick(family.logits(torch.tensor([noisy[row]]))[0], clean[row]))


def test_a_shifted_block_model_is_refused() -> None:
    with pytest.raises(ValueError, match="shifted block-causal"):
        shifted("sdar")


# --- the cache


def test_a_slot_holds_what_was_written_last() -> None:
    memory = KVCache(1, 2, 1, 4, 2, dtype=torch.float32, device=torch.device("cpu"))
    assert memory.length == 4
    first, second = torch.ones(2, 1, 3, 2), torch.full((2, 1, 1, 2), 5.0)
    memory.write(0, first, -first, memory.places(torch.tensor([[0, 1, 2], [3, 2, 1]])))
    key, value = memory.write(0, second, -second, memory.places(torch.tensor([[1], [3]])))
    assert key[:, 0, :, 0].tolist() == [[1, 5, 1, 0], [0, 1, 1, 5]]
    assert torch.equal(value, -key)


def test_rows_of_a_cache_are_copied_from_what_was_there_before() -> None:
    memory = KVCache(2, 3, 1, 4, 2, dtype=torch.float32, device=torch.device("cpu"))
    for slot in (0, 2):
        key = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 1, 1, 2)
        memory.write(1, key, -key, memory.places(torch.full((3, 1), slot)))
    memory.copy_rows(torch.tensor([0, 2]), torch.tensor([2, 1]), 2)
    assert memory.keys[1][:, 0, 0, 0].tolist() == [2, 1, 1]
    assert memory.values[1][:, 0, 0, 1].tolist() == [-2, -1, -1]
    assert memory.keys[1][:, 2, 0, 0].tolist() == [0, 1, 2]
    assert not memory.keys[0].any()


# --- misuse


def test_views_must_lie_on_their_canvas() -> None:
    family = tiny("llada")
    canvas = family.canvas([[1, 2]], [[3]])
    ids = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="their canvas"):
        family.view_logp(views(ids, ids, ids.bool()), canvas)


def test_padding_is_no_target() -> None:
    family = tiny("llada")
    canvas = family.canvas([[1], [1]], [[2], [2, 3]])
    everywhere = torch.ones_like(canvas.is_real_BS)
    with pytest.raises(ValueError, match="padding has no log-prob"):
        family.view_logp(views(canvas.input_BS, canvas.input_BS, everywhere), canvas)


def test_views_without_targets_have_a_gradient_of_zero() -> None:
    family = tiny("llada")
    canvas = family.canvas([[1, 2]], [[3]])
    logp = family.view_logp(views(canvas.input_BS, canvas.input_BS, torch.zeros_like(canvas.is_real_BS)), canvas)
    (grad,) = torch.autograd.grad(logp.sum(), [family.network.head_weight])
    assert torch.equal(grad, torch.zeros_like(grad))
