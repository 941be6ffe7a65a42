"""Topology of a net as data: which channels are made, read, tied, and which must stay."""

from prune_dn.graph.inference import call, tensors, to_inference_
from prune_dn.graph.tracing import trace
from prune_dn.graph.types import NONE, Follower, Graph, Op, Producer, Reader

__all__ = [
    "NONE",
    "Follower",
    "Graph",
    "Op",
    "Producer",
    "Reader",
    "call",
    "tensors",
    "to_inference_",
    "trace",
]
