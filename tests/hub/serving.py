"""
`transformers serve` by someone who has transformers and not this package.

    python -I serving.py serve --trust-remote-code ...

It ends when its standard input does, so that it does not outlive whoever started it.
"""

import os
import sys
import threading


sys.modules["modeling_fire"] = None  # from here on importing the package fails, installed or not

import transformers  # noqa: E402
from transformers.cli.transformers import main  # noqa: E402


def end_with_input() -> None:
    sys.stdin.read()
    os._exit(0)


# The server looks a model's class up in transformers, also where its code comes with it (5.17 to 5.24).
transformers.FireForCausalLM = transformers.AutoModelForCausalLM

if __name__ == "__main__":
    threading.Thread(target=end_with_input, daemon=True).start()
    main()
