"""Noise of public supervised training from its own draws, and losses that depend on the layout: SDAR, dLLM-RL, NeMo."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dare.algorithms.sft import SFT, SFTOptions
from dare.algorithms.trace_sft import TraceSFT, TraceSFTOptions
from dare.core.rng import Key
from dare.core.types import Samples, Views
from dare.diffusion import corrupt, supervised
from dare.diffusion.schedule import spread_time
from dare.families.base import Family
from dare.families.predict import target_argmax
from dare.families.weights import load_family
from dare.objectives.entropy import entropy
from tests.golden_checkpoints import copy_checkpoint, golden_family, load_golden
from tests.golden_sft import EOS, MASK, RTOL, case, load, samples_of

# 1. Noise


@pytest.mark.parametrize("name", ["blockwise", "sequence_topk"])
def test_rounded_counts_with_later_tokens_likelier(name: str) -> None:
    """`num_masked: rounded` from their rates and draws; they rank unscored tokens too and then leave them visible."""
    facts, tensors = case("corruption", name)
    width = facts["params"]["block_size"]
    input_BS = tensors["input_ids"]
    length = input_BS.shape[1]
    every = samples_of(input_BS, torch.ones_like(input_BS, dtype=torch.bool), block_length=width)
    draw_BS = tensors["draw1"].reshape(4, -1)[:, :length]
    probability_BS = tensors["p_mask"].double()
    is_drawn_BMS = supervised.counted(every, probability_BS[:, None], draw_BS.double()[:, None], is_rounded=True)
    is_scored_BS = tensors["loss_mask"].bool()
    assert torch.equal(is_drawn_BMS[:, 0] & is_scored_BS, tensors["masked"])
    rates = tensors["draw0"].double().view(4, -1)
    t_BS = spread_time(rates, 1e-3).repeat_interleave(width or length, 1)[:, :length]
    torch.testing.assert_close(t_BS, probability_BS, rtol=0, atol=1e-6)


def test_everything_masked() -> None:
    _, tensors = case("corruption", "all_masked")
    samples = samples_of(tensors["input_ids"], tensors["loss_mask"].bool())
    samples = dataclasses.replace(
        samples, canvas=dataclasses.replace(samples.canvas, is_completion_BS=samples.is_scored_BS)
    )
    views = corrupt.all_masked(samples, Key(0))
    assert torch.equal(views.is_target_RS, tensors["masked"])
    assert torch.equal(views.noisy_RS, tensors["noisy_ids"])


def packed_noise(name: str) -> tuple[dict[str, Any], dict[str, Tensor], list[tuple[Samples, Tensor, Tensor]]]:
    """Documents of each packed row as rows of their own, and the last try's times and draws for them."""
    facts, tensors = case("corruption", name)
    kinds, rows, last = facts["draw_kinds"], [], 0
    for row in range(2):
        tries = kinds[last:].index("randint") if "randint" in kinds[last:] else len(kinds) // 2
        t_D, draw_1S = (tensors[f"draw{last + tries - 2 + k:02d}"].double() for k in (0, 1))
        last += tries + ("randint" in kinds[last:])
        lengths = facts["documents"][row]
        width = max(lengths)
        pieces = [
            [torch.nn.functional.pad(p, (0, width - len(p))) for p in value.split(lengths)]
            for value in (tensors["input_ids"][row], ~tensors["prompt_mask"][row], draw_1S[0])
        ]
        input_DS, is_scored_DS, draw_DS = (torch.stack(piece) for piece in pieces)
        rows.append((samples_of(input_DS, is_scored_DS), spread_time(t_D, 1e-3), draw_DS))
    return facts, tensors, rows


def masked_documents(samples: Samples, t_D: Tensor, draw_DS: Tensor) -> Views:
    t_DMS = t_D[:, None, None].expand(-1, 1, samples.canvas.length)
    return supervised.masked(samples, SFT(SFTOptions(preset="sdar")).objective.noise, t_DMS, draw_DS[:, None])


