"""The extension of a component: a custom parameter for every OSC address of `streamflow live`, which sends its value when it
changes, and methods that send any.

It needs the Text DAT streamflow_link in the same component.
"""

import re

from streamflow_link import Sender, fetch_knobs

CONNECTION, KNOBS = "StreamFlow", "Knobs"  # the pages of parameters


def parameter_name(address):
    """The name of the custom parameter of an OSC address: a capital, then small letters and digits, as TouchDesigner wants
    it. "/prompt/weight_1" is "Promptweight1"."""
    letters = re.sub(r"[^a-z0-9]", "", address.lower())
    return letters.capitalize() if letters[:1].isalpha() else f"Knob{letters}"


class StreamFlowExt:
    """Attributes and methods with a capital are the component's own, such as `op("streamflow1").Send("/guidance", 0.5)`."""

    def __init__(self, ownerComp):
        self.ownerComp = ownerComp
        self._sender = None
        self._values = {}  # by parameter, what the stream has
        if not hasattr(ownerComp.par, "Oscport"):
            page = ownerComp.appendCustomPage(CONNECTION)
            for made, default in (
                (page.appendStr("Host", label="Host"), "127.0.0.1"),
                (page.appendInt("Oscport", label="OSC Port"), 9000),
                (page.appendInt("Pageport", label="Page Port"), 9001),
            ):
                made[0].default = made[0].val = default
            page.appendPulse("Refresh", label="Refresh Knobs")

    def Send(self, address, *values):
        """Send one OSC message, such as `Send("/guidance", 0.5)`. ValueError, TypeError: a value that OSC does not have."""
        target = self.ownerComp.par.Host.eval(), int(self.ownerComp.par.Oscport.eval())
        if self._sender is None or self._sender.target != target:
            self.Close()
            self._sender = Sender(*target)
        self._sender.send(address, *values)

    def Refresh(self):
        """Make the parameters anew from the page of controls, at the values that the stream has now. Each has its address as
        its label. OSError: the page does not answer; then nothing has changed."""
        par = self.ownerComp.par
        knobs = fetch_knobs(int(par.Pageport.eval()), par.Host.eval())["osc"]
        self._values = {}
        for page in [one for one in self.ownerComp.customPages if one.name == KNOBS]:
            page.destroy()
        page = self.ownerComp.appendCustomPage(KNOBS)
        for knob in knobs["addresses"]:
            name = parameter_name(knob["address"])
            while hasattr(par, name):  # of an address with the same letters, or of the component's owner
                name += "x"
            self._values[name] = self._append(page, name, knob)
        if knobs["port"]:
            par.Oscport.val = knobs["port"]

    @staticmethod
    def _append(page, name, knob):
        """Append the parameter of a knob, and return its value."""
        if knob["type"] == "text":
            made = page.appendStr(name, label=knob["address"])[0]
            made.val = knob["value"] if isinstance(knob["value"], str) else ""
            return made.val
        made = page.appendFloat(name, label=knob["address"])[0]
        made.min, made.max = made.normMin, made.normMax = min(knob["source"]), max(knob["source"])
        made.clampMin = made.clampMax = True
        made.val = knob["source"][0] if knob["at"] is None else knob["at"]
        return made.val

    def OnValueChange(self, par):
        """Send the value of a knob's parameter, unless the stream has it already. The Parameter Execute DAT calls it."""
        value = par.eval()
        if par.page.name == KNOBS and self._values.get(par.name) != value:
            self._values[par.name] = value
            self.Send(par.label, value)

    def OnPulse(self, par):
        """Refresh, where that was pulsed."""
        if par.name == "Refresh":
            self.Refresh()

    def Close(self):
        """Close the socket."""
        if self._sender is not None:
            self._sender.close()
            self._sender = None
