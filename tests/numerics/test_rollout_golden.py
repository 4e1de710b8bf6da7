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
from dare.diffusion import trace as traces
from dare.diffusion import unmask
from dare.families.base import Family
from dare.families.weights import load_family
from dare.rollout.engine import denoise

GOLDEN = Path(__file__).parents[1] / "golden"
META = {name: json.loads((GOLDEN / name / "decode.json").read_text()) for name in ("llada", "sdar")}
RANDOM = "random_remask_fixed_draws"
LLADA = [name for name in META["llada"] if not name.startswith("prim") and name != RANDOM]
SDAR = [name for name in META["sdar"] if not name.startswith("prim")]


@pytest.fixture(scope="module")
def families() -> dict[str, Family]:
    return {name: load_family(GOLDEN / name, torch.float32) for name in META}


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


@pytest.mark.parametrize("name", LLADA)
def test_llada(name: str, families: dict[str, Family], tensors: dict[str, dict[str, Tensor]]) -> None:
    meta, data = META["llada"][name], tensors["llada"]
    eos_ids = tuple(meta["params"][key] for key in ("eos_id", "eot_id") if key in meta["params"])
    family = with_eos(families["llada"], eos_ids) if eos_ids else families["llada"]
    prompts, padding = unpadded(data, name)
    trace = denoise(family, prompts, Decode(**llada_options(meta)), Key(0), list(range(len(prompts))))
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
@pytest.mark.parametrize("name", SDAR)
def test_sdar(name: str, cache: str, families: dict[str, Family], tensors: dict[str, dict[str, Tensor]]) -> None:
    meta, data = META["sdar"][name], tensors["sdar"]
    stop = meta["params"].get("stopping_criteria_idx")
    family = with_eos(families["sdar"], tuple(stop)) if stop else families["sdar"]
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
