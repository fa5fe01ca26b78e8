"""Batches whose rows do not stand at the positions 0, 1, 2, ...: for studies of what a position bias learns."""

import torch
from transformers import default_data_collator


Rows = list[dict[str, torch.Tensor]]


def at_random_positions(rows: Rows, reach: int) -> dict[str, torch.Tensor]:
    """
    A batch whose rows stand at ascending positions below `reach`, drawn anew each time (arXiv 2305.16843).

    Positions are given for the keys as well, so that gaps between them do not mark documents.
    """
    batch = default_data_collator(rows)
    drawn = torch.rand(len(rows), reach).argsort(dim=1)[:, : batch["input_ids"].shape[1]]
    positions = drawn.sort(dim=1).values
    return {**batch, "position_ids": positions, "key_position_ids": positions}


def in_documents(rows: Rows, mean_length: float) -> dict[str, torch.Tensor]:
    """
    A batch whose rows are cut into packed documents, which do not see each other; a cut comes before any token with
    the probability `1 / mean_length`, drawn anew each time.
    """
    batch = default_data_collator(rows)
    starts = torch.rand(batch["input_ids"].shape) < 1 / mean_length
    starts[:, 0] = True
    place = torch.arange(starts.shape[1]).expand_as(starts)
    positions = place - torch.where(starts, place, 0).cummax(dim=1).values
    return {**batch, "position_ids": positions, "labels": batch["labels"].masked_fill(starts, -100)}
