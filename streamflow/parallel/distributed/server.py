"""A rank that computes for rank 0: it takes calls, answers them, and ends when it is told to. Knows modules and messages."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from streamflow.parallel.distributed.wire import Argument, Link, Message, Op, RankLost, header

logger = logging.getLogger(__name__)


@torch.no_grad()
def serve(modules: Sequence[nn.Module], link: Link) -> None:
    """Answer calls of the modules, by their number, until rank 0 says that it is done.

    Raises:
        RankLost: rank 0 is gone, or said nothing for as long as the link's timeout.
    """
    calls, kept = 0, {}
    try:
        with torch.cuda.device(link.device) if link.device.type == "cuda" else nullcontext():
            while (message := link.receive()).op is not Op.STOP:
                calls += message.op is Op.CALL
                link.send(_answer(modules, message, kept))
            link.send(Message(Op.DONE))
    except RankLost as error:
        raise RankLost(
            f"rank 0, which this rank computes for, is gone after {calls} calls, or silent for longer than the timeout "
            f"({error}). See the output of rank 0; start all ranks anew"
        ) from error
    logger.info("rank 0 is done; this rank answered %d calls", calls)


def _answer(modules: Sequence[nn.Module], message: Message, kept: dict[tuple[int, str], Tensor]) -> Message:
    if message.op is Op.PING:
        return Message(Op.DONE)
    positional = [a.tensor for a in message.arguments if not a.name]
    kept.update({(message.part, a.name): a.tensor for a in message.arguments if a.name and not a.kept})
    named = {a.name: kept[message.part, a.name] for a in message.arguments if a.name}
    try:
        result = modules[message.part](*positional, **named)
        answer = Message(Op.DONE, arguments=(Argument(result),))
        header(answer)  # what cannot travel is an error of this call
        if result.is_cuda:  # an error of the GPU shows here, before rank 0 is told that there is a result
            torch.cuda.current_stream(result.device).synchronize()
    except Exception as error:  # whatever a module raises is rank 0's to judge: it goes there, and this rank stays
        logger.warning("a call failed here; rank 0 is told", exc_info=True)
        return Message.failed(f"{type(error).__name__}: {error}")
    return answer
