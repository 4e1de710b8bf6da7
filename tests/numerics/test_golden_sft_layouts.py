"""Layouts of public supervised training from our parts: what a token sees, which EOS is added, how rows are cut."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from dare.core.data_recipe import DataRecipe
from dare.core.decode import Decode
from dare.core.rng import Key
from dare.data.rows import EncodedRow, Row
from dare.diffusion import blocks
from dare.families.layers.attention import Packed
from dare.families.tokenizer import char_tokenizer
from dare.rollout.engine import denoise
from dare.training.data import encode_rows
from tests.golden_checkpoints import golden_family
from tests.golden_sft import EOS, MASK, case, load
from tests.numerics.test_rollout import replayed_logp

# 1. What a token sees


@pytest.mark.parametrize("name", [n for n in load("masks")[0] if n.startswith("packed")])
def test_packed_documents_see_what_they_see_alone(name: str) -> None:
    """The mask of our packed attention, found by probing it, is their mask of [noisy d | clean d] after one another."""
    facts, tensors = case("masks", name)
    for row, lengths in enumerate(facts["documents"]):
        is_real_BS = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
        block_BS = blocks.block_ids(
            torch.ones_like(is_real_BS), torch.zeros(len(lengths)).long(), "sequence", facts["block_size"]
        )
        packed = Packed.of(is_real_BS.repeat(1, 2), blocks.two_stream_mask(block_BS, is_real_BS))
        assert isinstance(packed.visible, Tensor)
        size = 2 * sum(lengths)
        # Which slots of [row, column] each packed token sees, then which packed tokens those are.
        seen_BTT = packed.visible[:, 0]
        index_1N = packed.pack(torch.arange(packed.batch_size * packed.length).view(packed.batch_size, packed.length))
        row_N, column_N = index_1N[0] // packed.length, index_1N[0] % packed.length
        is_same_NN = row_N[:, None] == row_N
        ours_NN = is_same_NN & seen_BTT[row_N[:, None], column_N[:, None], column_N[None]]
        assert torch.equal(ours_NN, tensors["mask_interleaved"][row, :size, :size])
        positions_BS = blocks.positions(is_real_BS)
        assert torch.equal(
            torch.cat([positions_BS[d, :n] for d, n in enumerate(lengths)]), tensors["position_ids"][row]
        )
        order = tensors["permutation"][row]
        assert torch.equal(tensors["mask_two_stream"][row][order][:, order], tensors["mask_interleaved"][row])


def test_padded_rows() -> None:
    """Equal at real queries; a padded query sees nothing there, and itself here, because a softmax needs a key."""
    facts, tensors = case("masks", "padded")
    is_real_BS = tensors["attention_mask"].bool()
    block_BS = (torch.arange(facts["n"]) // facts["block_size"]).expand_as(is_real_BS)
    ours = blocks.two_stream_mask(block_BS, is_real_BS)[:, 0]
    is_query_B1 = is_real_BS.repeat(1, 2)[..., None]
    assert torch.equal(ours & is_query_B1, tensors["mask"].bool())
    assert torch.equal(ours & ~is_query_B1, torch.eye(2 * facts["n"]).bool() & ~is_query_B1)


@pytest.mark.parametrize("name", [n for n in load("masks")[0] if n.startswith("response")])
def test_blocks_that_count_from_the_response(name: str) -> None:
    """Their [prompt | clean response | noisy response] is part of [noisy | clean], noisy prompt queries left out."""
    facts, tensors = case("masks", name)
    num_prompt, length = facts["prompt_width"], facts["prompt_width"] + facts["response_len"]
    theirs = torch.cat(
        [torch.arange(length, 2 * length), torch.arange(num_prompt, length)]
    )  # clean row, noisy response
    for row, num_pad in enumerate(facts["left_pads"]):
        is_real_1S = (torch.arange(length) >= num_pad)[None]
        block_1S = blocks.block_ids(is_real_1S, torch.tensor([num_prompt - num_pad]), "completion", facts["block_size"])
        mask = blocks.two_stream_mask(block_1S, is_real_1S)[0, 0][theirs][:, theirs]
        is_real_query = ~tensors["input_is_pad"][row]
        assert torch.equal(mask[is_real_query], tensors["mask_padded"][row].bool()[is_real_query])
        if num_pad == 0:
            assert torch.equal(mask, tensors["mask"].bool())


# 2. EOS and collators

TOKENIZER = char_tokenizer("".join(chr(0x4E00 + i) for i in range(119)))  # the id of a character is its place


def encoded(prompt: list[int], completion: list[int], *, block_length: int | None = None, **data: Any) -> EncodedRow:
    """The ids as text, and the row that our encoder makes of it."""
    spec = dataclasses.replace(
        golden_family("llada" if block_length is None else "sdar").spec, eos_ids=(EOS,), mask_id=MASK, max_length=64
    )
    prompt_text, text = ("".join(chr(0x4E00 + i) for i in ids) for ids in (prompt, completion))
    decode, recipe = Decode(block_length=block_length), DataRecipe.model_validate(data)
    (row,) = encode_rows(TOKENIZER, [Row("r", "here", prompt_text, text)], recipe, decode, spec)
    assert row.prompt_ids == prompt[len(prompt) - len(row.prompt_ids) :]
    return row


def test_the_test_tokenizer_has_their_ids() -> None:
    assert TOKENIZER.eos_token_id == EOS


@pytest.mark.parametrize("name", ["append_eos_w4", "append_eos_w7"])
def test_eos_up_to_the_end_of_the_block(name: str) -> None:
    """`eos: align`. Rows of two tokens without loss and the rest with it; what is appended is scored."""
    facts, tensors = case("bd3lm_a2d", name)
    for row, length in enumerate(facts["lengths_before"]):
        found = encoded([1, 2], list(range(3, length + 1)), block_length=facts["block_size"], eos="align")
        is_used = tensors["input_ids"][row] >= 0
        assert found.prompt_ids + found.completion_ids == tensors["input_ids"][row][is_used].tolist()
        labels = [-100, -100, *found.completion_ids]
        assert all(found.is_scored)
        assert labels == tensors["labels"][row][is_used].tolist()


COLLATORS = [n for n in load("dream_sft")[0] if n.startswith("collate")]


@pytest.mark.parametrize("name", COLLATORS)
def test_batches_of_dreams_collators(name: str) -> None:
    """Each batch is `eos: fill` or `fill_row` with the length that they took from the batch; rows are cut to it.

    Their left padding is hidden and positions skip it, so it is our right padding. Which length a batch gets is drawn
    from its own rows in their code; a recipe has one for all rows, so that no row depends on its batch mates.
    """
    _, tensors = case("dream_sft", name)
    input_BS, is_scored_BS = tensors["input_ids"], tensors["loss_mask"].bool()
    num_scored_B = tensors["out_loss_mask"].sum(-1).tolist()
    width = tensors["out_input_ids"].shape[1]
    for row in range(4):
        prompt = input_BS[row][~is_scored_BS[row]].tolist()
        answer = [token for token in input_BS[row][is_scored_BS[row]].tolist() if token != EOS]
        is_real = tensors["out_attention_mask"][row].bool()
        expected = tensors["out_input_ids"][row][is_real].tolist()
        if not answer:  # an empty completion is refused by name here; theirs is EOS only
            assert expected[len(prompt) :] == [EOS] * num_scored_B[row]
            continue
        if name == "collate_random_with_input_pad":
            found = encoded(prompt, answer, eos="fill", gen_length=num_scored_B[row], on_too_long="right")
        else:
            found = encoded(prompt, answer, eos="fill_row", max_length=width, on_too_long="right")
        assert found.prompt_ids + found.completion_ids == expected
        is_loss = [False] * len(prompt) + found.is_scored
        assert is_loss == tensors["out_loss_mask"][row][is_real].bool().tolist()
        assert blocks.positions(is_real[None])[0].tolist() == tensors["out_position_ids"][row].tolist()


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_rollouts_on_blocks_that_count_from_the_response(cache: str) -> None:
    """What the engine recorded on that grid is what training scores, and blocks start with the completion."""
    family = copy.copy(golden_family("sdar"))
    family.spec = dataclasses.replace(family.spec, block_grid="completion")
    prompts = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9]]
    decode = Decode(gen_length=8, cache=cache, temperature=1.0, eos_stop=False)
    trace = denoise(family, prompts, decode, Key(0), [0, 1, 2])
    for row, prompt in enumerate(prompts):
        first = len(prompt)
        assert trace.canvas.block_BS[row, first : first + 8].tolist() == [0] * 4 + [1] * 4
        assert trace.canvas.block_BS[row, :first].tolist() == [(i - first) // 4 for i in range(first)]
    torch.testing.assert_close(replayed_logp(family, trace), trace.logp_BS, atol=1e-4, rtol=0)
    on_sequence = denoise(golden_family("sdar"), prompts, decode, Key(0), [0, 1, 2])
    assert not torch.equal(on_sequence.canvas.input_BS[:, :10], trace.canvas.input_BS[:, :10])
