"""Supervised fine-tuning: cross entropy of the trained tokens, given everything before them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from loratune.config.section import Section
from loratune.kernels import linear_cross_entropy

if TYPE_CHECKING:
    import torch

    from loratune.data.prefix_sharing import Layout, Row

IGNORED = -100  # torch's and transformers' label for a token that is not trained


class Sft(Section):
    """Learn to write the trained tokens: sum of -log p(token | everything before it) over their count."""

    type: Literal["sft"] = "sft"
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="part (0-1) of each target spread over the whole vocabulary"
    )
    neftune: float = Field(
        0.0,
        ge=0,
        description="noise on the embeddings while training: uniform within neftune / sqrt(tokens x width) "
        "(arXiv:2310.05914, alg. 1)",
    )

    def collate(self, rows: Sequence[Row], layout: Layout = "padded") -> dict[str, Any]:
        """Make one micro-batch of rows: padded on the right, or packed behind one another, or sharing what they can.

        Returns:
            input_ids, attention_mask and labels, each (rows, longest); a label stands under the token itself and is
            IGNORED where the token is not trained, or is the first of its row and so can't be predicted. Packed: see
            `_behind_one_another` and `_sharing`. Of every layout `predicts`: the places where the next token is
            trained, counted through all rows, int64, (trained tokens,); found here, as a GPU would have to be waited
            for; `targets`: these tokens, as many; `tokens`: how many the rows have, without padding, not as a tensor.
        """
        import torch

        tokens = sum(len(row.ids) for row in rows)
        if layout == "shared":
            return _sharing(rows) | {"tokens": tokens}
        if layout == "packed":
            return _predicting(_behind_one_another(rows)) | {"tokens": tokens}
        shape = (len(rows), max(len(row.ids) for row in rows))
        input_ids = torch.zeros(shape, dtype=torch.long)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED, dtype=torch.long)
        for index, row in enumerate(rows):
            ids, trained = torch.from_numpy(row.ids).long(), torch.from_numpy(row.trained)
            length = len(ids)
            input_ids[index, :length] = ids
            attention_mask[index, :length] = 1
            labels[index, 1:length] = torch.where(trained[1:], ids[1:], IGNORED)
        padded = _predicting({"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels})
        return padded | {"tokens": tokens}

    @property
    def is_noisy(self) -> bool:
        """Whether something random is drawn for each token of each row."""
        return self.neftune > 0

    def count(self, batch: dict[str, Any]) -> int:
        """Return the number of trained tokens in a micro-batch."""
        return len(batch["predicts"])

    def total(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """Return the summed loss of a micro-batch in nats, float32, shape ().

        Smoothing and noise apply only while the model is in training mode, so that an evaluation measures the plain
        cross entropy.
        """
        smoothing = self.label_smoothing if model.training else 0.0
        inner = _inner(model)
        if linear_cross_entropy.is_fusible(inner, batch["input_ids"]):
            layer = linear_cross_entropy.layer_of(inner)
            with linear_cross_entropy.caught(layer, batch["predicts"]) as found, self._noise(inner, batch):
                model(**inputs(batch), use_cache=False)
            return linear_cross_entropy.summed_cross_entropy(
                found[0], layer.weight, layer.bias, batch["targets"], smoothing
            )
        logits, targets = self._predictions(model, batch)
        return linear_cross_entropy.cross_entropy_of_logits(logits, targets, smoothing)

    def scores(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return sums per row of a padded micro-batch, each of shape (rows,), for an evaluation.

        The logits of a plain head are never all in memory; those of another are, in its own precision.

        Returns:
            -log p of the trained tokens in nats; how many of them are the most probable token; how many there are.
        """
        import torch

        inner = _inner(model)
        # gradients of chunks would keep all of their logits
        if not torch.is_grad_enabled() and linear_cross_entropy.is_plain(inner, batch["input_ids"]):
            layer = linear_cross_entropy.layer_of(inner)
            with linear_cross_entropy.caught(layer, batch["predicts"]) as found, self._noise(inner, batch):
                model(**inputs(batch), use_cache=False)
            losses, right = linear_cross_entropy.losses_and_hits(found[0], layer, batch["targets"])
        else:
            losses, right = linear_cross_entropy.losses_and_hits(
                self._predictions(model, batch)[0], None, batch["targets"]
            )
        row = batch["predicts"] // batch["labels"].shape[1]
        zeros = torch.zeros(len(batch["labels"]), device=losses.device)
        return (
            zeros.index_add(0, row, losses),
            zeros.index_add(0, row, right),
            zeros.index_add(0, row, torch.ones_like(losses)),
        )

    def _predictions(self, model: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits (trained tokens, vocabulary) and targets (trained tokens,); the head runs nowhere else."""
        inner = _inner(model)
        with head_only_at(inner, batch["predicts"]), self._noise(inner, batch):
            logits = model(**inputs(batch), use_cache=False).logits
        return logits, batch["targets"]

    @contextmanager
    def _noise(self, model: Any, batch: dict[str, Any]) -> Iterator[None]:
        if not (self.neftune and model.training):
            yield
            return
        import torch

        def add(module: Any, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
            if "attention_mask" in batch:
                tokens = batch["attention_mask"].sum(dim=1).view(-1, 1, 1)  # (rows, 1, 1)
            else:
                lengths = batch["cu_seq_lens_q"].diff()
                tokens = lengths.repeat_interleave(lengths, output_size=embedded.shape[1]).view(1, -1, 1)
            width: torch.Tensor = self.neftune / (tokens * embedded.shape[-1]) ** 0.5
            return embedded + torch.empty_like(embedded).uniform_(-1, 1) * width.to(embedded.dtype)

        hook = model.get_input_embeddings().register_forward_hook(add)
        try:
            yield
        finally:
            hook.remove()


def _inner(model: Any) -> Any:
    """Return the model that a wrapper of several processes holds."""
    import torch

    return model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return what of a micro-batch the model is given."""
    return {name: value for name, value in batch.items() if name not in ("labels", "predicts", "targets", "tokens")}


def _predicting(batch: dict[str, Any]) -> dict[str, Any]:
    """Add `predicts` and `targets` to a micro-batch: position t predicts token t+1."""
    from torch.nn.functional import pad

    trained = pad(batch["labels"][:, 1:] != IGNORED, (0, 1))
    predicts = trained.flatten().nonzero().flatten()
    return batch | {"predicts": predicts, "targets": batch["labels"].flatten().index_select(0, predicts + 1)}


def _behind_one_another(rows: Sequence[Row]) -> dict[str, Any]:
    """Pack rows behind one another, under the names by which transformers knows packed rows.

    Returns:
        input_ids, labels and position_ids, each (1, tokens), positions restarting at 0 with each row and the first
        label of each IGNORED, so that no row predicts the next; cu_seq_lens_q and cu_seq_lens_k, where each row begins
        and the end of the last, int32, (rows + 1,); max_length_q and max_length_k, tokens of the longest row.
    """
    import torch

    lengths = torch.tensor([len(row.ids) for row in rows])
    starts = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    ids = torch.cat([torch.from_numpy(row.ids) for row in rows]).long()
    trained = torch.cat([torch.from_numpy(row.trained) for row in rows])
    labels = torch.where(trained, ids, IGNORED)
    labels[starts[:-1]] = IGNORED
    positions = torch.arange(len(ids)) - starts[:-1].repeat_interleave(lengths)
    begins, longest = starts.int(), int(lengths.max())
    return {
        "input_ids": ids[None], "labels": labels[None], "position_ids": positions[None],
        "cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip


def _sharing(rows: Sequence[Row]) -> dict[str, Any]:
    """Pack rows such that what they have in common stands there once; see `sharing.lay`.

    Returns:
        As `_behind_one_another`, but no labels: several tokens may be foretold from one place. cu_seq_lens_q tells
        where the own tokens of each row begin, cu_seq_lens_k where the row begins in key_places: where all its tokens
        stand in the pack, int64, (tokens of all rows,). predicts and targets: see `Sft.collate`.
    """
    import numpy as np
    import torch
    from torch.nn.functional import pad

    from loratune.data import prefix_sharing

    shared = prefix_sharing.lay(rows)
    known = [np.flatnonzero(row.trained[1:]) for row in rows]  # position t predicts token t+1
    lengths = [len(shared.places[row]) for row in shared.order]
    return {
        "input_ids": torch.from_numpy(shared.ids).long()[None],
        "position_ids": torch.from_numpy(shared.positions)[None],
        "cu_seq_lens_q": pad(torch.tensor(shared.own).cumsum(0), (1, 0)).int(), "max_length_q": max(shared.own),
        "cu_seq_lens_k": pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(), "max_length_k": max(lengths),
        "key_places": torch.from_numpy(np.concatenate([shared.places[row] for row in shared.order])),
        "predicts": torch.from_numpy(np.concatenate([at[t] for at, t in zip(shared.places, known, strict=True)])),
        "targets": torch.from_numpy(
            np.concatenate([row.ids[t + 1] for row, t in zip(rows, known, strict=True)])
        ).long(),
    }  # fmt: skip


@contextmanager
def head_only_at(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Let the model's head see only the hidden states at `positions`, counted through all rows, int64, (positions,).

    A hook before the head works for every architecture, also those that scale or cap their logits afterwards; what
    the model returns is then (positions, vocabulary) instead of (rows, tokens, vocabulary).
    """

    def select(module: Any, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        return (linear_cross_entropy.at(inputs[0], positions),)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()
