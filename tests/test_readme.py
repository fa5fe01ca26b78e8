"""Every Python block of the README runs as written, in order, and every path that it links to exists."""

import re
from pathlib import Path

import pytest
from helpers import tiny_model

from recipes.corpus import byte_tokenizer


ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PATTERNS = ("*.md", "[a-z]*/README.md", "recipes/*/README.md")
PAGES = sorted(str(path.relative_to(ROOT)) for pattern in PATTERNS for path in ROOT.glob(pattern))


def test_python_blocks_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text(README)
    # What `make demo` would have left.
    tiny_model(vocab_size=256, eos_token_id=None).save_pretrained("outputs/demo/FIRE-seed0")
    byte_tokenizer().save_pretrained("outputs/demo/FIRE-seed0")
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    assert (tmp_path / "outputs/mine/model.safetensors").exists()


@pytest.mark.parametrize("page", PAGES)
def test_links_exist(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("http") or (ROOT / page).parent.joinpath(link).exists(), link
