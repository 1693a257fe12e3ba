"""What can go wrong between a module and its running engine. Each error says the part, the stage, where it is known the
node, and what to do."""

from __future__ import annotations


class TensorRTError(RuntimeError):
    """The base. `part`: "velocity", "decoder" or "encoder"; `stage`; `node`: what of the graph, or None; `remedy`."""

    def __init__(self, part: str, stage: str, what: str, remedy: str, node: str | None = None):
        self.part, self.stage, self.node, self.remedy = part, stage, node, remedy
        where = f", at {node}" if node else ""
        super().__init__(f"TensorRT, {part}, {stage}{where}: {what}. What to do: {remedy}")


class NoDevice(TensorRTError):
    """There is no GPU that engines run on."""


class NotExportable(TensorRTError):
    """The module does not take tensors only."""


class ExportError(TensorRTError):
    """The module could not be written as ONNX."""


class BuildError(TensorRTError):
    """TensorRT could not read the ONNX file or could not build an engine of it."""


class EngineError(TensorRTError):
    """A finished engine could not be loaded, or did not run."""


class OutsideProfile(TensorRTError):
    """An input has a shape that the engine was not built for."""


class EngineMismatch(TensorRTError):
    """An engine draws something else than the plain module."""


class MissingTensorRT(ImportError):
    """TensorRT is not installed, or not the kind that this GPU needs. The message has the command."""
