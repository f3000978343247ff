"""The networks of the few-shot papers: ``nn.Sequential`` models whose children, in order, are their blocks."""

from innerloop.models._conv4 import Conv4
from innerloop.models._film import FiLM
from innerloop.models._mlp import MLP
from innerloop.models._resnet12 import ResNet12
from innerloop.models._siren import SIREN
from innerloop.models._sparse import Divergence, sparse, sparsity
from innerloop.models._tangent import Tangent

__all__ = ["MLP", "SIREN", "Conv4", "Divergence", "FiLM", "ResNet12", "Tangent", "sparse", "sparsity"]
