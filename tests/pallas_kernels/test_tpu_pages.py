"""Parts that the TPU kernels of paged attention share, outside of a kernel."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention.tpu_pages import LANES, spread


@pytest.mark.parametrize("lanes", [64, 128, 160, 256, 300])
def test_a_column_is_spread_over_any_number_of_lanes(lanes):
    """A block of a window's pages, 160 tokens for instance, need not be whole vectors."""
    column = jnp.tile(jnp.arange(8.0)[:, None], (1, LANES))
    np.testing.assert_array_equal(spread(column, lanes), np.tile(np.arange(8.0)[:, None], (1, lanes)))
