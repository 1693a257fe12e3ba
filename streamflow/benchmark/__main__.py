"""`python -m streamflow.benchmark`."""

import sys

from streamflow.benchmark import main

sys.exit(main())
