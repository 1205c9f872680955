"""`python -m secura.cli`, as launchers such as `accelerate launch -m secura.cli` need it."""

import sys

from secura.cli import main

sys.exit(main())
