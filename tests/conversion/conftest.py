"""What the tests of the conversion begin with."""

from pathlib import Path

import pytest
from checkpoints import llama, save_tokenizer
from transformers import GenerationConfig


@pytest.fixture
def source(tmp_path) -> Path:
    """A LLaMA with everything that may come along."""
    folder = tmp_path / "source"
    llama().save_pretrained(folder)
    save_tokenizer(folder)
    GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[2, 3]).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# Original\n")
    return folder
