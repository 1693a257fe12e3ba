"""The soak's part in one process with the wrapper: images by calls, text by calls, and `frames`, one session after
another, each with a wrapper of its own."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import torch
from soak_acts import Act, Memory, acts, check_answers, number_of

from streamflow.stream.frames import Input
from streamflow.wrapper import StreamFlowWrapper

MOST = 16  # calls after which the last frame must have come out
GUIDANCE = ("self", "full", "initialize", "none")


def change(wrapper: StreamFlowWrapper, act: Act) -> None:
    """What the act wants, all but its mask."""
    prompt = act.prompt if isinstance(act.prompt, str) else list(act.prompt)
    wrapper.update(prompt=prompt, guidance_scale=act.guidance, t_index_list=act.steps)


def by_images(wrapper: StreamFlowWrapper, played: list[Act], memory: Memory) -> list[int]:
    """`wrapper(image)`, with `inpaint` for an act's mask: the numbers of the images that came out."""
    return _by_calls(wrapper, played, memory, _enter_image)


def by_text(wrapper: StreamFlowWrapper, played: list[Act], memory: Memory) -> list[int]:
    """`wrapper.txt2img()`, each frame around a known image."""
    return _by_calls(wrapper, played, memory, _enter_text)


def _enter_image(wrapper: StreamFlowWrapper, act: Act, number: int) -> int:
    stream = wrapper.stream
    if number == act.numbers.start:
        stream.inpaint(mask=act.mask_of(stream.width, stream.height))
    return number_of(wrapper(act.image(number)))


def _enter_text(wrapper: StreamFlowWrapper, act: Act, number: int) -> int:
    stream = wrapper.stream
    stream.inpaint(act.image(number), act.mask_of(stream.width, stream.height))
    return number_of(wrapper.txt2img())


def _by_calls(wrapper: StreamFlowWrapper, played: list[Act], memory: Memory, enter: Callable[..., int]) -> list[int]:
    found: list[int] = []
    for act in played:
        change(wrapper, act)
        found += [enter(wrapper, act, number) for number in act.numbers]
        memory.sample(act.numbers.stop)
    last, calls = played[-1].numbers[-1], 0
    while found[-1] != last and calls < MOST:  # what is in flight comes out as more goes in
        found.append(enter(wrapper, played[-1], last))
        calls += 1
    return found


def by_frames(wrapper: StreamFlowWrapper, played: list[Act], memory: Memory) -> list[int]:
    """`stream.frames`, with masks of single frames: the numbers, each once, since none is primed and none doubled."""
    stream, found = wrapper.stream, []

    def inputs() -> Iterator[Input]:
        for act in played:
            change(wrapper, act)
            mask = act.mask_of(stream.width, stream.height)
            for number in act.numbers:
                yield Input(act.image(number), mask)
            memory.sample(act.numbers.stop)

    for k, frame in enumerate(stream.frames(inputs())):
        found.append(number_of(wrapper.postprocess_image(frame.image[None], "np")))
        if frame.id != k or (k and found[-1] == found[-2]):
            raise RuntimeError(f"frame {frame.id} with number {found[-1]} came as the {k}th")
    return found


WAYS = (by_images, by_frames, by_text)


def play(model: str, device: str, acceleration: str, sessions: list[range]) -> Memory:
    """All sessions. RuntimeError where a frame is missing, doubled or out of order."""
    memory = Memory(torch.device(device))
    for k, numbers in enumerate(sessions):
        guidance, way = GUIDANCE[k % len(GUIDANCE)], WAYS[k % len(WAYS)]
        options = {"cfg_type": guidance, "output_type": "np", "warmup": 2, "acceleration": acceleration}
        with StreamFlowWrapper(model, (1, 2, 3), device=device, **options) as wrapper:
            wrapper.prepare("a still life", num_inference_steps=4)
            check_answers(way(wrapper, list(acts(numbers, seed=k)), memory), numbers)
        del wrapper  # before the next one is made
        gc.collect()
    return memory
