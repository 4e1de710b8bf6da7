"""`dare bench rollout`: what the engine reaches on random weights, against a plain sampler and the machine's peak."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from dare.bench.reference import sample_plainly
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.rng import Key
from dare.diffusion.trace import scored_mask
from dare.families.base import Family
from dare.families.layers import packing
from dare.families.layers.moe import Experts
from dare.families.weights import create_family
from dare.rollout.engine import denoise
from dare.rollout.meter import Meter

_PEAK_SIZE, _NUM_PEAK_CALLS = 1024, 4
_PLAIN_POLICIES = ("low_confidence", "threshold")


@dataclass(frozen=True)
class Shape:
    """A model with random weights, and prompts of random tokens."""

    family: str
    hidden_size: int = 512
    num_layers: int = 8
    num_heads: int = 8
    num_kv_heads: int | None = None
    mlp_size: int = 1536
    vocab_size: int = 32768
    prompt_length: int = 128
    num_prompts: int = 1

    def build(self, decode: Decode, dtype: torch.dtype) -> Family:
        """The model. Raises DareError for an unknown family or sizes that do not fit together."""
        block_length = decode.block_length or 4
        family = create_family(
            self.family,
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            mlp_size=self.mlp_size,
            max_length=self.prompt_length + decode.gen_length + block_length,
            block_length=decode.block_length,
            mask_id=self.vocab_size - 1,
            eos_id=self.vocab_size - 2,
            pad_id=self.vocab_size - 3,
            seed=0,
        )
        family.network.eval()
        return family.to(dtype=dtype)

    def prompts(self, num: int) -> list[list[int]]:
        """Keyed random tokens, no special ones."""
        row_N1, column_S = torch.arange(num)[:, None], torch.arange(self.prompt_length)
        ids_NS: list[list[int]] = Key(0).fold("bench").integers(0, self.vocab_size - 3, row_N1, column_S).tolist()
        return ids_NS


@dataclass(frozen=True)
class Measurement:
    """The fastest of several runs; seconds are CPU time of the process.

    Only the first of several runs packs the weights; the others find them packed.

    flops            multiplications and additions of the matmuls and of attention that the run needed
    share_of_peak    of what a large matmul reaches on this machine in the same process
    is_equal         whether tokens are those of the plain sampler; None where they are random or it did not run
    """

    seconds: float
    num_tokens: int
    tokens_per_second: float
    nfe: float
    tokens_per_forward: float
    num_forwards: int
    flops: float
    flops_per_second: float
    peak_flops_per_second: float
    share_of_peak: float
    seconds_by_part: dict[str, float]
    plain_seconds: float | None
    speedup: float | None
    is_equal: bool | None

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def measure(
    shape: Shape, decode: Decode, *, dtype: torch.dtype, num_repeats: int, has_plain: bool, plain_batch: int = 1
) -> Measurement:
    """Run the engine on `shape`, each time followed by the plain sampler with the same weights and prompts.

    plain_batch  rows of the plain sampler's static batches (see `sample_plainly`)
    Raises DareError for sizes or options that do not fit.
    """
    if has_plain and decode.unmask not in _PLAIN_POLICIES:
        raise DareError(
            "the plain sampler does not know this policy",
            where="unmask",
            got=decode.unmask,
            expected=" or ".join(_PLAIN_POLICIES),
            fix="add --no-plain",
        )
    family, prompts = shape.build(decode, dtype), shape.prompts(shape.num_prompts)
    if has_plain and family.spec.is_shifted:
        raise DareError("the plain sampler knows no shifted logits", got=shape.family, fix="add --no-plain")
    needed_flops(family, Meter())  # so that what cannot be counted is said before anything runs
    best, meter, plain_best = float("inf"), Meter(), float("inf")
    for _ in range(num_repeats):
        counts, start = Meter(), time.process_time()
        trace = denoise(family, prompts, decode, Key(0), list(range(len(prompts))), meter=counts)
        counts.switch("bookkeeping")
        seconds = time.process_time() - start
        if seconds < best:
            best, meter = seconds, counts
        if has_plain:
            start = time.process_time()
            plain = sample_plainly(family, prompts, decode, batch_size=plain_batch)
            plain_best = min(plain_best, time.process_time() - start)
    is_equal = None
    if has_plain and decode.temperature == 0.0:
        rows = zip(trace.canvas.input_BS, trace.canvas.is_completion_BS, strict=True)
        is_equal = [row.tokens for row in plain] == [ids_S[here_S].tolist() for ids_S, here_S in rows]
    num_tokens, peak = int(scored_mask(trace).sum()), peak_flops(dtype)
    flops = needed_flops(family, meter)
    return Measurement(
        seconds=best,
        num_tokens=num_tokens,
        tokens_per_second=num_tokens / best,
        nfe=float(trace.nfe_B.float().mean()),
        tokens_per_forward=num_tokens / int(trace.nfe_B.sum()),
        num_forwards=meter.num_forwards,
        flops=flops,
        flops_per_second=flops / best,
        peak_flops_per_second=peak,
        share_of_peak=flops / best / peak,
        seconds_by_part={str(part): seconds for part, seconds in meter.seconds.items()},
        plain_seconds=plain_best if has_plain else None,
        speedup=plain_best / best if has_plain else None,
        is_equal=is_equal,
    )


def needed_flops(family: Family, meter: Meter) -> float:
    """Operations of the matmuls and the attention of what a meter counted.

    In the last layer, whatever the family, a third of the attention's weights (keys and values) is taken to run for
    every token, and the rest for those that were read.
    """
    network = family.network
    matrices = [(name, module.weight) for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    per_token = sum(weight.numel() for _, weight in matrices if weight is not network.head_weight)
    for module in network.modules():
        if isinstance(module, Experts):
            raise DareError("operations of a mixture of experts are not counted", fix="measure a dense family")
    per_layer = per_token / network.num_layers
    width = network.head_weight.shape[1]
    kv_part = 2.0 * width * network.num_kv_heads * network.head_dim
    layers = per_token - (per_layer - kv_part)
    attention = 4.0 * _query_width(network)
    return (
        2.0 * meter.num_tokens * layers
        + 2.0 * meter.num_read * (per_layer - kv_part)
        + attention * ((network.num_layers - 1) * meter.num_pairs + meter.num_read_pairs)
        + 2.0 * meter.num_logit_rows * network.head_weight.numel()
    )


def peak_flops(dtype: torch.dtype) -> float:
    """Operations a second of the faster of two large matmuls, plain and packed, on the threads that torch uses."""
    x, weight = (torch.full((_PEAK_SIZE, _PEAK_SIZE), 0.5, dtype=dtype) for _ in range(2))
    packed = packing.pack(weight)
    best = float("inf")
    with torch.no_grad():
        for multiply in (None, packed) if packed is not None else (None,):
            for _ in range(_NUM_PEAK_CALLS):
                start = time.process_time()
                if multiply is None:
                    functional.linear(x, weight)
                else:
                    multiply(x)
                best = min(best, time.process_time() - start)
    return 2.0 * _PEAK_SIZE**3 / best


def _query_width(network: nn.Module) -> int:
    """Width of all query heads together: what the attention's output matrix takes in."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(("attn_out", "o_proj", "dense")):
            return module.in_features
    raise ValueError("a network without an attention output")
