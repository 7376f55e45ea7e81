"""build(): others' code from a checkout, their weights from a folder, and what is said where
something is missing. The checkouts are small and our own; tests/integration takes the real ones.
"""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kvruntime
from kvruntime.models import BUILDERS, build
from kvruntime.models.checkout import find_weights, load_into, read_weights
from kvruntime.models.infinity import _packed, random_text
from kvruntime.models.stand_ins import DropPath, _modules, varlen_kvpacked

ROOT = Path(__file__).resolve().parents[2]
FULL = pytest.mark.full
VAR_CODE = """
import torch
from torch import nn
{imports}

class VQVAE(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.settings, self.weight = settings, nn.Parameter(torch.zeros(2))

class VAR(nn.Module):
    def __init__(self, vae_local, **settings):
        super().__init__()
        self.settings, self.weight = settings, nn.Parameter(torch.ones(3))
        self.initialised = None
    def init_weights(self, **settings):
        self.initialised = settings
    def autoregressive_infer_cfg(self, B, label_B, g_seed, cfg, top_k, top_p):
        assert torch.is_inference_mode_enabled()
        cast = torch.is_autocast_enabled("cpu")
        print(B, label_B.tolist(), g_seed, cfg, top_k, top_p, cast)
        return torch.zeros(B, 3, 8, 8)
"""


@pytest.fixture
def checkout(tmp_path):
    def make(imports=""):
        repo = tmp_path / "VAR"
        (repo / "models").mkdir(parents=True, exist_ok=True)
        (repo / "models" / "__init__.py").write_text("from .var import VAR, VQVAE\n")
        (repo / "models" / "var.py").write_text(VAR_CODE.format(imports=imports))
        return repo

    return make


def python(code, cwd):
    """In a process of its own: the checkout's package is called `models`."""
    return subprocess.run(
        [sys.executable, "-c", "import torch\nfrom kvruntime.models import build\n" + code],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
    )


def test_the_authors_code_with_random_weights_or_theirs(checkout, tmp_path):
    repo, weights = checkout(), tmp_path / "weights"
    weights.mkdir()
    torch.save({"weight": torch.tensor([5.0, 6.0])}, weights / "vae_ch160v4096z32.pth")
    torch.save({"weight": torch.tensor([7.0, 8.0, 9.0])}, weights / "var_d16.pth")
    done = python(
        f"""
built = build("var-d16", {str(repo)!r})
assert built.model.initialised == dict(init_adaln=0.5, init_adaln_gamma=0.5, init_head=1.0)
assert built.model.settings["depth"] == 16 and built.model.settings["embed_dim"] == 1024
assert built.model.settings["patch_nums"] == built.vae.settings["v_patch_nums"]
assert not built.model.training and not built.model.weight.requires_grad
assert built.draw(2, 998).shape == (2, 3, 8, 8)
small = build("var-d36", {str(repo)!r}, depth=2, dtype=torch.bfloat16)
assert small.model.settings["shared_aln"] and small.model.settings["num_heads"] == 2
small.draw(1, 3, cfg=1.5)
loaded = build("var-d16", {str(repo)!r}, {str(weights)!r})
print(loaded.vae.weight.tolist(), loaded.model.weight.tolist(), loaded.model.initialised)
""",
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2 [998, 999] 998 4.0 900 0.95 False",
        "1 [3] 3 1.5 900 0.95 True",
        "[5.0, 6.0] [7.0, 8.0, 9.0] None",
    ]


@pytest.mark.parametrize(
    ("imports", "stand_ins", "says"),
    [
        (
            "import nowhere",
            True,
            "which is not installed: pip install nowhere, nothing stands in for it",
        ),
        (
            "import flash_attn",
            False,
            "which is not installed: pip install flash-attn, or build(..., stand_ins=True)",
        ),
        ("import flash_attn", True, ""),
        pytest.param("from timm.models.layers import DropPath, drop_path", True, "", marks=FULL),
        pytest.param("from timm.loss import SoftTargetCrossEntropy", True, "", marks=FULL),
        pytest.param("from torchvision import transforms", True, "", marks=FULL),
        pytest.param("from huggingface_hub import PyTorchModelHubMixin", True, "", marks=FULL),
        pytest.param(
            "import flash_attn.ops.layer_norm",
            True,
            "imports flash_attn, which is not installed",
            marks=FULL,
        ),
    ],
)
def test_what_its_code_imports_and_is_not_installed(checkout, tmp_path, imports, stand_ins, says):
    code = f"build('var-d16', {str(checkout(imports))!r}, depth=1, stand_ins={stand_ins})"
    done = python(code, tmp_path)
    assert (done.returncode == 0) == (not says), done.stderr
    assert says in (done.stderr.splitlines() or [""])[-1]


