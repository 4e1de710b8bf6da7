"""What a recipe with rollout servers cannot ask for. No torch."""

from __future__ import annotations

from typing import Any

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.recipe import Recipe

# What the published servers have no option for; everything else is how they are started, or goes along in requests.
_UNKNOWN_TO_SERVERS = (
    "edit_threshold",
    "remask",
    "cfg_scale",
    "forbid_eos",
    "zero_eos_confidence",
    "eos_discount",
    "unmask_temperature",
    "schedule",
    "cache",
)


def check_rollout(recipe: Recipe, algorithm: Any) -> None:
    """Raise DareError for rollouts on servers that the rest of the recipe does not go with."""
    if not recipe.rollout.is_remote:
        return
    name = recipe.algorithm.name
    if algorithm.kind != "online":
        raise DareError(f"{name} has no rollouts", where="rollout.engine", fix="remove the rollout section")
    if recipe.executor.name != "local":
        raise DareError(
            f"executor {recipe.executor.name} denoises in its workers",
            where="rollout.engine",
            got=recipe.rollout.engine,
            fix="use executor: local with servers, or remove the rollout section",
        )
    needs = sorted(algorithm.needs)
    if needs:
        raise DareError(
            f"{name} needs the {' and '.join(needs)} of a rollout, which no server returns",
            where="rollout.engine",
            got=recipe.rollout.engine,
            fix="use engine: dare, or an algorithm that trains on completions or traces; `dare list algorithms`",
        )
    if recipe.log.traces:
        raise DareError(
            "traces record what every step thought of its positions, which no server returns",
            where="log.traces",
            fix="set log.traces: 0, or use engine: dare",
        )
    if recipe.lora is not None and recipe.lora.quantize_base is not None:
        raise DareError(
            "servers get whole weights, and an adapter is not merged into a quantised base",
            where="lora.quantize_base",
            fix="remove quantize_base, or use engine: dare",
        )
    if recipe.decode.eos_stop is False and not recipe.rollout.is_eos_ignored:
        raise DareError(
            "a server that stops at an EOS does not fill what comes after it",
            where="decode.eos_stop",
            got=False,
            fix="set rollout.is_eos_ignored: true, or remove eos_stop",
        )
    _check_decode(recipe.decode)


def _check_decode(decode: Decode) -> None:
    usual = Decode()
    given, default = decode.model_dump(), usual.model_dump()
    changed = [key for key in _UNKNOWN_TO_SERVERS if given[key] != default[key]]
    if decode.has_empty_steps:
        changed.append("unmask")
    if "eos_inside_block" in decode.compat:
        changed.append("compat")
    if changed:
        raise DareError(
            f"rollout servers have no {changed[0]}",
            where=f"decode.{changed[0]}",
            got=given[changed[0]],
            fix=f"remove {changed[0]}, or use rollout.engine: dare",
        )
