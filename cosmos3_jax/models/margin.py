"""Margins that make a picture divide evenly over devices, and leave no trace in the result.

To a convolution, the world beyond a picture is zero. So a picture may lie in the corner of a larger array, if the rest is made
zero again in front of every convolution that would see it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from cosmos3_jax.axes import current_mesh, padded


@dataclasses.dataclass(frozen=True)
class Margin:
    """A picture of h x w in the corner of rows x columns; or, further on in a decoder, any multiple of both."""

    h: int
    w: int
    rows: int
    columns: int

    def add(self, x: jax.Array) -> jax.Array:
        """`x` [t, h, w, c], the picture alone, with its margin."""
        return jnp.pad(x, ((0, 0), (0, self.rows - self.h), (0, self.columns - self.w), (0, 0)))

    def crop(self, x: jax.Array) -> jax.Array:
        """The picture alone."""
        h, w = self._picture(x)
        return x[:, :h, :w]

    def clear(self, x: jax.Array) -> jax.Array:
        """`x` with zeros in the margin."""
        h, w = self._picture(x)
        if (h, w) == x.shape[1:3]:
            return x
        inside = (jnp.arange(x.shape[1]) < h)[:, None] & (jnp.arange(x.shape[2]) < w)
        return jnp.where(inside[..., None], x, 0)

    def _picture(self, x: jax.Array) -> tuple[int, int]:
        """Rows and columns of the picture in `x`."""
        return x.shape[1] // self.rows * self.h, x.shape[2] // self.columns * self.w


NO_MARGIN = Margin(1, 1, 1, 1)  # one pixel in one pixel: of any array, all is picture


def margin_of(h: int, w: int) -> Margin:
    """What h x w latents need to divide evenly over the current mesh."""
    mesh = current_mesh()
    parts = {} if mesh is None else mesh.shape
    return Margin(h, w, padded(h, parts.get("h", 1)), padded(w, parts.get("w", 1)))
