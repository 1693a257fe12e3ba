"""The IP-Adapters of each family: diffusers' own loaders and image encoders (diffusers loaders/ip_adapter.py, and
`encode_image` of pipelines/stable_diffusion, pipelines/stable_diffusion_3 and pipelines/flux), and attention processors of
ours in the place of those that diffusers puts into the network.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import PIL.Image
import torch
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0, SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterFaceIDPlusImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn

from streamflow.conditioning.image_prompt import Encoded, ImagePrompting, Scaled
from streamflow.models.attention_backend import processor_of
from streamflow.models.image_attention import (
    FluxImageAttention,
    ImageProjections,
    SD3ImageAttention,
    TimedImageProjection,
    UNetImageAttention,
)
from streamflow.models.pipe_parts import base_network

if TYPE_CHECKING:
    from streamflow.models.adapter import FlowAdapter
    from streamflow.models.protocols import Call, Network, Pipeline

PROJECTIONS = ("encoder_hid_proj", "image_proj")
TYPE = "encoder_hid_dim_type"
ENCODERS = ("image_encoder", "feature_extractor")
MISSING = object()


@dataclass(frozen=True, eq=False)
class Loaded:
    """An adapter as diffusers has loaded it. projection: of its image embeddings. places: by the names of attention
    processors, diffusers' processor with its layers, and which of that one's adapters it is. scale: diffusers' own."""

    projection: Any
    places: Mapping[str, tuple[Any, int]]
    scale: float

    @property
    def width(self) -> int:
        """The width of its image embeddings."""
        return next(one for one in self.projection.modules() if isinstance(one, nn.Linear)).in_features


class ImagePromptRule:
    """The rule of a family's adapters. A subclass sets the class attributes and defines what raises here.

    given, attention: diffusers' class of attention processors, and ours. most: how many adapters a network can have; None:
    any number. projection: the network's attribute that holds the projections. encoder: the argument of `load_ip_adapter`
    that names the image encoder. vision: the class of image encoders in transformers.
    """

    given: ClassVar[type]
    attention: ClassVar[Any]
    most: ClassVar[int | None] = None
    projection: ClassVar[str] = "encoder_hid_proj"
    encoder: ClassVar[str] = "image_encoder_folder"
    vision: ClassVar[str] = "CLIPVisionModelWithProjection"

    def load_arguments(self, network: Network) -> Call:
        """More arguments of `load_ip_adapter`, unless they are given."""
        return {}

    def projections(self, network: Any) -> list[Any]:
        """The projections of the adapters in a network, in order."""
        return list(network.encoder_hid_proj.image_projection_layers)

    def joined(self, projections: Sequence[Any]) -> nn.Module:
        """One module of several adapters' projections, which takes embeddings with scales."""
        return ImageProjections(list(projections))

    def arguments(self, scaled: list[Scaled]) -> Call:
        """The network's arguments for each adapter's embeddings with their scales."""
        raise NotImplementedError

    def shape(self, one: Loaded) -> tuple[int, ...]:
        """The shape of the embeddings of one image, without the batch dimension."""
        return (1, one.width)

    def call(self, one: Loaded, embeds: Tensor) -> Tensor:
        """The keys that the first layer of an adapter makes of embeddings `[1, ...]`. RuntimeError: sizes do not fit."""
        processor, i = next(iter(one.places.values()))
        return processor.to_k_ip[i](one.projection(embeds.flatten(0, 1)))

    def encode(self, pipe: Pipeline, one: Loaded, image: PIL.Image.Image) -> Encoded:
        """An image, encoded by the pipeline's own code."""
        raise NotImplementedError

    def encodes_negative(self, one: Loaded) -> bool:
        """Whether `negative` needs the image encoder."""
        return False

    def features(self, encoder: Any) -> Any:
        """The image processor of an image encoder."""
        from transformers import CLIPImageProcessor

        size = encoder.config.image_size
        return CLIPImageProcessor(size=size, crop_size=size)

    def negative(self, pipe: Pipeline, one: Loaded, positive: Tensor, size: tuple[int, int]) -> Tensor:
        """What the pipeline gives the rows of the negative prompt, where nothing else was passed. size: of the frames."""
        return torch.zeros_like(positive)


