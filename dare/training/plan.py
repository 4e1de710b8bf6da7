"""What a run will need before it starts: memory by part, from the sizes of its tensors and a short calibration."""

from __future__ import annotations

from dataclasses import dataclass

from dare.families.base import Family

_MOMENTS, _FLOAT32 = 8, 4  # bytes per trained number: AdamW's two moments; a float32 copy


@dataclass(frozen=True)
class StepCost:
    """What a calibration measured of one forward and backward of the largest micro-batch, all layers; bytes, seconds.

    activations  what layers keep for the backward
    workspace    everything else that exists at most beside them: head, masks, temporaries
    seconds      of one whole optimizer step
    calibrated   bytes of all tensors that the calibration itself had at one time, at most
    forward_seconds  of one forward of a rollout, if one was measured
    """

    activations: int
    workspace: int
    seconds: float
    calibrated: int = 0
    forward_seconds: float = 0.0


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run by part, on the device of the model.

    weights, optimizer, reference, critic  exist all the time; `optimizer` holds moments, and masters of bfloat16
                 weights
    gradients    from the first micro-batch of a step to its end
    update       activations and workspace of the largest micro-batch
    step         what AdamW makes for one parameter at a time
    rollout      cached keys and values
    process      the interpreter, its libraries, and what kernels and the allocator need beside tensors; 0 on a GPU
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    workspace: int
    step: int
    reference: int
    critic: int
    rollout: int
    process: int
    has_many_micro_batches: bool

    @property
    def peak(self) -> int:
        """The most that exists at the same time.

        In a step of one micro-batch gradients come into being as activations go, so only the larger of both counts.
        """
        lasting = self.weights + self.optimizer + self.reference + self.critic + self.process
        update = self.activations + self.workspace
        backward = self.gradients + update if self.has_many_micro_batches else max(self.gradients, update)
        return lasting + max(backward, self.gradients + self.step, self.rollout)

    def parts(self) -> dict[str, int]:
        """The parts that are not 0, with the names that a user reads."""
        named = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "head and temporaries": self.workspace,
            "optimizer step": self.step,
            "reference policy": self.reference,
            "critic": self.critic,
            "rollout cache": self.rollout,
            "process": self.process,
        }
        return {name: size for name, size in named.items() if size}


def weight_bytes(family: Family) -> int:
    """Parameters and buffers, a tied head once; also of a family on the meta device."""
    tensors = [*family.network.parameters(), *family.network.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(family: Family) -> int:
    """Both moments of every trained number, and a float32 master where the weight is of another dtype."""
    trained = [parameter for parameter in family.network.parameters() if parameter.requires_grad]
    return sum(p.numel() * (_MOMENTS + _FLOAT32 * (p.element_size() != _FLOAT32)) for p in trained)


def gradient_bytes(family: Family) -> int:
    """A float32 number per trained number."""
    return sum(p.numel() * _FLOAT32 for p in family.network.parameters() if p.requires_grad)


def step_bytes(family: Family) -> int:
    """What AdamW makes on the way: two float32 tensors of the largest parameter."""
    return max((2 * p.numel() * _FLOAT32 for p in family.network.parameters() if p.requires_grad), default=0)


def cache_bytes(family: Family, num_rows: int, length: int) -> int:
    """Keys and values of `length` positions in every layer of every row."""
    network = family.network
    numbers = 2 * network.num_layers * num_rows * network.num_kv_heads * length * network.head_dim
    return numbers * family.network.head_weight.element_size()


def make_plan(
    family: Family,
    cost: StepCost,
    *,
    num_micro_batches: int,
    rollout: int = 0,
    has_reference: bool = False,
    has_critic: bool = False,
    process: int = 0,
) -> MemoryPlan:
    """The plan of a family (which may be on the meta device) whose step costs what `cost` says."""
    weights, optimizer, gradients = weight_bytes(family), optimizer_bytes(family), gradient_bytes(family)
    return MemoryPlan(
        weights=weights,
        optimizer=optimizer,
        gradients=gradients,
        activations=cost.activations,
        workspace=cost.workspace,
        step=step_bytes(family),
        reference=weights if has_reference else 0,
        critic=weights + optimizer + gradients if has_critic else 0,
        rollout=rollout,
        process=process,
        has_many_micro_batches=num_micro_batches > 1,
    )
