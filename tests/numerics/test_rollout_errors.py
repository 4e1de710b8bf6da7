"""Requests that cannot work are refused with what, where and a way out."""

from __future__ import annotations

from typing import Any

import pytest

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.rng import Key
from dare.families.base import Family
from dare.rollout.engine import denoise


def refused(family: Family, prompts: list[list[int]], **options: Any) -> str:
    """What the user reads."""
    with pytest.raises(DareError) as caught:
        denoise(family, prompts, Decode(**options), Key(0), list(range(len(prompts))))
    return str(caught.value)


@pytest.mark.parametrize("name", ["llada", "sdar"])
def test_prompts_that_do_not_fit(name: str, families: dict[str, Family]) -> None:
    family = families[name]
    text = refused(family, [[1], [1] * 90], gen_length=8, block_length=4)
    assert "row 1" in text
    assert "prompt 90 + completion" in text
    assert "<= 96" in text
    text = refused(family, [[1, 2], [1, 23, 2]], gen_length=8, block_length=4)
    assert "mask token" in text
    assert "row 1, position 1" in text
    text = refused(family, [[1, 24]], gen_length=8, block_length=4)
    assert "24" in text
    assert "0 <= id < 24" in text
    assert "no prompt" in refused(family, [], gen_length=8, block_length=4)


def test_options_that_do_not_fit_the_family(families: dict[str, Family]) -> None:
    llada, sdar, prompt = families["llada"], families["sdar"], [[1, 2]]
    assert "whole blocks" in refused(llada, prompt, gen_length=10, block_length=4)
    for cache in ("prefix", "dual"):
        assert "use cache: auto" in refused(sdar, prompt, gen_length=8, cache=cache)
        assert "set cache: none" in refused(llada, prompt, gen_length=8, block_length=4, cache=cache, cfg_scale=1.0)
    assert "set cfg_scale to 0" in refused(sdar, prompt, gen_length=8, cfg_scale=1.0)
    text = refused(sdar, prompt, gen_length=8, steps_per_block=5)
    assert "steps_per_block 5" in text
    assert "decode.steps_per_block" in text
    text = refused(llada, prompt, gen_length=8, block_length=4, zero_eos_confidence=True, unmask="entropy")
    assert "low_confidence" in text


def test_one_sample_id_per_prompt(families: dict[str, Family]) -> None:
    with pytest.raises(ValueError, match="2 prompts, but 1 sample ids"):
        denoise(families["llada"], [[1], [2]], Decode(gen_length=4, block_length=4), Key(0), [0])
