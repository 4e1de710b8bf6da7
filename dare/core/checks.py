"""Checks of a recipe that need more than one section, without torch: impossible pairs and doubtful ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.core.registry import FAMILIES, check_name
from dare.core.reward_recipe import GroupRecipe, RewardRecipe
from dare.core.rollout_checks import check_rollout


def check(recipe: Recipe) -> list[str]:
    """Warnings about doubtful settings. Raises DareError for settings that cannot work."""
    algorithm = recipe.algorithm.type
    if recipe.model.create is not None:
        family = recipe.model.create.family
        check_name("families", family, where="model.create.family")
        attention = FAMILIES[family].attention if family in FAMILIES else None
        if attention is not None:
            check_attention(recipe.algorithm.name, algorithm, attention)
    _check_reference(recipe, algorithm)
    warnings = _check_online(recipe, algorithm) if algorithm.kind == "online" else _check_offline(recipe)
    _check_blocks(recipe)
    _check_lora(recipe)
    check_rollout(recipe, algorithm)
    recipe.executor.build().check(recipe)
    if recipe.evaluation.num < 30 and recipe.task is not None:
        warnings.append(f"evaluation.num {recipe.evaluation.num} gives intervals too wide to compare anything")
    return warnings


def _check_reference(recipe: Recipe, algorithm: Any) -> None:
    """Stored log-probs need batches that are known beforehand, and somebody who reads them."""
    if recipe.reference.mode == "live":
        return
    name = recipe.algorithm.name
    is_online = algorithm.kind == "online"
    if is_online or not recipe.algorithm.build().needs_reference:
        reason = "trains on rollouts, which are not known beforehand" if is_online else "has no reference policy"
        raise DareError(f"{name} {reason}", where="reference.mode", got="stored", fix="remove the reference section")


def check_attention(name: str, algorithm: Any, attention: str) -> None:
    """Raise DareError with the reason if `algorithm` cannot train models of this attention kind."""
    if attention in algorithm.forbidden:
        raise DareError(
            f"algorithm {name} cannot train this family: {algorithm.forbidden[attention]}",
            where="algorithm.name",
            got=f"a family with {attention} attention",
            fix="choose another algorithm; `dare list algorithms` shows what fits",
        )


def _check_online(recipe: Recipe, algorithm: Any) -> list[str]:
    name = recipe.algorithm.name
    if recipe.validation is not None:
        raise DareError(
            f"algorithm {name} trains on rewards, which have no held-out loss",
            where="validation",
            fix="remove it; evaluation.every measures held-out solve rates",
        )
    if recipe.task is None:
        raise DareError(f"algorithm {name} trains on rewards", where="task", got="none", fix="add a task to the recipe")
    if recipe.data is not None:
        raise DareError(f"algorithm {name} trains on the task's problems", where="data", fix="remove the data section")
    if recipe.decode.temperature == 0.0:
        raise DareError(
            "greedy rollouts make all completions of a prompt equal, so nothing can be learnt",
            where="decode.temperature",
            got=0.0,
            fix="set decode.temperature, for example to 1.0; evaluation has its own temperature",
        )
    if recipe.train.completions_per_prompt < 2:
        raise DareError(
            "advantages compare the completions of a prompt, so there must be at least two",
            where="train.completions_per_prompt",
            got=recipe.train.completions_per_prompt,
            fix="use 8 or more",
        )
    if algorithm.compares_rewards and recipe.reward.combine == "decoupled":
        raise DareError(
            f"{name} forms its advantages from whole rewards, so their parts cannot be compared one by one",
            where="reward.combine",
            got="decoupled",
            fix="set reward.combine: sum, or choose another algorithm",
        )
    warnings = []
    _check_records(recipe, algorithm)
    warnings += _check_correction(recipe, algorithm)
    chosen_by_candidate = ("low_confidence", "threshold", "capped_threshold", "factor")
    if algorithm.needs_step_map and recipe.decode.unmask in chosen_by_candidate:
        warnings.append(
            f"{name} replays the trace, but unmask: {recipe.decode.unmask} chooses positions by the sampled token, so "
            "the trace likelihood is not exact; with max_prob, entropy, margin and random it is"
        )
    if recipe.decode.cache in ("prefix", "dual"):
        warnings.append(f"decode.cache: {recipe.decode.cache} is approximate; rollouts differ from the trained policy")
    if recipe.decode.top_k is not None or recipe.decode.top_p is not None:
        warnings.append("top_k and top_p truncate the policy that samples, not the one that is scored")
    return warnings + list(recipe.algorithm.build().check_rollouts(recipe.decode))


def _check_correction(recipe: Recipe, algorithm: Any) -> list[str]:
    """Importance weights need advantages to weigh and a trace that says what every step read."""
    train, decode, name = recipe.train, recipe.decode, recipe.algorithm.name
    if train.correction == "none":
        if train.overlap == "none":
            return []
        return [
            "train.overlap: one_step updates on rollouts of older weights, and nothing corrects for that unless the "
            "algorithm does (rollout_cap, old: rollout); train.correction weighs them"
        ]
    if algorithm.compares_rewards or algorithm.normalises_advantages:
        raise DareError(
            f"{name} makes more of a rollout than a multiple of its advantage, so a weight would be lost",
            where="train.correction",
            got=train.correction,
            fix="set train.correction: none, or choose another algorithm",
        )
    if decode.remask != "none" or decode.edit_threshold is not None:
        raise DareError(
            "a correction replays the rollout step by step, but this one changes tokens that it has committed",
            where="train.correction",
            got=f"remask: {decode.remask}, edit_threshold: {decode.edit_threshold}",
            fix="set train.correction: none, or decode without remasking and edits",
        )
    return []


def _check_records(recipe: Recipe, algorithm: Any) -> None:
    """What the rollout must record has to fit how it decodes."""
    name, decode = recipe.algorithm.name, recipe.decode
    if (algorithm.needs_step_map or algorithm.needs) and decode.edit_threshold is not None:
        raise DareError(
            f"{name} replays the rollout step by step, in which tokens replace masks, but edits replace tokens",
            where="decode.edit_threshold",
            got=decode.edit_threshold,
            fix="remove edit_threshold, or choose an algorithm that does not replay the rollout",
        )
    if decode.remask != "none" and (algorithm.needs_step_map or "tree" in algorithm.needs):
        raise DareError(
            f"{name} replays a trace in which a token is committed once, but remask: {decode.remask} takes tokens back",
            where="decode.remask",
            fix="set remask: none, or train with an algorithm that records drafts (mdpo)",
        )
    if "drafts" in algorithm.needs and (decode.cache in ("prefix", "dual") or decode.cfg_scale):
        raise DareError(
            f"{name} records what every step predicts, which needs a plain forward of the whole canvas",
            where="decode",
            got=f"cache: {decode.cache}, cfg_scale: {decode.cfg_scale}",
            fix="set cache: auto and cfg_scale: 0",
        )
    num_leaves = recipe.train.completions_per_prompt
    branching = recipe.algorithm.build().branching(num_leaves)
    if branching and math.prod(branching) != num_leaves:
        raise DareError(
            f"the completions of a prompt are the leaves of a tree with branching {list(branching)}",
            where="train.completions_per_prompt",
            got=num_leaves,
            expected=math.prod(branching),
            fix=f"set train.completions_per_prompt: {math.prod(branching)}, or leave branching to its default",
        )
    if branching and (decode.is_dynamic or decode.cache in ("prefix", "dual")):
        raise DareError(
            f"{name} grows trees, which branch on a fixed schedule and need an exact cache",
            where="decode",
            got=f"unmask: {decode.unmask}, cache: {decode.cache}",
            fix="use unmask: max_prob and cache: auto",
        )


def _check_lora(recipe: Recipe) -> None:
    if recipe.lora is None:
        return
    if recipe.model.create is not None:
        raise DareError(
            "an adapter belongs to a checkpoint, and a new model is in none",
            where="lora",
            got="model.create",
            fix="train a new model whole, without lora; then give its run folder as model.path",
        )
    if recipe.algorithm.build().critic_lr is not None:
        raise DareError(
            f"{recipe.algorithm.name} trains a critic, a second network, which an adapter does not save",
            where="lora",
            fix="remove lora, or choose an algorithm without a critic; `dare list algorithms` shows them",
        )


def _check_offline(recipe: Recipe) -> list[str]:
    if recipe.task is None and (recipe.data is None or not recipe.data.all_sources):
        raise DareError(
            "there is nothing to train on", where="data.path", got="none", fix="give data.path, or a task with answers"
        )
    for section, is_set in (
        ("reward", recipe.reward != RewardRecipe()),
        ("groups", recipe.groups != GroupRecipe()),
    ):
        if is_set:
            raise DareError("offline training has no rewards", where=section, fix=f"remove the {section} section")
    train = recipe.train
    for key, is_set in (
        ("updates_per_rollout", train.updates_per_rollout != 1),
        ("overlap", train.overlap != "none"),
        ("correction", train.correction != "none"),
    ):
        if is_set:
            raise DareError(
                "offline training has no rollouts", where=f"train.{key}", fix="remove it; train.steps counts steps"
            )
    return []


def _check_blocks(recipe: Recipe) -> None:
    """The schedule must fill the block length that will be used, as far as it is known without loading."""
    decode = recipe.decode
    block_length = decode.block_length or _known_block_length(recipe)
    if block_length is None:
        return
    try:
        decode.check_block(block_length)
    except ValueError as error:
        raise DareError(str(error), where="decode.steps_per_block") from None


def _known_block_length(recipe: Recipe) -> int | None:
    if recipe.model.create is not None:
        return recipe.model.create.block_length
    config = Path(recipe.model.path or "") / "config.json"
    if not config.is_file():
        return None
    try:
        value = json.loads(config.read_text(encoding="utf-8")).get("block_size")
    except (ValueError, RecursionError, AttributeError):
        return None  # loading reports it
    return value if isinstance(value, int) else None
