"""python -m kvruntime.cli."""

from kvruntime.cli import main

main()
