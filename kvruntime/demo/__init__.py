"""The demo: the bundled model on its own cache and on ours, same seeds, side by side."""

from kvruntime.extras import extra

with extra("cli"):
    from kvruntime.demo.compare import SHOWN, demo_labels, run_demo
    from kvruntime.demo.pictures import save_formats, save_memory, save_picture, save_trio
    from kvruntime.demo.table import print_report, print_trio
    from kvruntime.demo.trio import run_trio

__all__ = [
    "SHOWN",
    "demo_labels",
    "print_report",
    "print_trio",
    "run_demo",
    "run_trio",
    "save_formats",
    "save_memory",
    "save_picture",
    "save_trio",
]
