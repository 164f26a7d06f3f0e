"""A stand-in for CUDA cards on a CPU build of torch.

A ``CardTensor`` says that it is on ``cuda:N`` and computes with a tensor on the CPU, so its values are real.
Operands on two devices are refused as on CUDA, and autocast uses torch's lists for CUDA. Operations, waits of the
host and copies to the card are counted, with the line that asked for them. Kernels stay the CPU's: a card's speed,
its rounding and faults of its kernels cannot be seen here.

How: a tensor subclass gets every operation that has a card's tensor among its operands; operations that make
tensors from nothing are registered for torch's CUDA backend, which a CPU build leaves empty.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import pytest
import torch
import torch._inductor  # imported by the first optimizer otherwise, when torch looks for code of a real card
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

aten = torch.ops.aten
GIB = 2**30

COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
WAITING = {
    "_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "bincount",
    "equal", "is_nonzero",
}  # fmt: skip
"""Operations whose result, or its size, the host has to read."""
NO_KERNEL = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"}


class Counts:
    """What happened on the cards since ``reset``."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all counts; the highest number of bytes starts from the present one."""
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()
        self.uploads: Counter[str] = Counter()
        self.fetched: Counter[str] = Counter()  # bytes
        self.pinned = 0  # bytes
        self.peak = Block.live


class Block:
    """The bytes of one storage on a card, while any tensor uses it."""

    live = 0
    of: ClassVar[WeakValueDictionary[int, Block]] = WeakValueDictionary()

    def __init__(self, size: int) -> None:
        self.size = size
        Block.live += size
        counts.peak = max(counts.peak, Block.live)

    def __del__(self) -> None:
        type(self).live -= self.size

    @classmethod
    def holding(cls, value: Tensor) -> Block:
        """Return the block of a tensor's storage."""
        storage = value.untyped_storage()
        if (block := cls.of.get(storage._cdata)) is None:
            block = cls.of[storage._cdata] = cls(storage.nbytes())
        return block


class CardTensor(Tensor):
    """A tensor on a card: sizes and device of its own, values in a tensor on the CPU."""

    value: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, value: Tensor, device: torch.device | None = None, **_: Any) -> Any:
        if device is None:  # accelerate makes a parameter anew, by its class
            return torch.nn.Parameter(value, requires_grad=_.get("requires_grad", True))
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            value.shape,
            strides=value.stride(),
            storage_offset=value.storage_offset(),
            dtype=value.dtype,
            layout=value.layout,
            device=device,
        )
        made.value, made.block = value, Block.holding(value)
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @property
    def data(self) -> Tensor:
        """The same values without their history."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        if not isinstance(other, CardTensor) or other.shape != self.shape or other.device != self.device:
            raise NotImplementedError("the stand-in cannot give a tensor another device or shape in place")
        self.value, self.block = other.value, other.block

    def untyped_storage(self) -> Any:
        return self.value.untyped_storage()

    def data_ptr(self) -> int:
        return self.value.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = self.detach().clone()
        if isinstance(self, torch.nn.Parameter):
            made = torch.nn.Parameter(made, self.requires_grad)
        return memo.setdefault(id(self), made)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CardTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [*_tensors_in(args), *_tensors_in(kwargs.values())]
        plain = (Tensor, torch.nn.Parameter)
        if any(type(t) not in plain and not isinstance(t, CardTensor) for t in tensors):
            return NotImplemented  # such as a quantized weight, which calls back with its codes
        on_card = [t for t in tensors if isinstance(t, CardTensor)]
        device = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        target = device or (args[0].device if func is aten.copy_.default else on_card[0].device)
        if func not in COPIES:
            _check_devices(func, args, tensors, on_card[0].device)
        _count(func, args, kwargs, target)
        inner_args = [_inner(argument) for argument in args]
        inner = {name: _inner(argument) for name, argument in kwargs.items()}
        if device is not None:
            inner = inner | {"device": "cpu" if target.type == "cuda" else target}
        if kwargs.get("pin_memory"):
            inner = inner | {"pin_memory": False}
        with _drawing(func, target):
            if func is aten.histc.default and not inner_args[0].is_floating_point():  # only CUDA counts integers
                out = func(inner_args[0].float(), *inner_args[1:]).to(inner_args[0].dtype)
            else:
                out = func(*inner_args, **inner)
        if target.type != "cuda":
            return args[0] if func is aten.copy_.default else out
        return return_and_correct_aliasing(func, args, kwargs, _on_card(out, target))


def _tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(value)


def _inner(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_inner(one) for one in value]
    return value.value if isinstance(value, CardTensor) else value


def _on_card(out: Any, device: torch.device) -> Any:
    if isinstance(out, (list, tuple)):
        return type(out)(_on_card(one, device) for one in out)
    return CardTensor(out, device) if type(out) is Tensor else out


def _check_devices(func: Any, args: Any, tensors: list[Tensor], device: torch.device) -> None:
    """Refuse what CUDA refuses: operands on two devices, except numbers, and indices on the CPU."""
    other = [t for t in tensors if t.device != device and not (t.dim() == 0 and t.device.type == "cpu")]
    if func in INDEXING and args[0].device == device:
        indices = list(_tensors_in(args[1]))
        other = [t for t in other if not (t.device.type == "cpu" and any(t is index for index in indices))]
    if other:
        where = [(tuple(t.shape), str(t.device)) for t in tensors]
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {where}")


def _count(func: Any, args: Any, kwargs: Any, target: torch.device) -> None:
    name = func.overloadpacket.__name__
    if not func.is_view and name not in NO_KERNEL:
        counts.launches[name] += 1
    if func in COPIES:
        source = args[1] if func is not aten._to_copy.default else args[0]
        non_blocking = kwargs.get("non_blocking", False) or (
            func is aten.copy_.default and len(args) > 2 and args[2]
        )
        if source.device.type == "cuda" and target.type == "cpu":
            counts.fetched[_place()] += source.nbytes
            if not non_blocking:
                counts.waits[f"{name} to the CPU: {_place()}"] += 1
        if source.device.type == "cpu" and target.type == "cuda" and not non_blocking:
            counts.uploads[_place()] += 1
    elif func in INDEXING:
        indices = list(_tensors_in(args[1]))
        if any(t.dtype in (torch.bool, torch.uint8) for t in indices):
            counts.waits[f"{name} by a mask: {_place()}"] += 1
        if any(t.device.type == "cpu" for t in indices):
            counts.uploads[_place()] += 1
    elif name in WAITING or (func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None):
        counts.waits[f"{name}: {_place()}"] += 1


def _place() -> str:
    """Return the line of the package that asks, or of a library if no line of the package is near."""
    frame, library = sys._getframe(3), ""
    for _ in range(40):
        if frame is None:
            break
        file = frame.f_code.co_filename
        if "/src/flexperts/" in file:
            own = f"{file.rpartition('/src/flexperts/')[2]}:{frame.f_lineno}"
            return f"{own} > {library}" if library else own
        if not library and "/site-packages/" in file and "/torch/" not in file:
            library = f"{file.rpartition('/site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return library


class Generators:
    """The state of each card's random generator."""

    def __init__(self) -> None:
        self.seed_all(0)

    def seed_all(self, seed: int) -> None:
        """Start every card's stream from a seed."""
        self.states = {index: torch.Generator().manual_seed(seed + 1).get_state() for index in range(CARDS)}

    @contextmanager
    def drawing(self, index: int) -> Iterator[None]:
        """Draw from a card's stream inside the block; the CPU's does not move."""
        before = torch.get_rng_state()
        torch.set_rng_state(self.states[index])
        try:
            yield
        finally:
            self.states[index] = torch.get_rng_state()
            torch.set_rng_state(before)


