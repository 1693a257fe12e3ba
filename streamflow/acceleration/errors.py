"""The errors of TensorRT and of the export to ONNX. Each names the part, the stage, the node of the graph where it is known,
and the remedy."""

from __future__ import annotations


class TensorRTError(RuntimeError):
    """Base class. `part`: "velocity", "decoder" or "encoder". `stage`, `remedy`: text. `node`: of the graph, or None."""

    def __init__(self, part: str, stage: str, problem: str, remedy: str, node: str | None = None):
        self.part, self.stage, self.node, self.remedy = part, stage, node, remedy
        where = f", at {node}" if node else ""
        super().__init__(f"TensorRT, {part}, {stage}{where}: {problem}. What to do: {remedy}")


class NoDevice(TensorRTError):
    """There is no GPU that can run engines."""


class NotExportable(TensorRTError):
    """The module takes or returns something else than tensors."""


class ExportError(TensorRTError):
    """The module could not be exported to ONNX."""


class BuildError(TensorRTError):
    """TensorRT could not read the ONNX file or could not build an engine from it."""


class EngineError(TensorRTError):
    """An engine could not be loaded or run."""


class OutsideProfile(TensorRTError):
    """An input has a shape that the engine was not built for."""


class EngineMismatch(TensorRTError):
    """The output of an engine differs from the output of the plain module by more than the tolerance."""


class MissingTensorRT(ImportError):
    """TensorRT, or the kind of TensorRT that this GPU needs, is not installed. The message has the command."""
