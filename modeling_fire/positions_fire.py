"""Where the queries and the keys of one attention call stand, and who sees whom."""

from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache
from transformers.utils.import_utils import is_tracing


class FirePositions(NamedTuple):
    """
    Where the queries and the keys of one attention call stand, and who sees whom.

    A distance is the difference of `query` and `key`, which share one frame: positions, or indices among the keys.
    The absolute position, which normalises FIRE, is kept apart: a cached key knows its index, not its position.

    Args:
        absolute (`torch.LongTensor` of shape `(batch or 1, queries)`):
            Position of each query in its own document, counted from 0.
        query (`torch.LongTensor` of shape `(batch or 1, queries)`):
            Coordinate of each query.
        key (`torch.LongTensor` of shape `(batch or 1, keys)`):
            Coordinate of each key.
        first, last (`torch.LongTensor` of shape `(batch or 1, queries)`, *optional*):
            A query sees the keys of index `first <= j < last`. `None` where only a mask of the caller's tells.
        visible (`torch.BoolTensor` of shape `(batch or 1, keys)`, *optional*):
            Keys that no query sees are `False`; for masks with gaps, which `first` and `last` cannot say.
        consecutive (`bool`):
            Whether a distance is the difference of indices: the coordinate of each key is its index.
        causal (`bool`): Whether no query sees keys ahead.
        separate (`bool`):
            Whether the queries are few of each of several requests, which see few of the keys each: a hint for speed.
    """

    absolute: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    first: torch.Tensor | None = None
    last: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    consecutive: bool = False
    causal: bool = True
    separate: bool = False

    @classmethod
    def arange(
        cls,
        length: int,
        device: torch.device | str | None = None,
        *,
        past: int = 0,
        window: int | None = None,
        causal: bool = True,
    ) -> "FirePositions":
        """
        The last `length` of `past + length` consecutive tokens as queries, all of them as keys.

        Args:
            length (`int`): number of queries.
            past (`int`, *optional*, defaults to 0): number of keys before the first query.
            window (`int`, *optional*): each query sees this many keys at most on each side, itself counted.
            causal (`bool`, *optional*, defaults to `True`): whether keys ahead are hidden.
        """
        key = torch.arange(past + length, device=device)[None]
        query = key[:, past:]
        first, last = torch.zeros_like(query), query + 1 if causal else torch.full_like(query, past + length)
        if window is not None:
            first = (query - window + 1).clamp(min=0)
            last = torch.minimum(last, query + window)
        return cls(query, query, key, first, last, consecutive=True, causal=causal)

    @classmethod
    def packed(cls, cu_seqlens: torch.Tensor, length: int) -> "FirePositions":
        """
        Documents one after the other, each causal and blind to the others.

        Args:
            cu_seqlens (`torch.Tensor` of shape `(documents + 1,)`): where each begins; 0 first, `length` last.
            length (`int`): tokens in all.
        """
        index = torch.arange(length, device=cu_seqlens.device)
        first = cu_seqlens.long()[torch.searchsorted(cu_seqlens, index, right=True, out_int32=True) - 1]
        index, first = index[None], first[None]
        return cls(index - first, index, index, first, index + 1, consecutive=True)

    def block(self, start: int, stop: int, num_keys: int) -> "FirePositions":
        """The queries from `start` to `stop` beside the first `num_keys` keys."""
        return self._replace(
            absolute=self.absolute[:, start:stop],
            query=self.query[:, start:stop],
            key=self.key[:, :num_keys],
            first=None if self.first is None else self.first[:, start:stop],
            last=None if self.last is None else self.last[:, start:stop].clamp(max=num_keys),
            visible=None if self.visible is None else self.visible[:, :num_keys],
        )

    def check(self, batch: int, queries: int, keys: int) -> None:
        """
        Raises:
            ValueError: unless these tell who sees whom among so many sequences, queries and keys.
        """
        if self.first is None or self.last is None:
            raise ValueError("`positions` need `first` and `last`: which keys each query sees.")
        for name in ("absolute", "query", "first", "last", "key", "visible"):
            field, length = getattr(self, name), keys if name in ("key", "visible") else queries
            if field is not None and field.shape not in ((1, length), (batch, length)):
                raise ValueError(
                    f"`positions.{name}` has shape {tuple(field.shape)} beside {queries} queries and {keys} keys: "
                    f"it must be ({batch} or 1, {length})."
                )

    def mask(self) -> torch.Tensor:
        """Who sees whom, densely: `torch.BoolTensor` of shape `(batch or 1, 1, queries, keys)`."""
        index = torch.arange(self.key.shape[1], device=self.key.device)
        seen = (self.first[:, :, None] <= index) & (index < self.last[:, :, None])
        if self.visible is not None:
            seen = seen & self.visible[:, None, :]
        return seen[:, None]

    def distance(self) -> torch.Tensor:
        """
        `|i - j|` as integers of shape `(batch or 1, queries, keys)`: exact at any length, where subtracting after a
        conversion to a float type is not. In a causal model keys ahead, which are masked, count as distance 0: a
        large bias could outweigh the mask in float16, and would spoil the scale of a rounded row.
        """
        difference = self.query[:, :, None] - self.key[:, None, :]
        if self.causal and (self.consecutive or self.last is None):
            return difference.clamp(min=0)
        # Coordinates of the caller's own need not ascend: a key seen may be ahead.
        return difference.abs().where(self.mask()[:, 0], 0) if self.causal else difference.abs()


