"""Reference images as a condition of frames: those of single frames, and those that all frames have. The families' rules are
in `streamflow.models.references`."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import PIL.Image
import torch
from torch import Tensor

from streamflow._grad_mode import computing
from streamflow.conditioning.prompt import Prompt, extended
from streamflow.conditioning.reference import Entering, FixedReferences, Image, OwnSize, Reference, ReferenceRule, several
from streamflow.flow.schedule import Stages
from streamflow.image_utils import Size, image_size
from streamflow.models import reference_rule
from streamflow.models.codec import Codec
from streamflow.models.row_by_row import RowByRow
from streamflow.stream.callbacks import weak_call
from streamflow.stream.conditioner import Conditioner, Start
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.inputs import ImageReader
from streamflow.stream.model import Model
from streamflow.stream.outputs import Outputs
from streamflow.stream.request import owned
from streamflow.stream.ring import Group
from streamflow.stream.updates import Updates

if TYPE_CHECKING:
    from streamflow.image_utils import Images, ReferenceArgument
    from streamflow.models.protocols import Arguments

Key = int | str  # a frame's own reference by its index, one of all frames by its name


class References(Conditioner):
    """The conditioner of reference images."""

    name = "reference"
    uses_image = False

    def __init__(self, model: Model, denoiser: Denoiser, updates: Updates, outputs: Outputs, reader: ImageReader) -> None:
        self._model, self._denoiser, self._updates, self._reader = model, denoiser, updates, reader
        self.active = model.adapter.reference is not None  # an update may bring references of all frames at any time
        self._changing = threading.Lock()
        self._encoded: dict[tuple[int, Key], tuple[Codec, Reference]] = {}  # the last, by a row of the group and a key
        self._prompts: dict[int, tuple[Prompt, list[Reference], Prompt]] = {}  # (plain, references, extended) by row
        self._memories: dict[int, dict[str, Any]] = {}  # what the rule keeps, by row
        self._of_all: dict[str, tuple[object, tuple[Size, Size], Tensor]] = {}  # (as given, sizes, pixels) by name
        self._time: tuple[Stages, Tensor] | None = None
        updates.readers["references"] = weak_call(self.fixed)
        updates.readers["reference_reuse"] = weak_call(self.check_reuse)
        outputs.on_redraw.add(self.forget)
        denoiser.on_close.add(self._close)

    @property
    def references(self) -> tuple[str, ...]:
        """The names of the references that all frames have, in the order in which they were set."""
        return tuple(self._fixed().images)

    def set_reference(self, name: str, image: Images | None) -> None:
        """A reference image that all frames have which enter from now on, after their own; None takes it away. It stays,
        through `prepare` too, and is encoded once. From any thread.

        Raises:
            TypeError, ValueError: no image, or one that the pipeline refuses; an unknown name to take away.
            NotImplementedError: the pipeline takes no references. Then all is as it was.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"a reference is named by a text, not {name!r}")
        self._model.check_open()
        self._rule()
        made = None if image is None else self._checked(image, name)
        with self._changing:
            images = dict(self._fixed().images)
            if made is not None:
                images[name] = made
            elif images.pop(name, None) is None:
                known = ", ".join(map(repr, images)) or "none"
                raise ValueError(f"no reference is named {name!r}; there are {known}")
            self._updates.keep(references=FixedReferences(images))

    def fixed(self, given: FixedReferences | Mapping[str, Images] | Sequence[Images] | Images | None) -> FixedReferences:
        """What `update(references=...)` takes as the references of all frames: images by name, one or several, or None."""
        if isinstance(given, FixedReferences):
            return given
        if given is not None:
            self._rule()
        if not isinstance(given, Mapping):
            given = {f"reference_{i}": one for i, one in enumerate(several(given))}
        return FixedReferences({name: self._checked(one, name) for name, one in given.items()})

    def check_reuse(self, tolerance: float | None) -> float | None:
        """`reference_reuse` of `update`. NotImplementedError where the family keeps no keys and values."""
        if tolerance is not None and not self._rule().keeps:
            name = type(self._model.adapter.pipe).__name__
            raise NotImplementedError(
                f"reference_reuse keeps keys and values of references, and {name} has none: use Flux2KleinKVPipeline"
            )
        return tolerance

    def forget(self) -> None:
        """Keep nothing that the networks made of references. Called when what is drawn has changed."""
        self._prompts, self._memories = {}, {}

    def _close(self) -> None:
        self._encoded, self._prompts, self._memories, self._of_all = {}, {}, {}, {}

    # -- of frames ------------------------------------------------------------------------------------------------------

    def images(self, given: Images, what: str) -> list[Tensor]:
        """One image or several, each `[1, 3, h, w]` in [-1, 1], in the pipeline's own size for references."""
        return self._reader.each(given, what, self._sizes)

    def read(
        self, given: ReferenceArgument | None, images: Tensor | None, positions: range
    ) -> list[tuple[Tensor, ...] | None]:
        """The images of each frame's own references."""
        if given is None:
            return [None] * len(positions)
        self._rule()
        by_reference = [self._of_frames(one, i, len(positions)) for i, one in enumerate(several(given))]
        return [tuple(images[i] for images in by_reference) or None for i in range(len(positions))]

    def compared(self, entries: Sequence[tuple[Tensor, ...] | None]) -> Tensor | None:
        """Nothing. Where an image is a reference, the similarity filter is given it as the frame's image."""
        return None

    @computing
    def join(self, group: Group, entries: Sequence[tuple[Tensor, ...] | None], start: Start) -> Group:
        """The group with its frames' references in their prompts."""
        state, adapter = self._denoiser.prepared(), self._model.adapter
        fixed = {name: self._sized(name, image) for name, image in state.request.references.images.items()}
        rows: list[dict[Key, Tensor]] = [{**dict(enumerate(entry or ())), **fixed} for entry in entries]
        exact = isinstance(adapter.velocity, RowByRow)
        time = self._first_time(state.stages)
        kept: dict[tuple[int, Key], tuple[Codec, Reference]] = {}
        prompts = []
        for row, (images, prompt, x) in enumerate(zip(rows, group.prompts, group.x.split(1), strict=True)):
            for key, image in images.items():
                kept[row, key] = self._encode(self._encoded.get((row, key)), image, exact)
            references = [kept[row, key][1] for key in images]
            memory = self._memories.setdefault(row, {})
            entering = Entering(prompt, x, time, exact, self._read_prompt, state.request.reference_reuse, memory)
            prompts.append(self._extended(references, entering, row))
        self._encoded = kept
        return replace(group, prompts=tuple(prompts))

    def example(self, prompt: Prompt) -> Prompt:
        """A prompt with as many references as a frame has that brings one image, where images are references; black ones."""
        state, model = self._denoiser.prepared(), self._model
        if model.adapter.reference is None or not self._rule().uses_codec:
            return prompt
        sizes = [(model.width, model.height)] if model.image_is_reference else []
        sizes += [image_size(image) for image in state.request.references.images.values()]
        if not sizes:
            return prompt
        cropped = [self._sizes(size)[1] for size in sizes]
        black = [-torch.ones(1, 3, height, width) for width, height in cropped]
        references = [self._encode(None, image, True)[1] for image in black]
        x = torch.zeros(1, *model.shape, device=model.device, dtype=model.dtype)
        entering = Entering(prompt, x, self._first_time(state.stages), False, self._read_prompt)
        return self._extended(references, entering)

    # -- inside ---------------------------------------------------------------------------------------------------------

    def _rule(self) -> ReferenceRule:
        return reference_rule(self._model.adapter)

    def _fixed(self) -> FixedReferences:
        return self._updates.current("references")

    def _sizes(self, size: Size) -> tuple[Size, Size]:
        """`ReferenceRule.sizes` under the arguments of the pipeline that are in force."""
        state = self._denoiser.state
        return self._rule().sizes(self._model.adapter, size, {} if state is None else state.request.arguments)

    def _checked(self, image: Images, name: str) -> Image:
        """A copy of one image, which can be a reference."""
        made = self.images(image, f"reference {name!r}")
        if len(made) != 1:
            raise ValueError(f"{len(made)} images for reference {name!r}: pass one")
        while isinstance(image, (list, tuple)):
            (image,) = image
        return image.copy() if isinstance(image, PIL.Image.Image) else owned(image)

    def _sized(self, name: str, image: Image) -> Tensor:
        """A reference of all frames in its size, which depends on the arguments of the pipeline."""
        sizes = self._sizes(image_size(image))
        kept = self._of_all.get(name)
        if kept is None or kept[0] is not image or kept[1] != sizes:
            kept = self._of_all[name] = image, sizes, self.images(image, f"reference {name!r}")[0]
        return kept[2]

    def _of_frames(self, given: Images | OwnSize, i: int, count: int) -> Sequence[Tensor]:
        if isinstance(given, OwnSize):
            return given.images
        made = self.images(given, f"reference {i} of frame {self._denoiser.next_id}")
        if len(made) not in (1, count):
            raise ValueError(f"{len(made)} images for reference {i} of {count} frames: pass one, or one each")
        return made * (count // len(made))

    def _first_time(self, stages: Stages) -> Tensor:
        """The time of the first step of these stages, `[1]` on the device."""
        if self._time is None or self._time[0] is not stages:
            self._time = stages, self._model.to_device(stages.timesteps[:1], torch.float32)
        return self._time[1]

    def _read_prompt(self, more: Arguments) -> Prompt:
        request = self._denoiser.prepared().request
        return self._updates.planner.read_prompt(replace(request, arguments={**request.arguments, **more}))

    def _encode(self, last: tuple[Codec, Reference] | None, image: Tensor, exact: bool) -> tuple[Codec, Reference]:
        """A reference, encoded unless it is the image that was encoded `last` in its place. exact: as the pipeline does,
        without acceleration, which is made for images of the stream's own size."""
        model = self._model
        as_planned = model.frames == 1 and tuple(image.shape[-2:]) == (model.height, model.width)
        codec = model.codec if as_planned and not exact else model.plain_codec
        if last is not None and last[0] is codec and _same(last[1].image, image):
            return last
        grid = image.shape[-2] // model.adapter.multiple, image.shape[-1] // model.adapter.multiple
        if not self._rule().uses_codec:
            return codec, Reference(image, None, grid)
        pixels = image
        if exact:
            pixels = pixels.contiguous(memory_format=torch.channels_last)  # as diffusers makes a tensor of a PIL image
        return codec, Reference(image, model.encode(pixels, codec), grid)

    def _extended(self, references: list[Reference], entering: Entering, row: int | None = None) -> Prompt:
        """The prompt of a frame with these references: the last one in this row of the group where it is the same."""
        rule, adapter, plain = self._rule(), self._model.adapter, entering.prompt
        if len(references) < rule.least:
            raise ValueError(
                f"{type(adapter.pipe).__name__} draws from a reference image, and a frame has none: pass stream(image), or "
                f"set_reference(name, image)"
            )
        if rule.most is not None and len(references) > rule.most:
            raise ValueError(
                f"{len(references)} references for a frame, and {type(adapter.pipe).__name__} takes {rule.most}: pass "
                f"fewer, or take away one that all frames have, set_reference(name, None)"
            )
        if not references:
            return plain
        last = None if row is None else self._prompts.get(row)
        if last is not None and last[0] is plain and last[1] == references:
            return last[2]
        made = extended(plain, rule.extend(adapter, references, entering))
        if row is not None and rule.reusable:
            self._prompts[row] = plain, references, made
        return made


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two images are one, or are equal on the CPU; on a GPU the host would wait for the answer."""
    return a is b or (a.device.type == b.device.type == "cpu" and a.shape == b.shape and torch.equal(a, b))
