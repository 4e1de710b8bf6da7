"""What a rollout cost and how it ended, in numbers."""

from __future__ import annotations

from dare.core.types import TraceBatch
from dare.diffusion.trace import scored_mask

_FROM = {"steps": ("nfe", "tokens_per_forward"), "logp": ("commit_nll",)}


def rollout_stats(trace: TraceBatch) -> dict[str, float]:
    """Means over the rows of a rollout; what a rollout server did not return is left out.

    nfe                 denoising forwards per row
    completion_length   tokens through the first EOS
    tokens_per_forward  all such tokens over all forwards
    eos_rate            share of rows with an EOS
    truncation_rate     share of rows that ran to their full length without one
    commit_nll          minus the mean log-prob of such tokens when they were committed, nats per token: at temperature
                        1 an estimate of how much choice the sampler has left
    padding_share       share of the positions of the rectangular batch that are padding
    """
    num_rows = len(trace.nfe_B)
    is_scored_BS = scored_mask(trace)
    num_tokens = int(is_scored_BS.sum())
    num_forwards = int(trace.nfe_B.sum())
    eos_rate = int(trace.is_eos_B.sum()) / num_rows
    found = {
        "nfe": num_forwards / num_rows,
        "completion_length": num_tokens / num_rows,
        "tokens_per_forward": num_tokens / num_forwards,
        "eos_rate": eos_rate,
        "truncation_rate": 1.0 - eos_rate,
        "commit_nll": -float(trace.logp_BS[is_scored_BS].double().mean()),
        "padding_share": 1.0 - float(trace.canvas.is_real_BS.double().mean()),
    }
    absent = [name for part in trace.missing for name in _FROM[part]]
    return {name: value for name, value in found.items() if name not in absent}
