"""What an update of each algorithm costs: forwards per sample, and peak memory with 1 and with 16 views per sample.

    python benchmarks/zoo_cost.py                  # writes benchmarks/results/zoo_cost.md
    python benchmarks/zoo_cost.py --only espo

Counts are rows of the network's forwards per sample, read off the model while it makes two updates on one rollout with
each algorithm's defaults (KL off): for the old policy, which the first update needs no pass for, for the new one, and
with a gradient in the first update, where nothing is clipped yet. Memory is what an update needs above the state before
it, each case in a fresh process; the number of views is set by the option that the table names, or for algorithms that
replay the rollout by its number of denoising steps.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMPLETION, NUM_SAMPLES, VOCABULARY = 32, 4, 8192
# Which option sets the number of views, and how many views a sample has at a value of 1; none: steps of the rollout.
VIEW_OPTIONS: dict[str, tuple[str, int] | None] = {
    "espo": ("num_mc", 2),
    "coupled_grpo": ("num_pairs", 2),
    "bgpo": ("num_mc", 1),
    "ebpo": ("num_mc", 1),
    "gdpo": ("num_nodes", 1),
    "unigrpo": ("num_views", 1),
    "spg": ("num_views", 1),
    "cj_grpo": None,
    "tracerl": None,
    "tracerl_value": None,
    "agrpo": ("num_steps", 1),
    "mdpo": ("top_steps", 1),
}
FIXED = {"d1": "always 1", "wd1": "always 1", "justgrpo": "one per token", "dtreerpo": "edges of the tree"}


def recipe_of(name: str, num_steps: int, options: dict[str, Any]) -> Any:
    from dare.core.recipe import parse_recipe

    resolved = {"beta": 0.0, **options} if name not in ("wd1", "spg") else options
    unmask = {"unmask": "left_to_right"} if name == "justgrpo" else {"unmask": "max_prob", "steps_per_block": num_steps}
    return parse_recipe(
        {
            "name": "cost",
            "model": {"create": {"family": "llada"}},
            "algorithm": {"name": name, **resolved},
            "task": "countdown",
            "decode": {"gen_length": COMPLETION, "block_length": COMPLETION, "temperature": 1.0, **unmask},
            "train": {"completions_per_prompt": NUM_SAMPLES, "micro_batch_views": 1},
        },
        where="benchmark",
    )


def prepare(name: str, num_steps: int, options: dict[str, Any]) -> tuple[Any, Any, Any]:
    """An engine with a small random model, the algorithm, and a rollout of four completions with random rewards."""
    import torch

    from dare.core.rng import Key
    from dare.core.text import Prompt, Reward
    from dare.diffusion.trace import to_completions
    from dare.evals.runner import Scored
    from dare.executors.local import LocalEngine
    from dare.families.weights import create_family
    from dare.rewards.mix import RewardMix
    from dare.training.online import build_samples

    torch.set_num_threads(1)
    family = create_family(
        "llada",
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_layers=2,
        num_heads=4,
        mlp_size=384,
        max_length=128,
        mask_id=VOCABULARY - 1,
        eos_id=VOCABULARY - 2,
        pad_id=VOCABULARY - 3,
        seed=0,
    )
    recipe = recipe_of(name, num_steps, options)
    algorithm = recipe.algorithm.build()
    engine = LocalEngine(recipe, family, num_updates=9, needs_reference=False, critic_lr=algorithm.critic_lr)
    trace = engine.generate(
        [[1, 2, 3, 4]] * NUM_SAMPLES,
        recipe.decode,
        Key(0),
        list(range(NUM_SAMPLES)),
        has_drafts="drafts" in algorithm.needs,
        branching=algorithm.branching(NUM_SAMPLES),
    )
    scored = [
        Scored(Prompt(str(row), text=""), completion, "", Reward(row / NUM_SAMPLES, False), [])
        for row, completion in enumerate(to_completions(trace))
    ]
    if trace.drafts is not None:
        trace.drafts.reward_D.copy_(torch.arange(len(trace.drafts.reward_D)) % 5 / 5)
    mix = RewardMix(recipe.reward, recipe.decode.gen_length)
    return engine, algorithm, build_samples(algorithm, trace, scored, NUM_SAMPLES, mix)


def count(name: str) -> dict[str, float]:
    """Rows of forwards per sample: with a gradient in the first update on a rollout, without one in the second."""
    import torch

    from dare.core.rng import Key
    from dare.training.update import plan_iterations, update

    engine, algorithm, samples = prepare(name, 8, {})
    rows = {"score": 0, "train": 0}

    def note(module: Any, inputs: Any, output: Any) -> None:
        rows["train" if torch.is_grad_enabled() else "score"] += int(inputs[0].shape[0])

    engine.family.network.register_forward_hook(note)
    if engine.critic is not None:
        engine.critic.family.network.register_forward_hook(note)
    first, second = plan_iterations(engine, algorithm, samples, Key(1), 2)
    update(engine, algorithm, samples, first)
    planned, trained = rows["score"], rows["train"]
    rows.update(score=0, train=0)
    update(engine, algorithm, samples, second)
    views = second.views.num_views
    return {
        "views": views / NUM_SAMPLES,
        "score": rows["score"] / NUM_SAMPLES,
        "train": trained / NUM_SAMPLES,
        "old": (planned - rows["score"])
        / NUM_SAMPLES,  # what was scored before and for the first update, less the latter
    }


def measure(name: str, num_views: int) -> float:
    """Peak resident memory (MiB) of an update above the state before it."""
    import torch

    from dare.core.rng import Key
    from dare.training.update import plan_iterations, update

    option = VIEW_OPTIONS[name]
    num_steps = num_views if option is None else 16
    options = {} if option is None else {option[0]: max(num_views // option[1], 1)}
    engine, algorithm, samples = prepare(name, num_steps, options)
    for network in [engine.family.network, *([engine.critic] if engine.critic is not None else [])]:
        for _, parameter in network.named_parameters():  # gradients and moments exist before the measurement
            parameter.grad = torch.zeros_like(parameter)
    engine.step()
    if engine.critic is not None:
        engine.step(role="critic")
    (iteration,) = plan_iterations(engine, algorithm, samples, Key(1), 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    update(engine, algorithm, samples, iteration)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def in_process(name: str, num_views: int | None) -> Any:
    command = [sys.executable, __file__, "--case", name, *(["--views", str(num_views)] if num_views else [])]
    # Blocks above 64 KiB go back to the system when freed, so that resident memory is what is alive.
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="algorithms whose name contains this text; prints, writes nothing")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--views", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        result = measure(arguments.case, arguments.views) if arguments.views else count(arguments.case)
        print(json.dumps(result))
        return
    lines = [
        "# Cost of an update",
        "",
        f"`python benchmarks/zoo_cost.py` on {platform.machine()}, one thread, fp32; {NUM_SAMPLES} completions of "
        f"{COMPLETION} tokens in 8 denoising steps, width 128, 2 layers, vocabulary {VOCABULARY}, one view per "
        "micro-batch. Forwards are rows per sample: for the old policy (updates after the first), for scoring the new "
        "one, and with a gradient (on policy; views whose gradient is zero are not run). A critic's are counted in.",
        "",
        "| algorithm | views | forwards: old, new, with gradient | MiB, 1 view | MiB, 16 views | set by |",
        "|---|---:|---|---:|---:|---|",
    ]
    print("\n".join(lines[-2:]))
    for name in sorted([*VIEW_OPTIONS, *FIXED]):
        if arguments.only not in name:
            continue
        counted = in_process(name, None)
        if name in FIXED:
            memory = f"– | – | {FIXED[name]}"
        else:
            option = VIEW_OPTIONS[name]
            one, many = (in_process(name, num) for num in (1, 16))
            memory = f"{one:.0f} | {many:.0f} | {'denoising steps' if option is None else option[0]}"
        cells = f"{counted['old']:g}, {counted['score']:g}, {counted['train']:g}"
        lines.append(f"| `{name}` | {counted['views']:g} | {cells} | {memory} |")
        print(lines[-1], flush=True)
    if not arguments.only:
        (ROOT / "benchmarks" / "results" / "zoo_cost.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
