"""Supervised objectives of public training code from its own times, draws and masks: MDLM, block, Dream, LLaDA2.

Losses to 5e-5 and gradients to 5e-4, relative, from the stored token losses and from the checkpoints. Where the public
loss is not ours (a softmax without the mask token, a shift across blocks, a division by the width of a batch), the
stored token losses stand in for the network.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dare.algorithms.sft import SFT, SFTOptions
from dare.core.rng import Key
from dare.core.types import Canvas, Samples, Views
from dare.diffusion import blocks, corrupt, supervised
from dare.diffusion.schedule import find_schedule, spread_time, stratum
from dare.diffusion.supervised import Noise
from dare.families.base import Family
from dare.families.layers.moe import Experts
from dare.families.predict import target_argmax
from dare.objectives.entropy import entropy
from tests.golden_checkpoints import load_golden
from tests.golden_sft import EOS, MASK, RTOL, case, load


def samples_of(
    tensors: dict[str, Tensor],
    is_scored_BS: Tensor,
    *,
    block_length: int | None = None,
    is_real_BS: Tensor | None = None,
) -> Samples:
    input_BS = tensors["input_ids"]
    column_S = torch.arange(input_BS.shape[1])
    return Samples(
        canvas=Canvas(
            input_BS,
            is_scored_BS,
            torch.ones_like(is_scored_BS) if is_real_BS is None else is_real_BS.bool(),
            (column_S // (block_length or len(column_S))).expand_as(input_BS).contiguous(),
            "full" if block_length is None else "block_causal",
        ),
        is_scored_BS=is_scored_BS,
        sample_id_B=torch.arange(len(input_BS)),
        advantage_B=torch.zeros(len(input_BS)),
        group_B=torch.arange(len(input_BS)),
        mask_id=MASK,
        eos_ids=(EOS,),
    )


def objective(**settings: Any) -> SFT:
    return SFT(SFTOptions.model_validate({"preset": "llada", "t_min": 1e-6, **settings}))


def views_of(algorithm: SFT, samples: Samples, t: Tensor, uniform_BS: Tensor) -> Views:
    """Our views from stored times, one per row or position, and stored draws."""
    t_BMS = t.double().view(len(t), 1, -1).expand(-1, 1, samples.canvas.length)
    return supervised.masked(samples, algorithm.objective.noise, t_BMS, uniform_BS.double()[:, None])


def value_of(algorithm: SFT, logp_RS: Tensor, views: Views, samples: Samples) -> Tensor:
    return algorithm.loss(logp_RS, logp_RS, None, views, samples).value


def check_loss(value: Tensor, expected: float) -> None:
    assert float(value.detach()) == pytest.approx(expected, rel=RTOL)


def check_network(
    checkpoint: str, algorithm: SFT, views: Views, samples: Samples, token_ce_BS: Tensor, loss: float, norms: Any
) -> None:
    """Log-probs, loss and the gradient of every parameter, from the checkpoint."""
    family: Family = load_golden(checkpoint)
    logp_RS = family.view_logp(views, samples.canvas.rows(views.sample_R))
    expected_RS = torch.where(views.is_target_RS, -token_ce_BS, 0.0)
    torch.testing.assert_close(logp_RS.detach(), expected_RS, rtol=0, atol=1e-4)
    value = value_of(algorithm, logp_RS, views, samples)
    check_loss(value, loss)
    value.backward()
    got = {key: p.grad for key, p in family.network.named_parameters() if p.grad is not None}
    if "model.embed_tokens.weight" in got and family.spec.is_shifted:
        got["model.embed_tokens.weight"][family.spec.pad_id] = 0.0  # their embedding never trains its padding index
    assert got.keys() == norms.keys()
    for name, expected in norms.items():
        assert float(got[name].norm()) == pytest.approx(expected, rel=5e-4, abs=1e-9), name


# 1. MDLM (linear, cosine; scheduler weights or none; three norms), shifted, and with context-adaptive weights

MDLM = [name for name, facts in load("mdlm")[0].items() if "losses" in facts]
BLOCK = [name for name, facts in load("bd3lm_a2d")[0].items() if "losses" in facts]
WEIGHTS = {"scheduler": {"weight": "elbo"}, "uniform": {"weight": "uniform"}}


def mdlm(file: str, name: str, norm: str) -> tuple[SFT, Samples, Views, dict[str, Any], dict[str, Tensor]]:
    facts, tensors = case(file, name)
    kind = facts["weight_type"]
    weight = WEIGHTS[kind] if kind in WEIGHTS else {"weight": "cart", "cart_p": float(kind[:-1].split(":")[1])}
    algorithm = objective(schedule=facts["schedule"], norm=norm, **weight)
    is_real_BS = tensors.get("attention_mask")
    samples = samples_of(tensors, tensors["labels"] != -100, block_length=facts["block_size"], is_real_BS=is_real_BS)
    return algorithm, samples, views_of(algorithm, samples, tensors["t"], tensors["mask_uniform"]), facts, tensors


@pytest.mark.parametrize(("file", "name"), [("mdlm", n) for n in MDLM] + [("bd3lm_a2d", n) for n in BLOCK])
def test_masks_weights_and_the_three_norms(file: str, name: str) -> None:
    for norm in ("token", "sequence", "batch"):
        algorithm, samples, views, facts, tensors = mdlm(file, name, norm)
        assert torch.equal(views.is_target_RS, tensors["masked"])
        assert torch.equal(views.noisy_RS, tensors["noisy_ids"])
        # Their weights have 1e-6 in the denominator, and the cosine one is computed from alpha close to 1.
        weight_BS = torch.where(tensors["masked"], tensors["weight"], 0.0)
        torch.testing.assert_close(views.weight_RS, weight_BS, rtol=2e-4, atol=1e-5)
        stored = replace(views, weight_RS=weight_BS)
        logp_RS = torch.where(tensors["masked"], -tensors["token_ce"], 0.0)
        check_loss(value_of(algorithm, logp_RS, stored, samples), facts["losses"][norm])
        assert float(value_of(algorithm, logp_RS, views, samples)) == pytest.approx(facts["losses"][norm], rel=2e-4)


@pytest.mark.parametrize(
    ("file", "name", "checkpoint"),
    [("mdlm", n, n.split("_")[0]) for n in MDLM] + [("bd3lm_a2d", n, "sdar") for n in BLOCK if "shifted" not in n],
)
def test_mdlm_and_block_losses_from_the_checkpoint(file: str, name: str, checkpoint: str) -> None:
    norm = "token"
    algorithm, samples, views, facts, tensors = mdlm(file, name, norm)
    stored = replace(views, weight_RS=torch.where(tensors["masked"], tensors["weight"], 0.0))
    norms = facts["grad_norms"][norm]
    check_network(checkpoint, algorithm, stored, samples, tensors["token_ce"], facts["losses"][norm], norms)


# 2. BD3-LM: other schedules, one t per block, clipped ranges

NOISES = {
    "loglinear": "linear",
    "cosine": "raised_cosine",
    "square": "square",
    "square_root": "square_root",
    "log": "log",
}


@pytest.mark.parametrize("noise", list(NOISES))
def test_their_schedules(noise: str) -> None:
    """Equal where their floor of 1e-3 does not act; the cosine one once the floor inside it is taken out."""
    _, tensors = case("schedules", f"noise_{noise}")
    t, chance, scale = tensors["t"].double(), tensors["move_chance"].double(), -tensors["loss_scaling"].double()
    schedule = find_schedule(NOISES[noise])
    p, weight = schedule.mask_probability(t), schedule.loss_weight(t)
    if noise == "cosine":
        floored = 1 - 0.999 * (1 - p)
        torch.testing.assert_close(floored, chance, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(weight * p * 0.999 / (floored + 1e-3), scale, rtol=1e-4, atol=1e-6)
        return
    is_free = chance > 1.001e-3
    assert int(is_free.sum()) > 15
    torch.testing.assert_close(p[is_free], chance[is_free], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weight[is_free], scale[is_free], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", list(load("bd3lm")[0]))
def test_bd3lm_losses(name: str) -> None:
    """Our softmax holds the mask token; theirs does not, and both values are stored. t_min > 0.5 means weight 1."""
    facts, tensors = case("bd3lm", name)
    weight = "uniform" if facts["t_min"] > 0.5 else "elbo"
    t_min = min(facts["t_min"], 0.999)
    algorithm = objective(
        schedule=NOISES[facts["noise"]], weight=weight, norm="token", t_min=t_min, t_max=facts["t_max"]
    )
    is_scored_BS = tensors["attention_mask"].bool().clone()
    if facts["mode"] == "evaluation":
        is_scored_BS[:, 0] = False
    every_BS = torch.ones_like(is_scored_BS)
    samples = samples_of(tensors, is_scored_BS, block_length=facts["block_size"], is_real_BS=every_BS)
    is_masked_BMS = tensors["masked"][:, None]
    weight_BMS = supervised.weights(samples, algorithm.objective.noise, tensors["t"].double()[:, None], is_masked_BMS)
    is_target_BMS = is_masked_BMS & is_scored_BS[:, None]
    views = corrupt.assemble(samples, is_masked_BMS, is_target_BMS, weight_BMS)
    if facts["noise"] not in ("cosine", "square"):  # where their floor acts
        expected_RS = torch.where(views.is_target_RS, tensors["weight"], 0.0)
        torch.testing.assert_close(views.weight_RS, expected_RS, rtol=1e-4, atol=1e-5)
    views = replace(views, weight_RS=torch.where(views.is_target_RS, tensors["weight"], 0.0))
    check_loss(value_of(algorithm, -tensors["token_nll"], views, samples), facts["loss"])
    if facts["mask_logit_bias"] == 0.0:
        logp_RS = load_golden("sdar").view_logp(views, samples.canvas.rows(views.sample_R))
        check_loss(value_of(algorithm, logp_RS, views, samples), facts["loss_if_mask_logit_kept"])


@pytest.mark.parametrize("name", ["t_antithetic", "t_independent", "t_clipped", "t_one_block", "t_block1_nll"])
def test_low_discrepancy_times(name: str) -> None:
    """Their law is ours with the index of the block in the batch as its place; ours draws the place."""
    facts, tensors = case("bd3lm_sampling", name)
    xi = tensors["xi"].double()
    place = torch.arange(xi.numel()).view(xi.shape)
    share = stratum(xi, place, xi.numel()) if facts["low_discrepancy"] else xi
    t_BK = spread_time(share, facts["t_min"], facts["t_max"])
    width = tensors["t"].shape[1] // xi.shape[1] if tensors["t"].shape[1] > 1 else 1
    torch.testing.assert_close(t_BK.repeat_interleave(width, 1), tensors["t"].double(), rtol=0, atol=1e-6)
    p_BS = find_schedule("linear").mask_probability(tensors["t"].double())
    assert torch.equal(tensors["mask_uniform"] < p_BS, tensors["masked"])


@pytest.mark.parametrize("name", ["resample_both", "resample_upper_only", "resample_lower_only"])
def test_masks_out_of_their_band_are_drawn_again(name: str) -> None:
    """Their rounds of draws, block by block; where none is left our last draws are theirs."""
    facts, tensors = case("bd3lm_sampling", name)
    rounds = tensors["uniforms"].double()
    every_BS = torch.ones((facts["batch"], facts["n"]), dtype=torch.bool)
    samples = samples_of({"input_ids": every_BS.long()}, every_BS, block_length=facts["block_size"])
    noise = Noise(t_min=facts["t_min"], t_max=facts["t_max"], is_rate_kept=True)
    t_BMS = tensors["t"].double()[:, None]
    uniform_BMS = supervised.redrawn(samples, noise, t_BMS, rounds[0][:, None], [r[:, None] for r in rounds[1:]])
    views = supervised.masked(samples, noise, t_BMS, uniform_BMS)
    assert torch.equal(views.is_target_RS, tensors["masked"])
    share_BK = views.is_target_RS.view(facts["batch"], -1, facts["block_size"]).double().mean(-1)
    torch.testing.assert_close(share_BK, tensors["fraction"].double(), rtol=0, atol=1e-6)


# 3. Dream: time reweighting, focal factor, trailing EOS as one unit

DREAM = [name for name, facts in load("dream_sft")[0].items() if "loss" in facts]
TIME_WEIGHTS = {"original": "elbo", "linear": "one_minus_t", "none": "uniform", "cart": "cart"}


def dream(name: str) -> tuple[SFT, Samples, Views, dict[str, Any], dict[str, Tensor]]:
    facts, tensors = case("dream_sft", name)
    options = facts["options"]
    settings: dict[str, Any] = {"weight": TIME_WEIGHTS[facts["time_reweighting"]], "norm": "masked"}
    if "cart_p" in options:
        settings["cart_p"] = options["cart_p"]
    if options.get("token_reweighting"):
        settings |= {"focal_gamma": options["gamma"], "focal_alpha": options["alpha"]}
    algorithm = objective(**settings, is_eos_unit=options.get("eos", False))
    samples = samples_of(tensors, tensors["loss_mask"].bool())
    return algorithm, samples, views_of(algorithm, samples, tensors["t"], tensors["mask_uniform"]), facts, tensors


@pytest.mark.parametrize("name", DREAM)
def test_dream_losses_and_gradients(name: str) -> None:
    algorithm, samples, views, facts, tensors = dream(name)
    assert torch.equal(views.is_target_RS, tensors["masked"])
    torch.testing.assert_close(
        views.weight_RS, torch.where(tensors["masked"], tensors["weight"], 0.0), rtol=1e-4, atol=1e-6
    )
    logp_RS = torch.where(views.is_target_RS, -tensors["token_ce"], 0.0)
    check_loss(value_of(algorithm, logp_RS, views, samples), facts["loss"])
    assert algorithm.is_linear == ("focal" not in name)
    check_network("dream", algorithm, views, samples, tensors["token_ce"], facts["loss"], facts["grad_norms"])


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_the_double_normalisation_is_not_ours(name: str) -> None:
    """1 / t and a division by the number of masked tokens: known here as weight elbo with norm masked, no preset."""
    facts, tensors = case("dare_sft", name)
    is_scored_BS = torch.arange(16) >= tensors["prompt_lengths"][:, None]
    samples = samples_of(tensors, is_scored_BS)
    logp_RS = torch.where(tensors["masked"], -tensors["token_ce"], 0.0)
    values = {}
    for norm in ("masked", "token"):
        algorithm = objective(norm=norm)
        views = views_of(algorithm, samples, tensors["t"], tensors["mask_uniform"])
        assert torch.equal(views.noisy_RS, tensors["noisy_ids"])
        values[norm] = float(value_of(algorithm, logp_RS, views, samples))
    assert values["masked"] == pytest.approx(facts["loss"], rel=RTOL)
    assert values["token"] < 0.8 * values["masked"]


# 4. LLaDA2: rates without 1 / t, and the entropy where the model is right

LLADA2 = [name for name, facts in load("llada2_sft")[0].items() if "loss" in facts]


def llada2(name: str, rows: slice) -> tuple[SFT, Samples, Views, dict[str, Any], dict[str, Tensor]]:
    facts, tensors = case("llada2_sft", name)
    tensors = {key: value[rows] if not key.startswith("grad__") else value for key, value in tensors.items()}
    algorithm = objective(weight="uniform", norm="masked", confidence_weight=facts.get("confidence_beta", 0.0))
    is_scored_BS = torch.arange(16) >= tensors["prompt_lengths"][:, None]
    is_real_BS = tensors["attention_mask"].bool() if "attention_mask" in tensors else None
    if is_real_BS is not None:
        is_scored_BS = is_scored_BS & is_real_BS
    samples = samples_of(tensors, is_scored_BS, block_length=facts["block_size"], is_real_BS=is_real_BS)
    return algorithm, samples, views_of(algorithm, samples, tensors["rate"], tensors["mask_uniform"]), facts, tensors


@pytest.mark.parametrize("name", LLADA2)
def test_llada2_losses(name: str) -> None:
    """Theirs is a mean over micro-batches, ours over the batch: compared micro-batch by micro-batch."""
    facts, _ = case("llada2_sft", name)
    num, totals = facts["micro_batches"], []
    for part in range(num):
        algorithm, samples, views, _, tensors = llada2(name, slice(part * 4 // num, (part + 1) * 4 // num))
        assert torch.equal(views.noisy_RS, tensors["noisy_ids"])
        is_scored_here_BS = torch.ones_like(views.is_target_RS)
        if not facts["same_token_labels"]:  # label 0 has no logits before it
            is_scored_here_BS[:, 0] = False
        logp_RS = torch.where(views.is_target_RS & is_scored_here_BS, -tensors["token_ce"], 0.0)
        totals.append(float(value_of(algorithm, logp_RS, views, samples)))
    assert sum(totals) / num == pytest.approx(facts["loss_cross_entropy"], rel=RTOL)


@pytest.mark.parametrize("name", [n for n in LLADA2 if "shifted" not in n and "two" not in n])
def test_llada2_with_confidence_from_the_checkpoint(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probs, which predictions are right, the entropy term, and the gradient of the sum.

    The published network runs its routed experts without a graph, so they neither learn nor pass a gradient on; and its
    embedding never trains its padding index. Ours do both.
    """
    forward = Experts.forward
    monkeypatch.setattr(Experts, "forward", lambda self, x_ND, route: forward(self, x_ND, route).detach())
    algorithm, samples, views, facts, tensors = llada2(name, slice(None))
    family = load_golden("llada2_0")
    canvas = samples.canvas.rows(views.sample_R)
    with torch.no_grad():
        token_RS = target_argmax(family, family.view_hidden(views, canvas), views)
    views = algorithm.with_predictions(views, samples, token_RS)
    assert torch.equal(views.is_target_RS & (token_RS == views.target_RS), tensors["correct"])
    hidden_RTD = family.view_hidden(views, canvas)
    total = value_of(algorithm, family.target_logp(hidden_RTD, views), views, samples)
    check_loss(total, facts["loss_cross_entropy"])
    auxiliary = algorithm.auxiliary(views, samples)
    assert (auxiliary is None) == (facts["n_correct"] == 0)
    if auxiliary is not None:
        assert len(auxiliary.view_A) == facts["n_correct"]
        term = family.aux_terms(hidden_RTD, views, auxiliary, torch.arange(len(auxiliary.view_A))).sum()
        check_loss(term, facts["confidence_beta"] * facts["loss_confidence"])
        total = total + term
    check_loss(total, facts["loss"])
    total.backward()
    grads = {key: p.grad for key, p in family.network.named_parameters() if p.grad is not None}
    grads["model.word_embeddings.weight"][family.spec.pad_id] = 0.0
    got = {key: float(grad.norm()) for key, grad in grads.items()}
    assert got == pytest.approx(facts["grad_norms"], rel=5e-4, abs=1e-9)


