"""LoRAs of a stream: load, weigh, fuse, swap and unload them between two ticks, from any thread.

diffusers' and peft's own methods do the work, on the pipe that is streamed, so that the pipe draws with the same LoRAs. This
file adds the lock, the encoding of prompts after a change of text encoders, and the restoring after an error.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from streamflow._validation import check_number
from streamflow.models.pipe_parts import quantized_kinds
from streamflow.models.protocols import Pipeline
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.model import Model
from streamflow.stream.updates import Updates

if TYPE_CHECKING:
    from streamflow.models.protocols import Function

# The first of the two matrices of each layer, in the spellings that diffusers gives a LoRA that it has read.
DOWN = re.compile(r"(lora_A|lora_linear_layer\.down|lora\.down|lokr_w1|lokr_w1_a)(\.weight)?$")


class Loras:
    """The LoRAs of a stream. A change acts on all rows from the next tick on. If it includes a text encoder, the prompt is
    encoded again for frames that enter from then on. An error leaves networks and stream as they were.

    redraw: called when what is drawn has changed.
    """

    def __init__(self, model: Model, denoiser: Denoiser, updates: Updates, redraw: Callable[[], None]) -> None:
        self._model, self._denoiser, self._updates, self._redraw = model, denoiser, updates, redraw

    @property
    def loras(self) -> tuple[str, ...]:
        """The names of the LoRAs that are loaded, in the order of loading."""
        return _names(_parts(self._model.pipe))

    def load_lora(
        self, pretrained_lora_model_name_or_path_or_dict: object, adapter_name: str | None = None, **kwargs: object
    ) -> str:
        """Load a LoRA into the pipe's network and text encoders. Returns its name.

        pretrained_...: a hub id, a folder, a file or a dict of tensors. kwargs: what else the pipeline's own
            `load_lora_weights` takes; `hotswap=True` replaces the values of the LoRA of that name, which must have the same
            targets; of the same rank, nothing is captured anew.
        adapter_name: by default "default_0", "default_1", ... As in diffusers the first one loaded is active, at weight 1,
            and later ones once `set_adapters` names them.

        Raises:
            ValueError: it does not fit this pipeline, with how much of it does; the name is taken. ImportError: no peft.
            RuntimeError: `unet` is not the pipe's own network; what accelerates the stream has changed that network.
        """
        loader, lora = self._loader(), pretrained_lora_model_name_or_path_or_dict
        read = _fitting(self._model.pipe, loader.lora_state_dict, lora, **kwargs)
        wanted = sum(bool(DOWN.search(key)) for key in (read[0] if isinstance(read, tuple) else read))
        with self._adapting(values=bool(kwargs.get("hotswap"))):
            taken = self.loras
            name = adapter_name or next(n for i in range(len(taken) + 1) if (n := f"default_{i}") not in taken)
            if name in taken and not kwargs.get("hotswap"):
                raise ValueError(f"there is a LoRA named {name!r}: unload_lora({name!r}), another name, or hotswap=True")
            _fitting(self._model.pipe, loader.load_lora_weights, lora, adapter_name=name, **kwargs)
            layers = [layer for part in _parts(self._model.pipe).values() for layer in _layers(part) if name in layer.r]
            found = sum(_has_its_shape(layer, name) for layer in layers)
            if found < max(wanted, len(layers), 1):
                raise ValueError(
                    f"this LoRA does not fit {type(self._model.pipe).__name__} ({found} of its {wanted} layers have a place "
                    f"there): load it in a stream of the family that it was trained for"
                )
        return name

    def set_adapters(self, adapter_names: str | Sequence[str] | Mapping[str, float], adapter_weights: object = None) -> None:
        """Which LoRAs act, and how strongly: `set_adapters({"a": 0.7, "b": 0.3})`, or names and weights apart, as diffusers'
        method of this name takes them. Those not named rest. Weights are 1 by default; 0 and below are allowed.

        Raises:
            ValueError, TypeError: an unknown name, with those known; a weight that is no finite number; not one for each.
        """
        if isinstance(adapter_names, Mapping):
            if adapter_weights is not None:
                raise TypeError("pass the weights in the mapping or as adapter_weights, not both")
            adapter_names, adapter_weights = list(adapter_names), list(adapter_names.values())
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        for weight in adapter_weights if isinstance(adapter_weights, list) else [adapter_weights]:
            if not isinstance(weight, dict):  # diffusers takes weights by block, too
                check_number("a LoRA's weight", weight)
        with self._adapting() as loader:
            self._check_loaded(names)
            loader.set_adapters(names, adapter_weights)

    def unload_lora(self, adapter_name: str | None = None) -> None:
        """Take a LoRA out, or all of them. With the last one the networks are what they were; fused ones stay in the
        weights, unless `unfuse_lora` came before.

        Raises:
            ValueError: an unknown name, with those known. RuntimeError: this one is fused.
        """
        with self._adapting() as loader:
            if adapter_name is not None:
                self._check_loaded([adapter_name])
                if adapter_name in _merged(_parts(self._model.pipe)):
                    raise RuntimeError(f"LoRA {adapter_name!r} is fused into the weights: unfuse_lora() first")
                loader.delete_adapters(adapter_name)
            if adapter_name is None or not self.loras:
                loader.unload_lora_weights()

    def fuse_lora(
        self,
        fuse_unet: bool = True,
        fuse_text_encoder: bool = True,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Add the active LoRAs, or those named, to the weights of the network and the text encoders; `safe_fusing` looks for
        NaN. A fused network runs as fast as one without LoRA."""
        parts = self._fusible(fuse_unet, fuse_text_encoder)
        with self._adapting() as loader:
            self._check_loaded(adapter_names or ())
            before = _merged(_parts(self._model.pipe))
            try:
                loader.fuse_lora(parts, lora_scale=lora_scale, safe_fusing=safe_fusing, adapter_names=adapter_names)
            except BaseException:
                if not before:
                    loader.unfuse_lora(parts)
                raise

    def unfuse_lora(self, unfuse_unet: bool = True, unfuse_text_encoder: bool = True) -> None:
        """Take fused LoRAs out of the weights again, to within rounding; they act as they did before they were fused."""
        with self._adapting() as loader:
            loader.unfuse_lora(self._fusible(unfuse_unet, unfuse_text_encoder))

    def load_lcm_lora(self, *args: object, **kwargs: object) -> None:
        """Raises NotImplementedError: flows do not need LCM-LoRA."""
        raise NotImplementedError(
            "LCM-LoRA teaches a diffusion UNet to draw in few steps; a rectified flow does that by itself. "
            "Leave the call out; for other LoRAs there is load_lora"
        )

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _loader(self) -> Pipeline:
        """The pipe, if LoRAs can be loaded into it and act in this stream."""
        self._model.check_open()
        pipe = self._model.pipe
        if self._model.unet is not getattr(pipe, self._model.adapter.network):
            raise RuntimeError(
                "stream.unet is not the pipe's own network, into which LoRAs are loaded: load them into the pipe before, or "
                "into the network itself (load_lora_adapter)"
            )
        if kinds := quantized_kinds(self._model.unet):
            raise RuntimeError(
                f"the network was quantised to {', '.join(kinds)} without keeping the plain weights (keep_plain=False), to "
                f"which LoRAs belong: load the pipe again, call its load_lora_weights(), fuse_lora() and "
                f"unload_lora_weights(), and quantise it then"
            )
        kind, options = self._model.acceleration
        changed = [name for name in ("fuse_qkv", "quantize") if getattr(options, name, None)]
        if changed:
            raise RuntimeError(
                f"accelerate({kind!r}, {changed[0]}=...) has changed the layers that LoRAs belong to: accelerate('none'), "
                f"load and fuse_lora(), then accelerate again"
            )
        if not hasattr(pipe, "load_lora_weights"):
            raise ValueError(f"diffusers has no LoRA loader for {type(pipe).__name__}")
        try:
            import peft  # noqa: F401
        except ImportError as error:
            raise ImportError('diffusers loads LoRAs through peft: pip install "peft>=0.17,<1"') from error
        return pipe

    def _check_loaded(self, names: Sequence[str]) -> None:
        known = self.loras
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no LoRA is named {', '.join(map(repr, unknown))}: loaded are {', '.join(known) or 'none'}")

    def _fusible(self, network: bool, texts: bool) -> list[str]:
        wanted = [name for name in _parts(self._model.pipe) if (network if name == self._model.adapter.network else texts)]
        if not wanted:
            raise ValueError("there is nothing to fuse: choose the network, the text encoders or both")
        return wanted

    @contextmanager
    def _adapting(self, values: bool = False) -> Iterator[Pipeline]:
        """A context in which no tick runs and no prompt is encoded, with the loader of LoRAs. An error restores everything,
        with `values` the adapters' values too. Otherwise prompts are encoded again if a text encoder has changed."""
        loader = self._loader()
        self._denoiser.check_step("a call that changes LoRAs")
        with self._denoiser.ticks:
            self._redraw()
            with self._updates.callers, _undone_on_error(list(_parts(self._model.pipe).values()), values):
                texts = [part for name, part in _parts(self._model.pipe).items() if name != self._model.adapter.network]
                before = [_settings(part) for part in texts]
                yield loader
                changed = [_settings(part) for part in texts] != before
        if changed and self._denoiser.state is not None:
            self._updates.amend(self._updates.planner.plan_again)


