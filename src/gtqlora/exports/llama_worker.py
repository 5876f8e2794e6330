"""Loads one GGUF in llama.cpp and serves it on the loopback, in a process of its own.

Run as a script by `llama_server`, never imported: what goes wrong in C++ ends the process that it happens in. It reads
its settings as one line of JSON, writes the server's address as one line, and lives until its input ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gtqlora.exports.llama_server import Settings

_ERRORS = 2
"""llama.cpp's level of messages up to which warnings and errors are written."""
_PATIENCE = 50
"""Tenths of a second that messages may take."""
_SECONDS = 3600
"""For which the server waits for a client; the client ends sooner."""


def parameters(xllamacpp: ModuleType, settings: Settings) -> object:
    """Return llama.cpp's parameters for exact sums: keys and values in fp32, and no flash attention."""
    found = xllamacpp.CommonParams()
    found.model.path = settings["model"]
    found.api_keys = [settings["key"]]
    found.n_parallel, found.n_ctx = settings["slots"], settings["slots"] * settings["context"]
    found.cpuparams.n_threads = found.cpuparams_batch.n_threads = settings["threads"]
    found.cache_type_k = found.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    found.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    found.warmup = found.fit_params = found.ui = found.cache_prompt = False
    found.cache_ram_mib = 0
    found.timeout_read = found.timeout_write = _SECONDS
    found.verbosity = _ERRORS
    found.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0) for adapter in settings["adapters"]]
    return found


def wait_for_messages() -> None:
    """Wait until llama.cpp's messages stand in the file that is the standard error: a thread of its own writes them."""
    before = -1
    for _ in range(_PATIENCE):
        if 0 < (now := os.fstat(2).st_size) == before:
            return
        before = now
        time.sleep(0.1)


def main() -> None:
    """Serve until the input ends."""
    # llama.cpp may print; what it prints must not be taken for the address.
    told = os.dup(1)
    os.dup2(2, 1)
    xllamacpp = import_module("xllamacpp")
    wanted = parameters(xllamacpp, json.loads(sys.stdin.readline()))
    try:
        server = xllamacpp.Server(wanted)
    except RuntimeError:  # it only says that something failed
        wait_for_messages()
        os._exit(1)
    os.write(told, f"{server.listening_address}\n".encode())
    sys.stdin.read()
    # At once: the server's own end waits for threads that may never end.
    os._exit(0)


if __name__ == "__main__":
    main()
