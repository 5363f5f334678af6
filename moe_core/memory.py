"""Memory of tensors: what is alive, of what kind, and the most there ever was.

- Counts storages, not tensors: a view costs nothing, and what autograd keeps counts as long as it is kept.
- Works on any device, and on fake tensors (`torch._subclasses.FakeTensorMode`), which have sizes and no data: a 12 B
  training step is counted in seconds on a laptop, by the code that trains.
- Counts tensors alone. A process has torch's libraries besides, a CUDA allocator its rounding and its cache.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ACTIVATIONS = "activations"


@dataclass(frozen=True)
class Peak:
    """The most bytes that were alive at once, and what they were."""

    total: int
    by_kind: Mapping[str, int] = field(default_factory=dict)


class LiveMemory(TorchDispatchMode):
    """A context in which every new tensor is counted, as `activations` unless told otherwise.

    What existed before must be told by `watch`. Tensors of another device than those watched count alike.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak = Peak(0)
        self._kinds: dict[int, tuple[str, int]] = {}
        self._new = ACTIVATIONS

    def watch(self, tensors: Iterable[Tensor], kind: str) -> None:
        """Counts these as `kind`, whether they were known or not."""
        for tensor in tensors:
            self._count(tensor, kind)
            self._raise_peak()

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """From now on a gradient that has arrived at its parameter counts as `gradients`."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda p: self.watch([p.grad], "gradients"))

    @contextmanager
    def all_new_is(self, kind: str) -> Iterator[None]:
        """Inside, new tensors count as `kind`."""
        before, self._new = self._new, kind
        try:
            yield
        finally:
            self._new = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.made(output)
        return output

    def made(self, output: Any) -> None:
        """Counts what an operation gave back."""
        for leaf in (output,) if isinstance(output, Tensor) else tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        self._raise_peak()

    def _count(self, tensor: Tensor, kind: str | None = None) -> None:
        if isinstance(tensor, DTensor):
            # It has the storage of the whole in name only; what is here is this process's part.
            tensor = tensor._local_tensor
        storage = tensor.untyped_storage()
        known = self._kinds.get(storage._cdata)
        if known is None:
            if tensor.device.type == "meta":
                return
        elif kind is None:
            return
        self._keep(storage, kind or self._new)

    def _keep(self, storage: torch.UntypedStorage, kind: str) -> None:
        key = storage._cdata
        if known := self._kinds.get(key):
            self.live[known[0]] -= known[1]
        else:
            # PyTorch keeps a storage's Python object as long as the storage: this is called when the memory goes.
            weakref.finalize(storage, self._forget, key)
        self._kinds[key] = (kind, storage.nbytes())
        self.live[kind] += storage.nbytes()

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Counts a storage whose memory `resize_` gave or took, which is no operation and so is not seen: FSDP2 does so."""
        known = self._kinds.get(storage._cdata)
        self._keep(storage, known[0] if known else self._new)
        self._raise_peak()

    def _forget(self, key: int) -> None:
        kind, size = self._kinds.pop(key)
        self.live[kind] -= size

    def _raise_peak(self) -> None:
        total = self.live.total()
        if total > self.peak.total:
            self.peak = Peak(total, {kind: size for kind, size in self.live.items() if size})


def parameters_and_buffers(module: nn.Module) -> list[Tensor]:
    """The tensors that a module holds."""
    return [*module.parameters(), *module.buffers()]
