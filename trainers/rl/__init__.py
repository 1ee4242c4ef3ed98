"""What reinforcement learning adds: scores, roles on one base, losses and what is told of them."""
