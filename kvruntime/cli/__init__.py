"""The command line: kvruntime demo, vary, plan, sample, eval, report, check, calibrate, tune,
doctor.
"""

from __future__ import annotations

import typer

from kvruntime.cli.demo import demo
from kvruntime.cli.doctor import doctor
from kvruntime.cli.evaluate import evaluate_command
from kvruntime.cli.models import calibrate_command, check_command, tune_command
from kvruntime.cli.plan import plan_command
from kvruntime.cli.report import report_command
from kvruntime.cli.sample import sample_command
from kvruntime.cli.vary import vary

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="A memory-managed, paged KV cache for next-scale (VAR) image models.",
)
app.command("demo")(demo)
app.command("vary")(vary)
app.command("plan")(plan_command)
app.command("sample")(sample_command)
app.command("eval")(evaluate_command)
app.command("report")(report_command)
app.command("check")(check_command)
app.command("calibrate")(calibrate_command)
app.command("tune")(tune_command)
app.command("doctor")(doctor)


def main() -> None:
    app()