def test_one_rate_per_packed_document() -> None:
    facts, tensors, rows = packed_noise("packed_documents")
    rates = []
    for row, (samples, t_D, draw_DS) in enumerate(rows):
        views = masked_documents(samples, t_D, draw_DS)
        lengths = facts["documents"][row]
        is_masked_S = torch.cat([views.is_target_RS[d, :n] for d, n in enumerate(lengths)])
        assert torch.equal(is_masked_S, tensors["masked"][row])
        rates.append(torch.cat([t_D[d].expand(int(views.is_target_RS[d].sum())) for d in range(len(lengths))]))
    torch.testing.assert_close(torch.cat(rates).float(), tensors["p_of_masked"], rtol=0, atol=1e-6)


def test_a_row_without_a_mask_contributes_nothing() -> None:
    """They force one token after ten tries, with the weight 1 / p of the last one; ours stays empty, its loss 0."""
    _, tensors, rows = packed_noise("packed_forced")
    assert tensors["masked"].sum(-1).tolist() == [1, 1]
    for samples, t_D, draw_DS in rows:
        views = masked_documents(samples, t_D, draw_DS)
        assert not views.is_target_RS.any()
        zero_RS = torch.zeros(views.noisy_RS.shape)
        assert float(SFT(SFTOptions(preset="sdar")).loss(zero_RS, zero_RS, None, views, samples).value) == 0.0


# 2. Losses that depend on the layout


def grad_norms(family: Family) -> dict[str, float]:
    return {n: float(p.grad.norm()) for n, p in family.network.named_parameters() if p.grad is not None}


@functools.cache
def sdar_from_the_response(tmp: Path, block_length: int) -> Family:
    """The checkpoint with `block_grid: completion` in its config."""
    folder = copy_checkpoint("sdar", tmp)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "block_grid": "completion", "block_size": block_length}))
    return load_family(folder)


def response_rows(family: Family, tensors: dict[str, Tensor], width: int) -> tuple[Samples, list[int]]:
    """Their rows without the left padding, and how much that was; pads of the response stay, as tokens."""
    prompts, completions, shifts = [], [], []
    for row in tensors["input_ids"].tolist():
        num_pad = next(i for i, token in enumerate(row) if token != EOS)
        shifts.append(num_pad)
        prompts.append(row[num_pad : len(row) - width])
        completions.append(row[len(row) - width :])
    canvas = family.canvas(prompts, completions)
    rest = samples_of(canvas.input_BS, canvas.is_completion_BS)
    return dataclasses.replace(rest, canvas=canvas), shifts


def shifted(value_RS: Tensor, shift_R: list[int]) -> Tensor:
    """[R, S]: their columns as ours."""
    return torch.stack([row.roll(-shift) for row, shift in zip(value_RS, shift_R, strict=True)])


