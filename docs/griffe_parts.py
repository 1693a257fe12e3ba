"""An extension of griffe for the reference: methods and attributes that `StreamFlow` forwards to its parts
(`streamflow.stream.forwards`) are shown with the signatures, types and docstrings of the parts."""

from __future__ import annotations

import copy
from typing import Any

import griffe

FORWARDS = "streamflow.stream.forwards"
ATTRIBUTES = (f"{FORWARDS}.Attribute", f"{FORWARDS}.DiffusersAttribute")


class Parts(griffe.Extension):
    """Replaces the assignments in the body of `StreamFlow` once the package is loaded."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Show forwards of this package. KeyError where a forward names a member that its part does not have."""
        cls = pkg["pipeline.StreamFlow"]
        for name, member in list(cls.members.items()):
            decorators = [one.value for one in getattr(member, "decorators", ())]
            call = decorators[0] if decorators else getattr(member, "value", None)
            if not isinstance(call, griffe.ExprCall):
                continue
            function, of = call.function, call.arguments[-1]
            if function.canonical_path in (f"{FORWARDS}.method", f"{FORWARDS}.override"):
                cls.set_member(name, self._method(name, pkg[_inside(of)], cls))
            elif isinstance(function, griffe.ExprSubscript) and function.left.canonical_path in ATTRIBUTES:
                self._describe(member, function.slice, of, pkg)

    def _method(self, name: str, target: griffe.Function, cls: griffe.Class) -> griffe.Function:
        method = copy.copy(target)
        method.name, method.parent = name, cls
        return method

    def _describe(self, member: griffe.Attribute, kind: griffe.Expr, of: str | griffe.Expr, pkg: griffe.Module) -> None:
        target = None if isinstance(of, str) else pkg[_inside(of)]
        while target is not None and isinstance(target.value, griffe.ExprName):  # another name of the same property
            target = target.parent[target.value.name]
        member.annotation, member.value = kind, None
        fixed = target is not None and target.setter is None
        member.labels = {"property"} if fixed else {"property", "writable"}
        member.docstring = griffe.Docstring(of.strip("\"'"), parent=member) if target is None else target.docstring


def _inside(of: griffe.Expr) -> str:
    """The path of an expression inside the package."""
    return of.canonical_path.partition(".")[2]
