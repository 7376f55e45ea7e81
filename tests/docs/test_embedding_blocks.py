"""Every Python block of docs/embedding.md runs, with a look-alike of VAR as the reader's model. The
worked example has a test of its own.
"""

import re
from pathlib import Path
from types import SimpleNamespace

import torch

import kvruntime
import kvruntime.models
from tests.look_alikes.var import VAR

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "embedding.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)


class LookAlike(VAR):
    """With the arguments of FoundationVision's sampler: guidance makes two rows of a picture."""

    def autoregressive_infer_cfg(self, B, label_B=None, g_seed=None, cfg=1.5):
        return super().autoregressive_infer_cfg(seed=g_seed or 0, rows=2 * B)


class Reader(dict):
    """What the reader has: q, k and v of whatever step a block is at."""

    def __missing__(self, name):
        if name not in ("q", "k", "v"):
            raise KeyError(name)
        tokens = self["cache"].schedule.tokens[self["scale"]]
        return torch.randn(4, tokens, 16, 64)


def test_every_block_runs_for_somebody_with_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = LookAlike(cosine=True, dim=32, sides=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    built = SimpleNamespace(model=model, draw=lambda *args, **settings: None)
    monkeypatch.setattr(kvruntime.models, "build", lambda *args, **settings: built)
    monkeypatch.setattr("kvruntime.tuning.CANDIDATES", [("centroid", None), ("h2o", "coded3")])
    names = Reader(model=model, torch=torch, kvruntime=kvruntime, features=torch.zeros(3, 2048))
    done = 0
    # tuning looks at codings: the block that makes one comes further down the page
    order = sorted(range(len(BLOCKS)), key=lambda number: "calibrate_coding" not in BLOCKS[number])
    for number in order:
        if "from painter import" in BLOCKS[number]:
            continue
        code = compile(BLOCKS[number], f"embedding.md, block {number}", "exec")
        exec(code, names)
        done += 1
    assert done == len(BLOCKS) - 1
    said = capsys.readouterr().out
    assert "policy='scalekv'" in said and "kvruntime_pool_pages" in said
    for written in ("var-d16.json", "var-d16.safetensors", "var-d16-2.json"):
        assert (tmp_path / written).exists()
    assert names["out"].shape == (4, 256, 16, 64)
