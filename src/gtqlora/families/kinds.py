"""Kinds of parameters, as every count of a model calls them."""

from __future__ import annotations

ROUTED, GATES, ATTENTION, SHARED = "routed experts", "routers (gates)", "attention", "shared experts"
SHARED_GATES, DENSE, EMBEDDINGS, NORMS = "shared-expert gates", "dense MLPs", "embeddings, head", "norms"
