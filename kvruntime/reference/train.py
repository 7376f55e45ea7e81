"""Train the bundled model: ``python -m kvruntime.reference.train --help``. CPU, two cores, under
two hours.
"""

from __future__ import annotations

import json
import math
import os
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor

from kvruntime.reference import emoji
from kvruntime.reference.tokenizer import PICTURE_SIDE, Tokenizer
from kvruntime.reference.transformer import EmojiVAR

TOKENIZER_GROUPS = ("Smileys & Emotion", "Animals & Nature", "Food & Drink")
TRANSFORMER_GROUPS = TOKENIZER_GROUPS[:2]


def _shift(pictures: Tensor, reach: int) -> Tensor:
    """Each picture moved by up to ``reach`` pixels both ways, white coming in."""
    padded = F.pad(pictures, (reach,) * 4, value=1.0)
    side = pictures.shape[-1]
    moved = []
    for picture in padded:
        top, left = torch.randint(0, 2 * reach + 1, (2,)).tolist()
        moved.append(picture[:, top : top + side, left : left + side])
    return torch.stack(moved)


def _psnr(a: Tensor, b: Tensor) -> float:
    return float((-10 * (a - b).square().mean((1, 2, 3)).log10()).mean())


def train_tokenizer(pictures: Tensor, steps: int, progress: Progress) -> Tokenizer:
    """Reconstruction (L1 + L2), codebook and commitment losses; dead codes restart from the
    batch.
    """
    tokenizer = Tokenizer()
    optimizer = torch.optim.AdamW(tokenizer.parameters(), lr=1e-3, betas=(0.9, 0.95))
    warm_up = steps // 20  # a plain autoencoder first, then codes
    usage = torch.zeros(tokenizer.codebook.shape[0])
    bar = progress.add_task("tokenizer", total=steps)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (steps - step) / (0.4 * steps))
        batch = pictures[torch.randint(0, len(pictures), (16,))]
        batch = _shift(batch, 3)
        if torch.rand(()) < 0.5:
            batch = batch.flip(3)
        with torch.autocast("cpu", torch.bfloat16):
            latent = tokenizer.encode(batch).float()
        if step < warm_up:
            code = latent
            penalty = latent.square().mean() * 0.01
        else:
            if step == warm_up:
                flat = latent.detach().permute(0, 2, 3, 1).reshape(-1, latent.shape[1])
                with torch.no_grad():
                    start = flat[torch.randperm(len(flat))[: len(usage)]]
                    tokenizer.codebook.copy_(start * torch.rand(len(usage), 1))
            targets, _, sums = tokenizer.quantise(latent)
            quantised = sums[-1]
            penalty = torch.stack(
                [
                    F.mse_loss(total, latent.detach()) + 0.25 * F.mse_loss(total.detach(), latent)
                    for total in sums
                ]
            ).mean()
            code = latent + (quantised - latent).detach()
            usage += torch.bincount(torch.cat([t.flatten() for t in targets]), minlength=len(usage))
            if step % 50 == 0 and step < 0.7 * steps:
                dead = (usage < 2).nonzero()[:, 0]
                rest = (latent - quantised).detach().permute(0, 2, 3, 1).flatten(0, 2)
                with torch.no_grad():
                    tokenizer.codebook[dead] = rest[torch.randint(0, len(rest), (len(dead),))]
                usage.zero_()
        with torch.autocast("cpu", torch.bfloat16):
            decoded = tokenizer.decoder(code).float()
        wanted = batch * 2 - 1
        loss = F.mse_loss(decoded, wanted) + 0.2 * F.l1_loss(decoded, wanted) + penalty
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(tokenizer.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            progress.console.print(f"tokenizer {step} loss {loss.item():.4f}")
        progress.advance(bar)
    tokenizer.eval()
    return tokenizer


def learning_rate(step: int, steps: int, peak: float = 1.5e-3) -> float:
    """Linear warm-up over 200 steps, flat, then a cosine to zero over the last 40 %."""
    decay_start = 0.6 * steps
    if step < decay_start:
        return peak * min(1.0, (step + 1) / 200)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - decay_start) / (steps - decay_start)))