class UNetImagePrompts(ImagePromptRule):
    """Stable Diffusion's and SDXL's. Adapters with a resampler ("plus") see the encoder's last but one layer, and under
    guidance what it makes of zeros."""

    given, attention = IPAdapterAttnProcessor2_0, UNetImageAttention

    def load_arguments(self, network: Network) -> Call:
        return {"subfolder": "", "weight_name": None}

    def arguments(self, scaled: list[Scaled]) -> Call:
        return {"added_cond_kwargs": {"image_embeds": scaled}}

    def shape(self, one: Loaded) -> tuple[int, ...]:
        return (1, one.width) if self._pooled(one) else (1, 1, one.width)

    def encode(self, pipe: Pipeline, one: Loaded, image: PIL.Image.Image) -> Encoded:
        positive, negative = pipe.encode_image(image, pipe.device, 1, not isinstance(one.projection, ImageProjection))
        return Encoded(positive[None], negative[None])

    def encodes_negative(self, one: Loaded) -> bool:
        return not self._pooled(one)

    def negative(self, pipe: Pipeline, one: Loaded, positive: Tensor, size: tuple[int, int]) -> Tensor:
        if self._pooled(one):
            return torch.zeros_like(positive)
        black = self.encode(pipe, one, _black(size)).negative
        return torch.zeros_like(positive) if black is None else black.expand_as(positive)

    def _pooled(self, one: Loaded) -> bool:
        """Whether its embeddings are one vector an image, not several tokens."""
        return isinstance(one.projection, ImageProjection) or hasattr(one.projection, "num_tokens")


class FluxImagePrompts(ImagePromptRule):
    """Flux's and Chroma's. Under true guidance the negative prompt sees a black image."""

    given, attention = FluxIPAdapterAttnProcessor, FluxImageAttention
    encoder = "image_encoder_pretrained_model_name_or_path"

    def load_arguments(self, network: Network) -> Call:
        return {"weight_name": None, "image_encoder_dtype": network.dtype}

    def arguments(self, scaled: list[Scaled]) -> Call:
        return {"joint_attention_kwargs": {"ip_adapter_image_embeds": scaled}}

    def encode(self, pipe: Pipeline, one: Loaded, image: PIL.Image.Image) -> Encoded:
        return Encoded(pipe.encode_image(image, pipe.device, 1)[None])

    def encodes_negative(self, one: Loaded) -> bool:
        return True

    def negative(self, pipe: Pipeline, one: Loaded, positive: Tensor, size: tuple[int, int]) -> Tensor:
        return self.encode(pipe, one, _black(size)).positive.expand_as(positive)


class SD3ImagePrompts(ImagePromptRule):
    """Stable Diffusion 3's, one at a time."""

    given, attention = SD3IPAdapterJointAttnProcessor2_0, SD3ImageAttention
    most = 1
    projection = "image_proj"
    vision = "SiglipVisionModel"

    def features(self, encoder: Any) -> Any:
        from transformers import SiglipImageProcessor

        size = encoder.config.image_size
        return SiglipImageProcessor(size={"height": size, "width": size})

    def projections(self, network: Any) -> list[Any]:
        return [network.image_proj]

    def joined(self, projections: Sequence[Any]) -> nn.Module:
        return TimedImageProjection(projections[0])

    def arguments(self, scaled: list[Scaled]) -> Call:
        return {"joint_attention_kwargs": {"ip_adapter_image_embeds": scaled[0]}}

    def call(self, one: Loaded, embeds: Tensor) -> Tensor:
        processor, _ = next(iter(one.places.values()))
        tokens, temb = one.projection(embeds, torch.zeros(1, device=embeds.device))
        return processor.to_k_ip(processor.norm_ip(tokens, temb=temb))

    def encode(self, pipe: Pipeline, one: Loaded, image: PIL.Image.Image) -> Encoded:
        return Encoded(pipe.encode_image(image, pipe.device))


