"""Mixed Mllama (Llama 3.2 Vision) batches: text rows see no image, and images that are not there cost nothing.

Tokens with no image to look at (a text-only row, or text before an image) have every key of the cross attention
masked; transformers then zeroes that mask row, so that softmax spreads them over the images of other rows, and blanks
only the MLP's output behind it, so that they leak. https://github.com/huggingface/transformers/issues/39379
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def isolated_text_rows(model: torch.nn.Module) -> Iterator[None]:
    """Multiply each cross attention's output by the mask of rows that see an image, while the context is open.

    A row's logits and gradients in a mixed batch then equal those of the row alone. Hooks on this model only; works
    under gradient checkpointing, PEFT and 4-bit layers.

    Raises: ValueError where the model has no Mllama cross-attention layer.
    """
    from transformers.models.mllama.modeling_mllama import MllamaCrossAttentionDecoderLayer

    layers = [module for module in model.modules() if isinstance(module, MllamaCrossAttentionDecoderLayer)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no Mllama cross-attention layer; it needs no isolated_text_rows")
    sees_image: dict[torch.nn.Module, torch.Tensor | None] = {}  # cross attention -> [batch, 1, tokens, 1]

    # As an argument of the call, the mask is at hand again when checkpointing calls the layer's forward a second time.
    def hand_on(layer, args, kwargs):
        return args, kwargs | {"sees_image": kwargs.get("full_text_row_masked_out_mask")}

    def take(cross_attention, args, kwargs):
        sees_image[cross_attention] = kwargs["sees_image"]
        return args, {name: value for name, value in kwargs.items() if name != "sees_image"}

    def mask(cross_attention, args, output):
        seen = sees_image.pop(cross_attention)
        return output if seen is None else (output[0] * seen[:, 0].to(output[0].dtype), *output[1:])

    hooks = [layer.register_forward_pre_hook(hand_on, with_kwargs=True) for layer in layers]
    hooks += [layer.cross_attn.register_forward_pre_hook(take, with_kwargs=True) for layer in layers]
    hooks += [layer.cross_attn.register_forward_hook(mask) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def present_images_only(model: torch.nn.Module) -> Iterator[None]:
    """Run the vision tower on the images that are there, not on the zeros that fill up a mixed batch.

    Mllama wants as many images for each row as the row with the most has: a text row beside a row of two images costs
    two runs of the tower. The result is the same, since no token sees a filled-up place.

    Raises: ValueError where the model has no Mllama vision tower.
    """
    from transformers.models.mllama.modeling_mllama import MllamaVisionModel

    tower = next((module for module in model.modules() if isinstance(module, MllamaVisionModel)), None)
    if tower is None:
        raise ValueError(f"{type(model).__name__} has no Mllama vision tower; it needs no present_images_only")
    present: list[torch.Tensor] = []

    def gather(tower, args, kwargs):
        present[:] = [kwargs["aspect_ratio_ids"] > 0]  # [rows, images]; 0 is no image
        names = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        return args, {**kwargs, **{name: kwargs[name][present[0]][:, None] for name in names}}

    def scatter(tower, args, output):
        seen = output.last_hidden_state  # [images, 1, tiles, patches, width]
        whole = seen.new_zeros(*present[0].shape, *seen.shape[2:])
        whole[present[0]] = seen[:, 0]
        output.last_hidden_state = whole
        return output

    hooks = [tower.register_forward_pre_hook(gather, with_kwargs=True), tower.register_forward_hook(scatter)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
