"""What a call changes in a model and in torch for its own time, and puts back however it ends.

Calls in several threads may share a model: what one of them has changed for itself stays so until the last one that
needs it has ended. And an interrupt can come anywhere, into torch's own context managers too, so that nothing here
relies on a single `__exit__`.
"""

from __future__ import annotations

import functools
import os
import threading
import traceback
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import torch.nn.utils.parametrize as parametrize
from torch import Tensor

Result = TypeVar("Result")
Parameters = ParamSpec("Parameters")


class Afterwards:
    """Calls a function at the end of a block.

    ``with afterwards, afterwards:`` does so even if an interrupt cuts the first call short, or keeps it from beginning;
    the function has to bear being called once more after a call that was cut short. The block must hold no
    comprehension: from Python 3.12 on, which runs it in the block's own frame, an interrupt can pass the end by there.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        self.function, self.ended = function, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None and not isinstance(error, Exception):
            # Torch's interrupted generators would end, and push their mode, when the trace is forgotten: end them now.
            traceback.clear_frames(trace)
        if not self.ended:
            self.function()
            self.ended = True


def torch_state() -> Callable[[], None]:
    """A function that puts back grad mode, torch functions with their modes, and autocast as they are now."""
    grad, modes, functions = torch.is_grad_enabled(), function_modes(), _functions()
    cache, autocast = torch.is_autocast_cache_enabled(), [torch.is_autocast_enabled(device) for device in _AUTOCAST]

    def put_back() -> None:
        _set_functions(functions)
        modes()
        torch._C._set_grad_enabled(grad)
        torch.set_autocast_cache_enabled(cache)
        for device, enabled in zip(_AUTOCAST, autocast, strict=True):
            torch.set_autocast_enabled(device, enabled)

    return put_back


_AUTOCAST = ("cpu", "cuda")
# Whether torch functions run; not in torch's stubs.
_functions, _set_functions = torch._C._get_torch_function_state, torch._C._set_torch_function_state  # type: ignore[attr-defined]


def without_autocast(device_type: str, function: Callable[..., Result], *arguments: object) -> Result:
    """``function(*arguments)``, whose operators give the types that they say.

    An interrupt inside `torch.autocast` would leave it off, and its depth wrong, so that casts of weights outlive them.
    """
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return function(*arguments)
    end = Afterwards(lambda: torch.set_autocast_enabled(device_type, True))
    with end, end:
        torch.set_autocast_enabled(device_type, False)
        return function(*arguments)


def function_modes() -> Callable[[], None]:
    """A function that puts back the stack of torch-function modes as it is now.

    Torch takes a mode off the stack while it is called, and an interrupt there loses it.
    """
    stack = [torch._C._get_function_stack_at(k) for k in range(torch._C._len_torch_function_stack())]

    def put_back() -> None:
        while torch._C._len_torch_function_stack() > len(stack):
            torch.overrides._pop_mode()
        for mode in stack[torch._C._len_torch_function_stack() :]:
            torch.overrides._push_mode(mode)

    return put_back


class _Loan(NamedTuple):
    held: object  # so that nothing else gets its id: a tensor, a module's dict of buffers, `parametrize`
    put_back: Callable[[], object]
    calls: set[int]  # that need it changed


_loans: dict[int, _Loan] = {}  # by the id of what is held
_lock = threading.Lock()


class Loans:
    """The changes that one call needs; `put_back` ends its need of them.

    >>> weight, loans = torch.zeros(3), Loans()
    >>> with (end := Afterwards(loans.put_back)), end:
    ...     loans.thaw([weight])
    ...     weight.requires_grad
    True
    >>> weight.requires_grad
    False
    """

    def __init__(self) -> None:
        self.taken: list[object] = []

    def thaw(self, parameters: Iterable[Tensor]) -> None:
        """Let the frozen ones among them require grad."""
        with _lock, torch._C.DisableTorchFunction():  # a call around this one would see its weights used
            for p in parameters:
                if not p.is_inference() and (not p.requires_grad or id(p) in _loans):
                    self._take(p, functools.partial(p.requires_grad_, False))
                    p.requires_grad_(True)

    def keep(self, modules: Iterable[torch.nn.Module]) -> None:
        """Whatever is written into their buffers, or put in their place as they are updated, is undone in the end."""
        with _lock:
            for buffers in (module._buffers for module in modules):
                if isinstance(buffers, dict):  # a scripted module's lie elsewhere
                    self._take(buffers, functools.partial(_put_back_buffers, buffers, dict(buffers)))
                for buffer in buffers.values():
                    if buffer is not None:
                        self._take(buffer, _nothing if id(buffer) in _loans else _Former(buffer))

    def compute_parametrizations(self) -> None:
        """Use no weights that `torch.nn.utils.parametrize.cached` keeps, and leave none there that aliases gave."""
        with _lock:
            if parametrize._cache_enabled or id(parametrize) in _loans:
                enabled = parametrize._cache_enabled
                self._take(parametrize, functools.partial(setattr, parametrize, "_cache_enabled", enabled))
                parametrize._cache_enabled = 0

    def _take(self, held: object, put_back: Callable[[], object]) -> None:
        self.taken.append(held)
        _loans.setdefault(id(held), _Loan(held, put_back, set())).calls.add(id(self))

    def put_back(self) -> None:
        if not self.taken:
            return
        with _lock, torch._C.DisableTorchFunction():  # nor may a mode look on that an interrupt has left behind
            for held in self.taken:
                loan = _loans.get(id(held))
                if loan is not None:
                    loan.calls.discard(id(self))
                    if not loan.calls:
                        loan.put_back()
                        del _loans[id(held)]
            self.taken.clear()


class _Exchange:
    """When a model's own parameters are exchanged for others, as `torch.func.functional_call` does: by one thread at a
    time. A forward of another thread would meet parameters that are not the model's."""

    def __init__(self) -> None:
        self.lock = threading.RLock()  # held meanwhile
        self.thread: int | None = None  # that exchanges now; put back in the end
        self.count, self.own = 0, threading.local()

    def begin(self) -> None:
        self.thread = threading.get_ident()
        self.count += 1
        self.own.count = getattr(self.own, "count", 0) + 1

    def others(self) -> int:
        """How many exchanges other threads have begun; negative: one is going on."""
        count = self.count - getattr(self.own, "count", 0)
        return count if self.thread in (None, threading.get_ident()) else -1 - count


