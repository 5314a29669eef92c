"""What the vision notebooks and tests judge by: rows beside themselves alone, and labels made visible."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .completions import IGNORE
from .results import worst

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .vision import Row, VisionCollator


def forward(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits [rows, tokens, vocabulary] of a batch, its labels left aside."""
    device = next(model.parameters()).device
    return model(**{key: value.to(device) for key, value in batch.items() if key != "labels"}).logits


def row_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed cross entropy of each row."""
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:].to(logits.device), ignore_index=IGNORE, reduction="none"
    )
    return losses.sum(1)


def gradients(loss: torch.Tensor, parameters: Sequence[torch.Tensor], keep: bool = False) -> torch.Tensor:
    """Every parameter's gradient in one vector, zero where ``loss`` does not reach."""
    found = torch.autograd.grad(loss, parameters, retain_graph=keep, allow_unused=True)
    pairs = zip(found, parameters, strict=True)
    return torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in pairs])


def row_isolation(
    model: torch.nn.Module, collate: VisionCollator, rows: Sequence[Row], orders: Iterable[Sequence[int]] | None = None
) -> tuple[float, float]:
    """How far a row in a mixed batch is from the same row alone.

    Args:
        orders: of the rows, all of them by default; padding is right and left in turn.

    Returns: the largest difference of any logit, and of any parameter's gradient relative to the largest gradient
        (or absolute, where that is below 1). In the first order each row's own gradient is compared, else the batch's.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    alone, alone_gradients = [], []
    for row in rows:
        batch = collate([row])
        logits = forward(model, batch)
        alone.append(logits[0].detach())
        alone_gradients.append(gradients(row_losses(logits, batch["labels"]).sum(), parameters))

    def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
        return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()

    of_logits, of_gradients = [], []
    side = collate.padding_side
    for number, order in enumerate(orders or itertools.permutations(range(len(rows)))):
        collate.padding_side = ("right", "left")[number % 2]
        batch = collate([rows[i] for i in order])
        logits = forward(model, batch)
        for place, i in enumerate(order):
            seen = batch["attention_mask"][place].bool()
            of_logits.append((logits[place, seen] - alone[i]).abs().max().item())
        losses = row_losses(logits, batch["labels"])
        if number == 0:
            for place, i in enumerate(order):
                own = gradients(losses[place], parameters, keep=True)
                of_gradients.append(difference(own, alone_gradients[i]))
        whole = gradients(losses.sum(), parameters)
        of_gradients.append(difference(whole, sum(alone_gradients[i] for i in order)))
    collate.padding_side = side
    return worst(of_logits), worst(of_gradients)


@torch.no_grad()
def beside_llamacpp(
    model: torch.nn.Module, processor: Any, files: tuple[Path, Path], row: Row, new_tokens: int = 8
) -> dict[str, Any]:
    """One conversation with images, read and answered by transformers and by llama.cpp.

    Args:
        files: what :func:`helpers.gguf_vision.export_gguf` wrote of ``model``.
        row: its images must have sizes that neither side changes, since the two resize differently.

    Returns: ``ids`` (text tokens equal), ``embeddings`` and ``logits`` (largest differences), ``top20`` (tokens equal),
        ``answer`` (greedy tokens equal), ``ours`` and ``theirs`` (the answers), ``vectors`` (llama.cpp's embeddings).
    """
    from .llamacpp import MARKER, LlamaCpp
    from .vision import VisionCollator

    batch = {key: value.to(model.device) for key, value in VisionCollator(processor).prompts([row]).items()}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    projector = base.model.visual if hasattr(base.model, "visual") else base.model.multi_modal_projector
    features: list[torch.Tensor] = []
    hook = projector.register_forward_hook(
        lambda module, args, out: features.append(out if torch.is_tensor(out) else out.pooler_output)
    )
    logits = model(**batch).logits[0, -1].float().numpy(force=True)
    hook.remove()
    end = processor.tokenizer.eos_token_id
    out = model.generate(
        **batch, do_sample=False, max_new_tokens=new_tokens, eos_token_id=end,
        pad_token_id=processor.tokenizer.pad_token_id,
    )  # fmt: skip
    ids = batch["input_ids"][0].tolist()
    # llama.cpp takes a marker for an image and puts the image's own tokens around it.
    token = re.escape(processor.image_token)
    around = rf"(?:<\|vision_start\|>)?(?:{token})+(?:<\|vision_end\|>)?"
    prompt = re.sub(around, MARKER.decode(), processor.tokenizer.decode(ids))
    engine = LlamaCpp(*files)
    said_ids, vectors, said = engine.read(prompt, row["images"])
    said = said[: len(logits)]
    theirs = engine.answer(prompt, row["images"], new_tokens, end)
    engine.close()
    ours, seen = out[0, len(ids) :].tolist(), features[0].flatten(0, -2).float().numpy(force=True)
    return {
        "ids": said_ids == [i for i in ids if i != processor.image_token_id],
        "embeddings": float(abs(np.concatenate(vectors) - seen).max()),
        "logits": float(abs(said - logits).max()),
        "top20": set(np.argsort(said)[-20:]) == set(np.argsort(logits)[-20:]),
        "answer": ours == theirs,
        "ours": ours,
        "theirs": theirs,
        "vectors": np.concatenate(vectors),
    }


def search_markers(ids: Sequence[int], start: Sequence[int], end: Sequence[int]) -> list[int]:
    """The labels of today's ``train_on_responses_only``: everything between two markers that are searched for.

    Args:
        ids: a row's tokens.
        start: the tokens that open an assistant's turn.
        end: the tokens that open a user's.
    """
    labels, learning, i = [], False, 0
    while i < len(ids):
        for marker, then in ((start, True), (end, False)):
            if list(ids[i : i + len(marker)]) == list(marker):
                labels += [IGNORE] * len(marker)
                i, learning = i + len(marker), then
                break
        else:
            labels.append(ids[i] if learning else IGNORE)
            i += 1
    return labels


def draw_labels(
    axes: Axes, processor: Any, ids: Sequence[int], labels: Sequence[int], title: str, width: int = 92
) -> None:
    """Write a row's text into ``axes``: learned tokens on green, masked ones grey, runs of image tokens on blue."""
    from matplotlib.patches import Rectangle

    pieces: list[tuple[str, str]] = []
    for image, group in itertools.groupby(
        zip(ids, labels, strict=True), lambda pair: pair[0] == processor.image_token_id
    ):
        group = list(group)
        if image:
            pieces.append((f"[{len(group)} image tokens]", "image"))
            continue
        for learned, run in itertools.groupby(group, lambda pair: pair[1] != IGNORE):
            text = processor.tokenizer.decode([token for token, _ in run]).replace("\n", "↵")
            pieces.append((text, "learned" if learned else "masked"))
    looks = {"learned": ("black", "#b7e4b0"), "masked": ("#8a8a8a", "white"), "image": ("#1f4e99", "#d5e3f7")}
    letters = [(letter, *looks[look]) for text, look in pieces for letter in text]
    for i, (letter, color, ground) in enumerate(letters):
        line, column = divmod(i, width)
        axes.add_patch(Rectangle((column, -line - 1), 1, 0.95, color=ground, linewidth=0))
        # Letter by letter: a run's width in the saved picture is not that on the screen.
        axes.text(
            column + 0.5, -line - 0.5, letter, family="monospace", fontsize=7, color=color, ha="center", va="center",
            parse_math=False,
        )  # fmt: skip
    axes.set(xlim=(0, width), ylim=(-(len(letters) // width) - 1, 0), title=title)
    axes.title.set_fontsize(9)
    axes.axis("off")
