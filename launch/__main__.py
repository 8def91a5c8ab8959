"""`python -m launch train ...`, and so `torchrun --nproc-per-node 4 -m launch train ...`."""

import sys

from launch.cli import main

sys.exit(main())
