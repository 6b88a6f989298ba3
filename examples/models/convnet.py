"""A small convolutional network in Flax Linen for scikit-learn's digits (8x8, one channel)."""

from functools import partial

import flax.linen as nn
import jax.numpy as jnp


class ConvNet(nn.Module):
    width: int = 32
    classes: int = 10

    @nn.compact
    def __call__(self, x, train=False):
        """x [B, 8, 8, 1] -> logits [B, classes]. train=True needs mutable=["batch_stats"]."""
        norm = partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        conv = partial(nn.Conv, use_bias=False)
        W = self.width
        x = conv(W, (3, 3), name="stem")(x)
        x = nn.relu(norm(name="stem_norm")(x))  # [B, 8, 8, W]
        x = conv(W, (3, 3), feature_group_count=W, name="depthwise")(x)  # each channel by itself
        x = conv(2 * W, (1, 1), name="pointwise")(x)
        x = nn.relu(norm(name="pointwise_norm")(x))  # [B, 8, 8, 2W]
        x = conv(2 * W, (3, 3), strides=2, name="down")(x)
        x = nn.relu(norm(name="down_norm")(x))  # [B, 4, 4, 2W]
        return nn.Dense(self.classes, name="head")(jnp.mean(x, axis=(1, 2)))
