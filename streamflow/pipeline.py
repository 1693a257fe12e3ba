"""StreamFlow: StreamDiffusion's class for rectified flows. It connects the parts; their work is in `streamflow.stream`.

prompt -> cond; image -> latent -> noised latent -> ring (guidance, velocity, Euler) -> latent -> image
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from streamdiffusion import StreamDiffusion
from torch import Tensor, nn

from streamflow._grad_mode import computing
from streamflow.acceleration.accelerator import Accelerator
from streamflow.conditioning.image_prompt import ImagePromptArgument
from streamflow.flow.noise import check_policy
from streamflow.flow.schedule import check_indices
from streamflow.image_filter import SimilarImageFilter
from streamflow.image_utils import ControlArgument, Images, ReferenceArgument, as_rgb_where_pil, marking
from streamflow.models import adapter_for
from streamflow.models.codec import Codec
from streamflow.models.pipe_parts import base_view
from streamflow.models.protocols import VAE, Network, Pipeline, Scheduler
from streamflow.parallel.accelerated import accelerate
from streamflow.stream import forwards
from streamflow.stream.attributes import READ_ONLY, Attributes
from streamflow.stream.callbacks import weak_call
from streamflow.stream.controlnets import ControlNets
from streamflow.stream.denoiser import Denoiser
from streamflow.stream.forwards import Attribute, DiffusersAttribute
from streamflow.stream.frame_loop import FrameLoop
from streamflow.stream.hooks import Hooks
from streamflow.stream.image_prompts import ImagePrompts
from streamflow.stream.inpainting import Inpainting
from streamflow.stream.inputs import ImageReader, Inputs
from streamflow.stream.loras import Loras
from streamflow.stream.model import Model
from streamflow.stream.outputs import Outputs
from streamflow.stream.planner import Planner
from streamflow.stream.references import References
from streamflow.stream.request import Request, Seeds
from streamflow.stream.steps import Steps
from streamflow.stream.updates import Updates

if TYPE_CHECKING:
    from streamflow.acceleration import Parts
    from streamflow.io import Sink, Source
    from streamflow.live.remote import Controls
    from streamflow.live.show import Live


class StreamFlow(StreamDiffusion):
    """Streams a loaded diffusers pipeline of a rectified-flow model. The pipeline stays usable and unchanged. One thread
    draws; `update` may be called from any, and `prepare`, `reset`, `flush` and `close` wait for the current tick.

    Args:
        pipe: a diffusers pipeline of a known family (`streamflow.models.PIPELINES`), on its device, in its dtype.
        t_index_list: the steps, of the schedule of `num_inference_steps`, at which a frame stops; each once, 0 the noisiest.
            `range(N)` of N is the pipeline's own schedule, `range(k, N)` image-to-image at strength (N - k) / N, a subset is
            Euler on the sub-grid. None: all steps.
        torch_dtype: the network's dtype, which is the default; another one is an error, since the pipe is not changed.
        width, height: pixels; by default the pipeline's own.
        do_add_noise: False is Euler. True predicts x0 at every stage and re-noises it with the frame's own noise.
        use_denoising_batch: False runs every frame to its end by itself: the sequential reference.
        frame_buffer_size: F, how many frames enter and leave together.
        cfg_type: "none", "full" (the pipeline's own guidance), "self" or "initialize" (see `streamflow.flow.guidance`).
        family: overrides the family found by the pipeline's class.
        input_range: what float images are in, (0, 1) or (-1, 1). PIL and uint8 are 0..255.
        noise: of frames: "fixed", one noise for all image frames of a stream; "frame", a fresh one for each; "interpolated",
            for image and text frames, noise that moves to another every `noise_period` frames, always of variance one.
            Text frames have fresh noise under the first two, and so have frames whose image is a reference; "constant", one
            noise for all frames.
        noise_period: frames from one noise to the next, where it is interpolated.
        feedback: how much of the last finished image goes into the next image frame's start, against flicker:
            `(1 - feedback) x0 + feedback x0_last`, x0_last being the frame that has left last: S frames before this one in a
            ring of S stages, the one before it without a batch. 0 to below 1. `reset` and `prepare` forget x0_last.
            `update` changes these three; `prepare` goes back to them.
        resize: stretch images of other sizes, or refuse them.
        check_inputs: also look for NaN in images on a GPU, which makes the host wait for it.
        image_as: what the image of a call is: "start", from which the frame starts, as in image-to-image; "reference", an
            image that the network sees, while the frame starts from noise. By default "reference" where the pipeline's own
            `image=` is one (Flux.2, Kontext, FIBO Edit), else "start".

    Raises:
        TypeError, ValueError: for every argument that cannot be, with what it was and the remedy.
    """

    _constructed = False

    def __init__(
        self,
        pipe: Any,
        t_index_list: Sequence[int] | None = None,
        torch_dtype: torch.dtype | None = None,
        width: int | None = None,
        height: int | None = None,
        do_add_noise: bool = False,
        use_denoising_batch: bool = True,
        frame_buffer_size: int = 1,
        cfg_type: str = "self",
        *,
        family: str | None = None,
        input_range: tuple[float, float] = (0, 1),
        noise: str = "fixed",
        noise_period: int = 30,
        feedback: float = 0.0,
        resize: bool = True,
        check_inputs: bool = False,
        image_as: str | None = None,
    ) -> None:
        if t_index_list is not None:
            t_index_list = check_indices(t_index_list)
        check_policy(noise, noise_period)
        self._model = model = Model(pipe, adapter_for(pipe, family), height, width, frame_buffer_size, torch_dtype, image_as)
        adapter, frames = model.adapter, model.frames
        planner = Planner(model)
        planner.check(cfg_type, do_add_noise)
        self._denoiser = denoiser = Denoiser(model, use_denoising_batch)
        self._outputs = outputs = Outputs(model, denoiser)
        self._hooks = hooks = Hooks(model, denoiser)
        defaults: dict[str, Any] = {"t_index_list": t_index_list, "cfg_type": cfg_type, "do_add_noise": do_add_noise}
        defaults |= {"noise": noise, "noise_period": noise_period, "feedback": feedback}
        self._updates = Updates(model, planner, denoiser, outputs, **defaults)
        reader = self._reader = ImageReader(model, denoiser, input_range, resize, check_inputs)
        self._inpainting = Inpainting(model, denoiser, outputs.redraw, reader)
        self._controlnets = ControlNets(model, denoiser, outputs.redraw, reader)
        self.image_prompts = ImagePrompts(model, denoiser, outputs.redraw, reader)
        references = self._references = References(model, denoiser, self._updates, outputs, reader)
        conditioners = self._inpainting, self._controlnets, self.image_prompts
        self._inputs = inputs = Inputs(model, denoiser, reader, conditioners, references)
        self._loop = FrameLoop(model, denoiser, self._updates, inputs, outputs)
        self._steps = Steps(model, denoiser, self._updates, inputs)
        self._attributes = Attributes(model, denoiser, self._updates, inputs, outputs)
        self._loras = Loras(model, denoiser, self._updates, outputs.redraw)
        parts = partial(_parts, model, denoiser, self._steps)
        self._accelerator = accelerator = Accelerator(model, parts, accelerate, hooks.check_acceleration, self._steps.trial)
        denoiser.on_close.add(accelerator.put_back, self.image_prompts.close)
        model.before_change.add(accelerator.put_back, outputs.redraw)
        model.after_change.add(accelerator.rebuild)
        view = cast(Any, base_view(pipe, adapter.net, adapter.factor))
        # `__setattr__` ignores what the base class assigns to properties
        super().__init__(view, list(t_index_list or [0]), model.dtype, model.width, model.height, frame_buffer_size=frames)
        self.pipe: Pipeline = pipe
        self.adapter = adapter
        self.image_processor = marking(pipe.image_processor, as_rgb_where_pil)
        self._constructed = True
        if type(self).decode_image is not StreamFlow.decode_image:
            outputs.decode_image = weak_call(self.decode_image)
        self._controlnets.add_pipe_nets()

    def __setattr__(self, name: str, value: Any) -> None:
        if not self._constructed and isinstance(getattr(type(self), name, None), property):
            return  # StreamDiffusion's constructor assigns what is derived here
        if self._constructed and name in READ_ONLY:
            raise AttributeError(f"{name} of a {type(self).__name__} cannot be assigned: {READ_ONLY[name]}")
        if name == "decode_image":
            self._outputs.decode_image = value
        super().__setattr__(name, value)

    # -- draw ---------------------------------------------------------------------------------------------------------

    @computing
    def __call__(
        self,
        x: Images | None = None,
        mask: Images | None = None,
        control: ControlArgument | None = None,
        reference: ReferenceArgument | None = None,
        image_prompt: ImagePromptArgument | None = None,
    ) -> Tensor:
        """One call of the stream: F images in, F finished images out, `[F, 3, height, width]` in [-1, 1].

        Without an image it is `txt2img()`. On an empty ring an image is followed by S - 1 copies of itself, so calls 1 to
        S return the first image and call k > S that of call k - S + 1; `frames` and `flush` leave copies out.
        `mask`: draw the image where it is white and keep it elsewhere, in this call only (`inpaint` describes masks).
        `control`: for each control net its image, or F of them (`add_control`), or a maker, which makes it from the frame's
        own image (`set_control_maker`). A maker alone, `control="canny"`, is that of the only net.
        `reference`: reference images, one or several, each for all frames or F of them. In edit pipelines the image itself
        is the first reference, and the frame starts from noise, `frame_noise(id)`.
        `image_prompt`: a style image for all frames, or F of them, or a blend (`ImagePrompts` lists the forms).
        Where the decoder raises, the finished frames stay, and the next call begins with decoding them.

        Raises:
            RuntimeError: before `prepare`, after `close`, or while a loop over `frames` is running. TypeError, ValueError:
                for a bad image, or not F of them.
        """
        if x is None:
            self._inpainting.read(mask, None, range(0))
            return self.txt2img(control=control, reference=reference, image_prompt=image_prompt)
        denoiser, inputs, outputs = self._denoiser, self._inputs, self._outputs
        denoiser.check_free("stream(image)")
        began = outputs.timer.start()
        try:
            given = {"mask": mask, "control": control, "reference": reference, "image_prompt": image_prompt}
            read = inputs.read(x, given)
            if self._updates.pending is not None:
                self._updates.take()
            if outputs.similar_image_filter and outputs.skips(inputs.compared(read.seen, read.conditions)):
                if outputs.prev_image_result is not None:
                    return outputs.prev_image_result.clone()
            ids = denoiser.next_ids(self._model.frames)
            return outputs.show(outputs.enter(inputs.group(ids, read.conditions, read.images)))
        except BaseException:
            outputs.similar_filter.forget()  # no frame is skipped for resembling a frame that was not drawn
            raise
        finally:
            outputs.timer.stop(began)

    @computing
    def txt2img(
        self,
        batch_size: int | None = None,
        latents: Tensor | None = None,
        control: ControlArgument | None = None,
        reference: ReferenceArgument | None = None,
        image_prompt: ImagePromptArgument | None = None,
    ) -> Tensor:
        """Draw from noise: exactly `batch_size` images (None: F), a multiple of F, `[batch_size, 3, height, width]`.

        On an empty ring S - 1 more groups of fresh frames follow the first; they leave at later calls or at `flush`.
        latents: `[batch_size, ...]`, the noise to start from, as the pipeline takes it.
        control: for each control net an image, or one for each of `batch_size`; further frames have the last one's.
        reference: reference images, one or several, each likewise. image_prompt: a style image, likewise.
        """
        denoiser, inputs, outputs, frames = self._denoiser, self._inputs, self._outputs, self._model.frames
        denoiser.check_free("txt2img()")
        groups = inputs.group_count(batch_size, latents)
        given = {"control": control, "reference": reference, "image_prompt": image_prompt}
        conditions = inputs.conditions(given, None, range(groups * frames))
        outputs.similar_filter.forget()
        began = outputs.timer.start()
        self._updates.take()
        done = list(denoiser.finished)[:groups]
        images = [outputs.decode(one) for one in done]  # where that fails, nothing enters
        pushed = 0
        while pushed < groups or len(denoiser.finished) < groups:
            first = min(pushed, groups - 1) * frames
            own = [(one, entries[first : first + frames]) for one, entries in conditions]
            x = latents[first : first + frames] if latents is not None and pushed < groups else None
            denoiser.tick(inputs.group(denoiser.next_ids(frames), own, latents=x))
            pushed += 1
        done += list(denoiser.finished)[len(done) : groups]
        images += [outputs.decode(one) for one in done[len(images) :]]
        denoiser.hand_out(done)
        shown = outputs.show(torch.cat(images) if len(images) > 1 else images[0])
        outputs.timer.stop(began)
        return shown

    def txt2img_sd_turbo(self, batch_size: int | None = None) -> Tensor:
        """The one-step form: `txt2img` of a stream with a single stage. ValueError with more."""
        stages = len(self._denoiser.prepared().stages)
        if stages != 1:
            remedy = "make it with t_index_list=[0], or call txt2img"
            raise ValueError(f"txt2img_sd_turbo draws in one step and this stream has {stages} stages: {remedy}")
        return self.txt2img(batch_size)

    def live(
        self,
        source: str | Source | None,
        sinks: str | Sink | Sequence[str | Sink],
        *,
        target_fps: float = 30.0,
        policy: str = "newest",
        mode: str = "auto",
        on_error: str = "hold",
        controls: Controls | None = None,
    ) -> Live:
        """Restyle a source live; draw from noise without one. Begins at once, in threads of its own, and returns.

            with stream.live("camera:0", ["window", "record:out.mp4"], target_fps=30) as show:
                stream.update_prompt("a fox, 3d render")
                print(show.wait())  # its Statistics, when the window was closed

        `streamflow.live.show.Live` describes the arguments and errors. On a CPU it draws faster where the stream was
        prepared in a thread that has ended (`streamflow.app.scenes.aside`). RuntimeError: before `prepare`, after `close`.
        """
        from streamflow.live.show import Live

        self._denoiser.check_free("live()")
        return Live(
            self, source, sinks, target_fps=target_fps, policy=policy, mode=mode, on_error=on_error, controls=controls
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- the parts' methods and attributes ------------------------------------------------------------------------------

    @forwards.override("_updates", Updates.prepare)
    def prepare(self): ...
    @forwards.override("_updates", Updates.update_prompt)
    def update_prompt(self): ...
    @forwards.override("_loras", Loras.load_lora)
    def load_lora(self): ...
    @forwards.override("_loras", Loras.fuse_lora)
    def fuse_lora(self): ...
    @forwards.override("_loras", Loras.load_lcm_lora)
    def load_lcm_lora(self): ...
    @forwards.override("_outputs", Outputs.enable_filter)
    def enable_similar_image_filter(self): ...
    @forwards.override("_steps", Steps.add_noise)
    def add_noise(self): ...
    @forwards.override("_steps", Steps.encode_image)
    def encode_image(self): ...
    @forwards.override("_steps", Steps.decode_image)
    def decode_image(self): ...
    @forwards.override("_steps", Steps.scheduler_step_batch)
    def scheduler_step_batch(self): ...
    @forwards.override("_steps", Steps.predict_x0_batch)
    def predict_x0_batch(self): ...
    @forwards.override("_steps", Steps.unet_step)
    def unet_step(self): ...

    update = forwards.method("_updates", Updates.update)
    requested = forwards.method("_updates", Updates.requested)
    forget_prompts = forwards.method("_updates", Updates.forget_prompts)
    cached_prompts = Attribute[int]("_updates", "cached_prompts", Updates.cached_prompts)
    flush = forwards.method("_denoiser", Denoiser.flush)
    reset = forwards.method("_denoiser", Denoiser.reset)
    close = forwards.method("_denoiser", Denoiser.close)
    frames = forwards.method("_loop", FrameLoop.frames)
    inpaint = forwards.method("_inpainting", Inpainting.inpaint)
    add_control = forwards.method("_controlnets", ControlNets.add_control)
    remove_control = forwards.method("_controlnets", ControlNets.remove_control)
    set_control_maker = forwards.method("_controlnets", ControlNets.set_control_maker)
    set_control_scale = forwards.method("_controlnets", ControlNets.set_control_scale)
    set_reference = forwards.method("_references", References.set_reference)
    set_adapters = forwards.method("_loras", Loras.set_adapters)
    unload_lora = forwards.method("_loras", Loras.unload_lora)
    unfuse_lora = forwards.method("_loras", Loras.unfuse_lora)
    on_step = forwards.method("_hooks", Hooks.on_step)
    trace = forwards.method("_hooks", Hooks.trace)
    use_tiny_vae = forwards.method("_model", Model.use_tiny_vae)
    set_denoising_batch = forwards.method("_denoiser", Denoiser.set_batched)
    preprocess = forwards.method("_reader", ImageReader.preprocess)
    frame_noise = forwards.method("_steps", Steps.frame_noise)

    velocity = Attribute[nn.Module]("_model", "velocity", Model.velocity)
    unet = DiffusersAttribute[Network]("_model", "unet", Model.unet)
    vae = DiffusersAttribute[VAE]("_model", "vae", Model.vae)
    codec = Attribute[Codec]("_model", "codec", "The codec in use, accelerated or not.")
    accelerate = forwards.method("_accelerator", Accelerator.accelerate)
    acceleration = Attribute[str]("_accelerator", "kind", Accelerator.kind)
    acceleration_measured = Attribute[tuple]("_accelerator", "measured", "What `accelerate('max')` has measured.")
    controls = Attribute[dict[str, float]]("_controlnets", "controls", ControlNets.controls)
    references = Attribute[tuple[str, ...]]("_references", "references", References.references)
    loras = Attribute[tuple[str, ...]]("_loras", "loras", Loras.loras)
    calls_behind = Attribute[int]("_denoiser", "calls_behind", Denoiser.calls_behind)
    not_finite = Attribute[int]("_outputs", "not_finite", Outputs.not_finite)
    input_range = Attribute[tuple[float, float]]("_reader", "input_range", "What float images are in.")
    similar_filter = Attribute[SimilarImageFilter]("_outputs", "similar_filter", "Decides which image frames are skipped.")
    similar_image_filter = Attribute[bool]("_outputs", "similar_image_filter", "Whether image frames may be skipped.")
    prev_image_result = Attribute[Tensor | None]("_outputs", "prev_image_result", "The images of the last call.")

    guidance_scale = Attribute[float]("_attributes", "guidance_scale", Attributes.guidance_scale)
    delta = Attribute[float]("_attributes", "delta", Attributes.delta)
    cfg_type = Attribute[str]("_attributes", "cfg_type", Attributes.cfg_type)
    do_add_noise = Attribute[bool]("_attributes", "do_add_noise", Attributes.do_add_noise)
    t_list = Attribute[list[int]]("_attributes", "t_list", Attributes.t_list)
    t_index_list = Attribute[list[int]]("_attributes", "t_index_list", Attributes.t_index_list)
    prepared = Attribute[bool]("_attributes", "prepared", Attributes.prepared)
    request = Attribute[Request]("_attributes", "request", Attributes.request)
    use_denoising_batch = Attribute[bool]("_attributes", "use_denoising_batch", Attributes.use_denoising_batch)
    scheduler = DiffusersAttribute[Scheduler]("_attributes", "scheduler", Attributes.scheduler)
    text_encoder = Attribute[nn.Module | None]("_attributes", "text_encoder", Attributes.text_encoder)
    seed = Attribute[Seeds | None]("_attributes", "seed", Attributes.seed)
    generator = Attribute[torch.Generator | None]("_attributes", "generator", Attributes.generator)
    prompt_embeds = Attribute[Tensor]("_attributes", "prompt_embeds", Attributes.prompt_embeds)
    init_noise = Attribute[Tensor]("_attributes", "init_noise", Attributes.init_noise)
    stock_noise = Attribute[Tensor]("_attributes", "stock_noise", Attributes.stock_noise)
    x_t_latent_buffer = Attribute[Tensor | None]("_attributes", "x_t_latent_buffer", Attributes.x_t_latent_buffer)
    denoising_steps_num = Attribute[int]("_attributes", "denoising_steps_num", Attributes.denoising_steps_num)
    batch_size = Attribute[int]("_attributes", "batch_size", Attributes.batch_size)
    trt_unet_batch_size = Attribute[int]("_attributes", "trt_unet_batch_size", Attributes.trt_unet_batch_size)
    timesteps = Attribute[Tensor]("_attributes", "timesteps", Attributes.timesteps)
    sub_timesteps = Attribute[list[Tensor]]("_attributes", "sub_timesteps", Attributes.sub_timesteps)
    sub_timesteps_tensor = Attribute[Tensor]("_attributes", "sub_timesteps_tensor", Attributes.sub_timesteps_tensor)
    beta_prod_t_sqrt = Attribute[Tensor]("_attributes", "beta_prod_t_sqrt", Attributes.beta_prod_t_sqrt)
    alpha_prod_t_sqrt = Attribute[Tensor]("_attributes", "alpha_prod_t_sqrt", Attributes.alpha_prod_t_sqrt)
    c_skip = Attribute[Tensor]("_attributes", "c_skip", Attributes.c_skip)
    c_out = Attribute[Tensor]("_attributes", "c_out", Attributes.c_out)
    inference_time_ema = Attribute[float]("_attributes", "inference_time_ema", Attributes.inference_time_ema)

    def parts(self) -> Parts | None:
        """The plain modules, each with its inputs in a tick. RuntimeError before `prepare`."""
        self._denoiser.prepared()
        return _parts(self._model, self._denoiser, self._steps)


def _parts(model: Model, denoiser: Denoiser, steps: Steps) -> Parts | None:
    """As `StreamFlow.parts`; None before `prepare`."""
    from streamflow.acceleration import Parts

    return None if denoiser.state is None else Parts.of(model.adapter, model.plain_codec, *steps.example())