def _parts(pipe: Pipeline) -> dict[str, nn.Module]:
    """The networks of a pipe into which diffusers can load LoRAs, by name."""
    names = getattr(type(pipe), "_lora_loadable_modules", ())
    return {name: part for name in names if isinstance(part := getattr(pipe, name, None), nn.Module)}


def _layers(part: nn.Module) -> list[Any]:
    """Its layers that have adapters, which are peft's."""
    return [m for m in part.modules() if hasattr(m, "base_layer") and hasattr(m, "merged_adapters")]


def _has_its_shape(layer: Any, name: str) -> bool:
    """Whether the matrices of an adapter have this layer's width and height; swapped in place, nothing else checks them."""
    if name not in getattr(layer, "lora_A", ()):
        return True  # another kind of adapter than LoRA
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return (down.shape[1], up.shape[0], up.shape[1]) == (layer.in_features, layer.out_features, down.shape[0])


def _names(parts: Mapping[str, nn.Module]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for part in parts.values() for name in getattr(part, "peft_config", None) or ()))


def _merged(parts: Mapping[str, nn.Module]) -> set[str]:
    return {name for part in parts.values() for layer in _layers(part) for name in layer.merged_adapters}


def _settings(part: nn.Module) -> list[tuple]:
    """How every layer's adapters are set: two that are equal compute the same, but for weights swapped in place."""
    return [
        (id(m), tuple(m.active_adapters), tuple(m.scaling.items()), tuple(m.merged_adapters), m.disable_adapters)
        for m in _layers(part)
    ]


