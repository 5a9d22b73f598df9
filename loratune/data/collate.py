"""Rows to the tensors of a micro-batch: padded, packed behind one another, or sharing what they begin with alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from loratune.data import prefix_sharing
from loratune.data.prefix_sharing import Layout, Row

IGNORED = -100  # torch's and transformers' label for a token that is not trained


def collate(rows: Sequence[Row], layout: Layout = "padded") -> dict[str, Any]:
    """Make one micro-batch of rows: padded on the right, or packed behind one another, or sharing what they can.

    Returns:
        input_ids, attention_mask and labels, each (rows, longest); a label stands under the token itself and is
        IGNORED where the token is not trained, or is the first of its row and so can't be predicted. Packed: see
        `_behind_one_another` and `_sharing`. Of every layout `predicts`: the places where the next token is
        trained, counted through all rows, int64, (trained tokens,); found here, as a GPU would have to be waited
        for; `targets`: these tokens, as many; `tokens`: how many the rows have, without padding, not as a tensor.
    """
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


def inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """Return what of a micro-batch the model is given."""
    return {name: value for name, value in batch.items() if name not in ("labels", "predicts", "targets", "tokens")}


def _predicting(batch: dict[str, Any]) -> dict[str, Any]:
    """Add `predicts` and `targets` to a micro-batch: position t predicts token t+1."""
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
    lengths = torch.tensor([len(row.ids) for row in rows])
    starts = pad(lengths.cumsum(0), (1, 0))
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
    """Pack rows such that what they have in common stands there once; see `prefix_sharing.lay`.

    Returns:
        As `_behind_one_another`, but no labels: several tokens may be foretold from one place. cu_seq_lens_q tells
        where the own tokens of each row begin, cu_seq_lens_k where the row begins in key_places: where all its tokens
        stand in the pack, int64, (tokens of all rows,). predicts and targets: see `collate`.
    """
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
