"""What chance decides in PPO, step by step: which rows a step has, and the seed of each answer."""

import hashlib

import torch


def hash_seed(*parts: int | str) -> int:
    """A seed that has nothing to do with those of other parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


def choose_rows(step: int, *, n_rows: int, batch_size: int, seed: int) -> list[int]:
    """The rows of a step, counted from 0: each comes once before any comes again, in a new order then."""
    rows = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, n_rows)
        order = torch.randperm(n_rows, generator=torch.Generator().manual_seed((seed << 20) + epoch))
        rows.append(int(order[place]))
    return rows