exchange = _Exchange()


def undisturbed(function: Callable[[], Result]) -> Result:
    """``function()``, which has a model run; once more where another thread has exchanged parameters meanwhile."""
    before = exchange.others()
    try:
        result = function()
        if before == exchange.others() >= 0:
            return result
    except Exception:
        if before == exchange.others() >= 0:
            raise
    with exchange.lock:
        return function()


def left_as_found(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """A function that has a model run `undisturbed`, and after which `torch_state` is as it was, however it ends."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        state, loans = torch_state(), Loans()

        def put_back() -> None:
            state()
            loans.put_back()

        end = Afterwards(put_back)
        with end, end:
            loans.compute_parametrizations()
            return undisturbed(lambda: function(*args, **kwargs))

    return call


def _put_back_buffers(buffers: dict[str, Tensor | None], former: dict[str, Tensor | None]) -> None:
    """As ``self.count = self.count + 1`` found them; one of another shape is no update, but a cache that has grown."""
    for name, buffer in former.items():
        new = buffers.get(name)
        if new is not None and buffer is not None and (new.shape, new.dtype) == (buffer.shape, buffer.dtype):
            buffers[name] = buffer


class _Former:
    """Writes a buffer's value of now into it, if it has changed since."""

    def __init__(self, buffer: Tensor) -> None:
        self.buffer, self.version, self.value = buffer, buffer._version, buffer.clone()

    def __call__(self) -> None:
        if self.buffer._version != self.version:
            with torch.no_grad():
                self.buffer.copy_(self.value)


def _nothing() -> None:
    pass


def _after_fork() -> None:
    """The other threads, with their calls, stayed in the parent: what they had changed is put back here."""
    _lock.release()
    for loan in list(_loans.values()):
        loan.put_back()
    _loans.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork)
    free = exchange.lock.release
    os.register_at_fork(before=exchange.lock.acquire, after_in_parent=free, after_in_child=free)