def _fitting(pipe: Pipeline, call: Function, lora: object, **kwargs: object) -> Any:
    """The result of a loader of diffusers. ValueError where the loader fails because this LoRA does not fit."""
    try:
        return call(lora, **kwargs)
    except torch.OutOfMemoryError:
        raise
    except (ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        detail = " ".join(str(error).split())[:300]
        raise ValueError(
            f"this LoRA does not fit {type(pipe).__name__} ({type(error).__name__}: {detail}): load it in a stream of the "
            f"family that it was trained for"
        ) from error


@contextmanager
def _undone_on_error(parts: Sequence[nn.Module], values: bool) -> Iterator[None]:
    """Put networks back as they were if what happens inside fails: their layers, adapters and settings; with `values` also
    the adapters' values. Weights that an adapter was fused into are not put back."""
    modules = [m for part in parts for m in part.modules()]
    containers = (dict, list, set, OrderedDict)
    kept = [(m, {k: v.copy() if type(v) in containers else v for k, v in vars(m).items()}) for m in modules]
    trained = [(p, p.requires_grad) for part in parts for p in part.parameters()]
    named = [pair for part in parts for pair in part.named_parameters()] if values else []
    adapters = [(p, p.detach(), p.detach().clone()) for name, p in named if ".lora_" in name]
    try:
        yield
    except BaseException:
        for module, state in kept:
            vars(module).clear()
            vars(module).update(state)
        for parameter, was in trained:
            parameter.requires_grad_(was)
        for parameter, place, value in adapters:
            parameter.data = place.copy_(value)
        raise
