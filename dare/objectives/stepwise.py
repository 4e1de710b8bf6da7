"""Credit for single denoising steps: gains of drafts (MDPO) and generalised advantage estimation (TraceRL)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dare.core.lazy import torch
from dare.objectives.reduce import divide

if TYPE_CHECKING:
    from torch import Tensor


def draft_gains(reward_D: Tensor, sample_D: Tensor, step_D: Tensor) -> Tensor:
    """float64 [D]: what each step's draft gained, and what came of it (MDPO, He et al. 2025).

    (R_t - R_{t-1}) + 1 + mean of the rewards of later drafts of the sample, with R_{-1} = 0; the last step has its own
    reward in the place of later ones. The 1 of the paper cancels within a group. Every sample
    has drafts of the steps 0, 1, 2, ...
    """
    num_samples, num_steps = int(sample_D.max()) + 1, int(step_D.max()) + 1
    reward_BT = torch.zeros((num_samples, num_steps), dtype=torch.float64, device=reward_D.device)
    reward_BT[sample_D, step_D] = reward_D.double()
    count_BT = torch.zeros_like(reward_BT)
    count_BT[sample_D, step_D] = 1.0
    num_later_BT = count_BT.flip(-1).cumsum(-1).flip(-1) - count_BT
    later_BT = divide(reward_BT.flip(-1).cumsum(-1).flip(-1) - reward_BT, num_later_BT)
    later_BT = torch.where(num_later_BT == 0, reward_BT, later_BT)
    before_BT = torch.cat([torch.zeros_like(reward_BT[:, :1]), reward_BT[:, :-1]], dim=-1)
    return (reward_BT - before_BT + 1.0 + later_BT)[sample_D, step_D]


def stepwise_gae(
    reward_BS: Tensor, value_BS: Tensor, step_BS: Tensor, is_trained_BS: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """float64 [B, S] each: returns and advantages of tokens that are committed several at a time (TraceRL, Wang et al.
    2025); 0 where `is_trained_BS` is False.

    With r* and V* the means over the trained tokens of a step and t + 1 the next step that has any,

        R*_t = r*_t + gamma R*_{t+1}          A*_t = r*_t - V*_t + gamma V*_{t+1} + gamma lam A*_{t+1}
        R_j  = r_j + gamma R*_{t+1}           A_j  = r_j - V_j + gamma V*_{t+1} + gamma lam A*_{t+1}

    reward_BS  reward of each token at its own step
    step_BS    int64 denoising step of each token, >= 0 where trained
    """
    reward_BS, value_BS = reward_BS.double(), value_BS.double()
    return_BS, advantage_BS = torch.zeros_like(reward_BS), torch.zeros_like(reward_BS)
    next_return_B1, next_value_B1, next_advantage_B1 = torch.zeros((3, len(reward_BS), 1), dtype=torch.float64)
    last_step = int(torch.where(is_trained_BS, step_BS, -1).max())
    for step in range(last_step, -1, -1):
        is_now_BS = is_trained_BS & (step_BS == step)
        later_B1 = gamma * next_value_B1 + gamma * lam * next_advantage_B1
        return_BS = torch.where(is_now_BS, reward_BS + gamma * next_return_B1, return_BS)
        advantage_BS = torch.where(is_now_BS, reward_BS - value_BS + later_B1, advantage_BS)
        count_B1 = is_now_BS.sum(-1, keepdim=True)
        step_reward_B1 = divide(torch.where(is_now_BS, reward_BS, 0.0).sum(-1, keepdim=True), count_B1)
        step_value_B1 = divide(torch.where(is_now_BS, value_BS, 0.0).sum(-1, keepdim=True), count_B1)
        has_step_B1 = count_B1 > 0
        next_advantage_B1 = torch.where(has_step_B1, step_reward_B1 - step_value_B1 + later_B1, next_advantage_B1)
        next_return_B1 = torch.where(has_step_B1, step_reward_B1 + gamma * next_return_B1, next_return_B1)
        next_value_B1 = torch.where(has_step_B1, step_value_B1, next_value_B1)
    return return_BS, advantage_BS
