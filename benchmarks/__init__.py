"""Benchmarks: ``python -m benchmarks NAME --json FILE``."""

import os
import sys

if "--beside-load" in sys.argv:  # read where torch loads its threads: docs/embedding.md, Threads
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
