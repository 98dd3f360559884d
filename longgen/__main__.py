"""Run the command line as `python -m longgen`."""

import sys

from longgen.cli import main

sys.exit(main())
