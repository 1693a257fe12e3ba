"""A stream between a source and sinks, live (`StreamFlow.live`): capture, drawing, output clock and encoding each in a
thread of its own. `settings` holds only settings; `show` puts the parts together."""
