"""config.json of the models that peaks were measured on, and of Kimi-K2.5 itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers import bench_module

KIMI = Path(__file__).parents[1] / "data" / "kimi_k25_config.json"
SHAPES: dict[str, dict[str, Any]] = {
    name: {"model_type": family, "dtype": "bfloat16", **sizes}
    for name, (family, sizes) in bench_module("step").SHAPES.items()
}
