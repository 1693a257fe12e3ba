"""The server's settings. Knows no viewer and no model."""

from __future__ import annotations

import re
from typing import Self

from pydantic import Field, field_validator, model_validator

from streamflow._validation import Section

# Settings of a stream that the page does not use: viewers choose the steps, and share the model.
UNUSED = ("t_index_list", "frame_buffer_size", "use_denoising_batch", "devices", "similar_image_filter")


class IceServer(Section):
    """A STUN or TURN server, with which WebRTC finds a way through firewalls."""

    url: str = Field(pattern=r"^(stun|turns?):[^\s:]+(:[0-9]{1,5})?(\?transport=(udp|tcp))?$", max_length=200)
    username: str | None = Field(default=None, description="of a TURN server")
    credential: str | None = Field(default=None, description="of a TURN server", repr=False)

    @model_validator(mode="after")
    def _has_a_port_and_what_turn_needs(self) -> Self:
        port = re.search(r":([0-9]+)(\?|$)", self.url)
        if port is not None and not 0 < int(port[1]) < 65536:
            raise ValueError(f"{self.url} has a port outside of 1 to 65535")
        if self.url.startswith("turn") and None in (self.username, self.credential):
            raise ValueError(f"{self.url} needs a username and a credential")
        return self


class Server(Section):
    """The page: where it is served, to whom, and its limits."""

    host: str = Field(
        default="127.0.0.1", description="address to bind; beyond this machine only with tokens, and TLS or a proxy"
    )
    port: int = Field(default=7860, ge=0, le=65535, description="0: any that is free")
    token_file: str | None = Field(
        default=None,
        description="a line for each user: name token [streams=2] [fps=15]; or in the environment: STREAMFLOW_TOKENS",
    )
    tls_certificate: str | None = Field(default=None, description="PEM file; needs tls_key")
    tls_key: str | None = Field(default=None, description="PEM file; needs tls_certificate")
    behind_proxy: bool = Field(default=False, description="a proxy in front ends TLS")
    origins: tuple[str, ...] = Field(default=(), description="other origins that may connect, such as https://my.example")
    max_viewers: int = Field(default=4, ge=1, le=64, description="at once; one more is refused and may come again")
    max_fps: float = Field(default=60.0, gt=0, description="images a second that one viewer gets at most")
    max_steps: int = Field(default=8, ge=1, le=100, description="that a viewer may ask for")
    max_message_bytes: int = Field(default=4_000_000, ge=1024, description="of one message, images included")
    max_text_bytes: int = Field(default=16_384, ge=1024, description="of one text message; more ends its connection")
    max_image_pixels: int = Field(
        default=8_000_000, ge=4096, description="of one image from a viewer; never more than 16 times the model's own size"
    )
    max_messages_per_second: float = Field(default=150.0, gt=0, description="of one viewer; more ends its connection")
    max_connections: int = Field(
        default=512, ge=8, description="open at once; the oldest without a request is closed for a new one"
    )
    max_half_open_per_address: int = Field(default=16, ge=1, description="connections without a request, of one address")
    max_connections_per_address: int | None = Field(
        default=None, ge=1, description="requests and viewers at once, of one address; default: max_viewers + 16"
    )
    request_seconds: float = Field(
        default=10.0, gt=0, description="for a request to arrive, and for its response to be sent"
    )
    webrtc: bool = Field(default=True, description="offer WebRTC beside the WebSocket; needs the extra webrtc")
    ice_servers: tuple[IceServer, ...] = Field(
        default=(),
        description="STUN and TURN servers of WebRTC, each with url, username and credential; the server uses the first of "
        "each kind, and pages get all",
    )
    max_readers: int = Field(default=8, ge=1, le=64, description="players at once that read streams by WHEP")
    streams_per_user: int | None = Field(
        default=None,
        ge=1,
        description="viewers of a token without streams=; default: an equal share where there are several",
    )
    models: dict[str, str] = Field(
        default={}, description="more models that viewers may choose: name and hub id, folder or file"
    )
    loras: dict[str, str] = Field(
        default={}, description="LoRAs that viewers may choose: name and hub id or file; each takes a copy of the model"
    )

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        return host[1:-1] if host.startswith("[") and host.endswith("]") else host

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("tls_certificate and tls_key go together: give both, or neither")
        if twice := set(self.models) & set(self.loras):
            raise ValueError(f"models and loras are one list on the page, and both have {', '.join(sorted(twice))}")
        pickled = [one for one in (*self.models.values(), *self.loras.values()) if one.endswith(PICKLED)]
        if pickled:
            raise ValueError(f"only safetensors are loaded, since pickled weights can run code: not {', '.join(pickled)}")
        if wrong := [one for one in self.origins if normal_origin(one) is None]:
            raise ValueError(
                f"an origin is scheme://host[:port], such as https://my.example, in ASCII and without a path or wildcard: "
                f"not {', '.join(map(repr, wrong))}"
            )
        return self


_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_PORTS = {"http": 80, "https": 443}


def normal_origin(text: str) -> str | None:
    """An origin `scheme://host[:port]` in lower case and without its scheme's default port; None for anything else."""
    match = _ORIGIN.fullmatch(text.lower()) if text.isascii() else None
    if match is None:
        return None
    scheme, host, port = match.groups()
    if port is None or int(port) == _PORTS.get(scheme):
        return f"{scheme}://{host}"
    return f"{scheme}://{host}:{int(port)}" if 0 < int(port) < 65536 else None


PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
