"""The chunked head against the plain log-softmax, in value and in both gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dare.families.layers import head
from dare.families.layers.head import chunk_rows, linear_logp, linear_total
from dare.training.live_bytes import LiveBytes

N, D, V = 13, 7, 11


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(N, D, generator=generator).to(dtype).requires_grad_()
    weight_VD = (torch.randn(V, D, generator=generator) * 2).to(dtype).requires_grad_()
    target_N = torch.randint(V, (N,), generator=generator)
    upstream_N = torch.randn(N, generator=generator)
    return hidden_ND, weight_VD, target_N, upstream_N


@pytest.mark.parametrize("rows", [1, 2, 5, 13, 64])
@pytest.mark.parametrize("scale", [1.0, 0.3, 2.5])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, rows: int, scale: float) -> None:
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", rows * V)
    assert chunk_rows(V) == rows
    hidden_ND, weight_VD, target_N, upstream_N = inputs()
    logp_N = linear_logp(hidden_ND, weight_VD, target_N, scale)
    grads = torch.autograd.grad((upstream_N * logp_N).sum(), [hidden_ND, weight_VD])

    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden_ND, weight_VD))
    exact_N = (exact_hidden @ exact_weight.T * scale).log_softmax(-1)[torch.arange(N), target_N]
    expected = torch.autograd.grad((upstream_N.double() * exact_N).sum(), [exact_hidden, exact_weight])
    torch.testing.assert_close(logp_N.double(), exact_N, atol=1e-5, rtol=0.0)
    for grad, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), reference, atol=2e-5, rtol=1e-5)


def test_freezing_one_side_leaves_the_gradient_of_the_other() -> None:
    hidden_ND, weight_VD, target_N, _ = inputs()
    (only_hidden,) = torch.autograd.grad(linear_logp(hidden_ND, weight_VD.detach(), target_N).sum(), [hidden_ND])
    (only_weight,) = torch.autograd.grad(linear_logp(hidden_ND.detach(), weight_VD, target_N).sum(), [weight_VD])
    both = torch.autograd.grad(linear_logp(hidden_ND, weight_VD, target_N).sum(), [hidden_ND, weight_VD])
    assert torch.equal(only_hidden, both[0])
    assert torch.equal(only_weight, both[1])


def test_nothing_to_score_has_gradients_of_zero() -> None:
    hidden_ND, weight_VD, target_N, _ = inputs()
    logp_N = linear_logp(hidden_ND[:0], weight_VD, target_N[:0])
    assert logp_N.shape == (0,)
    assert logp_N.dtype == torch.float32
    for grad in torch.autograd.grad(logp_N.sum(), [hidden_ND, weight_VD]):
        assert torch.equal(grad, torch.zeros_like(grad))


def test_a_token_that_is_all_but_certain_has_a_finite_log_prob() -> None:
    """Logits of 1e4 overflow exp; the log-prob and its gradient do not."""
    hidden_ND = torch.tensor([[1e4], [-1e4]], requires_grad=True)
    logp_N = linear_logp(hidden_ND, torch.tensor([[1.0], [0.0]]), torch.tensor([0, 0]))
    assert logp_N.tolist() == [0.0, -1e4]
    (grad,) = torch.autograd.grad(logp_N.sum(), [hidden_ND])
    assert grad.tolist() == [[0.0], [1.0]]


def test_low_precision_inputs_give_float32_log_probs() -> None:
    """Logits are rounded once, as a bfloat16 head rounds them; the softmax is float32."""
    hidden_ND, weight_VD, target_N, _ = inputs(torch.bfloat16)
    logp_N = linear_logp(hidden_ND, weight_VD, target_N)
    expected = (hidden_ND @ weight_VD.T).float().log_softmax(-1)[torch.arange(N), target_N]
    assert logp_N.dtype == torch.float32
    torch.testing.assert_close(logp_N, expected, atol=1e-6, rtol=1e-6)
    grads = torch.autograd.grad(logp_N.sum(), [hidden_ND, weight_VD])
    assert all(grad.dtype == torch.bfloat16 for grad in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_known_factors_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int, scale: float
) -> None:
    """Whether the gradient comes with the log-probs or in the backward: same log-probs, same gradients."""
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", rows * V)
    hidden_ND, weight_VD, target_N, factor_N = inputs(dtype)
    total, logp_N = linear_total(hidden_ND, weight_VD, target_N, factor_N, scale)
    grads = torch.autograd.grad(total, [hidden_ND, weight_VD])
    later_N = linear_logp(hidden_ND, weight_VD, target_N, scale)
    expected = torch.autograd.grad((factor_N * later_N).sum(), [hidden_ND, weight_VD])
    assert torch.equal(logp_N, later_N.detach())
    assert not logp_N.requires_grad
    torch.testing.assert_close(total, (factor_N * later_N).sum(), atol=0, rtol=0)
    for grad, reference in zip(grads, expected, strict=True):
        assert torch.equal(grad, reference)


def test_the_gradient_of_a_total_is_taken_once_and_scales() -> None:
    hidden_ND, weight_VD, target_N, factor_N = inputs()
    total, _ = linear_total(hidden_ND, weight_VD, target_N, factor_N)
    (once,) = torch.autograd.grad(total, [hidden_ND], retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        torch.autograd.grad(total, [hidden_ND])
    total, _ = linear_total(hidden_ND, weight_VD, target_N, factor_N)
    (thrice,) = torch.autograd.grad(total * 3.0, [hidden_ND])
    torch.testing.assert_close(thrice, once * 3.0)


@pytest.mark.parametrize("num", [64, 640])
def test_the_loss_takes_less_than_two_chunks_whatever_its_size(monkeypatch: pytest.MonkeyPatch, num: int) -> None:
    """Beyond the hidden states' and the weight's gradients, by counting every tensor that is made."""
    vocab_size, width = 2048, 8
    monkeypatch.setattr(head, "_CHUNK_ELEMENTS", 16 * vocab_size)
    hidden_ND = torch.randn(num, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight_VD = torch.randn(vocab_size, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
    target_N, factor_N = torch.arange(num), torch.ones(num)
    with LiveBytes() as count:
        total, logp_N = linear_total(hidden_ND, weight_VD, target_N, factor_N)
        total.backward()
    assert hidden_ND.grad is not None
    assert weight_VD.grad is not None
    gradients = hidden_ND.grad.nbytes + weight_VD.grad.nbytes + logp_N.nbytes
    assert count.peak - gradients < 2 * 16 * vocab_size * 4
    assert count.peak > 16 * vocab_size * 4  # one chunk is there
