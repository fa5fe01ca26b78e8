"""
Loads a FIRE model as anyone would who has transformers and not this package, and lets it go on from a text.

    python examples/train_with_trainer.py  # leaves the model that is taken by default
    python examples/load_and_generate.py
    python examples/load_and_generate.py "import os" --model someone/their-fire-model --tokens 500
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed


MODEL = "outputs/examples/model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="def __init__(self")
    parser.add_argument("--model", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--tokens", type=int, default=200)
    args = parser.parse_args()
    if args.model == MODEL and not Path(MODEL).exists():
        parser.error("run examples/train_with_trainer.py first, or name a --model")

    # The folder carries the model's code, which `trust_remote_code` allows to run. With `import modeling_fire` above,
    # the installed package is used and the word is not needed. For a model on the Hub add `revision=` with a commit.
    model = AutoModelForCausalLM.from_pretrained(args.model, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=True)
    inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)

    greedy = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    print(f"The most likely: {tokenizer.decode(greedy[0])!r}\n")
    set_seed(0)
    # A FIRE model has no longest text: this may go on past the length that it was trained at.
    sampled = model.generate(**inputs, max_new_tokens=args.tokens, do_sample=True, top_p=0.9)
    print(f"A sample of {sampled.shape[1]} tokens:\n{tokenizer.decode(sampled[0])}")


if __name__ == "__main__":
    main()
