"""What llama.cpp calls the parts of each family, how it wants their values, and what it cannot be told."""

from gtqlora.families.llama_cpp.layout import Layout, Made, Part, as_is
from gtqlora.families.llama_cpp.settings import Setting, settings

__all__ = ["Layout", "Made", "Part", "Setting", "as_is", "settings"]
