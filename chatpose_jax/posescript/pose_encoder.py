"""PoseScript's pose encoder: the encoder of VPoser (Pavlakos et al. 2019) over axis-angles, with a narrow output for retrieval."""

from __future__ import annotations

import jax
from flax import nnx

from chatpose_jax.posescript.layers import BatchNorm, Key, Linear, dropout


class PoseTrunk(nnx.Module):
    """VPoser's encoder without its last layer: batch norm, linear, leaky ReLU, batch norm, dropout, and two linears without anything between."""

    def __init__(self, joints: int, width: int = 512, *, rngs: nnx.Rngs):
        self.norm_in = BatchNorm(joints * 3)
        self.linear_in = Linear(joints * 3, width, rngs=rngs)
        self.norm = BatchNorm(width)
        self.linear_1 = Linear(width, width, rngs=rngs)
        self.linear_2 = Linear(width, width, rngs=rngs)

    def __call__(self, poses: jax.Array, key: Key = None) -> jax.Array:
        """(B, J, 3) axis-angles in radians -> (B, width)."""
        train = key is not None
        x = self.norm_in(poses.reshape(len(poses), -1), train)
        x = jax.nn.leaky_relu(self.linear_in(x), 0.01)
        return self.linear_2(self.linear_1(dropout(self.norm(x, train), 0.1, key)))


class PoseEncoder(nnx.Module):
    """``PoseTrunk``, a bottleneck, and the features of retrieval, which are not normalised yet."""

    def __init__(self, joints: int, latent: int = 512, width: int = 512, bottleneck: int = 32, *, rngs: nnx.Rngs):
        self.trunk = PoseTrunk(joints, width, rngs=rngs)
        self.narrow = Linear(width, bottleneck, rngs=rngs)
        self.out = Linear(bottleneck, latent, rngs=rngs)

    def __call__(self, poses: jax.Array, key: Key = None) -> jax.Array:
        """(B, J, 3) axis-angles in radians -> (B, latent)."""
        return self.out(jax.nn.relu(self.narrow(self.trunk(poses, key))))
