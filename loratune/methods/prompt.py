"""Prompt tuning: only a few embedding vectors before each row are trained.

Source: Lester et al. 2021, arXiv:2104.08691.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from loratune.errors import ModelError
from loratune.methods.section import MethodSection
from loratune.methods.tuned import Adapter, Setup, Tuned

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Prompt(MethodSection):
    """Train the embeddings of virtual tokens before each row; the model itself is unchanged."""

    type: Literal["prompt"] = "prompt"
    padded_only: ClassVar[bool] = True
    virtual_tokens: int = Field(20, ge=1, le=4096, description="number of vectors before each row")
    init_text: str | None = Field(
        None,
        min_length=1,
        description="text whose embeddings they start from, repeated or truncated to their number, such as a task in a "
        "sentence (default: tokens drawn from the vocabulary)",
    )

    @property
    def before_rows(self) -> int:
        """Virtual tokens that stand before each row in the model's output."""
        return self.virtual_tokens

    @property
    def forgets_by(self) -> str:
        """The key by which the model before step 1 is lost in training."""
        return "type"

    def describe(self) -> str:
        """Return what is trained, in a few words."""
        return f"prompt tuning, {self.virtual_tokens} virtual tokens"

    def apply(self, model: PreTrainedModel, setup: Setup) -> Tuned:
        """Freeze the base and add the virtual tokens.

        Raises:
            ModelError: when the tokenizer makes no tokens of `init_text`.
        """
        import torch
        from peft import PromptTuningConfig, get_peft_model

        model.requires_grad_(False)
        config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=self.virtual_tokens)
        net: Any = get_peft_model(model, config, revision=setup.revision)
        with torch.no_grad():
            start = model.get_input_embeddings()(self._tokens(model, setup.tokenizer).to(model.device))
            net.prompt_encoder["default"].embedding.weight.copy_(start.float())
        return BeforeRows(net, self.virtual_tokens)

    def _tokens(self, model: PreTrainedModel, tokenizer: Any) -> torch.Tensor:
        """Return the tokens whose embeddings initialize the virtual ones, int64, (virtual_tokens,)."""
        import torch

        known = model.get_input_embeddings().weight.shape[0]
        if self.init_text is None:
            return torch.randint(min(len(tokenizer), known), (self.virtual_tokens,))
        ids = tokenizer(self.init_text, add_special_tokens=False).input_ids[: self.virtual_tokens]
        if not ids:
            raise ModelError("`method.init_text` has no tokens", "write a sentence, or leave it out")
        if max(ids) >= known:
            told = f"`method.init_text`: token {max(ids):,} has no embedding: the model has {known:,}"
            raise ModelError(told, "use other words")
        return torch.tensor(ids).repeat(-(-self.virtual_tokens // len(ids)))[: self.virtual_tokens]


class BeforeRows(Adapter):
    """A model with virtual tokens before each row; without them it is the base, not the model before step 1."""

    def __init__(self, net: Any, virtual_tokens: int):
        super().__init__(net, off_is_start=False)
        self.virtual_tokens = virtual_tokens