def _black(size: tuple[int, int]) -> PIL.Image.Image:
    return PIL.Image.new("RGB", size)


# -- of a network -----------------------------------------------------------------------------------------------------------


def attentions(network: nn.Module) -> dict[str, Any]:
    """The attention modules of a network, by the names that diffusers gives their processors."""
    return {
        f"{name}.processor": module
        for name, module in network.named_modules()
        if processor_of(module) is not None and not name.startswith(PROJECTIONS)
    }


class _State:
    """The attention processors and the projections that a network has, for `put_back`."""

    def __init__(self, network: Network) -> None:
        self.processors = {name: module.processor for name, module in attentions(network).items()}
        self._held = {name: [holder.get(name, MISSING) for holder in _holders(network)] for name in PROJECTIONS}
        self._type = vars(network.config).get(TYPE, MISSING)

    def put_back(self, network: Network) -> None:
        """Give the network exactly these again."""
        for name, module in attentions(network).items():
            if module.processor is not self.processors[name]:
                module.set_processor(self.processors[name])
        for name, held in self._held.items():
            _restore(_holders(network), name, held)
        _restore((vars(network.config),), TYPE, (self._type,))


def _holders(network: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Where a module keeps what is assigned to it."""
    return vars(network), network._modules


def _restore(holders: Sequence[dict[str, Any]], name: str, held: Sequence[Any]) -> None:
    for holder, value in zip(holders, held, strict=True):
        if value is MISSING:
            holder.pop(name, None)
        else:
            holder[name] = value


class Adapters:
    """The adapters in a network, by name, with our attention processors in the place of diffusers'. before: what the network
    had. encoders: the image encoder and its processor that the pipe had. users: the parts of streams that draw with these
    adapters; what was there before is put back when none is left."""

    def __init__(self, network: Network, rule: ImagePromptRule) -> None:
        self._network, self.rule = weakref.ref(network), rule
        self.before = _State(network)
        self.loaded: dict[str, Loaded] = {}
        self.encoders: dict[str, Any] = {}
        self.users: WeakSet[Any] = WeakSet()

    @property
    def network(self) -> Network:
        """The network, which these do not keep alive."""
        network = self._network()
        if network is None:
            raise RuntimeError("the network of these adapters is gone: keep the pipe while it is streamed")
        return network

    @property
    def prompting(self) -> ImagePrompting:
        """What the velocity of the network is given."""
        shapes = tuple(self.rule.shape(one) for one in self.loaded.values())
        return ImagePrompting(self.rule.arguments, shapes, self.intact)

    @contextmanager
    def plain(self) -> Iterator[None]:
        """A context in which the network is what it was before; diffusers may load adapters into it."""
        network = self.network
        state = _State(network)
        self.before.put_back(network)
        try:
            yield
        finally:
            state.put_back(network)

    def use(self, loaded: Mapping[str, Loaded]) -> None:
        """Have these adapters in the network. Without any, it is what it was before."""
        network = self.network
        self.before.put_back(network)
        self.loaded = dict(loaded)
        if not loaded:
            _ADAPTERS.pop(network, None)
            return
        for name, module in attentions(network).items():
            places = [one.places[name] for one in loaded.values() if name in one.places]
            if places:
                module.set_processor(self.rule.attention.of(places, self.before.processors[name]))
        joined = self.rule.joined([one.projection for one in loaded.values()])
        setattr(network, self.rule.projection, joined)
        if self.rule.projection == PROJECTIONS[0]:
            vars(network.config)[TYPE] = "ip_image_proj"
        _ADAPTERS[network] = self

    def intact(self) -> bool:
        """Whether the processors in the network are still these."""
        named = {name for one in self.loaded.values() for name in one.places}
        own = {name: module for name, module in attentions(self.network).items() if name in named}
        return len(own) == len(named) and all(isinstance(one.processor, self.rule.attention) for one in own.values())


_ADAPTERS: WeakKeyDictionary[nn.Module, Adapters] = WeakKeyDictionary()


def adapters_of(adapter: FlowAdapter, rule: ImagePromptRule) -> Adapters | None:
    """The adapters in the network of a family: those of another stream of it, those that the pipe has loaded, or none.

    Raises:
        ValueError: the pipe has given an adapter another scale in one block than in others.
    """
    network = adapter.base
    known = _ADAPTERS.get(network)
    if known is not None and known.intact():
        return known
    loaded = read(network, rule)
    if not loaded:
        return None
    made = Adapters(network, rule)
    made.use({f"adapter_{i}": one for i, one in enumerate(loaded)})
    return made


def read(network: Network, rule: ImagePromptRule) -> list[Loaded]:
    """The adapters that diffusers has loaded into a network."""
    own = {name: module.processor for name, module in attentions(network).items()}
    own = {name: one for name, one in own.items() if isinstance(one, rule.given)}
    if not own:
        return []
    made = []
    for i, projection in enumerate(rule.projections(network)):
        scales = [one.scale[i] if isinstance(one.scale, list) else one.scale for one in own.values()]
        if any(not isinstance(scale, (int, float)) or scale != scales[0] for scale in scales):
            raise ValueError(
                f"the pipe's set_ip_adapter_scale has given the blocks of adapter {i} several scales, and a stream has one "
                f"for each adapter: pipe.set_ip_adapter_scale(1.0) first"
            )
        made.append(Loaded(projection, {name: (one, i) for name, one in own.items()}, float(scales[0])))
    return made


def load(
    adapters: Adapters, pipe: Pipeline, source: object, arguments: Mapping[str, Any], given: bool = False
) -> list[Loaded]:
    """Load adapters by the pipe's own `load_ip_adapter`, and take them out of the network again. The pipe keeps the image
    encoder that was loaded with them (`keeping_encoders`). given: the pipe was given one before.

    Raises:
        ValueError: they do not fit this network, with the reason. NotImplementedError: a kind that is not streamed. OSError:
        no such file.
    """
    network, rule = adapters.network, adapters.rule
    source, found = _located(source, arguments)
    arguments = {**rule.load_arguments(network), **found, **arguments}
    several = source if isinstance(source, list) else [source]
    if given or "weight_name" in found or any(isinstance(one, Mapping) for one in several):
        arguments.setdefault(rule.encoder, None)
    if len(several) > 1 and not arguments.get("weight_name"):
        arguments["weight_name"] = [None] * len(several)
    if isinstance(source, str) and not arguments.get("weight_name", MISSING):
        raise ValueError(f"{source!r} names no file of an adapter: pass weight_name=, and subfolder= where it is in one")
    with adapters.plain(), _weights_of(network) as weights:
        known = _loras(network)
        try:
            pipe.load_ip_adapter(source, **arguments)
        except (OSError, torch.OutOfMemoryError):
            raise
        except (ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise _misfit(network, f"{type(error).__name__}: {' '.join(str(error).split('. If')[0].split())}") from error
        finally:
            loras = [name for name in _loras(network) if name not in known]
            if loras:
                pipe.delete_adapters(loras)
            if loras and not known:
                pipe.unload_lora_weights()
        loaded = read(network, rule)
    if loras or any(isinstance(one.projection, IPAdapterFaceIDPlusImageProjection) for one in loaded):
        raise NotImplementedError(
            "a FaceID adapter that brings a LoRA or needs CLIP's embeddings beside the face's is not streamed: load one "
            "without, such as ip-adapter-faceid-portrait, and pass its faces as ImageEmbeds"
        )
    for one, state in zip(loaded, weights, strict=True):
        layers = {key.split(".")[0] for key in state["ip_adapter"] if "to_k_ip" in key}
        if len(layers) != len(one.places):
            raise _misfit(network, f"it is for {len(layers)} blocks, and this network has {len(one.places)}")
        _check(network, rule, one)
        for module in (one.projection, *(place for place, _ in one.places.values())):
            module.eval().requires_grad_(False)
    return loaded


@contextmanager
def _weights_of(network: Any) -> Iterator[list[Mapping[str, Any]]]:
    """A context in which the state dicts that diffusers loads into a network are collected."""
    seen: list[Mapping[str, Any]] = []
    own = network._load_ip_adapter_weights

    def collecting(state_dicts: Any, **options: Any) -> None:
        seen.extend(state_dicts if isinstance(state_dicts, list) else [state_dicts])
        own(state_dicts, **options)

    vars(network)["_load_ip_adapter_weights"] = collecting
    try:
        yield seen
    finally:
        del vars(network)["_load_ip_adapter_weights"]


def _loras(network: Any) -> list[str]:
    return list(getattr(network, "peft_config", None) or ())


def _located(source: object, arguments: Mapping[str, Any]) -> tuple[object, Call]:
    """A source as diffusers takes it, and its arguments: a file by its path on disk, or on the hub."""
    if not isinstance(source, (str, Path)):
        return source, {}
    path = Path(source).expanduser()
    if path.is_file() and not arguments.get("weight_name"):
        return str(path), {"weight_name": path.name, "subfolder": ""}
    parts = str(source).split("/")
    if len(parts) > 2 and path.suffix and not path.is_absolute() and not arguments.get("weight_name"):
        return "/".join(parts[:2]), {"weight_name": parts[-1], "subfolder": "/".join(parts[2:-1])}
    if not path.is_dir() and (path.is_absolute() or len(parts) != 2 or parts[0] in (".", "..", "~")):
        raise FileNotFoundError(f"there is no file or folder {source}: pass one, or a hub id such as 'h94/IP-Adapter'")
    return str(source), {}


@contextmanager
def keeping_encoders(pipe: Pipeline) -> Iterator[Call]:
    """A context with the image encoder and the image processor of a pipe. An error gives them back to it."""
    before = {name: getattr(pipe, name) for name in ENCODERS if hasattr(pipe, name)}
    try:
        yield before
    except BaseException:
        pipe.register_modules(**before)
        raise


def find_encoder(pipe: Pipeline, rule: ImagePromptRule, encoder: Any, features: Any) -> None:
    """Give the pipe an image encoder, a model or the folder or hub path of one, and its image processor."""
    if encoder is not None:
        if isinstance(encoder, (str, Path)):
            encoder = _opened(rule, str(encoder))
        pipe.register_modules(image_encoder=encoder.to(pipe.device, pipe.dtype).eval().requires_grad_(False))
        features = features or rule.features(encoder)
    if features is not None:
        pipe.register_modules(feature_extractor=features)


def _opened(rule: ImagePromptRule, where: str) -> nn.Module:
    """An image encoder from a folder, on disk or on the hub, where it may be in a subfolder."""
    import transformers

    parts = where.split("/")
    inside = {"subfolder": "/".join(parts[2:])} if len(parts) > 2 and not Path(where).expanduser().is_dir() else {}
    cls = getattr(transformers, rule.vision)
    return cls.from_pretrained("/".join(parts[:2]) if inside else str(Path(where).expanduser()), **inside)


def _check(network: Network, rule: ImagePromptRule, one: Loaded) -> None:
    """ValueError unless an adapter has all its weights, and its layers fit each other."""
    modules = {"image_proj": one.projection, **{name: processor for name, (processor, _) in one.places.items()}}
    missing = [f"{name}.{key}" for name, part in modules.items() for key, p in part.named_parameters() if p.is_meta]
    if missing:
        raise _misfit(network, f"it lacks {len(missing)} weights, {missing[0]} for one")
    try:
        rule.call(one, torch.zeros(1, *rule.shape(one), device=network.device, dtype=network.dtype))
    except RuntimeError as error:
        raise _misfit(network, str(error)) from error


def _misfit(network: Network, detail: str) -> ValueError:
    return ValueError(
        f"this IP-Adapter does not fit {type(base_network(network)).__name__} ({detail}): load one that was trained for it"
    )