def test_another_package_of_that_name_is_in_the_way(checkout, tmp_path):
    (tmp_path / "models.py").write_text("")
    done = python(f"import models; build('var-d16', {str(checkout())!r})", tmp_path)
    assert "build the model in a process of its own" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("var-d17", "."), ValueError, "unknown model 'var-d17'; there are emoji64, var-d16"),
        (("var-d16",), ValueError, "give repo, a checkout of it"),
        (("var-d16", "."), FileNotFoundError, "no checkout: it has no models/var.py"),
        (("infinity-2b", "."), FileNotFoundError, "it has no infinity/models/bsq_vae/vae.py"),
        (
            ("var-d20", ".", "."),
            FileNotFoundError,
            r"z32.pth is missing: .*FoundationVision/var",
        ),
        (("infinity-8b", ".", "."), FileNotFoundError, r"patchify.pth is missing: .*/Infinity"),
    ],
)
def test_what_is_missing_is_named(arguments, error, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=says):
        build(*arguments)


def test_depths_go_with_random_weights():
    with pytest.raises(ValueError, match="depth 2 goes with random weights"):
        build("var-d16", ".", ".", depth=2)
    with pytest.raises(ValueError, match="emoji64 comes as it is, got depth 2"):
        build("emoji64", depth=2)


def test_weights_that_are_code_are_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    path = tmp_path / "model.pth"
    torch.save({"weight": Evil()}, path)
    with pytest.raises(Exception, match=r"(?i)weights.?only"):
        read_weights(path)
    assert find_weights(tmp_path, "model.pth", "nowhere") == path


def test_weights_that_lack_a_tensor(tmp_path):
    model = torch.nn.Linear(2, 3).requires_grad_(False)
    with pytest.raises(ValueError, match="lacks 1 tensors of the model, bias first"):
        load_into(model, {"weight": torch.zeros(3, 2), "more": torch.zeros(1)}, tmp_path)
    assert float(model.weight.abs().sum()) == 0.0


def test_the_bundled_model_is_built_like_the_others():
    assert next(iter(BUILDERS)) == "emoji64"
    built = build("emoji64", dtype=torch.float32)
    own = built.draw(2, 3)
    assert torch.equal(own, built.model.generate(torch.tensor([3, 4]), 3))
    assert torch.equal(
        built.draw(1, 3, labels=torch.tensor([4])), built.model.generate(torch.tensor([4]), 3)
    )
    with kvruntime.attach(built.model, "full", 1.0):
        assert torch.equal(built.draw(2, 3), own)


class TestStandIns:
    def test_attention_of_packed_sequences(self):
        generator = torch.Generator().manual_seed(0)
        lengths_q, lengths_k = [2, 1, 3], [4, 1, 2]
        q = torch.randn(6, 2, 8, generator=generator)
        kv = torch.randn(7, 2, 2, 8, generator=generator)
        ends = [torch.tensor([0, *lengths]).cumsum(0).int() for lengths in (lengths_q, lengths_k)]
        out = varlen_kvpacked(q, kv, *ends, 3, 4, softmax_scale=0.3)
        start_q = start_k = 0
        for queries, keys in zip(lengths_q, lengths_k, strict=True):
            for head in range(2):
                part = q[start_q : start_q + queries, head].double()
                k, v = kv[start_k : start_k + keys, :, head].double().unbind(1)
                wanted = (part @ k.T * 0.3).softmax(-1) @ v
                ours = out[start_q : start_q + queries, head].double()
                assert torch.allclose(ours, wanted, atol=1e-5)
            start_q, start_k = start_q + queries, start_k + keys
        with pytest.raises(ValueError, match=r"no dropout, got 0.5"):
            varlen_kvpacked(q, kv, *ends, 3, 4, dropout_p=0.5)

    def test_what_is_not_computed_raises(self):
        (flash,) = _modules("flash_attn")
        with pytest.raises(ImportError, match=r"flash_attn_func is called, and only"):
            flash.flash_attn_func(1, 2, 3)
        drop = DropPath(0.5)
        with pytest.raises(ImportError, match="needed to train"):
            drop(torch.zeros(1))
        assert torch.equal(drop.eval()(torch.ones(2)), torch.ones(2))

    def test_they_are_logged(self, caplog, monkeypatch):
        from kvruntime.models import stand_ins

        monkeypatch.setattr(stand_ins, "_is_installed", lambda name: name != "imageio")
        monkeypatch.delitem(sys.modules, "imageio", raising=False)
        with caplog.at_level(logging.WARNING):
            with stand_ins.standing_in():
                import imageio  # noqa: F401
        assert "imageio" not in sys.modules
        assert [record.getMessage() for record in caplog.records] == [
            "stands in for imageio: whatever is called of it raises"
        ]


def test_prompts_are_packed_in_a_run():
    text = [torch.ones(2, 4), torch.zeros(3, 4)]
    run, lengths, ends, longest = _packed(text)
    assert run.shape == (5, 4) and lengths == [2, 3] and longest == 3
    assert ends.tolist() == [0, 2, 5] and ends.dtype == torch.int32
    one, two = random_text(2, 1, tokens=3)
    assert one.shape == (3, 2048) and not torch.equal(one, two)
