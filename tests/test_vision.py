"""The collator: every row of a mixed batch is as alone, in every order, for each family; and what it refuses."""

from __future__ import annotations

import contextlib
import copy
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from helpers import tiny_vision
from helpers.completions import IGNORE, NothingToLearnError, fit_content
from helpers.image_resize import ImageSize
from helpers.mllama_mask import isolated_text_rows, present_images_only
from helpers.vision import VisionCollator, load_processor
from helpers.vision_checks import forward, gradients, row_isolation, row_losses

TOWER = {"qwen2_vl": "visual", "qwen2_5_vl": "visual", "mllama": "vision_model"}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def talk(*turns) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(("user", "assistant")), turns)]


def mixed_rows() -> list[dict]:
    """Text without an `images` key, one image, two images inside the text, text with `images` None."""
    two = [{"type": "text", "text": "Is "}, {"type": "image"}, {"type": "text", "text": " like "}, {"type": "image"}]
    return [
        {"messages": talk("Who are you?", "the one")},
        {"messages": talk("What is this?", "A thing."), "images": [picture(60, 40)]},
        {"messages": talk(two, "Yes.", "Sure?", "Quite."), "images": [picture(30, 90, 1), picture(100, 100, 2)]},
        {"messages": talk("Tell me a long story, please.", "Once upon a time."), "images": None},
    ]


@pytest.fixture(scope="module", params=tiny_vision.FAMILIES)
def family(request):
    processor = tiny_vision.processor(request.param)
    return request.param, processor, tiny_vision.model(request.param, processor)


def isolated(name: str, model: torch.nn.Module):
    return isolated_text_rows(model) if name == "mllama" else contextlib.nullcontext()


def test_each_row_is_as_alone_in_every_order(family):
    name, processor, model = family
    with isolated(name, model):
        logit, gradient = row_isolation(model, VisionCollator(processor, responses="all"), mixed_rows())
    assert logit <= 1e-5 and gradient <= 1e-5


def test_a_leak_is_seen():
    processor = tiny_vision.processor("mllama")
    rows = mixed_rows()[:2]
    logit, gradient = row_isolation(tiny_vision.model("mllama", processor), VisionCollator(processor), rows)
    assert logit > 1e-2 and gradient > 1e-2


def test_text_batch_never_runs_the_vision_tower(family):
    name, processor, model = family
    batch = VisionCollator(processor)([mixed_rows()[0], mixed_rows()[3], {"messages": talk("a", "b"), "images": []}])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    calls = []
    hook = getattr(model.model, TOWER.get(name, "vision_tower")).register_forward_hook(lambda *_: calls.append(1))
    try:
        forward(model, batch)
        assert not calls
        forward(model, VisionCollator(processor)([mixed_rows()[1]]))
        assert calls  # the hook does see a call
    finally:
        hook.remove()


def test_mllama_leaks_without_the_patch_and_the_patch_is_undone():
    processor = tiny_vision.processor("mllama")
    model, collate, rows = tiny_vision.model("mllama", processor), VisionCollator(processor), mixed_rows()[:2]
    with torch.no_grad():
        alone = forward(model, collate(rows[:1]))[0]
        batch = collate(rows)
        seen = batch["attention_mask"][0].bool()
        leak = (forward(model, batch)[0, seen] - alone).abs().max()
        with isolated_text_rows(model):
            closed = (forward(model, batch)[0, seen] - alone).abs().max()
        after = (forward(model, batch)[0, seen] - alone).abs().max()
    assert leak > 1e-2 and closed <= 1e-5 and after == leak
    with pytest.raises(ValueError, match="no Mllama"), isolated_text_rows(torch.nn.Linear(1, 1)):
        pass


def test_mllama_runs_the_tower_on_the_images_that_are_there():
    processor = tiny_vision.processor("mllama")
    model, collate, rows = tiny_vision.model("mllama", processor), VisionCollator(processor), mixed_rows()
    seen = []
    # Of the tower's own parts, which the hooks do not touch: [rows x images, tiles, patches, width].
    part = model.model.vision_model.gated_positional_embedding
    hook = part.register_forward_hook(lambda module, args, out: seen.append(out.shape[0]))
    with torch.no_grad():
        stock = forward(model, collate(rows))
        with present_images_only(model):
            ours = forward(model, collate(rows))
            forward(model, collate(rows[:1]))  # no image: the tower does not run
        forward(model, collate(rows))
    hook.remove()
    assert seen == [8, 3, 8]
    text = collate(rows)["attention_mask"].bool()
    with isolated_text_rows(model), torch.no_grad():
        masked = forward(model, collate(rows))
        with present_images_only(model):
            both = forward(model, collate(rows))
    torch.testing.assert_close(both[text], masked[text], rtol=0, atol=1e-5)
    torch.testing.assert_close(ours[2, text[2]], stock[2, text[2]], rtol=0, atol=1e-5)  # has as many images as any
    with isolated_text_rows(model), present_images_only(model):
        logit, gradient = row_isolation(model, VisionCollator(processor, responses="all"), rows, [(0, 1, 2, 3)])
    assert logit <= 1e-5 and gradient <= 1e-5
    with pytest.raises(ValueError, match="no Mllama vision tower"), present_images_only(torch.nn.Linear(1, 1)):
        pass


