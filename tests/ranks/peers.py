"""What every rank of one machine's GPUs checks: tokens travel alike through NCCL and through memory that all read.

Run as: torchrun --nproc-per-node 2 -m tests.ranks.peers
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from gtqlora.experts.exchange import Exchange
from gtqlora.experts.messages import Messages
from gtqlora.experts.peer_memory import PeerMemory, are_readable
from gtqlora.ranks import all_of, joined, ranks

TIMES = 200
"""Often enough that a place that is written too early is seen."""


def _values(rows: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Whole numbers, of which sums are exact in any order."""
    generator = torch.Generator("cuda").manual_seed(1000 * seed + ranks().place)
    return torch.randint(-8, 9, (rows, 512), generator=generator, device="cuda").to(dtype)


def check_both_ways_bring_the_same(device: torch.device) -> None:
    by_nccl, direct, count = Messages(ranks().machine), PeerMemory(ranks().machine, device), ranks().here
    for rows in (8, 24, 4096, 16, 6000):  # small ones, large ones, and places that grow
        for dtype in (torch.bfloat16, torch.float32):
            mine, whole = _values(rows, rows, dtype), _values(count * rows, rows + 1, dtype)
            index = torch.arange(8 * rows, device=device, dtype=torch.int32).view(rows, 8) * ranks().place
            assert torch.equal(direct.gathered(mine)[0], by_nccl.gathered(mine)[0])
            assert torch.equal(direct.scattered(whole), by_nccl.scattered(whole))
            pairs = zip(direct.gathered(index, mine), by_nccl.gathered(index, mine), strict=True)
            assert all(torch.equal(found, expected) for found, expected in pairs)
    assert direct.nbytes > 0


def check_a_place_that_is_new_is_ready_for_all(device: torch.device) -> None:
    """One rank makes it while its GPU has much to do, and the others, which have nothing to do, meet it there."""
    by_nccl, count = Messages(ranks().machine), ranks().here
    for late in range(count):
        mine, whole = _values(64, late), _values(count * 64, late + 1)
        direct, expected = PeerMemory(ranks().machine, device), (by_nccl.gathered(mine)[0], by_nccl.scattered(whole))
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000_000 if ranks().place == late else 0)  # about a second
        found = direct.gathered(mine)[0], direct.scattered(whole)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def check_no_place_is_written_while_it_is_read(device: torch.device) -> None:
    by_nccl, direct, count = Messages(ranks().machine), PeerMemory(ranks().machine, device), ranks().here
    given = [(_values(2048, 2 * turn), _values(count * 2048, 2 * turn + 1)) for turn in range(20)]
    for order in ("gs", "gg", "ss", "gsg"):
        found, expected = list[Tensor](), list[Tensor]()
        for turn in range(TIMES):
            mine, whole = given[turn % len(given)]
            # one rank after the other is late
            torch.cuda._sleep(200_000 if turn % count == ranks().place else 0)
            gathers = order[turn % len(order)] == "g"
            found.append(direct.gathered(mine)[0] if gathers else direct.scattered(whole))
            if turn < len(given) * len(order):
                expected.append(by_nccl.gathered(mine)[0] if gathers else by_nccl.scattered(whole))
        for turn, one in enumerate(found):
            assert torch.equal(one, expected[turn % len(expected)]), (order, turn)


def check_recorded_passes(device: torch.device) -> None:
    direct, by_nccl, count = PeerMemory(ranks().machine, device), Messages(ranks().machine), ranks().here
    mine, whole = _values(1024, 1), _values(count * 1024, 2)

    def run() -> tuple[Tensor, Tensor]:
        return direct.gathered(mine)[0], direct.scattered(whole)

    run()
    graph = torch.cuda.CUDAGraph()
    direct.forget()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        found = run()
    direct.gathered(_values(9000, 3))  # its place is another from now on
    for seed in range(TIMES):
        mine.copy_(_values(1024, seed))
        whole.copy_(_values(count * 1024, seed + 1))
        direct.forget()
        graph.replay()
        direct.forget()
        assert torch.equal(found[0], by_nccl.gathered(mine)[0]) and torch.equal(found[1], by_nccl.scattered(whole))


def check_sums_and_gradients_of_experts(device: torch.device) -> None:
    def ran(direct: bool) -> list[Tensor]:
        exchange = Exchange(ranks().machine)
        exchange.direct = direct
        hidden = _values(512, 5).clamp(-1, 1).requires_grad_()
        weights = _values(512, 6, torch.float32)[:, :8].clamp(-1, 1).requires_grad_()
        index = torch.arange(4096, device=device).view(512, 8)
        with exchange.own():
            exchange.send(hidden)
            sums = exchange(
                lambda h, i, w: h * w.sum(1, keepdim=True).to(h.dtype) + i[:, :1] % 8, hidden, index, weights
            )
        sums.backward(_values(512, 7).clamp(-1, 1))
        assert (exchange.nbytes > 0) == direct and hidden.grad is not None and weights.grad is not None
        return [sums, hidden.grad, weights.grad]

    assert all(torch.equal(one, other) for one, other in zip(ran(True), ran(False), strict=True))


CHECKS: tuple[Callable[[torch.device], None], ...] = (
    check_both_ways_bring_the_same,
    check_a_place_that_is_new_is_ready_for_all,
    check_no_place_is_written_while_it_is_read,
    check_recorded_passes,
    check_sums_and_gradients_of_experts,
)

if __name__ == "__main__":
    with joined() as me:
        here = torch.device("cuda", me.place)
        torch.cuda.set_device(here)
        assert are_readable(me.machine, here)
        for check in CHECKS:
            check(here)
            all_of(0)
        sys.stdout.write(f"rank {me.rank}: {len(CHECKS)} checks passed\n")
        sys.stdout.flush()
