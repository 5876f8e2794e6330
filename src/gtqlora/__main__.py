"""`python -m gtqlora`: the command line without the installed script."""

import sys

from gtqlora.cli import main

if __name__ == "__main__":
    sys.exit(main())
