"""The callbacks of a Parameter Execute DAT inside the component: what changes is sent.

Its parameters: OPs `..`, Parameters `*`, Custom on, Built-In off, Value Change on, On Pulse on.
"""


def onValueChange(par, prev):
    """A value has changed, or an expression or export has changed it."""
    par.owner.OnValueChange(par)


def onPulse(par):
    """A button was pressed."""
    par.owner.OnPulse(par)
