"""The engine's draws against distributions that are enumerated, and what a step may hold in memory."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dare.core.decode import Decode
from dare.core.rng import Key
from dare.families.base import Family
from dare.families.layers import head
from dare.rollout.engine import denoise
from tests.conftest import tiny_family
from tests.golden_checkpoints import golden_family

PROMPT = [1, 2, 3, 4]


class TwoMasks:
    """A block of two masked positions after `PROMPT`: the network's probabilities in every state that it can be in.

    A stale cache holds the keys and values of everything but the block as they were at the first step.
    """

    def __init__(self, family: Family, cache: str) -> None:
        mask, self.family, self.is_stale = family.spec.mask_id, family, cache in ("prefix", "dual")
        vocab = torch.arange(family.spec.vocab_size)
        masks = torch.full_like(vocab, mask)
        self.first_KV = self._probs(torch.tensor([[mask, mask]]))[0]  # float64, both positions masked
        # [position that is still masked, token of the other, token]
        self.second_KVV = torch.stack(
            [
                self._probs(torch.stack([masks, vocab], dim=1))[:, 0],
                self._probs(torch.stack([vocab, masks], dim=1))[:, 1],
            ]
        )

    def _probs(self, block_BK: Tensor) -> Tensor:
        mask, prompt_BP = self.family.spec.mask_id, torch.tensor(PROMPT).expand(len(block_BK), -1)
        ids_BS = torch.cat([prompt_BP, block_BK], dim=1)
        with torch.no_grad():
            if not self.is_stale:
                return self.family.logits(ids_BS, None, 2)[:, 4:].double().softmax(-1)
            cache, position_BS = self.family.cache(*ids_BS.shape), torch.arange(6).expand(len(ids_BS), -1)
            first_BS = torch.cat([prompt_BP, torch.full_like(block_BK, mask)], dim=1)
            self.family.hidden(first_BS, position_BS, None, cache)
            hidden_BKD = self.family.hidden(block_BK, position_BS[:, 4:], None, cache)
            return self.family.row_logits(hidden_BKD.flatten(0, 1)).view(len(block_BK), 2, -1).double().softmax(-1)

    def allowed(self, probs: Tensor) -> Tensor:
        """Without the mask token, which is never drawn but counts for the confidence."""
        kept = probs.clone()
        kept[..., self.family.spec.mask_id] = 0.0
        return kept / kept.sum(-1, keepdim=True)

    def outcomes(self, unmask: str) -> Tensor:
        """float64 [V, V]: the probability of each pair of tokens."""
        draw_KV, then_KVV = self.allowed(self.first_KV), self.allowed(self.second_KVV)
        if unmask == "left_to_right":
            return draw_KV[0, :, None] * then_KVV[1]
        left_V, right_V = self.first_KV
        is_left_VV = left_V[:, None] >= right_V[None, :]  # the first position is the surer one
        left_wins_V = (draw_KV[1] * is_left_VV).sum(-1)
        right_wins_V = (draw_KV[0][:, None] * ~is_left_VV).sum(0)
        return (draw_KV[0] * left_wins_V)[:, None] * then_KVV[1] + (
            (draw_KV[1] * right_wins_V)[:, None] * then_KVV[0]
        ).T


@pytest.mark.parametrize("unmask", ["low_confidence", "left_to_right"])
@pytest.mark.parametrize(
    ("name", "cache"), [("llada", "none"), ("llada", "prefix"), ("llada", "dual"), ("sdar", "auto")]
)
def test_pairs_of_tokens_follow_the_enumerated_distribution(name: str, cache: str, unmask: str) -> None:
    """Pearson's chi-square over all pairs; its bound is exceeded once in a thousand keys."""
    family, num = tiny_family(name, vocab_size=12), 4000
    options: dict[str, Any] = {"gen_length": 2, "block_length": 2, "temperature": 1.0, "eos_stop": False}
    decode = Decode(**options, unmask=unmask, cache=cache, batch_size=num // 2)
    trace = denoise(family, [PROMPT] * num, decode, Key(3), list(range(num)))
    pair_B = trace.canvas.input_BS[:, 4] * 12 + trace.canvas.input_BS[:, 5]
    expected_C = num * TwoMasks(family, cache).outcomes(unmask).flatten()
    assert float(expected_C.sum()) == pytest.approx(num)
    count_C = torch.bincount(pair_B, minlength=144).double()
    assert not count_C[expected_C == 0.0].any()
    is_rare_C = expected_C < 5.0  # they share a cell
    expected_C = torch.cat([expected_C[~is_rare_C], expected_C[is_rare_C].sum()[None]])
    count_C = torch.cat([count_C[~is_rare_C], count_C[is_rare_C].sum()[None]])
    keep_C = expected_C > 0
    num_free = int(keep_C.sum()) - 1
    assert num_free > 20
    bound = num_free * (1 - 2 / (9 * num_free) + 3.09 * math.sqrt(2 / (9 * num_free))) ** 3  # Wilson and Hilferty 1931
    assert float(((count_C - expected_C) ** 2 / expected_C)[keep_C].sum()) < bound


class _Sizes(TorchDispatchMode):
    """The largest results over the vocabulary, and the largest float64 ones, of everything that runs."""

    def __init__(self, family: Family) -> None:
        super().__init__()
        self.vocab_size, self.num_logits, self.num_doubles = family.spec.vocab_size, 0, 0
        self.weights = {weight.untyped_storage().data_ptr() for weight in family.network.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                continue
            if tensor.dtype == torch.float64:
                self.num_doubles = max(self.num_doubles, tensor.numel())
            is_weight = tensor.untyped_storage().data_ptr() in self.weights
            if tensor.shape[-1:] == (self.vocab_size,) and not is_weight:
                self.num_logits = max(self.num_logits, tensor.numel())
        return result


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("name", "cache"), [("llada", "none"), ("llada", "dual"), ("sdar", "auto")])
def test_a_step_holds_one_chunk_of_logits_and_one_double_per_position(
    monkeypatch: pytest.MonkeyPatch, name: str, cache: str, temperature: float
) -> None:
    family = golden_family(name)
    vocab_size, num_rows, length = family.spec.vocab_size, 6, 4
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", 5 * vocab_size)
    decode = Decode(gen_length=8, block_length=length, temperature=temperature, cache=cache)
    with _Sizes(family) as sizes:
        denoise(family, [[3, 1, 4, row] for row in range(num_rows)], decode, Key(0), list(range(num_rows)))
    assert 0 < sizes.num_logits <= 5 * vocab_size
    assert sizes.num_doubles <= num_rows * length
