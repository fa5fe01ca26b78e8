"""`transformers serve` and `transformers chat` with a model from the Hub, in processes without this package."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from checkpoints import save_tokenizer
from clients import HERE
from helpers import tiny_model
from transformers.utils.import_utils import is_serve_available


pytestmark = pytest.mark.skipif(not is_serve_available(), reason="needs transformers[serving]")

TRANSFORMERS = [sys.executable, "-I", "-m", "transformers.cli.transformers"]
PROMPT = [{"role": "user", "content": "A fire needs"}]


@pytest.fixture(scope="module")
def settings(hub, tmp_path_factory) -> dict[str, str]:
    """Environment of the clients of a Hub with a model that can chat."""
    work = tmp_path_factory.mktemp("serve")
    tiny_model(seed=4).save_pretrained(work / "model")
    save_tokenizer(work / "model")
    hub.add("owner/model", work / "model")
    repo = hub.repos["models/owner/model"]
    repo.tags["v1"] = repo.resolve("main")
    return {**os.environ, **hub.environment(work / "home"), "COLUMNS": "200"}


@pytest.fixture(scope="module")
def server(settings, tmp_path_factory):
    """The address of a server that loads what it is asked for."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "log.txt"
    command = [sys.executable, "-I", str(HERE / "serving.py"), "serve", "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=output, stderr=output, env=settings) as process,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.kill()


def wait_for(url: str, process: subprocess.Popen, log) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=10)
            return
        except urllib.error.URLError:
            time.sleep(0.2)
    pytest.fail(log.read_text())


@pytest.fixture(scope="module")
def answer(tmp_path_factory) -> str:
    """What the model says: words that the interface does not, "p J"."""
    tokenizer = save_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    inputs = tokenizer.apply_chat_template(PROMPT, return_tensors="pt", return_dict=True)
    generated = tiny_model(seed=4).generate(**inputs, max_new_tokens=8, do_sample=False)
    return tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("model", ["owner/model", "owner/model@v1"])
def test_an_openai_client_is_answered(server, answer, model):
    from openai import OpenAI

    completions = OpenAI(base_url=server, api_key="none").chat.completions
    request = {"model": model, "messages": PROMPT, "max_tokens": 8, "temperature": 0}
    assert completions.create(**request).choices[0].message.content == answer
    chunks = completions.create(**request, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == answer


def test_chat(server, settings, answer):
    """Two questions at the keyboard; each answer ends at the limit of its tokens, and is not continued."""
    command = [*TRANSFORMERS, "chat", "owner/model", server, "max_new_tokens=8", "do_sample=False"]
    typed = f"{PROMPT[0]['content']}\nn\n!clear\n{PROMPT[0]['content']}\nn\n!exit\n"
    chat = subprocess.run(command, input=typed, env=settings, capture_output=True, text=True, timeout=120)
    assert chat.returncode == 0, chat.stderr
    assert chat.stdout.count(answer.strip()) == 2, chat.stdout


def test_without_a_word_the_server_does_not_find_the_class(tmp_path):
    """When this fails, transformers has learned it, and the line in `serving.py` may go."""
    from transformers.cli.serving.model_manager import ModelManager

    tiny_model().save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    manager = ModelManager(device="cpu", trust_remote_code=True)
    with pytest.raises(AttributeError, match="has no attribute FireForCausalLM"):
        manager.load_model_and_processor(f"{tmp_path}@main")
