"""The networks of the few-shot papers: ``nn.Sequential`` models whose children, in order, are their blocks."""

from innerloop.models.conv4 import Conv4
from innerloop.models.mlp import MLP
from innerloop.models.resnet12 import ResNet12

__all__ = ["MLP", "Conv4", "ResNet12"]
