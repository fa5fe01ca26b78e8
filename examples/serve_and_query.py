"""
Serves a FIRE model with `transformers serve` and asks it a question with OpenAI's client.

    python examples/train_with_trainer.py && python examples/sft_with_trl.py  # leave the model that is taken
    python examples/serve_and_query.py
    python examples/serve_and_query.py --model someone/their-fire-model --question "Who are you?"

Needs `pip install "transformers[serving]"`, and a tokenizer with a chat template.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from openai import APIConnectionError, OpenAI


MODEL = "outputs/examples/assistant"
# `transformers serve` (5.17 to 5.24) looks for the class that a config names in transformers alone, even if the model
# brings its code. The second line puts one there that finds it; the rest is what the command does.
SERVER = """
import transformers
transformers.FireForCausalLM = transformers.AutoModelForCausalLM
from transformers.cli.transformers import main
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--question", default="What is str.upper?")
    parser.add_argument("--port", default="8000")
    args = parser.parse_args()
    if args.model == MODEL and not Path(MODEL).exists():
        parser.error("run examples/sft_with_trl.py first, or name a --model")

    options = ["--trust-remote-code", "--host", "127.0.0.1", "--port", args.port]
    server = subprocess.Popen([sys.executable, "-c", SERVER, "serve", *options])
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{args.port}/v1", api_key="none")
        messages = [{"role": "user", "content": args.question}]
        while True:
            try:
                request = {"model": args.model, "messages": messages, "max_tokens": 40, "temperature": 0}
                answer = client.chat.completions.create(**request).choices[0].message.content
                break
            except APIConnectionError:  # not up yet
                if server.poll() is not None:
                    sys.exit("The server ended before it answered.")
        print(f"\n{args.question}\n{answer.strip()}")
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
