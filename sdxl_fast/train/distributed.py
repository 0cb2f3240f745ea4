"""One process or many: who this one is, how a batch is shared out, how gradients meet, how networks are spread."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

Parallel = Literal["ddp", "fsdp"]


def start(device: torch.device) -> None:
    """Joins the processes that torchrun started; does nothing without torchrun.

    Tensors on GPUs go by NCCL, and those on the CPU, flags and what is to be logged, by gloo.
    """
    if "RANK" not in os.environ or dist.is_initialized():
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(minutes=30))
    atexit.register(dist.destroy_process_group)


def rank() -> int:
    """Number of this process; 0 when it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes the files."""
    return rank() == 0


def barrier() -> None:
    """Waits for every process."""
    if size() > 1:
        dist.barrier()


def agreed(flag: bool) -> bool:
    """Whether any process says so; asked on the CPU, so that no GPU has to be waited for."""
    if size() == 1:
        return flag
    said = torch.tensor(float(flag))
    dist.all_reduce(said, dist.ReduceOp.MAX)
    return bool(said.item())


def shares(batch: int, accumulate: int) -> list[slice]:
    """The micro-batches of this process, as ranges of the global batch's samples.

    Raises:
        ValueError: the batch does not divide into equal micro-batches.
    """
    parts = size() * accumulate
    if batch % parts:
        raise ValueError(
            f"batch is {batch}; {size()} processes that accumulate {accumulate} micro-batches each need a multiple "
            f"of {parts}"
        )
    each = batch // parts
    first = rank() * accumulate
    return [slice((first + i) * each, (first + i + 1) * each) for i in range(accumulate)]


def average(facts: dict[str, float]) -> dict[str, float]:
    """The mean over processes of what each has to log; on the CPU."""
    if size() == 1 or not facts:
        return facts
    values = torch.tensor([facts[name] for name in sorted(facts)], dtype=torch.float64)
    dist.all_reduce(values)
    return dict(zip(sorted(facts), (values / size()).tolist(), strict=True))


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a spread tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """A spread tensor put together (every process must ask); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy on the CPU, contiguous as files have it."""
    return tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole copies on the CPU in the first process, nothing in the others (every process must ask).

    One tensor at a time, so that no GPU holds more than one that was spread over many.
    """
    found = {}
    for name, tensor in tensors.items():
        put_together = whole(tensor.detach())
        if is_first():
            found[name] = on_cpu(put_together)
    return found


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The mean over processes of the gradients of replicated parameters, one message per dtype.

    A discriminator runs several times before each backward and is skipped by the student's, which the hooks of
    `DistributedDataParallel` do not allow for. Spread parameters (FSDP2) have met already.
    """
    if size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p.grad, DTensor)]
    for dtype in dict.fromkeys(g.dtype for g in gradients):  # in the same order everywhere, which a set has not
        some = [g for g in gradients if g.dtype == dtype]
        flat = torch.cat([g.flatten() for g in some])
        dist.all_reduce(flat)
        flat /= size()
        for gradient, mean in zip(some, flat.split([g.numel() for g in some]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def spread(
    module: nn.Module,
    blocks: Iterable[nn.Module],
    methods: Iterable[str] = (),
    *,
    computed_in: torch.dtype | None = None,
) -> None:
    """Shards a module's parameters over the processes (FSDP2): each of `blocks` by itself, the rest as one group.

    Weights become contiguous, which FSDP2 asks for; activations may be channels_last nevertheless.

    Args:
        module: the network, on the device where it computes.
        blocks: parts of it.
        methods: what is called of the module beside its forward.
        computed_in: what weights are sent and put together in, if not in their own dtype; gradients then meet in
            float32. Inputs stay as they are: sizes and crops are no numbers of bfloat16.
    """
    module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    # torch's default is a mesh of the machine's GPUs, also for networks on the CPU
    mesh = init_device_mesh(next(module.parameters()).device.type, (size(),))
    policy = MixedPrecisionPolicy()
    if computed_in is not None:
        policy = MixedPrecisionPolicy(computed_in, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    for method in methods:
        register_fsdp_forward_method(module, method)


def unet_blocks(unet: Any) -> list[nn.Module]:
    """What of a UNet is sharded by itself: transformer blocks and resnets, so that one at a time is whole."""
    kinds = ("BasicTransformerBlock", "ResnetBlock2D")
    return [module for module in unet.modules() if type(module).__name__ in kinds]
