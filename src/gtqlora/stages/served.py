"""What `verify` does where a server gives the plain answers: who is asked, where it is noted, where the verdict stands.

Such a verdict is for information and stands apart, in a folder of its own: it neither makes a certificate nor takes the
place of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gtqlora.config import VerifyConfig
from gtqlora.contrasts import Contrast
from gtqlora.edits.edited import Edited
from gtqlora.edits.measured import Speakers
from gtqlora.errors import ModelError
from gtqlora.run import SERVED, Run, sha256_json
from gtqlora.scoring import Runner
from gtqlora.served.identity import check_pair, drawn
from gtqlora.served.saying import Served
from gtqlora.storage.journal import Journal


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a verdict stands: the name of its stage in the manifest, and its folder, `below` the run."""

    stage: str
    folder: Path
    below: str

    @staticmethod
    def of(config: VerifyConfig, run: Run) -> Place:
        """Return the run itself, or the folder of a server's answers in it."""
        if config.generate_with is None:
            return Place(stage="verify", folder=run.path, below="")
        folder = run / SERVED
        if folder.is_symlink():
            raise ModelError(f"{folder}: a link; remove it")
        folder.mkdir(exist_ok=True)
        return Place(stage=SERVED, folder=folder, below=f"{SERVED}/")


@contextmanager
def answers_of(
    config: VerifyConfig, place: Place, inputs: Mapping[str, str], *, restart: bool
) -> Iterator[Journal | None]:
    """Open the journal of a server's answers, by which a verdict that was broken off goes on; None without a server.

    It is removed once the block is done.

    Args:
        inputs: the identities of what is verified.
        restart: begin anew, without the answers that are noted.
    """
    if config.generate_with is None:
        yield None
        return
    basis = {key: inputs[key] for key in ("model", "adapter")}
    # By what the answers hang on: another model or edit has a journal of its own.
    with closing(Journal(place.folder / f"answers-{sha256_json(basis)[:12]}", basis, restart=restart)) as journal:
        yield journal
        journal.remove()


def speakers_of(config: VerifyConfig, runner: Runner, edited: Edited, rows: Contrast, journal: Journal) -> Speakers:
    """Return the two models of a server, once they are shown to be the original and the edited one.

    Args:
        runner: of the edited model.
        rows: the held-out ones, whose harmless prompts are the probes.

    Raises:
        ModelError: the server cannot be asked, or serves something else.
    """
    url, at_once = config.generate_with or "", config.batch_size
    before, after = (
        Served.of(runner.model, url, name or "", at_once=at_once, journal=journal)
        for name in (config.served_before, config.served_after)
    )
    # Lookalike prompts are harmless too, and where an edit is seen. By the edit, so that nobody chooses which.
    probes = [row for kind in ("benign", "lookalike") for row in drawn(rows.of_kind(kind), edited.drawn_by)]
    pair = check_pair(runner, edited.original, before, after, runner.encoded(probes), url)
    return Speakers(before=before, after=after, pair=pair)
