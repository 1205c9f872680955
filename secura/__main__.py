"""`python -m secura`, as launchers such as `accelerate launch -m secura` need it."""

import sys

from secura.cli import main

sys.exit(main())
