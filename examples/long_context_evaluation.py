"""
Measures how models get on with ever longer texts: the perplexity of the same tokens by the length of their context.

    python examples/train_with_trainer.py  # leaves the model that is taken by default
    python examples/long_context_evaluation.py
    python examples/long_context_evaluation.py someone/their-fire-model other/model --text novel.txt --passkey

Models may be of any architecture, with the same tokenizer. The same as a command: `fire evaluate` and `fire plot`.
"""

import argparse
import os
from pathlib import Path

from modeling_fire.evaluation.report import EvaluationOptions, evaluate, learned_tables, plot_model, tables


MODEL = "outputs/examples/model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[MODEL], help="folders or Hub ids; a FIRE model first")
    parser.add_argument("--text", default=str(Path(os.__file__).with_name("typing.py")), help="not of the training")
    parser.add_argument("--windows", type=int, default=16, help="of the text, each as long as the longest context")
    parser.add_argument("--passkey", action="store_true", help="hide a number in a long text and ask for it, too")
    parser.add_argument("--out", default="outputs/examples/evaluation")
    args = parser.parse_args()
    if args.models == [MODEL] and not Path(MODEL).exists():
        parser.error("run examples/train_with_trainer.py first, or name models")

    # Contexts of 1, 2, 4 and 8 times the length of the training texts. The tokens to predict are the same in all of
    # them, so a line that rises says that far tokens do harm, and one that falls that they are of use.
    options = EvaluationOptions(text=args.text, num_windows=args.windows, passkey=args.passkey)
    print(tables(evaluate(args.models, options, Path(args.out))))

    # What the first model learned: its bias by distance, `c` and `L` of every layer, and how far back it looks.
    print("\n" + learned_tables(plot_model(args.models[0], Path(args.out), text=args.text)))
    print(f"\nFigures and plots are in {args.out}: {', '.join(sorted(os.listdir(args.out)))}")


if __name__ == "__main__":
    main()
