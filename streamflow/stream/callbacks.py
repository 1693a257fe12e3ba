"""Calls from a part of a stream to those that are made of it."""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakMethod

from streamflow.models.protocols import Function


class Callbacks:
    """Methods that are called together, in the order in which they were added. They are held weakly: a part keeps no part
    alive that was given it, so that a stream which is dropped is freed at once, without the garbage collector."""

    def __init__(self, *methods: Callable[[], None]) -> None:
        self.methods: list[WeakMethod] = []
        self.add(*methods)

    def add(self, *methods: Callable[[], None]) -> None:
        """Call these bound methods too, as long as their objects live."""
        self.methods += [WeakMethod(method) for method in methods]

    def remove(self, method: Callable[[], None]) -> None:
        """Call this bound method no more."""
        self.methods = [one for one in self.methods if one() not in (method, None)]

    def __call__(self) -> None:
        for reference in self.methods:
            method = reference()
            if method is not None:
                method()


def weak_call(method: Function) -> Function:
    """A function that calls this bound method and does not keep its object alive."""
    reference, name = WeakMethod(method), method.__name__

    def call(*args: object, **kwargs: object) -> object:
        alive = reference()
        if alive is None:
            raise RuntimeError(f"the object of {name} is gone: keep the stream while it draws")
        return alive(*args, **kwargs)

    return call
