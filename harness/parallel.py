"""Several processes (torchrun): each samples and trains on its shard of the prompts; all hold the same weights."""

import datetime
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist

PATIENCE = datetime.timedelta(hours=2)  # for what the first process does alone, such as a warm start


def start(device: str) -> None:
    """Join the other processes, if torchrun started more than one. device: "auto", "cpu" or "cuda"."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=PATIENCE)
    if dist.get_rank() > 0:
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all


def stop() -> None:
    """Leave the group of processes. All processes call it, at the end of a run."""
    if dist.is_initialized():
        dist.destroy_process_group()


def world() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) unless torchrun started more."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def shard(problems: Sequence) -> Sequence:
    """This process's shard: every `size`-th problem, from the `rank`-th on."""
    rank, size = world()
    return problems if size == 1 else problems[rank::size]


def rank0_only(write: Callable[[], None]) -> None:
    """Call write() in the first process alone; the others wait for it."""
    rank, size = world()
    if rank == 0:
        write()
    if size > 1:
        dist.barrier()


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes: with equal shards, the gradient of the whole batch."""
    for parameter in parameters:
        if world()[1] > 1:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world()[1]


def all_gather(value) -> list:
    """The value of each process, in the order of ranks; it is sent by pickle."""
    values = [value] * world()[1]
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def reduce_metrics(record: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    """One record for all processes: the means of the records' values, and the sums of the counts."""
    everyone = all_gather((record, counts))
    means = {name: sum(values[name] for values, _ in everyone) / len(everyone) for name in record}
    return means | dict(sum((Counter(events) for _, events in everyone), Counter())) | means  # a metric keeps its value
