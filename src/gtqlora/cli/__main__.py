"""`python -m gtqlora.cli`, as `python -m gtqlora`."""

import sys

from gtqlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