@pytest.mark.parametrize("name", [n for n in load("dllm_rl_sft")[0] if n.startswith("sdar")])
def test_dllm_rl_on_block_models(name: str, tmp_path: Path) -> None:
    """Blocks from the response, sums divided by its width: `block_grid: completion`, `norm: constant`."""
    facts, tensors = case("dllm_rl_sft", name)
    family = sdar_from_the_response(tmp_path / "sdar", facts["block_size"])
    width = facts["response_width"]
    samples, shift_B = response_rows(family, tensors, width)
    is_trace = facts["method"] == "trace"
    sample_R = tensors["row_sample"].tolist() if is_trace else [0, 1, 2]
    shift_R = [shift_B[b] for b in sample_R]
    length = samples.canvas.length
    is_target_RS = shifted(tensors["targets"].bool(), shift_R)[:, :length]
    noisy = torch.cat([tensors["input_ids"][sample_R][:, : facts["prompt_width"]], tensors["extended_ids"][:, 16:]], 1)
    noisy_RS = torch.where(
        samples.canvas.is_real_BS[sample_R], shifted(noisy, shift_R)[:, :length], samples.canvas.input_BS[sample_R]
    )
    algorithm: Any
    if is_trace:
        step_BS = torch.nn.functional.pad(tensors["step_map"], (facts["prompt_width"], 0), value=-1)
        step_BS = torch.where(samples.canvas.is_completion_BS, shifted(step_BS, shift_B)[:, :length], -1)
        samples = dataclasses.replace(samples, step_map_BS=step_BS)
        algorithm = TraceSFT(TraceSFTOptions(shrink=facts["shrink"], norm="constant", norm_length=width))
        views = algorithm.corrupt(samples, Key(0))
        ours = list(zip(views.sample_R.tolist(), views.noisy_RS.tolist(), strict=True))
        views = views.rows(
            torch.tensor([ours.index((b, row)) for b, row in zip(sample_R, noisy_RS.tolist(), strict=True)])
        )
        views = dataclasses.replace(views, is_target_RS=views.is_target_RS & is_target_RS)
    else:
        algorithm = SFT(SFTOptions(preset="dllm_rl", norm="constant", norm_length=width))
        drawn_BL = torch.stack([tensors[f"draw{2 * b + 1:02d}"] <= tensors[f"draw{2 * b:02d}"] for b in range(3)])
        drawn_BS = shifted(torch.nn.functional.pad(drawn_BL, (facts["prompt_width"], 0)), shift_B)[:, None, :length]
        views = corrupt.assemble(samples, drawn_BS, drawn_BS & is_target_RS[:, None], torch.ones(drawn_BS.shape))
    assert torch.equal(views.noisy_RS, noisy_RS)
    assert torch.equal(views.is_target_RS, is_target_RS)
    logp_RS = family.view_logp(views, samples.canvas.rows(views.sample_R))
    expected_RS = torch.where(is_target_RS, -shifted(tensors["token_ce"], shift_R)[:, :length], 0.0)
    torch.testing.assert_close(logp_RS.detach(), expected_RS, rtol=0, atol=1e-4)
    value = algorithm.loss(logp_RS, logp_RS, None, views, samples).value
    assert float(value.detach()) == pytest.approx(facts["loss"], rel=RTOL)
    value.backward()
    assert grad_norms(family) == pytest.approx(facts["grad_norms"], rel=5e-4, abs=1e-9)


@pytest.mark.parametrize("name", [n for n in load("dllm_rl_sft")[0] if "random_masking" in n])
def test_dllm_rl_on_masked_models_from_the_checkpoint(name: str) -> None:
    """Preset `dllm_rl` from their rates and draws; pads without loss are masked with the rest there, and visible."""
    facts, tensors = case("dllm_rl_sft", name)
    noisy_RS, is_target_RS = tensors["noisy_ids"], tensors["targets"].bool()
    samples = samples_of(tensors["labels"], is_target_RS)
    if "attention_mask" in tensors:  # Dream's hides the padding before prompts; LLaDA's code shows it
        samples.canvas.is_real_BS = tensors["attention_mask"].bool()[:, -1]
    is_masked_RMS = (noisy_RS == MASK)[:, None]
    views = corrupt.assemble(samples, is_masked_RMS, is_target_RS[:, None], torch.ones(is_masked_RMS.shape))
    algorithm = SFT(SFTOptions(preset="dllm_rl"))
    noise = algorithm.objective.noise
    for row in range(len(noisy_RS)):
        t = spread_time(tensors[f"draw{2 * row:02d}"].double(), noise.t_min, noise.t_max)
        is_below = tensors[f"draw{2 * row + 1:02d}"] < t
        assert not (is_target_RS[row] & ~is_below).any()
    family = load_golden(name.split("_")[0])
    logp_RS = family.view_logp(views, samples.canvas)
    torch.testing.assert_close(
        logp_RS.detach(), torch.where(is_target_RS, -tensors["token_ce"], 0.0), rtol=0, atol=1e-4
    )
    value = algorithm.loss(logp_RS, logp_RS, None, views, samples).value
    assert float(value.detach()) == pytest.approx(facts["loss"], rel=RTOL)


