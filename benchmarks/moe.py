"""Time of one mixture-of-experts layer, forward and backward: every token through every expert, sorted loop, grouped.

    python benchmarks/moe.py                      # the CPU, or the GPU if there is one

The sizes are those of LLaDA-MoE and LLaDA2-mini on a GPU, and an eighth of their widths on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dare.families.layers.moe import Experts, can_group, grouped_swiglu, looped_swiglu

# name, experts, experts per token, hidden size, expert size
LAYERS = [("LLaDA-MoE", 64, 8, 2048, 1024), ("LLaDA2-mini", 256, 8, 2048, 512)]


def dense_swiglu(x: Tensor, experts: Experts) -> Tensor:
    """The plain reference: all experts for all tokens, [E, N, D]."""
    hidden = functional.silu(x @ experts.gate_proj.mT) * (x @ experts.up_proj.mT)
    return hidden @ experts.down_proj.mT


def milliseconds(run: Callable[[], Tensor], is_cuda: bool, repeats: int = 5) -> float:
    """Best of `repeats` forward and backward passes, after one that warms up."""
    best = float("inf")
    for index in range(repeats + 1):
        start = time.perf_counter()
        run().sum().backward()
        if is_cuda:
            torch.cuda.synchronize()
        if index:
            best = min(best, time.perf_counter() - start)
    return best * 1000


def main() -> None:
    torch.set_num_threads(1)
    is_cuda = torch.cuda.is_available()
    device, dtype, divisor = ("cuda", torch.bfloat16, 1) if is_cuda else ("cpu", torch.float32, 8)
    num_tokens = 4096 if is_cuda else 512
    print(f"{num_tokens} tokens, {dtype}, {torch.cuda.get_device_name() if is_cuda else 'one CPU thread'}")
    for name, num_experts, per_token, hidden_size, expert_size in LAYERS:
        width, size = hidden_size // divisor, expert_size // divisor
        generator = torch.Generator().manual_seed(0)
        experts = Experts(num_experts, width, size)
        for parameter in experts.parameters():
            parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
        experts.to(device=device, dtype=dtype)
        x = torch.randn(num_tokens, width, generator=generator).to(device=device, dtype=dtype)
        chosen = torch.rand(num_tokens, num_experts, generator=generator).topk(per_token).indices.flatten().to(device)
        order = chosen.argsort(stable=True)
        end_E = torch.searchsorted(chosen[order], torch.arange(num_experts, device=device), right=True)
        sorted_x = x[order // per_token]
        weights = (experts.gate_proj, experts.up_proj, experts.down_proj)
        times = {
            "dense": milliseconds(lambda e=experts, x=x: dense_swiglu(x, e), is_cuda),
            "sorted loop": milliseconds(lambda x=sorted_x, n=end_E, w=weights: looped_swiglu(x, n, *w), is_cuda),
        }
        if can_group(sorted_x, experts.gate_proj):
            # The sum's gradient is a view of one number, which a grouped matmul does not take.
            times["grouped"] = milliseconds(
                lambda x=sorted_x, n=end_E, w=weights: grouped_swiglu(x, n, *w) * 1.0, is_cuda
            )
        shown = ", ".join(f"{label} {value:.1f} ms" for label, value in times.items())
        print(f"{name} (width {width}, {num_experts} experts of {size}, {per_token} per token): {shown}", flush=True)


if __name__ == "__main__":
    main()
