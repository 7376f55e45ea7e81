"""The demo: the bundled model on its own cache and on ours, same seeds, side by side."""

from kvruntime.extras import extra

with extra("cli"):
    from kvruntime.demo.compare import SHOWN, demo_labels, run_demo
    from kvruntime.demo.pictures import save_formats, save_picture
    from kvruntime.demo.table import print_report

__all__ = ["SHOWN", "demo_labels", "print_report", "run_demo", "save_formats", "save_picture"]
