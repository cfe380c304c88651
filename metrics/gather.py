"""Bringing together what the processes of torchrun measured."""

import torch
import torch.distributed as dist


def share_of(rank, world_size, count):
    """Return (first, last): process `rank` takes the samples first ≤ i < last of `count`, in one stretch."""
    return rank * count // world_size, (rank + 1) * count // world_size


def sum_over_processes(tensor):
    """Return the sum of `tensor` over all processes, in every process."""
    if not dist.is_initialized():
        return tensor
    total = tensor.clone()
    dist.all_reduce(total)
    return total


def raise_everywhere(error):
    """Raise in every process the first error that any of them has (None: this one has none).

    Every process must call it: one that stopped alone would leave the others to fail for want of it.
    """
    if dist.is_initialized():
        errors = [None] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        error = next((one for one in errors if one is not None), None)
    if error is not None:
        raise error


def gather_rows(rows, device):
    """Return the rows of all processes in the order of rank, on the CPU, in every process.

    `rows` (N, …) lies on the CPU; N may differ by process. `device` is where the process group moves data.
    """
    if not dist.is_initialized():
        return rows
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    counts = counts.tolist()
    padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=device)
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count].cpu() for part, count in zip(parts, counts, strict=True)])
