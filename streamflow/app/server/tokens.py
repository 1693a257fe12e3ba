"""Who may use the server, and how much of it. Tokens come from a file or the environment, are kept as digests only and are
compared in constant time; none is ever written anywhere."""

from __future__ import annotations

import hashlib
import hmac
import os
import stat
from collections.abc import Mapping
from dataclasses import field
from pathlib import Path

from pydantic import PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass

from streamflow._files import Json

VARIABLE = "STREAMFLOW_TOKENS"
SHORTEST = 16


@dataclass(frozen=True)
class Holder:
    """One user: how many streams at once, and how many images a second over all of them; None: the server's limits."""

    name: str
    streams: PositiveInt | None = None
    fps: PositiveFloat | None = None
    digest: bytes = field(default=b"", repr=False)


ANYONE = Holder("anyone")


class Tokens:
    """The holders. Empty: whoever reaches the server may use it."""

    def __init__(self, holders: tuple[Holder, ...] = ()):
        self._holders = holders

    def __len__(self) -> int:
        return len(self._holders)

    def holder(self, token: str) -> Holder | None:
        """The holder of this token, or None. All tokens are compared, in constant time."""
        if not self._holders:
            return ANYONE
        digest, found = _digest(token), None
        for one in self._holders:
            if hmac.compare_digest(one.digest, digest):
                found = one
        return found


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def load(path: str | None, environment: Mapping[str, str] = os.environ) -> Tokens:
    """Tokens of a file, or else of the environment. ValueError names the line, never the token; FileNotFoundError."""
    if path is None:
        return parse(environment.get(VARIABLE, ""), VARIABLE)
    file = Path(path)
    if os.name == "posix" and stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise ValueError(f"{file} can be read by others: chmod 600 {file}")
    tokens = parse(file.read_text(encoding="utf-8"), str(file))
    if not tokens:
        raise ValueError(f"{file} holds no token: a line for each user, name token [streams=2] [fps=15]")
    return tokens


def parse(text: str, where: str) -> Tokens:
    """Tokens of lines `name token [streams=2] [fps=15]`; lines that begin with # are left out."""
    holders: list[Holder] = []
    for number, line in enumerate(text.replace(";", "\n").splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            holders.append(_holder(line.split(), f"{where}, line {number}"))
    if len({one.name for one in holders}) < len(holders) or len({one.digest for one in holders}) < len(holders):
        raise ValueError(f"{where}: names and tokens must differ from each other")
    return Tokens(tuple(holders))


def _holder(words: list[str], where: str) -> Holder:
    if len(words) < 2 or len(words[1]) < SHORTEST:
        raise ValueError(f"{where}: write a name and a token of at least {SHORTEST} characters")
    quotas: Json = {name: value for name, _, value in (word.partition("=") for word in words[2:])}
    if not quotas.keys() <= {"streams", "fps"}:
        raise ValueError(f"{where}: after the token come streams= and fps= only, as in streams=2")
    try:
        return Holder(words[0], digest=_digest(words[1]), **quotas)
    except ValidationError as error:
        wrong = (f"{one['loc'][0]}: {one['msg']}" for one in error.errors(include_url=False))
        raise ValueError(f"{where}: {'; '.join(wrong)}") from None
