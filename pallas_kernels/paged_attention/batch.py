"""The metadata of one ragged step: which tokens belong to which row, and where each row's KV lives.

Dimension letters: T flat tokens, R rows (sequences), H query heads, K KV heads, D head size, P pages, S page size,
MP pages per row in the table.

A batch drawn, with two decode rows, one prompt chunk of four tokens and one padded row (T = 8, R = 4):

    tokens         d0 d1 p0 p1 p2 p3 -- --
    query_starts   0  1  2           6  6         num_decode_rows = 2, num_rows = 3
"""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RaggedBatch:
    """One step's rows. Decode rows (exactly one query token) come first, then the others, then padding.

    Attributes:
      query_starts: int32[R+1]. Row r owns the flat tokens query_starts[r]:query_starts[r+1]. Tokens from
        query_starts[R] on are padding.
      context_lens: int32[R]. KV length after this step, this step's tokens included; 0 for padded rows.
      page_table: int32[R, MP]. Page ids of each row in order. Page 0 is the null page: it fills the unused places of
        the table, takes the writes of padded tokens, and is never owned by a row.
      num_decode_rows: int32[]. Rows [0, num_decode_rows) have exactly one query token.
      num_rows: int32[]. Live rows.
      decode_only: static. True says that T == R and that every live row has one token.
      tree_mask: int32[T, W] or None. Bit j % 32 of word j // 32 of a token's mask says that it sees its row's new
        token j: what a verification row needs whose new tokens are a tree of drafts, each after its parent. A token
        always sees itself, never a later one, and everything before its row's new tokens. Tokens of rows that are no
        trees have every bit set (-1). New tokens from 32 * W on are seen by all later ones.
    """

    query_starts: jax.Array
    context_lens: jax.Array
    page_table: jax.Array
    num_decode_rows: jax.Array
    num_rows: jax.Array
    decode_only: bool = field(default=False, metadata={"static": True})
    tree_mask: jax.Array | None = None

    @property
    def max_rows(self) -> int:
        return self.context_lens.shape[0]

    @property
    def num_tokens(self) -> jax.Array:
        """int32[]: live tokens."""
        return self.query_starts[-1]

    def token_rows(self, num_tokens: int) -> jax.Array:
        """int32[num_tokens]: the row of each flat token; padded tokens get the last row."""
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        # Counting the starts at or before a token also skips empty rows, whose start equals the next row's.
        row = jnp.sum(self.query_starts[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)
        return jnp.minimum(row, self.max_rows - 1)

    def token_positions(self, num_tokens: int) -> jax.Array:
        """int32[num_tokens]: each flat token's position in its sequence; 0 for padded tokens."""
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        row = self.token_rows(num_tokens)
        position = self.context_lens[row] - self.query_starts[row + 1] + token
        return jnp.where(token < self.num_tokens, position, 0)

    def token_slots(self, num_tokens: int, page_size: int) -> tuple[jax.Array, jax.Array]:
        """(page, slot), int32[num_tokens] each: where each token's KV is kept; the null page for padded tokens."""
        token = jnp.arange(num_tokens, dtype=jnp.int32)
        position = self.token_positions(num_tokens)
        page = self.page_table[self.token_rows(num_tokens), position // page_size]
        return jnp.where(token < self.num_tokens, page, 0), position % page_size


def tree_allows(words: list[jax.Array], key: jax.Array, query: jax.Array) -> jax.Array:
    """bool: whether a query sees a key by its tree mask alone.

    Args:
      words: W arrays of int32, the query's mask.
      key, query: int32[...], their places among their row's new tokens; negative for a key before them.
    """
    num_bits = 32 * len(words)
    bit = jnp.clip(key, 0, num_bits - 1)
    word = words[0]
    for index in range(1, len(words)):
        word = jnp.where(bit >> 5 == index, words[index], word)
    seen = jnp.right_shift(word, bit & 31) & 1
    return (seen == 1) | (key < 0) | (key >= num_bits) | (key == query)


@dataclass(frozen=True)
class KVSpec:
    """What a KV pool holds, whatever its layout. shared_values: one array is a token's key and its value."""

    num_pages: int
    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: jnp.dtype
    shared_values: bool = False