def token_positions(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.LongTensor | None = None,
    key_position_ids: torch.LongTensor | None = None,
    cache: Cache | None = None,
    layer_idx: int = 0,
) -> FirePositions:
    """
    What the arguments of a model's forward say of where its tokens stand. See [`FireModel.forward`] for them.

    Args:
        layer_idx (`int`, *optional*, defaults to 0): whose cache tells how many tokens went before.
    """
    length, device = inputs_embeds.shape[1], inputs_embeds.device
    offset, num_keys = 0, length
    if cache is not None:
        offset = cache.get_query_offset(layer_idx)
        num_keys = cache.get_mask_sizes(length, layer_idx)[0]
    key = torch.arange(num_keys, device=device)[None]
    query = torch.arange(length, device=device)[None] + offset
    absolute = query if position_ids is None else position_ids
    positions = FirePositions(absolute, query, key, torch.zeros_like(query), query + 1, consecutive=True)
    least = offset + length if isinstance(offset, int) else length
    mask = None
    if attention_mask is not None and attention_mask.ndim != 2:
        positions = positions._replace(first=None, last=None)
    elif attention_mask is not None:
        if attention_mask.shape[0] != inputs_embeds.shape[0] or not least <= attention_mask.shape[1] <= num_keys:
            raise ValueError(
                f"`attention_mask` has shape {tuple(attention_mask.shape)}; a mask of 2 dimensions is for all "
                f"tokens, cached ones included: ({inputs_embeds.shape[0]}, {least})."
            )
        if has_padding(attention_mask):
            mask = nn.functional.pad(attention_mask.to(device).bool(), (0, num_keys - attention_mask.shape[1]))
            positions = padded_positions(positions, mask, position_ids)

    if key_position_ids is not None:
        given = key_position_ids.shape[1]
        if not least <= given <= num_keys:
            raise ValueError(
                f"`key_position_ids` are of {given} keys: give those of all {least}, cached ones included."
            )
        # A static cache has room for more keys, which nobody sees.
        key = nn.functional.pad(key_position_ids, (0, num_keys - given))
        return positions._replace(query=position_ids, key=key, visible=mask, consecutive=False)
    if cache is not None or position_ids is None:
        return positions
    if attention_mask is None:
        # Documents start where positions do not go on.
        starts = nn.functional.pad(position_ids.diff() != 1, (1, 0))
        return positions._replace(first=torch.where(starts, query, 0).cummax(-1).values)
    if positions.consecutive and not has_jumps(position_ids, mask):
        return positions
    return positions._replace(query=position_ids, key=position_ids, visible=mask, consecutive=False)


def paged_positions(
    position_ids: torch.Tensor, cu_seq_lens_q: torch.Tensor, cu_seq_lens_k: torch.Tensor, attention_mask: torch.Tensor
) -> FirePositions:
    """Continuous batching: requests side by side, whose queries and keys begin at the `cu_seq_lens`."""
    index = torch.arange(position_ids.shape[-1], device=position_ids.device)
    request = torch.searchsorted(cu_seq_lens_q[1:].long(), index, right=True).clamp(max=len(cu_seq_lens_k) - 2)
    first = cu_seq_lens_k.long()[request][None]
    query = first + position_ids
    key = torch.arange(attention_mask.shape[-1], device=position_ids.device)[None]
    few = position_ids.shape[-1] <= 16 * (len(cu_seq_lens_q) - 1)  # rather than part of a long prompt
    return FirePositions(position_ids, query, key, first, query + 1, consecutive=True, separate=few)


def padded_positions(positions: FirePositions, mask: torch.Tensor, position_ids: torch.Tensor | None) -> FirePositions:
    """
    Positions beside a padding mask of shape `(batch, keys)`: tokens are counted without the padding, as `generate`
    counts them. Padding before and after leaves distances alone; padding between tokens (a right-padded prompt that
    is continued) does not.
    """
    count = (mask.long().cumsum(-1) - 1).clamp(min=0)
    query = count.expand(mask.shape[0], -1).gather(1, positions.query.expand(mask.shape[0], -1))
    absolute = query if position_ids is None else position_ids
    if has_gaps(mask):
        return positions._replace(absolute=absolute, query=query, key=count, visible=mask, consecutive=False)
    first = mask.int().argmax(-1, keepdim=True)
    last = torch.minimum(positions.last, first + mask.sum(-1, keepdim=True))
    return positions._replace(absolute=absolute, first=first.expand_as(last), last=last)


def has_padding(attention_mask: torch.Tensor) -> bool:
    """Whether a 2-dimensional mask hides anything. Unknown, so assumed, while tracing, when values cannot be read."""
    return is_tracing(attention_mask) or not bool(attention_mask.all())


def has_gaps(attention_mask: torch.Tensor) -> bool:
    """Whether a 2-dimensional mask hides anything between tokens; assumed while tracing."""
    return is_tracing(attention_mask) or bool(
        (attention_mask.int().diff() == 1).sum(-1).gt(~attention_mask[:, 0]).any()
    )


def has_jumps(position_ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether positions do not go up by one from token to token, beside a mask without gaps; assumed while tracing."""
    jumps = position_ids.diff() != 1
    if mask is not None:
        jumps = jumps & mask[:, 1:] & mask[:, :-1]
    return is_tracing(position_ids) or bool(jumps.any())
