"""StreamFlow's nodes for ComfyUI. ComfyUI reads the two tables when it starts; StreamFlow is imported by the first node that
runs."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