def test_mllama_patch_holds_under_checkpointing():
    processor = tiny_vision.processor("mllama")
    model, batch = tiny_vision.model("mllama", processor), VisionCollator(processor)(mixed_rows())
    parameters = list(model.parameters())
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with isolated_text_rows(model):
            found.append(gradients(row_losses(forward(model, batch), batch["labels"]).sum(), parameters))
    assert (found[1] - found[0]).abs().max() <= 1e-5 * max(1, found[0].abs().max())


@pytest.mark.parametrize("name", ["llava", "llava_siglip", "mllama", "qwen2_vl", "qwen2_5_vl", "pixtral"])
def test_equals_transformers_own_processor(name):
    """Batches of images alone are those of transformers' processor, token for token; and that processor serves too."""
    import transformers as hf

    ours = tiny_vision.processor(name)
    parts = {"image_processor": ours.image_processor, "tokenizer": ours.tokenizer, "chat_template": ours.chat_template}
    if name in ("qwen2_vl", "qwen2_5_vl", "pixtral"):
        pytest.importorskip("torchvision")
    if name.startswith("llava"):
        select = {"vision_feature_select_strategy": ours.vision_feature_select_strategy}
        stock = hf.LlavaProcessor(
            **parts, **select, patch_size=14, num_additional_image_tokens=ours.num_additional_image_tokens
        )
    elif name == "mllama":
        stock = hf.MllamaProcessor(**parts)
    elif name == "pixtral":
        stock = hf.PixtralProcessor(**parts, patch_size=16)
    else:
        kind = hf.Qwen2VLProcessor if name == "qwen2_vl" else hf.Qwen2_5_VLProcessor
        stock = kind(**parts, video_processor=hf.Qwen2VLVideoProcessor())
    rows = mixed_rows()[1:3]

    def render(messages, prompt=False):
        return ours.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)

    shown = [{"type": "image"}, {"type": "text", "text": rows[0]["messages"][0]["content"]}]
    talks = [[{"role": "user", "content": shown}, *rows[0]["messages"][1:]], rows[1]["messages"]]
    texts = [render(fit_content(messages, render)) for messages in talks]
    expected = stock(
        images=[row["images"] for row in rows], text=texts, return_tensors="pt", padding=True, add_special_tokens=False
    )
    batch = VisionCollator(ours)(rows)
    through_stock = VisionCollator(stock)(rows)
    assert all(torch.equal(through_stock[key], value) for key, value in batch.items())
    for key, value in expected.items():
        if key == "cross_attention_mask":  # transformers lets padding see images
            value = value * expected["attention_mask"][:, :, None, None]
        torch.testing.assert_close(batch[key], value, check_dtype=False, rtol=0, atol=0)


def test_qwen_placeholders_follow_the_grid_and_caps_hold():
    processor = tiny_vision.processor("qwen2_vl")
    row = {"messages": talk("Look", "ok"), "images": [picture(500, 300)]}
    sizes = {}
    for cap in (None, ImageSize.for_processor(processor), ImageSize.for_processor(processor, max_side=84)):
        batch = VisionCollator(processor, image_size=cap)([row])
        count = int((batch["input_ids"] == processor.image_token_id).sum())
        assert count == int(batch["image_grid_thw"].prod()) // 4 == int(batch["mm_token_type_ids"].sum())
        sizes[cap and cap.max_side] = count
        assert (batch["labels"][batch["input_ids"] == processor.image_token_id] == IGNORE).all()
    assert sizes[84] == 3 * 1 < sizes[None] <= 112 * 112 // 28**2


