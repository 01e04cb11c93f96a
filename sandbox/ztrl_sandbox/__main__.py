"""``python -m ztrl_sandbox``."""

import sys

from ztrl_sandbox.cli import main

sys.exit(main())
