"""Chat with a trained adapter on its 4-bit base, by transformers' ``generate``.

    python3 -m helpers.chat --adapter runs/train
    python3 -m helpers.chat --adapter runs/train --prompt "What does textwrap.wrap do?"

(``transformers chat`` is a client of ``transformers serve``, which takes Hub ids and needs a web server's packages.)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from . import host

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class ChatArguments:
    """What the command can be told."""

    adapter: str = field(metadata={"help": "folder that training saved the adapter in"})
    prompt: str | None = field(default=None, metadata={"help": "asked once; without it, a conversation until Ctrl-D"})
    max_new_tokens: int = field(default=256, metadata={"help": "tokens of an answer, at most"})
    temperature: float = field(default=0.0, metadata={"help": "0: the likeliest token each time; above: sampled"})


@torch.no_grad()
def reply(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    max_new_tokens: int = 256,
    temperature: float = 0.0,
) -> str:
    """The assistant's next turn, printed as it is generated, and returned.

    Args:
        messages: role and content of each turn so far, the user's last.
    """
    from transformers import TextStreamer

    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), **sampling,
    )  # fmt: skip
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main(argv: list[str] | None = None) -> int:
    from transformers import HfArgumentParser

    from .adapters import load_adapter

    parser = HfArgumentParser(ChatArguments, prog="python3 -m helpers.chat", description=__doc__.split("\n")[0])
    args = ChatArguments(**vars(parser.parse_args(argv)))
    host.quiet()
    try:
        if args.max_new_tokens < 1:
            raise ValueError(f"--max_new_tokens is {args.max_new_tokens}; it must be at least 1")
        model, tokenizer = load_adapter(args.adapter)
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer in {args.adapter!r} has no chat template: this model was not made to chat")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    messages: list[dict[str, str]] = []
    try:
        while text := args.prompt or input("you: "):
            messages.append({"role": "user", "content": text})
            answer = reply(model, tokenizer, messages, args.max_new_tokens, args.temperature)
            messages.append({"role": "assistant", "content": answer})
            if args.prompt:
                break
    except (EOFError, KeyboardInterrupt):
        print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