@pytest.mark.parametrize("name", ["confidence_mixed", "confidence_none_correct", "confidence_all_correct"])
def test_the_entropy_term_alone(name: str) -> None:
    facts, tensors = case("llada2_sft", name)
    logits = tensors["logits"].clone().requires_grad_()
    is_correct = (tensors["labels"] != -100) & (logits.argmax(-1) == tensors["labels"])
    value = entropy(logits)[is_correct].sum() / max(int(is_correct.sum()), 1)
    assert float(value.detach()) == pytest.approx(facts["value"], rel=RTOL, abs=1e-9)
    if bool(is_correct.any()):
        (grad,) = torch.autograd.grad(value, logits)
        torch.testing.assert_close(grad, tensors["grad"], rtol=5e-4, atol=1e-7)


def test_padded_rows_of_llada2_one_call_each() -> None:
    for row in range(4):
        algorithm, samples, views, facts, tensors = llada2("padded_w4_same", slice(row, row + 1))
        assert torch.equal(views.is_target_RS, tensors["masked"])
        logp_RS = load_golden("llada2_0").view_logp(views, samples.canvas)
        check_loss(value_of(algorithm, logp_RS, views, samples), facts["losses"][row])


# 5. dLLM-RL: rates without 1 / t, a mean over views of means

