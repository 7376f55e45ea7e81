"""The ten-minute tour is walked: every line of it, in an empty folder, in its order."""

import re
import shlex
from pathlib import Path

from typer.testing import CliRunner

from kvruntime.cards import find_card, reserve_of
from kvruntime.catalogue import find_model
from kvruntime.cli import app
from kvruntime.options import CacheOptions
from kvruntime.planning import planner
from kvruntime.planning.compare import compare_ways, most_pictures
from kvruntime.sizes import in_units

ROOT = Path(__file__).resolve().parents[2]
TOUR = (ROOT / "docs" / "tour.md").read_text()
BLOCKS = re.findall(r"```(python)?\n(.*?)```", TOUR, re.S)


def test_every_block_of_the_tour(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done, names = [], {}
    for language, block in BLOCKS:
        if language:
            exec(compile(block, "tour.md", "exec"), names)
            continue
        for line in block.splitlines():
            command, *arguments = shlex.split(line)
            if (command, arguments) == ("make", ["demo"]):  # as the Makefile has it
                command, arguments = "kvruntime", ["demo", "--out", "demo", "--count", "1"]
            assert command == "kvruntime", line
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, result.output
            done.append(arguments[0])
    pages, own = map(int, re.findall(r"(\d+) bytes .* (\d+)", capsys.readouterr().out)[0])
    assert pages < own / 40
    assert done == ["demo", "report", "check", "plan", "plan", "vary", "sample", "report"]
    for written in ("demo/report.html", "vary.png", "pictures/report.html"):
        assert (tmp_path / written).stat().st_size > 1000, written
    assert "kvruntime demo --out demo" in (ROOT / "Makefile").read_text()


def test_the_table_of_a_card_is_what_the_planner_says():
    model, card = find_model("infinity-2b"), find_card("4090")
    reserve = reserve_of(model)
    ways = compare_ways(model, card.num_bytes - reserve.fixed, reserve.running)
    rows = re.findall(r"^\| .+ \| ([\d.]+ [MG]iB) \| (\d+) \|$", TOUR, re.M)
    assert rows == [(in_units(way.picture_bytes), str(way.pictures)) for way in ways]
    alone, of_rows = reserve_of(model, with_text_encoder=False), planner(model, CacheOptions())
    more = most_pictures(
        lambda pictures: of_rows(2 * pictures).total_bytes + pictures * alone.running,
        card.num_bytes - alone.fixed,
    )
    (said,) = re.findall(r"`--no-text-encoder`\) gains (two|three|four) pictures", TOUR)
    assert more - ways[4].pictures == {"two": 2, "three": 3, "four": 4}[said]
