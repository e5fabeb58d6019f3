"""`python -m newllm` is the command `newllm`."""

from __future__ import annotations

import sys

from newllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
