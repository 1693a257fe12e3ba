"""The commands that draw, one file each. `options` makes their flags of the settings' own fields."""