CARDS = 2
counts = Counts()
generators = Generators()


_AS_IT_IS = nullcontext()


def _drawing(func: Any, device: torch.device) -> Any:
    draws = torch.Tag.nondeterministic_seeded in func.tags and device.type == "cuda"
    return generators.drawing(device.index or 0) if draws else _AS_IT_IS


def _made_from_nothing() -> Iterator[Any]:
    """Yield torch's operations that make a tensor on a device, without another tensor."""
    known = set(torch._C._dispatch_get_all_op_names())
    for schema in torch._C._jit_get_all_schemas():
        name = f"{schema.name}.{schema.overload_name}".rstrip(".")
        types = {argument.name: str(argument.type) for argument in schema.arguments}
        if not name.startswith("aten::") or name not in known or "device" not in types:
            continue
        if any("Tensor" in kind for kind in types.values()):
            continue
        if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd"):
            yield getattr(getattr(aten, schema.name.removeprefix("aten::")), schema.overload_name or "default")


def _factory(func: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        device = torch.device(kwargs["device"])
        device = torch.device("cuda", device.index or 0)
        if func.overloadpacket.__name__ not in NO_KERNEL:
            counts.launches[func.overloadpacket.__name__] += 1
        with _drawing(func, device):
            return CardTensor(func(*args, **kwargs | {"device": "cpu", "pin_memory": False}), device)

    return made


_library: Any = None


def _fill_backend() -> None:
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL", "CUDA")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for func in _made_from_nothing():
            _library.impl(func.name().removeprefix("aten::"), _factory(func), "CUDA")


def _with_cards(run: Any) -> Any:
    """Return a thread's function in which ``torch.tensor(..., device="cuda")`` copies where this file sees it."""

    def started(thread: threading.Thread) -> None:
        torch._C._set_only_lift_cpu_tensors(True)  # of a thread
        run(thread)

    return started


def _pin(tensor: Tensor, device: Any = None) -> Tensor:
    counts.pinned += tensor.nbytes
    return tensor.clone()


@contextmanager
def pretended(total: int = 24 * GIB) -> Iterator[Counts]:
    """Let torch find two cards inside the block; counts are yielded."""
    _fill_backend()
    facts = SimpleNamespace(
        name="a stand-in", major=9, minor=0, total_memory=total, multi_processor_count=100, gcnArchName=""
    )
    told: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "_is_compiled": lambda: True,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: CARDS,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: nullcontext(),
        "get_device_capability": lambda device=None: (facts.major, facts.minor),
        "get_device_name": lambda device=None: facts.name,
        "get_device_properties": lambda device=None: facts,
        "mem_get_info": lambda device=None: (max(0, total - Block.live), total),
        "memory_allocated": lambda device=None: Block.live,
        "memory_reserved": lambda device=None: Block.live,
        "max_memory_allocated": lambda device=None: counts.peak,
        "reset_peak_memory_stats": lambda device=None: setattr(counts, "peak", Block.live),
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
        "is_current_stream_capturing": lambda: False,
        "manual_seed": generators.seed_all,
        "manual_seed_all": generators.seed_all,
        "get_rng_state": lambda device=0: generators.states[torch.device("cuda", device).index].clone(),
        "set_rng_state": lambda state, device=0: generators.states.__setitem__(device, state.clone()),
    }
    with pytest.MonkeyPatch.context() as patch, torch.autograd.set_multithreading_enabled(False):
        for name, value in told.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
        patch.setattr(Tensor, "pin_memory", _pin)
        patch.setattr(threading.Thread, "run", _with_cards(threading.Thread.run))
        torch._C._set_only_lift_cpu_tensors(True)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        counts.reset()
        try:
            yield counts
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
            torch._C._set_only_lift_cpu_tensors(False)
