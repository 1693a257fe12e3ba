"""Methods and attributes of a class that are those of one of its parts, with their docstrings and signatures."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from operator import attrgetter
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, overload

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def method(part: str, of: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method that calls this method of `self.<part>`."""

    @wraps(of)
    def forward(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        return of(getattr(self, part), *args, **kwargs)

    return forward


def override(part: str, of: Callable[Concatenate[Any, P], R]) -> Callable[[Any], Callable[Concatenate[Any, P], R]]:
    """A decorator that replaces a stub with `method(part, of)`. It is for names that a base class declares: type checkers
    give an assigned method the base class's signature, and a decorated one its own."""
    return lambda stub: method(part, of)


class Attribute(property, Generic[T]):
    """A property that reads and assigns this attribute of `self.<part>`. of: the attribute in the part's class, or its
    docstring where instances hold it."""

    def __init__(self, part: str, name: str, of: object) -> None:
        fixed = isinstance(of, property) and of.fset is None

        def assign(self: object, value: object) -> None:
            setattr(getattr(self, part), name, value)

        doc = of if isinstance(of, str) else of.__doc__
        super().__init__(attrgetter(f"{part}.{name}"), None if fixed else assign, None, doc)

    @overload
    def __get__(self, instance: None, owner: type | None = None) -> Attribute[T]: ...

    @overload
    def __get__(self, instance: object, owner: type | None = None) -> T: ...

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return super().__get__(instance, owner)

    def __set__(self, instance: object, value: T) -> None:
        super().__set__(instance, value)


class DiffusersAttribute(Attribute[T]):
    """An attribute for objects of diffusers: all can be assigned, since their classes do not declare the members of `T`."""

    def __set__(self, instance: object, value: Any) -> None:
        super().__set__(instance, value)
