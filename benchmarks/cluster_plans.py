"""The tables of docs/scaling.md: what three published sizes need on nodes of eight GPUs, by the cost model.

python benchmarks/cluster_plans.py > benchmarks/results/cluster_plans.txt
"""

from __future__ import annotations

from pathlib import Path

from dare.core.recipe import load_recipe
from dare.terminal.cluster import Planned, plan_nodes

CLUSTER = Path(__file__).parents[1] / "recipes" / "cluster"
CASES = [
    ("llada_8b_rl", "llada-8b", (1, 2, 4), None, []),
    ("llada_8b_rl", "llada-8b", (1,), None, ["lora.rank=16", "optimizer.lr=1e-4"]),
    ("sdar_30b_rl", "sdar-30b-a3b", (1, 2, 4, 8), None, []),
    ("sdar_30b_rl", "sdar-30b-a3b", (4,), None, ["executor.fsdp_size=8"]),
    ("sdar_30b_rl", "sdar-30b-a3b", (4,), None, ["train.micro_batch_views=64", "train.micro_batch_tokens=65536"]),
    ("llada2_flash_sft", "llada2-flash-100b", (4, 8, 16), 4096, []),
    (
        "llada2_flash_sft",
        "llada2-flash-100b",
        (16,),
        4096,
        ["train.micro_batch_views=4", "train.micro_batch_tokens=16384"],
    ),
    ("sdar_30b_rl", "llada2-flash-100b", (16,), None, []),
]
HEADS = [
    "recipe, model",
    "GPUs",
    "GB of a GPU",
    "rollout s",
    "score s",
    "update s",
    "exposed comm. s",
    "step s",
    "sent GB",
]


def main() -> None:
    print("| " + " | ".join(HEADS) + " |")
    print("|" + "---|" * len(HEADS))
    for name, model, nodes, row_length, overrides in CASES:
        recipe = load_recipe(CLUSTER / f"{name}.yaml", [f"model.path={CLUSTER / 'models' / model}", *overrides])
        for num in nodes:
            changes = "".join(f" `{override}`" for override in overrides)
            print(row(f"{name}, {model}{changes}", plan_nodes(recipe, num, 8, row_length=row_length)))


def row(label: str, planned: Planned) -> str:
    plan, seconds = planned.plan, planned.plan.seconds
    is_too_large = any("does not fit" in note for note in plan.notes)
    cells = [
        label,
        str(planned.sharding.num_gpus),
        f"{plan.peak / 1e9:.0f}{' (does not fit)' if is_too_large else ''}",
        *(f"{seconds[part]:.1f}" for part in ("rollout", "score", "update", "communication")),
        f"{plan.step_seconds:.1f}",
        f"{sum(plan.volume.values()) / 1e9:,.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