def test_rows_are_not_changed(family):
    _, processor, _ = family
    rows = mixed_rows()
    rows.append({"messages": talk([{"type": "image", "image": picture(40, 40), "text": None}], "x")})
    before, pixels = copy.deepcopy(rows), [image.tobytes() for image in rows[2]["images"]]
    kept = [row.get("images") for row in rows]
    VisionCollator(processor)(rows)
    assert [row["messages"][0]["content"] for row in rows[:4]] == [row["messages"][0]["content"] for row in before[:4]]
    assert rows[4]["messages"][0]["content"][0].keys() == {"type", "image", "text"}
    assert all(a is row.get("images") for a, row in zip(kept, rows, strict=True))
    assert [image.tobytes() for image in rows[2]["images"]] == pixels


def test_truncation_keeps_images_whole(family):
    name, processor, model = family
    rows = [mixed_rows()[0], mixed_rows()[2]]
    whole = VisionCollator(processor)(rows)
    shown = whole["input_ids"][1] == processor.image_token_id
    last = int(shown.nonzero().max()) + 1
    fits = last + 2  # room for Pixtral's closing token
    batch = VisionCollator(processor, max_length=fits)(rows)
    assert batch["input_ids"].shape[1] == fits
    assert torch.equal(batch["input_ids"][1], whole["input_ids"][1, :fits])
    with isolated(name, model), torch.no_grad():
        torch.testing.assert_close(forward(model, batch)[1], forward(model, whole)[1, :fits], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=f"row 1 of the batch: max_length={last - 1} cuts off image tokens"):
        VisionCollator(processor, max_length=last - 1)(rows)
    short, lost = {"messages": talk("a", "b")}, {"messages": talk("A question longer than can be read", "cut off")}
    room = VisionCollator(processor)([short])["input_ids"].shape[1]
    with pytest.raises(NothingToLearnError, match="row 1 of the batch"):
        VisionCollator(processor, max_length=room, responses="last")([short, lost])


def test_what_does_not_fit_names_the_row():
    processor = tiny_vision.processor("qwen2_vl")
    collate, good = VisionCollator(processor), mixed_rows()[0]
    cases = {
        r"row 1 of the batch: 1 images for 2 image placeholders": {
            "messages": talk("Say <|image_pad|>", "no"), "images": [picture(30, 30)],
        },
        r"row 1 of the batch: 1 images for 2 places": {
            "messages": talk([{"type": "image"}, {"type": "image"}], "no"), "images": [picture(30, 30)],
        },
        r"row 1 of the batch has columns \['text'\]": {"text": "no"},
        r"str is no image": {"messages": talk("a", "b"), "image": 3},
    }  # fmt: skip
    for message, row in cases.items():
        with pytest.raises(ValueError, match=message.replace("str is", "int is")):
            collate([good, row])
    with pytest.raises(ValueError, match="no vision model known"):
        VisionCollator(processor.tokenizer)
    with pytest.raises(ValueError, match="responses='first'"):
        VisionCollator(processor, responses="first")


@pytest.mark.parametrize("name", ["qwen2_vl", "pixtral", "llava"])
def test_processor_is_composed_from_a_folder(name, tmp_path):
    from transformers.utils import is_torchvision_available

    if is_torchvision_available():
        pytest.skip("torchvision is here, so that AutoProcessor does it")
    made = tiny_vision.processor(name)
    made.image_processor.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    tiny_vision.model(name, made).config.save_pretrained(tmp_path)
    extra = '{"num_additional_image_tokens": 1}' if name == "llava" else "{}"
    (tmp_path / "processor_config.json").write_text(extra)
    rows = mixed_rows()[:3]
    ours, loaded = VisionCollator(made)(rows), VisionCollator(load_processor(str(tmp_path)))(rows)
    for key, value in ours.items():
        assert torch.equal(loaded[key], value), key


@pytest.mark.parametrize("name", ["qwen2_vl", "mllama", "pixtral", "llava", "llava_siglip"])
def test_torchvision_backed_processors_make_the_same_batch(name):
    """Where torchvision is, transformers' default image processors are its own; only resampling may differ."""
    pytest.importorskip("torchvision")
    import transformers

    ours = tiny_vision.processor(name)
    expected = VisionCollator(ours)(mixed_rows())
    pil = ours.image_processor
    ours.image_processor = getattr(transformers, type(pil).__name__.removesuffix("Pil")).from_dict(pil.to_dict())
    batch = VisionCollator(ours)(mixed_rows())
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        if key == "pixel_values":
            assert batch[key].shape == value.shape and (batch[key] - value).abs().mean() < 0.1
        else:
            assert torch.equal(batch[key], value), key
