"""`python -m launch train ...`, where the command `unbroken` is not installed.

It looks for packages where it is run, as `unbroken` does not: there a launch.py of the user's would come first.
"""

import sys

from launch.cli import main

sys.exit(main())
