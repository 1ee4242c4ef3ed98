"""The arithmetic of PPO (Schulman et al. 2017) with a penalty on the KL (Ziegler et al. 2019).

Tensors are [responses, tokens]. A mask is true on the tokens of a response, its first stop token included.
Sums run over all ranks, so that several processes compute what one would.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.training.ranks import sum_ranks


def place_rewards(
    logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, *, mask: Tensor, at: Tensor, kl_coef: float
) -> Tensor:
    """The reward of each token: the penalty for leaving the reference, and the score [responses] at `at`."""
    rewards = -kl_coef * (logprobs - ref_logprobs) * mask
    rewards[torch.arange(len(rewards), device=rewards.device), at] += scores
    return rewards


def estimate_advantages(rewards: Tensor, values: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalized advantage estimation. Rewards and values are zero after a response; so is its advantage."""
    advantages = torch.zeros_like(rewards)
    after = torch.zeros_like(rewards[:, 0])
    next_values = torch.zeros_like(after)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        after = delta + gamma * lam * after
        advantages[:, t] = after
        next_values = values[:, t]
    return advantages


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over the masked tokens of all ranks, zero elsewhere."""
    total, count = sum_ranks(torch.stack([(values * mask).sum(), mask.sum()]))
    centred = (values - total / count) * mask
    variance = sum_ranks(centred.square().sum()) / (count - 1).clamp(min=1)
    return centred * torch.rsqrt(variance + 1e-8)


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, mask: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """(sum of the clipped surrogate loss, number of tokens where the clip took hold)."""
    ratio = torch.exp((logprobs - old_logprobs) * mask)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    return (torch.max(plain, clipped) * mask).sum(), ((clipped > plain) & mask).sum()


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, *, mask: Tensor, clip: float) -> Tensor:
    """Sum of half the squared error, where a value gains nothing by moving further than `clip`."""
    near = old_values + (values - old_values).clamp(-clip, clip)
    worse = torch.max((values - returns).square(), (near - returns).square())
    return 0.5 * (worse * mask).sum()


def explain_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """The part of the returns' variance, over all ranks, that the values account for; 0 if there is none."""
    variance = _spread(returns, mask)
    return float(1 - _spread(returns - values, mask) / variance) if variance > 0 else 0.0


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    """Variance over the masked tokens of all ranks."""
    kept = values[mask].double()
    total, count = sum_ranks(torch.stack([kept.sum(), mask.sum()]))
    return sum_ranks((kept - total / count).square().sum()) / count


@dataclass
class KlController:
    """Raises the penalty while the policy is further from the reference than wished, and lowers it after.

    `target` is in nats a response token. The coefficient changes by at most a fifth in `horizon` responses.
    """

    coefficient: float
    target: float
    horizon: int

    def update(self, kl: float, *, n_responses: int) -> None:
        """Follows the KL that was measured on so many responses."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coefficient *= 1 + error * n_responses / self.horizon
