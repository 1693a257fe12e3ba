"""The page and its server (`streamflow serve`): several viewers of one model, each in a browser. `settings` holds only
settings; the rest needs the extra `web` and is imported by the command."""
