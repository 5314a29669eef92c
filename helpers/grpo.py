"""TRL's ``GRPOTrainer`` without logits: completions are scored through `helpers.chunked_head`; the loss stays TRL's."""

from __future__ import annotations

from typing import Any

import torch
from trl import GRPOTrainer

from .chunked_head import chunked_head

HEADS = ("chunked", "full", "trl")


class ChunkedGRPOTrainer(GRPOTrainer):
    """``GRPOTrainer`` that scores completions through `chunked_head`, and can record completions or replay them.

    Args:
        head: "chunked", "full" (all logits, for comparison) or "trl" (TRL's own Triton path).
        recorded: what `recorded` of another trainer held at its end: its completions are taken instead of sampling, and
            random numbers go on from where they did there, so that the two runs differ in nothing but the head.
        head_options: of `linear_forward`.
        kwargs: of ``GRPOTrainer``.
    """

    def __init__(
        self,
        *args,
        head: str = "chunked",
        recorded: list[tuple] | None = None,
        head_options: dict[str, Any] | None = None,
        **kwargs,
    ):
        if head not in HEADS:
            raise ValueError(f"head {head!r} is not one of {', '.join(HEADS)}")
        model = kwargs["model"] if "model" in kwargs else args[0]
        trained = [p for p in model.parameters() if p.requires_grad] if isinstance(model, torch.nn.Module) else []
        values = [p.detach().clone() for p in trained]
        super().__init__(*args, **kwargs)
        # TRL rounds adapters of a quantised model to bfloat16 (peft#2889); GradScaler has no bfloat16 unscale.
        for parameter, value in zip(trained, values, strict=True):
            parameter.data = value.to(parameter.device)
        self.head, self.head_options = head, head_options or {}
        self.recorded: list[tuple] = []
        self._replayed = iter(recorded) if recorded is not None else None

    def _get_per_token_logps_and_entropies(self, model, *args, **kwargs):
        if self.head == "trl":
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        entropy = self._entropy_bonus_enabled
        with chunked_head(
            model, self.temperature, differentiable_entropy=entropy, full=self.head == "full", **self.head_options
        ):
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        if self._replayed is None:
            generated = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            self.recorded.append((prompt_ids, generated, torch.get_rng_state()))
            return generated
        prompts, generated, state = next(self._replayed)
        if prompts != prompt_ids:
            raise ValueError("the completions recorded are of other prompts: replay them with the same data and seed")
        torch.set_rng_state(state)
        return generated
