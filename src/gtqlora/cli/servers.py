"""The options that name servers whose models give answers, and the word on where prompts go then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from gtqlora.cli.console import remark

if TYPE_CHECKING:
    from gtqlora.config import StageConfig

Server = Annotated[
    str | None,
    Parameter(
        name="--generate-with", help="Server that says the plain answers (vLLM, SGLang, llama.cpp, transformers serve)."
    ),
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Hold the options of `verify` that say which server gives the answers."""

    generate_with: Server = None
    before: Annotated[
        str | None,
        Parameter(name="--before", help="What it calls the original: NAME, or URL#NAME on another server."),
    ] = None
    after: Annotated[str | None, Parameter(name="--after", help="What it calls the edited model.")] = None

    def given(self) -> dict[str, object]:
        """Return the settings among them; None gives nothing."""
        return {"generate_with": self.generate_with, "served_before": self.before, "served_after": self.after}


def say_who_answers(config: StageConfig, *models: str) -> None:
    """Name, on stderr, the servers on other machines to which prompts are about to go."""
    from gtqlora.config.addresses import is_loopback, servers_of

    if server := getattr(config, "generate_with", None):
        for url in servers_of(server, *(getattr(config, key) for key in models)):
            if not is_loopback(url):
                remark(f"generate_with {url}: prompts leave this machine")
