"""The callbacks of a Script TOP that shows the images of `streamflow live --out mjpeg:8080`.

It needs the Text DAT streamflow_link beside it, and no plugin. Where NDI or Spout is at hand, NDI In TOP and Syphon Spout In
TOP take the images with less work for the CPU.
"""

from streamflow_link import Frames

frames = {}  # by the path of the Script TOP


def onSetupParameters(scriptOp):
    """Called by the button Setup Parameters."""
    page = scriptOp.appendCustomPage("StreamFlow")
    url = page.appendStr("Url", label="MJPEG Page")[0]
    url.default = url.val = "http://127.0.0.1:8080/"
    page.appendToggle("Active", label="Active")[0].val = True


def onPulse(par):
    """There is no pulse parameter."""


def onGetCookLevel(scriptOp):
    """Cook in every frame, since images come without an input that changes."""
    return CookLevel.ALWAYS  # noqa: F821 - of TouchDesigner


def onCook(scriptOp):
    """Show the newest image. While none comes, the last one stays, and the reason is the operator's warning."""
    reader, url = frames.get(scriptOp.path), scriptOp.par.Url.eval()
    if not scriptOp.par.Active.eval():
        close(scriptOp)
        return
    if reader is None or reader.url != url:
        close(scriptOp)
        reader = frames[scriptOp.path] = Frames(url)
    image = reader.newest()
    if image is not None:
        scriptOp.copyNumpyArray(image)
    if reader.error is not None:
        scriptOp.addWarning(reader.error)


def close(scriptOp):
    """Stop receiving."""
    reader = frames.pop(scriptOp.path, None)
    if reader is not None:
        reader.close()
