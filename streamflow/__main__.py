"""`python -m streamflow` is the command `streamflow`."""

from streamflow.app.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
