"""A plan as text, or as JSON."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dare.training.planning import RunPlan

_MIB = 1 << 20


def plan_text(plan: RunPlan) -> str:
    """A table of parts, the peak, and the expected speed."""
    memory = plan.memory
    lines = [f"{name:<22}{size / _MIB:>12,.1f} MiB" for name, size in memory.parts().items()]
    lines.append(f"{'peak, at one time':<22}{memory.peak / _MIB:>12,.1f} MiB on {plan.device}")
    lines.append("")
    lines.append(f"{plan.num_trained:,} of {plan.num_parameters:,} parameters are trained")
    lines.append(
        f"longest row {plan.longest_row} tokens; {plan.num_micro_batches} micro-batches in a step; about "
        f"{plan.seconds_per_step:.3g} s a step, {plan.tokens_per_second:,.0f} trained tokens/s"
    )
    if plan.rollout_seconds is not None:
        lines.append(f"its rollout about {plan.rollout_seconds:.3g} s, if no completion ends early")
    return "\n".join(lines)


def plan_json(plan: RunPlan) -> str:
    """The same as one JSON object; bytes and seconds."""
    data = {
        "device": plan.device,
        "peak_bytes": plan.memory.peak,
        "bytes": plan.memory.parts(),
        "num_parameters": plan.num_parameters,
        "num_trained": plan.num_trained,
        "longest_row": plan.longest_row,
        "num_micro_batches": plan.num_micro_batches,
        "seconds_per_step": plan.seconds_per_step,
        "tokens_per_second": plan.tokens_per_second,
        "rollout_seconds": plan.rollout_seconds,
    }
    return json.dumps(data, indent=2)