def test_nemos_losses() -> None:
    """The flat one has every supervised token as a target. The hybrid one adds next tokens of a causal pass.

    Families here have no causal pass, so the hybrid loss is no option; its parts give the number.
    """
    facts, tensors = case("llada_sft", "nemo_mdlm")
    is_scored_BS = tensors["loss_mask"].bool()
    samples = samples_of(tensors["input_ids"], is_scored_BS)
    algorithm = SFT(SFTOptions(preset="nemo"))
    is_masked_BMS, every_BMS = tensors["masked"][:, None], is_scored_BS[:, None]
    weight_BMS = supervised.weights(
        samples, algorithm.objective.noise, tensors["p_mask"].double()[:, None], is_masked_BMS
    )
    flat = corrupt.assemble(samples, is_masked_BMS, every_BMS, torch.ones(every_BMS.shape))
    views = corrupt.assemble(samples, is_masked_BMS, is_masked_BMS, weight_BMS)
    losses = facts["losses"]
    logp_RS = -tensors["token_ce"] * is_scored_BS
    value = {
        name: float(algorithm.loss(logp_RS, logp_RS, None, v, samples).value)
        for name, v in (("flat", flat), ("mdlm", views))
    }
    assert value["flat"] == pytest.approx(losses["flat_all_supervised"], rel=RTOL)
    assert value["mdlm"] == pytest.approx(losses["mdlm"], rel=RTOL)
    assert value["mdlm"] * facts["num_diffusion_tokens"] == pytest.approx(losses["mdlm_sum"], rel=RTOL)
    with torch.no_grad():
        causal_BSV = golden_family("llada").logits(tensors["noisy_ids"]).roll(3, 1)
    nll_BS = torch.nn.functional.cross_entropy(causal_BSV[:, :-1].mT, tensors["input_ids"][:, 1:], reduction="none")
    next_token = float(nll_BS[is_scored_BS[:, 1:]].mean())
    assert 0.3 * value["mdlm"] + next_token == pytest.approx(losses["hybrid_alpha0_3"], rel=RTOL)


def test_an_entropy_term_without_masks_is_zero() -> None:
    facts, tensors = case("llada2_sft", "confidence_nothing_masked")
    is_correct = (tensors["labels"] != -100) & (tensors["logits"].argmax(-1) == tensors["labels"])
    assert float(entropy(tensors["logits"])[is_correct].sum()) == facts["value"] == 0.0
    assert not tensors["grad"].any()


def test_shifted_labels_of_llada2_in_one_call_for_the_batch() -> None:
    """Label 0 has no logits before it; a shifted block model would score a block's first token from another block."""
    facts, tensors = case("llada2_sft", "padded_w4_shifted")
    is_real_BS = tensors["attention_mask"].bool()
    is_target_BS = tensors["masked"] & is_real_BS
    is_target_BS[:, 0] = False
    samples = samples_of(tensors["input_ids"], is_target_BS, block_length=4)
    is_BMS = is_target_BS[:, None]
    views = corrupt.assemble(samples, is_BMS, is_BMS, torch.ones(is_BMS.shape))
    logp_RS = -tensors["token_ce"] * is_target_BS
    algorithm = SFT(SFTOptions(weight="uniform", norm="masked"))
    value = algorithm.loss(logp_RS, logp_RS, None, views, samples).value
    assert float(value) == pytest.approx(facts["losses"][0], rel=RTOL)


def test_the_entropy_term_of_shifted_labels_is_the_unshifted_one() -> None:
    """Their shifted entropy term compares logits i with label i, a mistake beside a shifted loss: it is our number."""
    facts, tensors = case("llada2_sft", "w4_shifted_confidence")
    is_scored_BS = torch.arange(16) >= tensors["prompt_lengths"][:, None]
    samples = samples_of(tensors["input_ids"], is_scored_BS, block_length=4)
    algorithm = SFT(SFTOptions(weight="uniform", norm="masked", confidence_weight=facts["confidence_beta"]))
    is_BMS = (tensors["noisy_ids"] == MASK)[:, None]
    views = corrupt.assemble(samples, is_BMS, is_BMS, torch.ones(is_BMS.shape))
    family = golden_family("llada2_0")
    with torch.no_grad():
        hidden = family.view_hidden(views, samples.canvas)
        views = algorithm.with_predictions(views, samples, target_argmax(family, hidden, views))
        auxiliary = algorithm.auxiliary(views, samples)
        assert auxiliary is not None
        term = float(family.aux_terms(hidden, views, auxiliary, torch.arange(len(auxiliary.view_A))).sum())
    assert len(auxiliary.view_A) == facts["n_correct"]
    assert term == pytest.approx(facts["confidence_beta"] * facts["loss_confidence"], rel=RTOL)