DLLM_RL = [name for name in load("dllm_rl_sft")[0] if not name.startswith("sdar")]


@pytest.mark.parametrize("name", DLLM_RL)
def test_mean_over_views_of_means(name: str) -> None:
    facts, tensors = case("dllm_rl_sft", name)
    is_target_RS = tensors["targets"].bool()
    samples = samples_of({"input_ids": tensors["noisy_ids"]}, is_target_RS)
    every = is_target_RS[:, None]
    views = corrupt.assemble(samples, every, every, torch.ones(every.shape))
    algorithm = objective(weight="uniform", norm="view")
    check_loss(value_of(algorithm, -tensors["token_ce"] * is_target_RS, views, samples), facts["loss"])


# 6. Random tokens, and two-stream masks


@pytest.mark.parametrize("name", ["random_token", "random_token_block"])
def test_random_tokens_from_stored_draws(name: str) -> None:
    """Theirs may draw the token itself, so it corrupts less than its rate; ours never does, nor the mask."""
    facts, tensors = case("corruption", name)
    vocab_size = facts["params"]["vocab_size"]
    token_BS = tensors["input_ids"]
    uniform_BS = Key(0).uniform(torch.arange(token_BS.numel()).view(token_BS.shape))
    ours_BS = supervised.other_token(uniform_BS, token_BS, MASK, 128)
    assert not bool((ours_BS == token_BS).any())
    assert not bool((ours_BS == MASK).any())
    is_drawn_BS = tensors["masked"].bool()
    assert torch.equal(tensors["noisy_ids"][~is_drawn_BS], token_BS[~is_drawn_BS])
    assert int(tensors["noisy_ids"].max()) < max(vocab_size, int(token_BS.max()) + 1)


@pytest.mark.parametrize("name", [n for n in load("masks")[0] if n.startswith("two_stream")])
def test_two_stream_masks(name: str) -> None:
    facts, tensors = case("masks", name)
    block_1S = (torch.arange(facts["n"]) // facts["block_size"])[None]
    mask = blocks.two_stream_mask(block_1S, torch.ones_like(block_1S, dtype=torch.bool))
    assert torch.equal(mask.view(2 * facts["n"], 2 * facts["n"]), tensors["mask"].bool())
    assert int(mask.sum()) == facts["visible_pairs"]


def test_the_noise_of_a_preset_is_complete() -> None:
    """`decided` spells every setting out and changes none."""
    for preset in ("llada", "dream", "bd3lm", "sdar", "llada2", "llada2_edit"):
        options = SFTOptions.model_validate({"preset": preset})
        decided = options.decided("d1")
        assert decided.objective() == options.objective()
        assert isinstance(decided.objective().noise, Noise)
        assert decided.preset == preset
