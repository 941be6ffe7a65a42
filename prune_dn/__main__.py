"""`python -m prune_dn`, and `accelerate launch -m prune_dn run RECIPE` for several processes."""

from __future__ import annotations

import sys

from prune_dn.cli import main

sys.exit(main())
