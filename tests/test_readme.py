"""
Every Python block of the README runs as written, in order; every path that a page links to exists; every command of a
page is one that our programs understand, up to where they would begin to work.
"""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import typer
from helpers import tiny_model

from modeling_fire.cli import app
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


def commands_of(page: str) -> list[list[str]]:
    """The words of each command in the bash blocks of a page, its variables filled in where they are set there."""
    commands, variables = [], {}
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for name, value in variables.items():
                line = line.replace(f"${name} ", f"{value} ").replace(f"${name}/", f"{value}/")
            assigned = re.fullmatch(r"(\w+)=(\S+|\".*\")", line.strip())
            if assigned:
                variables[assigned[1]] = assigned[2].strip('"')
            else:
                commands.append(shlex.split(re.sub(r"(^|\s)#.*", "", line)))
    # What stands in a loop, the shell alone knows.
    return [words for words in commands if words and not any("$" in word for word in words)]


class Understood(Exception):
    pass


def check_script(path: str, arguments: list[str], monkeypatch) -> None:
    """A recipe reads its YAML and the changes to it; of other programs there are all options."""
    source = Path(path).read_text()
    if "settings_from_command_line" not in source:
        assert all(word in source for word in arguments if word.startswith("--")), (path, arguments)
        return
    module = importlib.import_module(Path(path).stem)
    read = module.settings_from_command_line

    def only_read(*given):
        read(*given)
        raise Understood

    monkeypatch.setattr(module, "settings_from_command_line", only_read)
    monkeypatch.setattr("sys.argv", [path, *arguments])
    with pytest.raises(Understood):
        module.main()
    monkeypatch.undo()


def test_commands_are_understood(monkeypatch):
    understood = dict.fromkeys(("make", "fire", "script"), 0)
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for page in PAGES:
        for program, *words in commands_of(page):
            monkeypatch.chdir(ROOT)
            scripts = [word for word in words if word.endswith(".py")]
            if program == "make":
                assert {word for word in words if "=" not in word} <= set(targets), (page, words)
                understood["make"] += 1
            elif program == "fire":
                command = typer.main.get_command(app).get_command(None, words[0])
                command.make_context(words[0], words[1:])
                understood["fire"] += 1
            elif program in ("python", ".venv/bin/python", "accelerate") and scripts:
                start = words.index(scripts[0])
                if "--config_file" in words:
                    assert "X" in (name := words[words.index("--config_file") + 1]) or Path(name).exists(), words
                check_script(scripts[0], words[start + 1 :], monkeypatch)
                understood["script"] += 1
    assert min(understood.values()) > 5, understood
