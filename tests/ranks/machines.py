"""What every rank of two machines checks: its machine's ranks hold all experts, and the edit is made by all of them."""

from __future__ import annotations

import json
from pathlib import Path

from gtqlora.capture import open_subject
from gtqlora.config import TrainConfig
from gtqlora.experts.exchange import exchange_of
from gtqlora.ranks import all_of, ranks
from tests import helpers
from tests.helpers import frozen_experts


def check_experts_are_split_inside_a_machine(folder: Path) -> None:
    me = ranks()
    assert (me.count, me.here, me.place) == (4, 2, me.rank % 2)
    model = open_subject(TrainConfig(**json.loads((folder / "variants.json").read_text())["nf4"])).model
    exchange = exchange_of(model)
    assert exchange is not None and exchange.count == 2
    held = [(module.first, module.count) for module in frozen_experts(model).values()]
    assert all_of(held) == [[[4 * (rank % 2), 4]] * len(held) for rank in range(4)]


def check_training(folder: Path) -> None:
    config = TrainConfig(**json.loads((folder / "variants.json").read_text())["nf4"])
    helpers.trained(config, folder / "ranks" / "machines")
