"""Data: sources of samples, partitions that divide their samples among nodes, and the store that nodes train from."""

from lightning_idkd.data.concat import Concat
from lightning_idkd.data.digits import Digits, Glyphs
from lightning_idkd.data.folder import ImageFolder
from lightning_idkd.data.huggingface import HuggingFace
from lightning_idkd.data.images import ImageInputs, Images
from lightning_idkd.data.inputs import Inputs
from lightning_idkd.data.lsun import LSUN
from lightning_idkd.data.noise import Noise
from lightning_idkd.data.partition import IID, Dirichlet, Partition, QGMDirichlet
from lightning_idkd.data.samples import Remarks, Samples
from lightning_idkd.data.skews import ClassesPerNode, FeatureSkew, FromFile, QuantitySkew, Regions, Shards
from lightning_idkd.data.source import Source, Subset
from lightning_idkd.data.tables import ScikitLearn, Vectors
from lightning_idkd.data.torchvision import Torchvision
from lightning_idkd.data.vectors import VectorInputs, VectorSource

__all__ = [
    "IID",
    "LSUN",
    "ClassesPerNode",
    "Concat",
    "Digits",
    "Dirichlet",
    "FeatureSkew",
    "FromFile",
    "Glyphs",
    "HuggingFace",
    "ImageFolder",
    "ImageInputs",
    "Images",
    "Inputs",
    "Noise",
    "Partition",
    "QGMDirichlet",
    "QuantitySkew",
    "Regions",
    "Remarks",
    "Samples",
    "ScikitLearn",
    "Shards",
    "Source",
    "Subset",
    "Torchvision",
    "VectorInputs",
    "VectorSource",
    "Vectors",
]
