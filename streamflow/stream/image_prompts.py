"""Image prompts (IP-Adapter) as a condition of frames: loading adapters, their scales, and the images of each frame. The
families' rules are in `streamflow.models.image_prompts`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from streamflow._grad_mode import computing
from streamflow.conditioning.blending import Cache, as_weighted, shares
from streamflow.conditioning.controlnet import check_scale
from streamflow.conditioning.image_prompt import Encoded, ImageEmbeds, blended, prompted
from streamflow.conditioning.prompt import Prompt
from streamflow.image_utils import uint8_pixels
from streamflow.models import image_prompt_rule
from streamflow.models.pipe_parts import has_image_adapters
from streamflow.stream.conditioner import Conditioner, Start
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.inputs import ImageReader
from streamflow.stream.model import Model
from streamflow.stream.ring import Group

if TYPE_CHECKING:
    from streamflow.conditioning.image_prompt import ImagePromptArgument
    from streamflow.models.image_prompts import Adapters, ImagePromptRule, Loaded

KEPT = 16  # encoded images that are kept, on a CPU
ByName = Mapping[str, Encoded]  # an image, or a blend of several, for each adapter


@dataclass(eq=False)
class Scales:
    """The scales of the frames that entered since a call of `set_scale(..., scope="frame")`, by the adapters' names. A call
    with scope "now" replaces `values`."""

    values: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Styled:
    """The image prompts of one frame: its images for the adapters, none for those that it leaves out, and its scales."""

    images: ByName
    scales: Scales


class ImagePrompts(Conditioner):
    """The image prompts of a stream, `stream.image_prompts`: an image, or several, beside the text. Frames get theirs by
    `stream(image, image_prompt=...)`, `txt2img(image_prompt=...)` and `frames([Input(image, image_prompt=...)])`, or all the
    same one by `set`. What an image prompt may be:

    - an image (PIL, array or tensor, in any size), or a list with an image prompt for each frame of the call;
    - several with weights, `[(style_a, 0.3), (style_b, 0.7)]`: the weighted mean of their embeddings;
    - `ImageEmbeds`, encoded before;
    - with several adapters, any of these by the adapters' names, `{"style": image, "face": other}`.
    """

    name = "image_prompt"
    uses_image = False

    def __init__(self, model: Model, denoiser: Denoiser, redraw: Callable[[], None], reader: ImageReader) -> None:
        self._model, self._denoiser, self._redraw, self._reader = model, denoiser, redraw, reader
        self.active = False  # there are adapters, and every frame has rows for them
        self._adapters: Adapters | None = None
        self._changing, self._reading = threading.Lock(), threading.RLock()
        self._scales = Scales({})  # of frames that enter
        self._all_scales: WeakSet[Scales] = WeakSet()
        self._renew = 0  # the number of coming steps before which rows in flight take scales that have changed
        self._fixed: ByName = {}
        self._forget()
        denoiser.on_empty.add(self._empty)
        self._adopt()

    def _adopt(self) -> None:
        """Use the adapters that are in the pipe's network already, if there are any."""
        adapter = self._model.adapter
        if adapter.image_prompt is None or not has_image_adapters(adapter.base):
            return
        from streamflow.models.image_prompts import adapters_of

        adapters = adapters_of(adapter, self._rule())
        if adapters is not None:
            self._set(adapters, adapters.loaded, {name: one.scale for name, one in adapters.loaded.items()})

    def _forget(self) -> None:
        """Forget what was made for the adapters that there were."""
        self._kept: list[tuple[str, np.ndarray, Encoded]] = []
        self._cast: WeakKeyDictionary[ImageEmbeds, tuple[tuple[str, ...], tuple[Encoded, ...]]] = WeakKeyDictionary()
        self._blends = Cache(KEPT)
        self._negatives: dict[tuple, Tensor] = {}
        self._blanks: dict[str, Tensor] = {}
        self._prompts: dict[int, tuple[Prompt, Styled, Mapping[str, float], Prompt]] = {}  # by the row of the group
        self._seen: dict[int, ByName] = {}  # by the row of the group, for the similarity filter

    def _empty(self) -> None:
        """Forget the frames that there were."""
        self._seen, self._prompts = {}, {}

    # -- adapters -------------------------------------------------------------------------------------------------------

    @property
    def adapters(self) -> dict[str, float]:
        """The names of the adapters, in the order in which they were loaded, and the scales of frames that enter."""
        return {name: self._scales.values[name] for name in self._loaded()}

    @property
    def fixed(self) -> tuple[str, ...]:
        """The names of the adapters for which `set` has given an image prompt."""
        return tuple(self._fixed)

    @computing
    def load(
        self,
        source: Any,
        name: str | Sequence[str] | None = None,
        *,
        scale: float | None = None,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        **kwargs: Any,
    ) -> tuple[str, ...]:
        """Load an adapter beside those that there are, or several at once, by the pipe's own `load_ip_adapter`. Returns the
        names.

        Frames in flight finish first, and what is accelerated is accelerated anew. The pipe's network has the adapters until
        `unload` or `close`, which give it back exactly what it had. To be called by the thread that draws.

        Args:
            source: as diffusers takes it: a hub id or a folder with `weight_name=` and `subfolder=`, a state dict, or a list
                of these; also the path of one file, on disk or on the hub
                ("h94/IP-Adapter/models/ip-adapter_sd15.safetensors").
            name: of the adapter, or one for each; by default "adapter_0", "adapter_1", ...
            scale: how strongly they act; by default as in diffusers, 1, or 0.5 for Stable Diffusion 3.
            image_encoder: a model, or the folder or hub path of one, where diffusers' loader does not find it, as for a
                state dict or one file. By default the one that the pipe has.
            feature_extractor: the image processor of `image_encoder`; by default it is made for it.
            kwargs: what else `load_ip_adapter` takes.

        Raises:
            ValueError: the adapter does not fit this pipeline, with the reason; a name that is taken; more adapters than the
                pipeline takes. Here and below all is as it was.
            NotImplementedError: diffusers has no IP-Adapter for this family; a kind of adapter that is not streamed.
            OSError: no such file.
            RuntimeError: `unet` or `velocity` were assigned; another stream of this pipe draws with its adapters.
        """
        from streamflow.models.image_prompts import Adapters, find_encoder, keeping_encoders, load

        rule, model = self._changeable("image_prompts.load()"), self._model
        if scale is not None:
            check_scale("scale of an image prompt", scale)
        with self._denoiser.ticks, keeping_encoders(model.pipe) as encoders:
            if self._adapters is None:
                model.adapter.check_network(model.adapter.base)
            adapters = self._adapters or Adapters(model.adapter.base, rule)
            find_encoder(model.pipe, rule, image_encoder, feature_extractor)
            loaded = load(adapters, model.pipe, source, kwargs, given=image_encoder is not None)
            names = self._new_names(name, len(loaded), list(adapters.loaded))
            if rule.most is not None and len(adapters.loaded) + len(loaded) > rule.most:
                raise ValueError(
                    f"{type(model.pipe).__name__} takes {rule.most} adapter at a time: unload() the other first"
                )
            by_name = dict(zip(names, loaded, strict=True))
            scales = {key: one.scale if scale is None else float(scale) for key, one in by_name.items()}
            self._put(adapters, {**adapters.loaded, **by_name}, {**self._scales.values, **scales})
            adapters.encoders = adapters.encoders or encoders
        return names

    @computing
    def unload(self, name: str | None = None) -> None:
        """Take an adapter out, or all of them; as `load`, frames in flight finish first. With the last one the pipe gets
        back the attention processors and the image encoder that it had. ValueError: an unknown name, with those known."""
        self._changeable("image_prompts.unload()")
        loaded = self._loaded()
        if name is not None:
            self._check_names([name])
        adapters = self._adapters
        if adapters is None:
            return
        left = {key: one for key, one in loaded.items() if name is not None and key != name}
        self._put(adapters, left, {key: self._scales.values[key] for key in left})
        if not left:
            self._model.pipe.register_modules(**adapters.encoders)

    def set_scale(self, scale: float | Mapping[str, float], *, scope: str = "now") -> None:
        """How strongly adapters act. From any thread; nothing is compiled or captured again.

        Args:
            scale: of all adapters, or of those that are named.
            scope: "now" for all rows from the next tick on, those in flight too; "frame" for frames that enter from now on.

        Raises:
            ValueError, TypeError: an unknown name, with those known; a scale that is no finite number.
        """
        self._model.check_open()
        if scope not in ("now", "frame"):
            raise ValueError(f"unknown scope {scope!r}: choose 'now' or 'frame'")
        given = dict(scale) if isinstance(scale, Mapping) else dict.fromkeys(self._loaded(), scale)
        if not given:
            raise ValueError("there is no adapter to scale: image_prompts.load(...) loads one")
        self._check_names(list(given))
        for key, value in given.items():
            check_scale(f"scale of adapter {key!r}", value)
        values = {key: float(value) for key, value in given.items()}
        with self._changing:
            if scope == "frame":
                self._scales = Scales({**self._scales.values, **values})
                self._all_scales.add(self._scales)
            else:
                for one in list(self._all_scales):
                    one.values = {**one.values, **values}
                self._renew = self._denoiser.stages + 1  # and a group that was made before the change may enter yet
        self._redraw()

    @computing
    def set(self, image_prompt: ImagePromptArgument | None) -> None:
        """The image prompt of all frames that enter from now on and bring none, until another one is set; None ends it. It
        stays through `prepare`, and is encoded once. From any thread. TypeError, ValueError: as for a single frame."""
        self._model.check_open()
        self._fixed = {} if image_prompt is None else self._read(image_prompt, 1)[0]
        self._redraw()

    @computing
    def encode(self, image_prompt: ImagePromptArgument) -> ImageEmbeds:
        """An image prompt, encoded, which calls take in its place, for the adapters that it is for."""
        images = self._read(image_prompt, 1)[0]
        return ImageEmbeds.of([images[name] for name in self._loaded() if name in images])

    def close(self) -> None:
        """Give the pipe back what it had, unless another stream of it draws with its adapters."""
        adapters, self._adapters, self._fixed = self._adapters, None, {}
        self._forget()
        if adapters is not None:
            adapters.users.discard(self)
            if not adapters.users:
                adapters.use({})
                self._model.pipe.register_modules(**adapters.encoders)

    # -- of frames ------------------------------------------------------------------------------------------------------

    @computing
    def read(self, given: ImagePromptArgument | None, images: Tensor | None, positions: range) -> list[Styled]:
        """The image prompts of each frame: those of the call, or the one that is set for all."""
        count = len(positions)
        entries = [self._fixed] * count if given is None else self._read(given, count)
        for position, entry in zip(positions, entries, strict=True):
            row = position % self._model.frames
            if row in self._seen and not _same(self._seen[row], entry):
                self._redraw()
            self._seen[row] = entry
        return [Styled(entry, self._scales) for entry in entries]

    def compared(self, entries: Sequence[Styled]) -> Tensor | None:
        """Nothing: frames with other image prompts than the last ones are always drawn (`read`)."""
        return None

    @computing
    def join(self, group: Group, entries: Sequence[Styled | None], start: Start) -> Group:
        """The group with its frames' images in their prompts."""
        styled = [one or Styled({}, self._scales) for one in entries]
        if any(name not in self._blanks for one in styled for name in one.images):
            raise RuntimeError(
                "adapters of image prompts were unloaded while frames of frames() waited for their group to be full: unload "
                "them before the loop, or draw with frame_buffer_size=1"
            )
        rows = enumerate(zip(group.prompts, styled, strict=True))
        return replace(group, prompts=tuple(self._prompt(prompt, one, row) for row, (prompt, one) in rows))

    def example(self, prompt: Prompt) -> Prompt:
        """The prompt with images of zeros for the adapters that there are, in the shapes that the encoder makes."""
        if self._can_encode():
            for name in self._blanks:
                self._encoded(name, -torch.ones(1, 3, self._model.height, self._model.width))
        nothing = Styled({}, self._scales)
        return prompted(prompt, {}, dict(self._blanks), partial(self._row, nothing)) if self._blanks else prompt

    def _prompt(self, plain: Prompt, styled: Styled, row: int) -> Prompt:
        """A prompt with a frame's images; the last one in this row of the group where it is the same."""
        values = styled.scales.values
        last = self._prompts.get(row)
        if last is not None and last[0] is plain and last[2] is values and _same(last[1].images, styled.images):
            return last[3]
        images = {name: self._whole(name, one, plain) for name, one in styled.images.items()}
        for name, one in images.items():
            self._take_shape(name, one)
        made = prompted(plain, images, dict(self._blanks), partial(self._row, styled))
        self._prompts[row] = plain, styled, values, made
        return made

    def _take_shape(self, name: str, one: Encoded) -> None:
        """Give the zeros of frames without an image for this adapter the shape of an encoded image."""
        if self._blanks[name].shape != one.positive.shape:
            self._blanks[name] = torch.zeros_like(one.positive)

    def _row(self, styled: Styled) -> Tensor:
        """The scales of a frame as they are now, float32 `[1, adapters]`, 0 where it has no image."""
        values = [styled.scales.values[name] if name in styled.images else 0.0 for name in self._blanks]
        return self._model.to_device(torch.tensor([values], dtype=torch.float32), torch.float32)

    def _whole(self, name: str, one: Encoded, prompt: Prompt) -> Encoded:
        """An encoded image, with the negative one that the prompt needs."""
        if prompt.uncond is None or one.negative is not None:
            return one
        key = name, tuple(one.positive.shape)
        if key not in self._negatives:
            model, rule = self._model, self._rule()
            if rule.encodes_negative(self._loaded()[name]):
                self._check_encoder(name)
            size = model.width, model.height
            negative = rule.negative(model.pipe, self._loaded()[name], one.positive, size)
            self._negatives[key] = negative.to(one.positive)
        return replace(one, negative=self._negatives[key])

    def _take_scales(self) -> None:
        """Let rows in flight take scales that have changed. Only the drawing thread calls this, before a step."""
        if self._renew:
            with self._changing:
                self._renew -= 1
            state, engine = self._denoiser.drawing()
            engine.set_prompt(state.prompt, frozenset())  # makes the prompts anew, of the same tensors

    # -- image prompts --------------------------------------------------------------------------------------------------

    def _read(self, given: Any, count: int) -> list[dict[str, Encoded]]:
        """The images of each of so many frames, for each adapter."""
        self._rule()
        names = list(self._loaded())
        if not names:
            raise ValueError("an image prompt needs an adapter: image_prompts.load(...) loads one")
        with self._reading:
            if isinstance(given, (list, tuple)) and given and not _is_blend(given):
                return _for_frames([self._fixed if one is None else self._read(one, 1)[0] for one in given], count)
            if isinstance(given, ImageEmbeds):
                return [dict(zip(names, self._embeds(given, names), strict=True))] * count
            if not isinstance(given, Mapping):
                if len(names) > 1:
                    raise ValueError(
                        f"there are {len(names)} adapters, {', '.join(map(repr, names))}: name the one that an image is "
                        f"for, image_prompt={{{names[0]!r}: image}}"
                    )
                given = {names[0]: given}
            self._check_names(list(given))
            each = {name: _for_frames(self._of_adapter(name, one), count) for name, one in given.items() if one is not None}
        return [{name: images[i] for name, images in each.items()} for i in range(count)]

    def _of_adapter(self, name: str, given: Any) -> list[Encoded]:
        """One image prompt for an adapter, or one for each frame."""
        if isinstance(given, ImageEmbeds):
            return list(self._embeds(given, [name]))
        if _is_blend(given):
            pairs = as_weighted("image_prompt", given, object, "image")
            parts = [(self._single(name, one), share) for (one, _), share in zip(pairs, shares(pairs, True), strict=True)]
            kept = tuple((one, share) for one, share in parts if share)
            return [self._blends.get(kept, lambda: blended(*zip(*kept, strict=True)))]
        if isinstance(given, (list, tuple)):
            if not given:
                raise ValueError("an empty list of image prompts")
            return [self._single(name, one) for one in given]
        what = f"the image prompt of frame {self._denoiser.next_id}"
        return [self._encoded(name, pixels) for pixels in self._reader.each(given, what)]

    def _single(self, name: str, given: Any) -> Encoded:
        made = self._of_adapter(name, given)
        if len(made) != 1:
            raise ValueError(f"{len(made)} images where one is needed for adapter {name!r}: pass them one by one")
        return made[0]

    def _encoded(self, name: str, image: Tensor) -> Encoded:
        """An image `[1, 3, h, w]`, encoded unless it is among the last ones."""
        pixels = uint8_pixels(image)[0]
        for known, its, encoded in self._kept:
            if known == name and np.array_equal(its, pixels):
                return encoded
        self._check_encoder(name)
        one = self._loaded()[name]
        encoded = self._on_device(self._rule().encode(self._model.pipe, one, PIL.Image.fromarray(pixels)))
        self._take_shape(name, encoded)
        self._kept = [(name, pixels, encoded), *self._kept[: KEPT - 1]]
        return encoded

    def _embeds(self, given: ImageEmbeds, names: Sequence[str]) -> tuple[Encoded, ...]:
        """Embeddings of the caller for these adapters. ValueError where they do not fit."""
        if len(given.parts) != len(names):
            raise ValueError(
                f"ImageEmbeds for {len(given.parts)} adapters, and here they are for {', '.join(map(repr, names))}: pass "
                f"one tensor for each"
            )
        known = self._cast.get(given)
        if known is not None and known[0] == tuple(names):
            return known[1]
        for name, part in zip(names, given.parts, strict=True):
            shape, found = self._rule().shape(self._loaded()[name]), part.positive.shape
            if len(found) != len(shape) + 1 or found[-1] != shape[-1]:
                form = ", ".join(["1", *("n" for _ in shape[:-1]), str(shape[-1])])
                raise ValueError(f"image embeddings of {list(found)}, and adapter {name!r} takes [{form}]")
        made = tuple(map(self._on_device, given.parts))
        self._cast[given] = tuple(names), made
        return made

    def _on_device(self, one: Encoded) -> Encoded:
        place = self._model.device, self._model.adapter.base.dtype
        return Encoded(one.positive.to(*place), None if one.negative is None else one.negative.to(*place))

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _loaded(self) -> Mapping[str, Loaded]:
        return {} if self._adapters is None else self._adapters.loaded

    def _rule(self) -> ImagePromptRule:
        return image_prompt_rule(self._model.adapter)

    def _changeable(self, call: str) -> ImagePromptRule:
        """The rule, if adapters can be changed now."""
        model = self._model
        model.check_open()
        self._denoiser.check_step(call)
        rule, adapter = self._rule(), model.adapter
        if not hasattr(model.pipe, "load_ip_adapter"):
            raise NotImplementedError(f"{type(model.pipe).__name__} has no load_ip_adapter, which loads image prompts")
        if model.unet is not getattr(model.pipe, adapter.network):
            raise RuntimeError("stream.unet is not the pipe's own network, into which adapters of image prompts are loaded")
        if adapter.velocity is not adapter.own_velocity:
            raise RuntimeError(
                f"stream.velocity was assigned, {type(adapter.velocity).__name__}, and image prompts belong under it: "
                f"assign stream.unet = stream.unet, load or unload, then wrap or shard anew"
            )
        if getattr(model.acceleration[1], "fuse_qkv", False):
            raise RuntimeError(
                "fuse_qkv puts attention processors of its own in the place of those of image prompts: accelerate without it"
            )
        if self._adapters is not None and len(self._adapters.users) > 1:
            raise RuntimeError("another stream of this pipe draws with its adapters of image prompts: close() it first")
        return rule

    def _new_names(self, given: str | Sequence[str] | None, count: int, taken: Sequence[str]) -> tuple[str, ...]:
        """The names of adapters that were loaded. ValueError: taken, or not one for each."""
        free = (name for i in range(len(taken) + count) if (name := f"adapter_{i}") not in taken)
        names = [next(free) for _ in range(count)] if given is None else [given] if isinstance(given, str) else list(given)
        if len(names) != count or len(set(names)) != count or not all(isinstance(one, str) and one for one in names):
            raise ValueError(f"{count} adapters were loaded, and their names are {given!r}: give each a name of its own")
        if both := [name for name in names if name in taken]:
            raise ValueError(f"there is an adapter named {both[0]!r}: unload({both[0]!r}) first, or choose another name")
        return tuple(names)

    def _check_names(self, names: Sequence[str]) -> None:
        loaded = self._loaded()
        if unknown := [name for name in names if name not in loaded]:
            known = ", ".join(map(repr, loaded)) or "none: image_prompts.load(...) loads one"
            raise ValueError(f"no adapter is named {', '.join(map(repr, unknown))}; there are {known}")

    def _can_encode(self) -> bool:
        """Whether the pipe has an image encoder and its image processor."""
        parts = "image_encoder", "feature_extractor"
        return all(getattr(self._model.pipe, name, None) is not None for name in parts)

    def _check_encoder(self, name: str) -> None:
        if not self._can_encode():
            raise ValueError(
                f"{type(self._model.pipe).__name__} has no image encoder for adapter {name!r}: load(..., image_encoder="
                f"model or folder), or pass ImageEmbeds, with their negative half under guidance"
            )

    def _put(self, adapters: Adapters, loaded: Mapping[str, Loaded], scales: Mapping[str, float]) -> None:
        """Let the frames in flight finish, then draw with these adapters. If that fails, the former ones stay."""
        model, fixed = self._model, self._fixed
        before = adapters, adapters.loaded, self._scales.values
        with self._denoiser.ticks:
            if self._denoiser.engine is not None:
                self._denoiser.run_out()
            model.before_change()
            try:
                self._set(adapters, loaded, scales)
                model.after_change()
            except BaseException:
                self._set(*before)
                self._fixed = fixed
                raise
        self._redraw()

    def _set(self, adapters: Adapters, loaded: Mapping[str, Loaded], scales: Mapping[str, float]) -> None:
        model = self._model
        self._forget()
        adapters.use(loaded)
        self._adapters, self.active = (adapters if loaded else None), bool(loaded)
        self._fixed = {name: one for name, one in self._fixed.items() if name in loaded}
        self._scales = Scales({name: scales[name] for name in loaded})
        self._all_scales.add(self._scales)
        self._denoiser.before_step.remove(self._take_scales)
        adapters.users.discard(self)
        model.adapter.set_image_prompts(adapters.prompting if loaded else None)
        if loaded:
            adapters.users.add(self)
            self._denoiser.before_step.add(self._take_scales)
            like = torch.zeros(0, device=model.device, dtype=model.adapter.base.dtype)
            self._blanks = {name: like.new_zeros(1, *adapters.rule.shape(one)) for name, one in loaded.items()}


def _for_frames(made: Sequence[Any], count: int) -> list[Any]:
    """One a frame of these. ValueError: neither one nor one for each frame."""
    if len(made) not in (1, count):
        raise ValueError(f"{len(made)} image prompts for {count} frames: pass one, or one each")
    return list(made) * (count // len(made))


def _is_blend(given: object) -> bool:
    """Whether this is a list of image prompts with weights."""
    pairs = given if isinstance(given, (list, tuple)) else ()
    return bool(pairs) and all(
        isinstance(one, (list, tuple)) and len(one) == 2 and isinstance(one[1], Real) and not isinstance(one[1], bool)
        for one in pairs
    )


def _same(a: ByName, b: ByName) -> bool:
    """Whether two frames have the same images."""
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)
