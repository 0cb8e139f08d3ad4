"""`python -m afd_server` is `afd`."""

import sys

from afd_server.cli import main

if __name__ == "__main__":
    sys.exit(main())
