"""What is known of tokenizers by their name alone. Imports nothing: processes that only tokenise read it, too."""

from __future__ import annotations

# Highest id + 1 of the tokenizers that ship with Lumina.
TOKENIZER_IDS = {"gpt-4": 100_277, "gpt-4o": 200_019, "lumina-1k": 1_024}
# Names whose vocabulary does not ship, and what to give instead.
TOKENIZER_FILES = {"gpt2": "give the path of OpenAI's r50k_base.tiktoken or of GPT-2's tokenizer.json"}
