"""Batches of text and images in any mix: Qwen2-VL, Qwen2.5-VL, Llama 3.2 Vision (Mllama), Pixtral and Llava.

Rows are prepared one by one and then joined, so that what a row becomes does not depend on its neighbours: the text is
rendered and tokenised, each image's one placeholder token grows to as many as the image needs, and padding comes last.
Images go through transformers' own image processors, in PIL where torchvision is missing.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.processing_utils import ProcessorMixin

from .completions import IGNORE, encode_conversation, labels_for, without_nones
from .image_resize import ImageSize, image_grid, open_image

Row = dict[str, Any]
# Pixtral's and Qwen's words around an image, which are no text to learn either.
AROUND_IMAGES = ("<|vision_start|>", "<|vision_end|>", "[IMG_BREAK]", "[IMG_END]")


class VisionProcessor(ProcessorMixin):
    """An image processor and a tokenizer, for machines where transformers' processor classes want torchvision.

    Args:
        image_processor: such as ``Qwen2VLImageProcessorPil``.
        tokenizer: a fast tokenizer that knows ``image_token``.
        chat_template: Jinja; the tokenizer's by default.
        image_token: the placeholder that the template writes for an image; by default the first of the known ones
            that the tokenizer has.
        patch_size: of the vision tower, for models whose image processor does not know it (Llava, Pixtral).
        spatial_merge_size: patches that one token takes per side (Pixtral).
        vision_feature_select_strategy: ``default`` where the model drops its class token (Llava), else ``full``.
        num_additional_image_tokens: tokens of the tower that are no patch (1 for CLIP's class token).
    """

    def __init__(
        self,
        image_processor: Any,
        tokenizer: Any,
        chat_template: str | None = None,
        image_token: str | None = None,
        patch_size: int | None = None,
        spatial_merge_size: int = 1,
        vision_feature_select_strategy: str = "default",
        num_additional_image_tokens: int = 0,
    ):
        self.image_token = image_token or _image_token(tokenizer)
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.patch_size = patch_size
        self.spatial_merge_size = spatial_merge_size
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        super().__init__(image_processor, tokenizer, chat_template=chat_template or tokenizer.chat_template)

    def __call__(self, *args: Any, **kwargs: Any):
        raise NotImplementedError("VisionProcessor only holds its parts; VisionCollator makes batches of them")


def load_processor(folder: str) -> ProcessorMixin:
    """``AutoProcessor`` where its class can be made here, else :class:`VisionProcessor` of the same parts.

    Args:
        folder: a local folder or a Hub id.
    """
    from transformers import AutoConfig, AutoProcessor, AutoTokenizer
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        return AutoProcessor.from_pretrained(folder)
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    saved = ProcessorMixin.get_processor_dict(folder)[0]
    named = ("patch_size", "spatial_merge_size", "vision_feature_select_strategy",
             "num_additional_image_tokens", "chat_template")  # fmt: skip
    settings = {name: saved[name] for name in named if saved.get(name) is not None}
    settings.setdefault("patch_size", config.vision_config.patch_size)
    token = getattr(config, "image_token_id", None) or config.image_token_index
    kind = _kind(ImageProcessingMixin.get_image_processor_dict(folder)[0]["image_processor_type"])
    module, _ = _known(kind)
    module = importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    image_processor = getattr(module, f"{kind}Pil").from_pretrained(folder)
    return VisionProcessor(image_processor, tokenizer, image_token=tokenizer.convert_ids_to_tokens(token), **settings)


@dataclass
class VisionCollator:
    """Conversations with any number of images, or none, to one batch of tensors.

    A row holds ``messages`` (or ``prompt`` and ``completion``) and its images in ``images`` (a list, None or missing)
    or ``image``, or inside the messages (``{"type": "image", "image": ...}``). Images without a place in the
    messages come before the first user's text. Rows are read, never changed.

    Args:
        processor: of transformers, or a :class:`VisionProcessor`.
        max_length: tokens per row, image placeholders included; None cuts nothing.
        image_size: what images are resized to, and nothing but that; by default what the processor does itself.
        responses: ``all`` or ``last`` learns the assistant's turns or its last; None learns every word. Image tokens
            and padding are never learned.
        padding_side: ``right`` or ``left``; the tokenizer's by default.

    Returns (when called with a list of rows): ``input_ids``, ``attention_mask`` and ``labels``, int64 [rows, tokens];
        with images also ``pixel_values`` (float32) and what the model wants beside them. A batch without images has
        none of those, so that the vision tower does not run.

    Raises: ValueError, naming the row, for images that do not fit the placeholders, or a cut that would lose image
        tokens; NothingToLearnError for a row whose labels are all masked.
    """

    processor: Any
    max_length: int | None = None
    image_size: ImageSize | None = None
    responses: str | None = None
    padding_side: str | None = None
    family: _Family = field(init=False, repr=False)

    def __post_init__(self):
        if self.responses not in (None, "all", "last"):
            raise ValueError(f"responses={self.responses!r} is not one of None, 'all', 'last'")
        if self.padding_side not in (None, "left", "right"):
            raise ValueError(f"padding_side={self.padding_side!r} is not one of None, 'left', 'right'")
        self.family = _known(_kind(type(getattr(self.processor, "image_processor", None)).__name__))[1](
            self.processor, resized=self.image_size is not None
        )

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        return self._join([self._encode(row, f"row {i} of the batch") for i, row in enumerate(rows)], self.padding_side)

    def prompts(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """What ``generate`` takes: each conversation and the template's call for an answer, padded left, no labels."""
        encoded = [self._encode(row, f"row {i} of the batch", prompt=True) for i, row in enumerate(rows)]
        batch = self._join(encoded, "left")
        del batch["labels"]
        return batch

    def _join(self, encoded: list[Row], padding_side: str | None) -> dict[str, torch.Tensor]:
        length = max(len(row["ids"]) for row in encoded)
        tokenizer = self.processor.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        left = (padding_side or tokenizer.padding_side) == "left"
        shape = len(encoded), length
        batch = {
            "input_ids": torch.full(shape, pad),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
            "labels": torch.full(shape, IGNORE),
        }
        places = []
        for i, row in enumerate(encoded):
            start = length - len(row["ids"]) if left else 0
            place = slice(start, start + len(row["ids"]))
            places.append(place)
            batch["input_ids"][i, place] = torch.tensor(row["ids"])
            batch["attention_mask"][i, place] = 1
            batch["labels"][i, place] = torch.tensor(row["labels"])
        if any(row["images"] for row in encoded):
            batch |= self.family.join(encoded, places, length)
        return batch

    def _encode(self, row: Row, name: str, prompt: bool = False) -> Row:
        """Token ids and labels of one row, its placeholders grown, and its images as tensors."""
        messages, images = _with_images(row, name)
        tokenizer = self.processor.tokenizer
        ids, said = encode_conversation(
            tokenizer,
            messages,
            chat_template=getattr(self.processor, "chat_template", None),
            tools=row.get("tools"),
            last_only=self.responses == "last",
            generation_prompt=prompt,
        )
        if self.responses is None or prompt:
            said = [True] * len(ids)
        token = self.family.image_token_id
        if ids.count(token) != len(images):
            raise ValueError(
                f"{name}: {len(images)} images for {ids.count(token)} image placeholders "
                f"({tokenizer.convert_ids_to_tokens(token)!r}) in its rendered text; each image needs one, and no "
                "text may contain any"
            )
        prepared = [self.family.prepare(self.image_size(image) if self.image_size else image) for image in images]
        ids, said, last = self._grow(ids, said, prepared)
        if self.max_length is not None and len(ids) > self.max_length:
            if last >= self.max_length:
                raise ValueError(
                    f"{name}: max_length={self.max_length} cuts off image tokens, which reach to token {last + 1} of "
                    f"{len(ids)}; raise max_length, or lower image_size"
                )
            ids, said = ids[: self.max_length], said[: self.max_length]
        return {"ids": ids, "labels": labels_for(ids, said, self.family.masked, name), "images": prepared}

    def _grow(self, ids: list[int], said: list[bool], prepared: list[Row]) -> tuple[list[int], list[bool], int]:
        """One placeholder an image becomes all of its tokens; also where the last of them is (-1 without images)."""
        grown, grown_said, images, last = [], [], iter(prepared), -1
        for token, mine in zip(ids, said, strict=True):
            piece = self.family.tokens(next(images)) if token == self.family.image_token_id else [token]
            grown += piece
            grown_said += [mine] * len(piece)
            if token == self.family.image_token_id:
                last = len(grown) - 1
        return grown, grown_said, last


class _Family:
    """What models whose image tokens stand in the text have in common; subclasses say what differs."""

    def __init__(self, processor: Any, resized: bool):
        self.processor, self.image_processor = processor, processor.image_processor
        self.image_token_id = processor.image_token_id
        known = processor.tokenizer.get_vocab()
        self.masked = {self.image_token_id, *(known[token] for token in AROUND_IMAGES if token in known)}
        # On the patch grid already, so that a second resize could only enlarge.
        self.settings = {"do_resize": False} if resized and image_grid(processor) > 1 else {}

    def prepare(self, image: Any) -> Row:
        """The tensors of one image, batch dimension first."""
        return dict(self.image_processor(images=[image], return_tensors="pt", **self.settings))

    def tokens(self, image: Row) -> list[int]:
        """The placeholder tokens of one image."""
        raise NotImplementedError

    def join(self, rows: list[Row], places: list[slice], length: int) -> dict[str, torch.Tensor]:
        """The tensors of all images, in the order of their placeholders."""
        images = [image for row in rows for image in row["images"]]
        return {key: torch.cat([image[key] for image in images]) for key in images[0]}


class _Qwen(_Family):
    """Qwen2-VL and Qwen2.5-VL: patches of all images in one list, ``image_grid_thw`` [images, 3]."""

    def tokens(self, image: Row) -> list[int]:
        return [self.image_token_id] * (int(image["image_grid_thw"].prod()) // self.image_processor.merge_size**2)

    def join(self, rows: list[Row], places: list[slice], length: int) -> dict[str, torch.Tensor]:
        types = torch.zeros(len(rows), length, dtype=torch.int32)  # 1 at image tokens: the model's rope wants it
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            types[i, place] = (torch.tensor(row["ids"]) == self.image_token_id).int()
        return super().join(rows, places, length) | {"mm_token_type_ids": types}


class _Pixtral(_Family):
    """Pixtral: images padded to the largest, ``image_sizes`` [images, 2]; a token ends each row of patches."""

    def __init__(self, processor: Any, resized: bool):
        super().__init__(processor, resized)
        convert = processor.tokenizer.convert_tokens_to_ids
        self.row_end, self.end = convert("[IMG_BREAK]"), convert("[IMG_END]")
        self.side = processor.patch_size * getattr(processor, "spatial_merge_size", 1)
        self.settings["patch_size"] = {"height": self.side, "width": self.side}

    def tokens(self, image: Row) -> list[int]:
        height, width = (int(side) // self.side for side in image["image_sizes"][0])
        patches = ([self.image_token_id] * width + [self.row_end]) * height
        return [*patches[:-1], self.end]

    def join(self, rows: list[Row], places: list[slice], length: int) -> dict[str, torch.Tensor]:
        images = [image for row in rows for image in row["images"]]
        sizes = torch.cat([torch.as_tensor(image["image_sizes"]) for image in images])
        pixels = torch.zeros(len(images), 3, *sizes.amax(0).tolist())
        for canvas, image in zip(pixels, images, strict=True):
            height, width = image["pixel_values"].shape[-2:]
            canvas[:, :height, :width] = image["pixel_values"][0]
        return {"pixel_values": pixels, "image_sizes": sizes}


class _Llava(_Family):
    """Llava on CLIP or SigLIP: every image one size, ``pixel_values`` [images, 3, side, side]."""

    def tokens(self, image: Row) -> list[int]:
        processor = self.processor
        height, width = (side // processor.patch_size for side in image["pixel_values"].shape[-2:])
        class_token = processor.vision_feature_select_strategy == "default"  # the model drops it
        return [self.image_token_id] * (height * width + processor.num_additional_image_tokens - class_token)


class _Mllama(_Family):
    """Llama 3.2 Vision: images are seen by cross attention; one token each, tensors [rows, most images, tiles, ...].

    Wrap training in :func:`helpers.mllama_mask.isolated_text_rows`, or text rows read other rows' images.
    """

    def tokens(self, image: Row) -> list[int]:
        return [self.image_token_id]

    def join(self, rows: list[Row], places: list[slice], length: int) -> dict[str, torch.Tensor]:
        from transformers.models.mllama.processing_mllama import (
            convert_sparse_cross_attention_mask_to_dense as dense,
        )
        from transformers.models.mllama.processing_mllama import get_cross_attention_token_mask

        most, tiles = max(len(row["images"]) for row in rows), self.image_processor.max_image_tiles
        one = next(row["images"][0] for row in rows if row["images"])
        pixels = torch.zeros(len(rows), most, *one["pixel_values"].shape[2:])
        ratio_ids = torch.zeros(len(rows), most, dtype=torch.long)
        ratio_mask = torch.zeros(len(rows), most, tiles, dtype=torch.long)
        ratio_mask[:, :, 0] = 1  # an image that is not there has one tile of zeros, as transformers pads
        sees = torch.zeros(len(rows), length, most, tiles, dtype=torch.long)
        for i, (row, place) in enumerate(zip(rows, places, strict=True)):
            for j, image in enumerate(row["images"]):
                pixels[i, j] = image["pixel_values"][0, 0]
                ratio_ids[i, j] = int(image["aspect_ratio_ids"][0, 0])
                ratio_mask[i, j] = image["aspect_ratio_mask"][0, 0]
            if row["images"]:
                counts = [[image["num_tiles"][0][0] for image in row["images"]]]
                spans = [get_cross_attention_token_mask(row["ids"], self.image_token_id)]
                mask = dense(spans, counts, tiles, len(row["ids"]))
                sees[i, place, : len(row["images"])] = torch.from_numpy(mask[0])
        return {
            "pixel_values": pixels,
            "aspect_ratio_ids": ratio_ids,
            "aspect_ratio_mask": ratio_mask,
            "cross_attention_mask": sees,
        }


# Image processor -> its module in transformers, and how its images are joined.
FAMILIES: dict[str, tuple[str, type[_Family]]] = {
    "Qwen2VLImageProcessor": ("qwen2_vl", _Qwen),
    "PixtralImageProcessor": ("pixtral", _Pixtral),
    "MllamaImageProcessor": ("mllama", _Mllama),
    "CLIPImageProcessor": ("clip", _Llava),
    "SiglipImageProcessor": ("siglip", _Llava),
    "LlavaImageProcessor": ("llava", _Llava),
}


def _kind(name: str) -> str:
    return name.removesuffix("Fast").removesuffix("Pil")


def _known(kind: str) -> tuple[str, type[_Family]]:
    if kind not in FAMILIES:
        raise ValueError(
            f"no vision model known that prepares images by {kind}; known: Qwen2-VL, Qwen2.5-VL, Mllama, Pixtral, Llava"
        )
    return FAMILIES[kind]


def _image_token(tokenizer: Any) -> str:
    known = tokenizer.get_vocab()
    for token in ("<|image_pad|>", "<|image|>", "[IMG]", "<image>"):
        if token in known:
            return token
    raise ValueError("the tokenizer knows none of the usual image tokens; name its own in image_token")


def _with_images(row: Row, name: str) -> tuple[list[Row], list[Any]]:
    """The row's messages with a place for each image, and the images in the order of their places."""
    if "messages" not in row and not ("prompt" in row and "completion" in row):
        raise ValueError(
            f"{name} has columns {sorted(row)}; a conversation is needed in `messages`, or in `prompt` and `completion`"
        )
    messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
    messages = without_nones(messages)
    waiting = row.get("images")
    if waiting is None:
        waiting = [] if row.get("image") is None else [row["image"]]
    parts = [part for message in messages for part in _parts(message)]
    places = [part for part in parts if part.get("type") == "image" or "image" in part]
    open_places = sum("image" not in part for part in places)
    if waiting and not places:
        first = next((m for m in messages if m["role"] == "user"), None)
        if first is None:
            raise ValueError(f"{name} has images and no user message to show them in")
        given = first.get("content") or []
        text = [{"type": "text", "text": given}] if isinstance(given, str) else given
        first["content"] = [*({"type": "image"} for _ in waiting), *text]
    elif open_places != len(waiting):
        raise ValueError(f"{name}: {len(waiting)} images for {open_places} places in its messages; each needs one")
    waiting, images = iter(waiting), []
    for message in messages:
        for part in _parts(message):
            if part.get("type") == "image" or "image" in part:
                images.append(open_image(part.pop("image") if "image" in part else next(waiting)))
                part["type"] = "image"
    return messages, images


def _parts(message: Row) -> list[Row]:
    content = message.get("content")
    return content if isinstance(content, list) else []
