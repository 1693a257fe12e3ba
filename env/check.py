"""Print versions, devices and accelerations, as `streamflow doctor` does, also where the installation is broken.

    python env/check.py

It looks at the environment of the Python that runs it.
"""

import sys
import types
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """The doctor's report, or one line where not even the doctor can run."""
    if sys.version_info < (3, 11):  # noqa: UP036  (an older Python is what this is for)
        print("StreamFlow needs Python 3.11 or newer; this is {}.".format(sys.version.split()[0]))  # noqa: UP032
        return 1
    try:
        metadata.version("packaging")
    except metadata.PackageNotFoundError:
        print(f"StreamFlow is not installed for {sys.executable}. Install it with: python3 env/install.py")
        return 1
    # `import streamflow` refuses a broken environment, which is what is examined here: take the module past it.
    package = types.ModuleType("streamflow")
    package.__path__ = [str(ROOT / "streamflow")]
    sys.modules["streamflow"] = package
    from streamflow.app import doctor

    return doctor.main()


if __name__ == "__main__":
    sys.exit(main())
