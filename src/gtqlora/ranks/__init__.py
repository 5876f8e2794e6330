"""Processes that run one command together, a rank each, as `torchrun` starts them: who they are, what they agree on.

Every rank runs the same code over the same inputs. Rank 0, the leader, alone writes and speaks; what only one may do,
such as asking a judge, it does for all (`by_leader`). What would part the ranks is found by `agree` before it does.
"""

from gtqlora.ranks.joining import end_process, joined, partings, progressing, speaker
from gtqlora.ranks.telling import (
    agree,
    all_of,
    average,
    by_leader,
    leader_first,
    least,
    most,
    summed,
)
from gtqlora.ranks.who import Ranks, ranks, share, started

__all__ = [
    "Ranks",
    "agree",
    "all_of",
    "average",
    "by_leader",
    "end_process",
    "joined",
    "leader_first",
    "least",
    "most",
    "partings",
    "progressing",
    "ranks",
    "share",
    "speaker",
    "started",
    "summed",
]
