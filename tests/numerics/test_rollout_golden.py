"""Greedy decoding, token for token and step for step, against what the published samplers did."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dare.core.decode import Decode
from dare.core.rng import Key
from dare.core.types import GIVEN
from dare.diffusion import sampling, unmask
from dare.diffusion import trace as traces
from dare.families.base import Family
from dare.rollout.engine import denoise
from tests.golden_checkpoints import load_golden

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ("llada", "llada_moe", "dream", "sdar", "sdar_moe", "llada2_0", "llada2_1")
META = {name: json.loads((GOLDEN / name / "decode.json").read_text()) for name in NAMES}
RANDOM = "random_remask_fixed_draws"


def cases(*families: str) -> list[tuple[str, str]]:
    return [
        (family, name)
        for family in families
        for name in META[family]
        if not name.startswith(("prim", "origin_fixed_draws")) and name != RANDOM
    ]


@pytest.fixture(scope="module")
def families() -> dict[str, Family]:
    return {name: load_golden(name) for name in META}


@pytest.fixture(scope="module")
def tensors() -> dict[str, dict[str, Tensor]]:
    return {name: load_file(GOLDEN / name / "decode.safetensors") for name in META}


def with_eos(family: Family, eos_ids: tuple[int, ...]) -> Family:
    """The same network that stops at other tokens."""
    other = copy.copy(family)
    other.spec = dataclasses.replace(family.spec, eos_ids=eos_ids)
    return other


def unpadded(tensors: dict[str, Tensor], name: str) -> tuple[list[list[int]], list[int]]:
    """Prompts without their padding on the left, and how much there was."""
    prompt_BP = tensors[f"{name}/prompt"]
    is_real_BP = tensors.get(f"{name}/prompt_attention_mask", torch.ones_like(prompt_BP)).bool()
    prompts = [row[is_real].tolist() for row, is_real in zip(prompt_BP, is_real_BP, strict=True)]
    return prompts, [prompt_BP.shape[1] - len(prompt) for prompt in prompts]


def llada_options(meta: dict[str, Any]) -> dict[str, Any]:
    params = meta["params"]
    options = {
        "gen_length": params["gen_length"],
        "block_length": params["block_length"],
        "cache": meta.get("cache", "none"),
        "cfg_scale": params.get("cfg_scale", 0.0),
        "forbid_eos": params.get("logits_eos_inf", False),
        "zero_eos_confidence": params.get("confidence_eos_eot_inf", False),
    }
    if params.get("threshold") is not None:
        return options | {"unmask": "threshold", "threshold": params["threshold"]}
    if params.get("factor") is not None:
        return options | {"unmask": "factor", "factor": params["factor"]}
    # The published `steps` is a total over all blocks.
    return options | {"steps_per_block": params["steps"] * params["block_length"] // params["gen_length"]}


def sdar_options(meta: dict[str, Any]) -> dict[str, Any]:
    params = meta["params"]
    steps = params["denoising_steps"]
    choices = {
        "sequential": {"unmask": "left_to_right", "steps_per_block": steps},
        "low_confidence_static": {"steps_per_block": steps},
        "low_confidence_dynamic": {
            "unmask": "threshold",
            "threshold": params.get("confidence_threshold"),
            "min_commit": params["block_length"] // steps,
        },
        "entropy_bounded": {"unmask": "entropy_bound", "entropy_bound": params.get("eb_threshold")},
    }
    return {
        "gen_length": params["gen_length"],
        "block_length": params["block_length"],
        "eos_stop": "stopping_criteria_idx" in params,
        **choices[params["remasking_strategy"]],
    }


def dream_options(meta: dict[str, Any]) -> dict[str, Any]:
    params = meta["params"]
    steps, num = params["steps"], params["max_new_tokens"]
    block_length = params.get("block_length", num)
    options: dict[str, Any] = {"gen_length": num, "block_length": block_length, "cache": meta.get("cache", "none")}
    options |= {name: params[name] for name in ("top_p", "top_k") if name in params}
    if "top_p" in params or "top_k" in params:
        options["compat"] = ["sampled_scores"]
    if params["alg"] == "confidence_threshold" and options["cache"] != "none":
        return options | {"unmask": "threshold", "threshold": params["threshold"]}
    options["steps_per_block"] = steps * block_length // num
    if params["alg"] == "confidence_threshold":
        return options | {"unmask": "capped_threshold", "threshold": params["threshold"], "schedule": "carried"}
    policies = {"maskgit_plus": "low_confidence", "topk_margin": "margin", "entropy": "entropy"}
    return options | {"unmask": policies[params["alg"]], "schedule": "timesteps"}


@pytest.mark.parametrize(("kind", "name"), cases("llada", "llada_moe", "dream"))
def test_masked_models(
    kind: str, name: str, families: dict[str, Family], tensors: dict[str, dict[str, Tensor]]
) -> None:
    meta, data = META[kind][name], tensors[kind]
    eos_ids = tuple(meta["params"][key] for key in ("eos_id", "eot_id") if key in meta["params"])
    family = with_eos(families[kind], eos_ids) if eos_ids else families[kind]
    prompts, padding = unpadded(data, name)
    options = dream_options(meta) if kind == "dream" else llada_options(meta)
    trace = denoise(family, prompts, Decode(**options), Key(0), list(range(len(prompts))))
    for row, skipped in enumerate(padding):
        is_real_S = trace.canvas.is_real_BS[row]
        assert torch.equal(trace.canvas.input_BS[row, is_real_S], data[f"{name}/final"][row, skipped:])
        assert torch.equal(trace.step_map_BS[row, is_real_S], data[f"{name}/unmask_call"][row, skipped:])
    assert trace.nfe_B.tolist() == [meta["nfe"]] * len(prompts)
    assert trace.is_exact == (meta.get("cache", "none") == "none")
    if len(prompts) == 1:
        seen = [traces.canvas_before(trace, step)[0] for step in range(meta["nfe"] + 1)]
        assert torch.equal(torch.stack(seen), data[f"{name}/x_steps"][:, 0].long())


@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize(("kind", "name"), cases("sdar", "sdar_moe"))
def test_sdar(
    kind: str, name: str, cache: str, families: dict[str, Family], tensors: dict[str, dict[str, Tensor]]
) -> None:
    meta, data = META[kind][name], tensors[kind]
    stop = meta["params"].get("stopping_criteria_idx")
    family = with_eos(families[kind], tuple(stop)) if stop else families[kind]
    (prompt,), _ = unpadded(data, name)
    trace = denoise(family, [prompt], Decode(**sdar_options(meta), cache=cache), Key(0), [0])
    # The published sampler goes on to the end of the canvas with masks; ours ends with the last block.
    length = trace.canvas.length
    final_S, call_S = data[f"{name}/final"][0], data[f"{name}/unmask_call"][0]
    assert torch.equal(trace.canvas.input_BS[0], final_S[:length])
    assert (final_S[length:] == family.spec.mask_id).all()
    # Forward calls -> denoising steps: prefill and store calls do not count.
    is_denoise = torch.tensor([kind == "denoise" for kind in meta["forward_calls"]]).long()
    step_S = torch.where(call_S < 0, GIVEN, (is_denoise.cumsum(0) - 1)[call_S.clamp(min=0)])
    assert torch.equal(trace.step_map_BS[0], step_S[:length])
    assert trace.nfe_B.tolist() == [meta["nfe"]]
    assert trace.is_exact


def llada2_options(meta: dict[str, Any]) -> dict[str, Any]:
    params = meta["params"]
    options = {
        "gen_length": params["gen_length"],
        "block_length": params["block_length"],
        "unmask": "threshold",
        "threshold": params["threshold"],
    }
    if "editing_threshold" in params:
        return options | {
            "min_commit": params.get("num_to_transfer", 1),
            "edit_threshold": params["editing_threshold"],
            "max_post_steps": params.get("max_post_steps", 16),
            "eos_stop": params["eos_early_stop"],
        }
    steps = min(params["steps"], params["gen_length"] // params.get("minimal_topk", 1))
    compat = ["eos_inside_block"] if params.get("eos_early_stop") else []
    return options | {"min_commit": params["block_length"] // steps, "compat": compat}


@pytest.mark.parametrize("cache", ["auto", "none"])
@pytest.mark.parametrize(("kind", "name"), cases("llada2_0", "llada2_1"))
def test_llada2(
    kind: str, name: str, cache: str, families: dict[str, Family], tensors: dict[str, dict[str, Tensor]]
) -> None:
    meta, data = META[kind][name], tensors[kind]
    family = with_eos(families[kind], (meta["params"]["eos_id"],))
    (prompt,), _ = unpadded(data, name)
    trace = denoise(family, [prompt], Decode(**llada2_options(meta), cache=cache), Key(0), [0])
    length = trace.canvas.length
    seen_TS = torch.stack([traces.canvas_before(trace, step)[0] for step in range(meta["nfe"] + 1)])
    expected_TS = data[f"{name}/x_steps"][:, 0].long()
    assert trace.nfe_B.tolist() == [meta["nfe"]]
    assert torch.equal(seen_TS, expected_TS[:, :length])
    assert (expected_TS[:, length:] == family.spec.mask_id).all()
    assert torch.equal(trace.canvas.input_BS[0], data[f"{name}/final_canvas"][0, :length])
    (completion,) = traces.to_completions(trace)
    returned = data[f"{name}/returned"][0].tolist()
    # The published samplers cut what lies beyond gen_length, which ours completes to whole blocks.
    assert completion.tokens[: len(returned)] == returned
    if kind == "llada2_1":
        assert trace.edits is not None
        assert len(trace.edits.row_E) == meta["edits"]


@pytest.mark.parametrize("name", [name for name in META["dream"] if name.startswith("origin_fixed_draws")])
def test_independent_reveals_with_the_published_draws(
    name: str, families: dict[str, Family], tensors: dict[str, dict[str, Tensor]]
) -> None:
    family, data, meta = families["dream"], tensors["dream"], META["dream"][name]
    decode, num_steps = Decode(unmask="independent"), meta["params"]["steps"]
    ids_BT = data[f"{name}/x_steps"][0].long()
    for step in range(num_steps):
        is_masked_BT = ids_BT == family.spec.mask_id
        score_BT = torch.ones(ids_BT.shape)
        score_BT[is_masked_BT] = data[f"{name}/draws"][step][: int(is_masked_BT.sum())].float()
        num_B, step_B = is_masked_BT.sum(-1), torch.full((len(ids_BT),), step)
        due = unmask.due("timesteps", num_B, num_B, num_steps, step_B)
        if step == num_steps - 1:  # nothing is drawn there
            score_BT.zero_()
        chosen_BT = unmask.commits("independent", score_BT, is_masked_BT, due.quota_B, decode, due.share_B)
        ids_BT = torch.where(chosen_BT, family.logits(ids_BT).argmax(-1), ids_BT)
        assert torch.equal(ids_BT, data[f"{name}/x_steps"][step + 1].long())


PRIMITIVES = {
    "prim_sample_tokens_plain": "confidence",
    "prim_sample_tokens_margin": "margin",
    "prim_sample_tokens_negent": "negative_entropy",
    "prim_sample_tokens_top_p": "confidence",
    "prim_sample_tokens_top_k": "confidence",
}


@pytest.mark.parametrize("name", PRIMITIVES)
def test_scores_of_sampled_distributions(name: str, tensors: dict[str, dict[str, Tensor]]) -> None:
    data, kwargs = tensors["dream"], META["dream"][name]["kwargs"]
    logits_NV = sampling.filtered(data[f"{name}/logits"], 1.0, kwargs.get("top_k"), kwargs.get("top_p"))
    token_N = data[f"{name}/tokens"]
    assert torch.equal(logits_NV.argmax(-1), token_N)
    found_N = sampling.score(PRIMITIVES[name], logits_NV, token_N, mask_id=0)
    torch.testing.assert_close(found_N, data[f"{name}/confidence"], atol=1e-5, rtol=0)


def test_random_remasking_with_the_published_draws(
    families: dict[str, Family], tensors: dict[str, dict[str, Tensor]]
) -> None:
    """The engine draws its own numbers, so this steps through the policy itself."""
    family, data, params = families["llada"], tensors["llada"], META["llada"][RANDOM]["params"]
    decode = Decode(unmask="random")
    ids_1T = data[f"{RANDOM}/x_steps"][0].long()
    length, start = params["block_length"], META["llada"][RANDOM]["prompt_length"]
    steps_per_block = params["steps"] * length // params["gen_length"]
    for step, draw_T in enumerate(data[f"{RANDOM}/draws"]):
        block, block_step = divmod(step, steps_per_block)
        window = slice(start + block * length, start + (block + 1) * length)
        is_masked_1K = ids_1T[:, window] == family.spec.mask_id
        quota_1 = unmask.quota(torch.tensor([length]), steps_per_block, torch.tensor([block_step]))
        chosen_1K = unmask.commits("random", draw_T[None, window], is_masked_1K, quota_1, decode)
        token_1K = family.logits(ids_1T)[:, window].argmax(-1)
        ids_1T[:, window] = torch.where(chosen_1K, token_1K, ids_1T[:, window])
        assert torch.equal(ids_1T, data[f"{RANDOM}/x_steps"][step + 1].long())
    assert torch.equal(ids_1T, data[f"{RANDOM}/final"])
