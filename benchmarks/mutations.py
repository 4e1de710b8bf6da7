"""Mutation check: each of these faults, put into a copy of the package, must make a test fail.

python benchmarks/mutations.py [--only WORD] [--out FILE]     # prints and writes a table; exit code 1 if one survives
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PLANS, TOY, ZOO = "tests/numerics/test_plans.py", "tests/numerics/test_toy.py", "tests/numerics/test_zoo.py"
FIRST, GOLDEN = "tests/numerics/test_golden_rl.py", "tests/numerics/test_golden_zoo.py"
OBJECTIVES, STREAMS = "tests/numerics/test_objectives.py", "tests/numerics/test_streams.py"
CONTRACTS, FAMILIES = "tests/contracts/test_algorithms.py", "tests/numerics/test_families_invariants.py"
STEPWISE, RECORDS = "tests/numerics/test_stepwise.py", "tests/numerics/test_golden_rl_records.py"
SHAPING, UPDATE = "tests/numerics/test_shaping.py", "tests/numerics/test_update.py"


class Mutation(NamedTuple):
    fault: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


CORRUPT, BLOCKS, LIKELIHOOD = "diffusion/corrupt.py", "diffusion/blocks.py", "diffusion/likelihood.py"
CREDIT, TREE, POLICY = "objectives/stepwise.py", "objectives/tree.py", "algorithms/policy.py"
ADVANTAGE, SURROGATE, KL = "objectives/advantage.py", "objectives/surrogate.py", "objectives/kl.py"
MUTATIONS = [
    Mutation("1/t becomes 1", "diffusion/schedule.py", "lambda t: 1.0 / t)", "lambda t: t / t)", (TOY,)),
    Mutation(
        "L/l becomes 1/l",
        CORRUPT,
        "(size_B1S + 1 - lowest).double() / num_views",
        "1.0 / num_views + 0.0 * size_B1S",
        (TOY,),
    ),
    Mutation(
        "wrong ddof",
        ADVANTAGE,
        '"zpop": lambda group: group.deviation_B / (group.squares_B / group.size_B)',
        '"zpop": lambda group: group.deviation_B / (group.squares_B / (group.size_B - 1))',
        (OBJECTIVES,),
    ),
    Mutation(
        "complement misses tokens",
        CORRUPT,
        "[is_drawn_BMS, ~is_drawn_BMS], dim=2",
        "[is_drawn_BMS, ~is_drawn_BMS & is_drawn_BMS.roll(1, -1)], dim=2",
        (PLANS,),
    ),
    Mutation(
        ">= becomes > in the step comparison",
        CORRUPT,
        "rank_BS[:, None] >= step_1M1,",
        "rank_BS[:, None] > step_1M1,",
        (PLANS,),
    ),
    Mutation(
        "clean stream sees the noisy one",
        BLOCKS,
        "clean = torch.cat([torch.zeros_like(query == key), query >= key], dim=-1)",
        "clean = torch.cat([query > key, query >= key], dim=-1)",
        (STREAMS,),
    ),
    Mutation(
        "noisy queries see their own clean block",
        BLOCKS,
        "noisy = torch.cat([query == key, query > key], dim=-1)",
        "noisy = torch.cat([query == key, query >= key], dim=-1)",
        (STREAMS,),
    ),
    Mutation(
        "shared streams see their own clean block",
        BLOCKS,
        "[(query > key) & is_pair_BSS",
        "[(query >= key) & is_pair_BSS",
        (STREAMS,),
    ),
    Mutation(
        "mean over views instead of tokens",
        "algorithms/cj_grpo.py",
        "value = reduce.masked_mean(item_RS, is_scored_RS)",
        "value = reduce.mean(reduce.divide((item_RS * is_scored_RS).sum(-1), is_scored_RS.sum(-1)))",
        ("tests/numerics/test_algorithms.py",),
    ),
    Mutation(
        "ratio without / L",
        "algorithms/policy.py",
        "log_ratio_B = reduce.divide(log_ratio_B, length_B)",
        "log_ratio_B = log_ratio_B * 1.0",
        (FIRST, ZOO),
    ),
    Mutation(
        "k1 sign",
        KL,
        '"k1": lambda difference: difference,',
        '"k1": lambda difference: -difference,',
        (OBJECTIVES, GOLDEN),
    ),
    Mutation("k3 sign", KL, "torch.expm1(-difference) + difference", "torch.expm1(difference) - difference", (FIRST,)),
    Mutation(
        "token ratio clipped per sequence",
        "algorithms/policy.py",
        "self.policy_loss(new - old, advantage",
        "self.policy_loss((new - old).sum(-1, keepdim=True).expand_as(new), advantage",
        (FIRST,),
    ),
    Mutation(
        "loss mask from the prompt",
        "diffusion/trace.py",
        "return is_completion_BS & (is_eos_BS.cumsum(-1) == is_eos_BS)",
        "return is_eos_BS.cumsum(-1) == is_eos_BS",
        ("tests/unit/test_trace.py",),
    ),
    Mutation(
        "shift off by one",
        "families/base.py",
        "torch.where(column_S > first_B1, column_S - 1, column_S)",
        "torch.where(column_S > first_B1, column_S, column_S)",
        (FAMILIES,),
    ),
    Mutation(
        "KL to the wrong policy",
        "algorithms/tracerl.py",
        "(old_RS if anchor_RS is None else anchor_RS)",
        "old_RS",
        (ZOO,),
    ),
    Mutation(
        "linear surrogate on the wrong side",
        SURROGATE,
        "return torch.where(is_up, up, down)",
        "return torch.where(is_up, down, up)",
        (ZOO,),
    ),
    Mutation(
        "wd1 softmax over all groups",
        ADVANTAGE,
        "weight_B / zero_G.index_add(0, index_B, weight_B)[index_B]",
        "weight_B / weight_B.sum()",
        (ZOO,),
    ),
    Mutation("power mean without its root", LIKELIHOOD, ".clamp(min=1) / power", ".clamp(min=1)", (ZOO,)),
    Mutation(
        "step weights dropped",
        "diffusion/plans.py",
        "views.weight_RS.double() * scale_B[views.sample_R, None]",
        "views.weight_RS.double()",
        (ZOO,),
    ),
    Mutation(
        "left to right reads its own token",
        "diffusion/plans.py",
        "column_BS, UNSAMPLED)",
        "column_BS // 2, UNSAMPLED)",
        (ZOO,),
    ),
    Mutation(
        "quadrature weights at the wrong nodes",
        "diffusion/plans.py",
        "(share_M / t_M)",
        "(share_M / t_M.flip(0))",
        (ZOO,),
    ),
    Mutation(
        "random block always the first",
        "diffusion/plans.py",
        "view_1M % is_candidate_BU",
        "(0 * view_1M) % is_candidate_BU",
        (ZOO,),
    ),
    Mutation(
        "masks keyed by the row",
        CORRUPT,
        "key.uniform(samples.sample_id_B[:, None, None], view_1M1,",
        "key.uniform(torch.arange(len(samples.sample_id_B))[:, None, None], view_1M1,",
        (CONTRACTS,),
    ),
    Mutation(
        "each micro-batch divides by its own views",
        "executors/local.py",
        "((total + sum(terms)) * self.gradient_factor).backward()",
        "((total + sum(terms)) / max(len(part), 1)).backward()",
        (UPDATE,),
    ),
    Mutation(
        "MDPO: gain without what came later",
        CREDIT,
        "(reward_BT - before_BT + 1.0 + later_BT)",
        "(reward_BT - before_BT + 1.0)",
        (STEPWISE, RECORDS),
    ),
    Mutation(
        "MDPO: gains compared across steps",
        "algorithms/mdpo.py",
        "* (int(drafts.step_D.max()) + 1) + drafts.step_D",
        "* (int(drafts.step_D.max()) + 1)",
        (RECORDS,),
    ),
    Mutation(
        "MDPO: confidence left out",
        "algorithms/mdpo.py",
        "(item_RS * scale_R1 + kl_RS) * confidence_RS, 0.0)",
        "(item_RS * scale_R1 + kl_RS), 0.0)",
        (RECORDS,),
    ),
    Mutation(
        "MDPO: the steps that disagree least",
        "algorithms/mdpo.py",
        "argsort(descending=True, stable=True)",
        "argsort(descending=False, stable=True)",
        ("tests/contracts/test_records.py",),
    ),
    Mutation(
        "d-TreeRPO: all nodes are siblings",
        TREE,
        "value_N[is_child_N], parent_N[is_child_N])",
        "value_N[is_child_N], 0 * parent_N[is_child_N])",
        (STEPWISE,),
    ),
    Mutation(
        "d-TreeRPO: an only child keeps its value",
        TREE,
        'only_child == "zero"',
        'only_child == "none"',
        (RECORDS, "tests/contracts/test_records.py"),
    ),
    Mutation(
        "d-TreeRPO: an edge scores what its parent had",
        "algorithms/dtreerpo.py",
        "is_target_RS = is_revealed_RS & (is_eos_RS.cumsum(-1) == is_eos_RS)",
        "is_target_RS = is_completion_RS & ~is_revealed_RS & (is_eos_RS.cumsum(-1) == is_eos_RS)",
        ("tests/contracts/test_records.py",),
    ),
    Mutation(
        "d-TreeRPO: shares ignore advantages",
        "algorithms/dtreerpo.py",
        "(advantage_R[good_C] / tau).softmax(0)",
        "(0 * advantage_R[good_C]).softmax(0)",
        (RECORDS,),
    ),
    Mutation(
        "GAE: the next step's value is undiscounted",
        CREDIT,
        "later_B1 = gamma * next_value_B1",
        "later_B1 = next_value_B1",
        (STEPWISE,),
    ),
    Mutation(
        "GAE: lambda left out",
        CREDIT,
        "+ gamma * lam * next_advantage_B1",
        "+ gamma * next_advantage_B1",
        (STEPWISE,),
    ),
    Mutation(
        "TraceRL value: the smaller of both errors",
        "algorithms/tracerl_value.py",
        "torch.maximum(error_RS, clipped_error_RS)",
        "torch.minimum(error_RS, clipped_error_RS)",
        (RECORDS,),
    ),
    Mutation(
        "TraceRL value: the reward comes at the first step",
        "algorithms/tracerl_value.py",
        "torch.where(is_trained_BS, step_BS, -1).amax(-1, keepdim=True)",
        "torch.where(is_trained_BS, step_BS, 99).amin(-1, keepdim=True)",
        (RECORDS,),
    ),
    Mutation(
        "the ratio of a step is that of its sample",
        POLICY,
        'view_R if self.options.ratio == "step" else views.sample_R',
        "views.sample_R",
        (SHAPING,),
    ),
    Mutation(
        "KL to the rollout goes to the reference",
        POLICY,
        'if self.options.beta > 0 and self.options.kl_to == "rollout":',
        "if False:",
        (SHAPING,),
    ),
    Mutation(
        "clip presets the other way round",
        SURROGATE,
        '"clip_higher": (0.2, 0.28)',
        '"clip_higher": (0.28, 0.2)',
        (SHAPING,),
    ),
    Mutation(
        "long completions are rewarded",
        "rewards/mix.py",
        "return -min(max(excess / lengths.margin, 0.0), 1.0)",
        "return min(max(excess / lengths.margin, 0.0), 1.0)",
        (SHAPING,),
    ),
    Mutation(
        "kept groups get the drafts of others",
        "training/groups.py",
        '"sample_D": place_B[drafts.sample_D[is_kept_D]]',
        '"sample_D": drafts.sample_D[is_kept_D]',
        (SHAPING,),
    ),
]


def is_killed(mutation: Mutation) -> bool:
    """Whether a test fails on a copy of the package that has the fault. Raises ValueError if the place has moved."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("dare", "tests", "recipes", "docs"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        path = copy / "dare" / mutation.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutation.right) != 1:
            raise ValueError(f"{mutation.fault}: {mutation.file} holds the text {text.count(mutation.right)} times")
        path.write_text(text.replace(mutation.right, mutation.wrong), encoding="utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.tests]
        environment = {**os.environ, "PYTHONPATH": str(copy)}
        code = subprocess.run(command, cwd=copy, env=environment, capture_output=True, check=False).returncode
        if code not in (0, 1):  # 1: a test failed
            raise ValueError(f"{mutation.fault}: pytest ended with {code}; do {', '.join(mutation.tests)} exist?")
        return code == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="faults that contain this text")
    parser.add_argument("--out", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    lines = ["| fault | where | tests | result |", "|---|---|---|---|"]
    print("\n".join(lines))
    has_survivor = False
    for mutation in MUTATIONS:
        if arguments.only not in mutation.fault:
            continue
        is_dead = is_killed(mutation)
        has_survivor |= not is_dead
        tests = ", ".join(Path(test).name for test in mutation.tests)
        lines.append(f"| {mutation.fault} | {mutation.file} | {tests} | {'killed' if is_dead else 'SURVIVED'} |")
        print(lines[-1], flush=True)
    if arguments.out is not None:
        arguments.out.write_text("# Mutation check\n\n" + "\n".join(lines) + "\n", encoding="utf-8")
    sys.exit(1 if has_survivor else 0)


if __name__ == "__main__":
    main()
