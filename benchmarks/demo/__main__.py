"""`python -m benchmarks.demo`: what a user can mend is told in one line."""

from __future__ import annotations

import sys

from benchmarks.assets import AssetError
from benchmarks.demo.run import main
from secura.cli.errors import USER_ERRORS, one_line

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (*USER_ERRORS, AssetError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
