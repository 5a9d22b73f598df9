"""Collate samples to the tensors of a micro-batch: padded, packed, or packed with prefix sharing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad

from loratune.data import prefix_sharing
from loratune.data.encode import Row
from loratune.data.prefix_sharing import Layout
from loratune.data.sample import Sample
from loratune.models.batch import Batch

IGNORED = -100  # label of torch and transformers for tokens without loss

# inputs of the model, and for each row the positions in the output at which its label tokens are predicted
Laid = tuple[dict[str, Any], list[np.ndarray]]


def collate(samples: Sequence[Sample], layout: Layout = "padded", virtual_tokens: int = 0) -> Batch:
    """Make one micro-batch of samples.

    Args:
        samples: whose rows are collated, in order.
        layout: padded on the right, packed, or packed with prefix sharing.
        virtual_tokens: that the model adds before each row, in its output too; only with the padded layout.

    Returns:
        The micro-batch; what its `inputs` are: see `_padded`, `_packed` and `_shared`.
    """
    assert layout == "padded" or not virtual_tokens, "virtual tokens stand before each row of a padded batch"
    rows = [row for sample in samples for row in sample.rows]
    known, targets = zip(*map(_asked, rows), strict=True)
    if layout == "padded":
        inputs, places = _padded(rows, known, virtual_tokens)
    else:
        inputs, places = _packed(rows, known) if layout == "packed" else _shared(rows, known)
    names = samples[0].values if samples else {}
    most = max((len(sample.labels) for sample in samples), default=0)
    labels = torch.full((len(samples), most), torch.nan)
    for index, sample in enumerate(samples):
        labels[index, : len(sample.labels)] = torch.from_numpy(sample.labels)
    states = [row.state for row in rows if row.pooled and row.state is not None]
    return Batch(
        inputs,
        torch.from_numpy(np.concatenate(places)),
        torch.from_numpy(np.concatenate(targets)).long(),
        torch.from_numpy(np.repeat(np.arange(len(rows)), [len(t) for t in known])),
        torch.from_numpy(np.repeat(np.arange(len(samples)), [len(sample.rows) for sample in samples])),
        len(samples),
        sum(len(row.ids) for row in rows),
        labels,
        {name: torch.tensor([sample.values[name] for sample in samples]) for name in names},
        torch.from_numpy(np.stack(states)) if states else None,
    )


def _asked(row: Row) -> tuple[np.ndarray, np.ndarray]:
    """Return positions of a row, (targets,), and the tokens predicted there; of a pooled row the last one, and 0."""
    if row.pooled:
        return np.array([len(row.ids) - 1]), np.zeros(1, dtype=np.int32)
    positions = np.flatnonzero(row.trained[1:])
    return positions, row.ids[positions + 1]


def labels(batch: Batch) -> torch.Tensor:
    """Return the labels of a padded batch, (rows, tokens): each label token at its own position, IGNORED elsewhere."""
    found = torch.full_like(batch.inputs["input_ids"], IGNORED)
    found.flatten()[batch.places + 1] = batch.targets
    return found


def _padded(rows: Sequence[Row], known: Sequence[np.ndarray], virtual_tokens: int) -> Laid:
    """Pad rows on the right: input_ids and attention_mask, each (rows, longest)."""
    longest = max(len(row.ids) for row in rows)
    input_ids = torch.zeros((len(rows), longest), dtype=torch.long)
    attention_mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row.ids)] = torch.from_numpy(row.ids)
        attention_mask[index, : len(row.ids)] = 1
    width = virtual_tokens + longest
    places = [index * width + virtual_tokens + at for index, at in enumerate(known)]
    return {"input_ids": input_ids, "attention_mask": attention_mask}, places


def _packed(rows: Sequence[Row], known: Sequence[np.ndarray]) -> Laid:
    """Concatenate rows, with transformers' names for packed rows.

    Returns:
        input_ids and position_ids, each (1, tokens), positions restarting at 0 with each row; cu_seq_lens_q and
        cu_seq_lens_k, the start of each row and the end of the last, int32, (rows + 1,); max_length_q and max_length_k,
        tokens of the longest row.
    """
    lengths = torch.tensor([len(row.ids) for row in rows])
    starts = pad(lengths.cumsum(0), (1, 0))
    ids = torch.cat([torch.from_numpy(row.ids) for row in rows]).long()
    positions = torch.arange(len(ids)) - starts[:-1].repeat_interleave(lengths)
    begins, longest = starts.int(), int(lengths.max())
    inputs = {
        "input_ids": ids[None], "position_ids": positions[None],
        "cu_seq_lens_q": begins, "cu_seq_lens_k": begins, "max_length_q": longest, "max_length_k": longest,
    }  # fmt: skip
    return inputs, [start + at for start, at in zip(starts.tolist(), known, strict=False)]


def _shared(rows: Sequence[Row], known: Sequence[np.ndarray]) -> Laid:
    """Pack rows with common prefixes included once; see `prefix_sharing.lay`.

    Returns:
        As `_packed`, but several tokens may be predicted at one position. cu_seq_lens_q has the start of each row's own
        tokens, cu_seq_lens_k the start of each row in key_places: the indices in the pack of all its tokens, int64,
        (tokens of all rows,).
    """
    shared = prefix_sharing.lay(rows)
    lengths = [len(shared.places[row]) for row in shared.order]
    inputs = {
        "input_ids": torch.from_numpy(shared.ids).long()[None],
        "position_ids": torch.from_numpy(shared.positions)[None],
        "cu_seq_lens_q": pad(torch.tensor(shared.own).cumsum(0), (1, 0)).int(), "max_length_q": max(shared.own),
        "cu_seq_lens_k": pad(torch.tensor(lengths).cumsum(0), (1, 0)).int(), "max_length_k": max(lengths),
        "key_places": torch.from_numpy(np.concatenate([shared.places[row] for row in shared.order])),
    }  # fmt: skip
    return inputs, [at[t] for at, t in zip(shared.places, known, strict=True)]