def train_transformer(
    model: EmojiVAR,
    latents: Tensor,
    labels: Tensor,
    steps: int,
    checkpoint: Path,
    progress: Progress,
    compile_model: bool,
) -> list[float]:
    """Cross-entropy on all 680 codes; inputs corrupted by up to 10 %; the class dropped one time in
    ten.

    Resumes from ``checkpoint`` when it exists; ``steps`` may differ from the first run's while the
    rate is flat.
    """
    weights = [p for name, p in model.named_parameters() if not name.startswith("tokenizer.")]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.02)
    losses: list[float] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]
    forward = torch.compile(model) if compile_model else model
    bar = progress.add_task("transformer", total=steps, completed=len(losses))
    began = time.monotonic()
    torch.manual_seed(len(losses))  # a resumed run draws other pictures than the first
    for step in range(len(losses), steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        pick = torch.randint(0, len(latents), (4,))
        with torch.no_grad():
            targets, inputs, _ = model.tokenizer.quantise(latents[pick], torch.rand(4) * 0.1)
        label = torch.where(torch.rand(4) < 0.1, model.num_classes, labels[pick])
        precision = torch.autocast("cpu", torch.bfloat16) if compile_model else nullcontext()
        with precision:
            logits = forward(label, torch.cat(inputs, dim=1))
        loss = F.cross_entropy(logits.float().flatten(0, 1), torch.cat(targets, dim=1).flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.item())
        progress.advance(bar)
        if step % 100 == 99:
            recent = sum(losses[-100:]) / 100
            rate = 100 / (time.monotonic() - began)
            began = time.monotonic()
            progress.console.print(f"transformer {step + 1} loss {recent:.4f} {rate:.2f} steps/s")
        if step % 500 == 499:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "losses": losses,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            os.replace(checkpoint.with_suffix(".new"), checkpoint)
    return losses


def main(
    out: Annotated[Path, typer.Option(help="folder for checkpoints and weights")] = Path("trained"),
    tokenizer_steps: int = 2200,
    steps: int = 4800,
    compile_model: Annotated[bool, typer.Option(help="torch.compile and bf16 autocast")] = True,
) -> None:
    """Render the pictures, train tokenizer and transformer, write emoji64.safetensors and
    classes.json.
    """
    torch.manual_seed(0)
    out.mkdir(parents=True, exist_ok=True)
    _, pixels = emoji.load(TOKENIZER_GROUPS, PICTURE_SIDE)
    pictures = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    kept, pixels = emoji.load(TRANSFORMER_GROUPS, PICTURE_SIDE)
    classes = list(dict.fromkeys(item.subgroup for item in kept))
    labels = torch.tensor([classes.index(item.subgroup) for item in kept])
    with Progress() as progress:
        tokenizer_file = out / "tokenizer.pt"
        tokenizer = Tokenizer()
        if tokenizer_file.exists():
            tokenizer.load_state_dict(torch.load(tokenizer_file, weights_only=True))
        else:
            tokenizer = train_tokenizer(pictures, tokenizer_steps, progress)
            torch.save(tokenizer.state_dict(), tokenizer_file)
        drawn = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        with torch.no_grad():
            latents = tokenizer.encode(drawn)
            psnr = _psnr(tokenizer.decode(tokenizer.quantise(latents)[2][-1]), drawn)
        progress.console.print(f"tokenizer reconstructs the {len(drawn)} pictures at {psnr:.2f} dB")
        model = EmojiVAR(len(classes))
        model.tokenizer = tokenizer.requires_grad_(False)
        losses = train_transformer(
            model, latents, labels, steps, out / "transformer.pt", progress, compile_model
        )
    half = {name: value.half().contiguous() for name, value in model.state_dict().items()}
    save_file(half, out / "emoji64.safetensors")
    (out / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
    print(
        f"tokenizer {psnr:.2f} dB, transformer loss {sum(losses[-100:]) / len(losses[-100:]):.4f}"
    )


if __name__ == "__main__":
    typer.run(main)
