"""
Makes a FIRE model of a LLaMA: converts it, lets the bias take over what the rotation did, and trains it a little.

    python examples/convert_and_heal.py
    python examples/convert_and_heal.py HuggingFaceTB/SmolLM2-135M --text "books/*.txt" --length 2048 --rate 3e-4

Without a checkpoint it trains a tiny LLaMA first. recipes/retrofit.py does it in earnest.
"""

import argparse
from glob import glob
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaConfig, TrainingArguments

from modeling_fire.conversion import CalibrationOptions, convert
from modeling_fire.evaluation.report import EvaluationOptions, evaluate, tables
from modeling_fire.training import FireTrainer


def train(model, tokenizer, texts, args, folder) -> None:
    ids, n = tokenizer("\n".join(texts), verbose=False).input_ids, args.length
    data = [{"input_ids": ids[i : i + n], "labels": ids[i : i + n]} for i in range(0, len(ids) - n + 1, n)]
    settings = {"max_steps": args.steps, "learning_rate": args.rate, "save_strategy": "no", "report_to": "none"}
    trainer = FireTrainer(model, TrainingArguments(folder, **settings), train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.save_model()  # with a card


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stdlib = Path(argparse.__file__).with_name("[p-t]*.py")
    parser.add_argument("source", nargs="?", help="a folder or a Hub id")
    parser.add_argument("--text", default=str(stdlib), help="files, of which the last is for the test")
    parser.add_argument("--out", default="outputs/examples/converted")
    for name, default in (("--length", 128), ("--steps", 200), ("--rate", 3e-3)):  # of the training; length in tokens
        parser.add_argument(name, type=type(default), default=default)
    args = parser.parse_args()
    *files, held_out = sorted(glob(args.text))
    texts = [Path(file).read_text(encoding="utf-8") for file in files]
    if args.source is None:
        args.source = f"{args.out}-from"
        shape = {"hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=259, max_position_embeddings=args.length, eos_token_id=1, **shape)
        train(AutoModelForCausalLM.from_config(config), ByT5Tokenizer(extra_ids=0), texts, args, args.source)  # bytes

    # The rotation goes, and layer by layer the bias learns its work. The logits prove that no weight is misplaced.
    calibration = CalibrationOptions(texts, tokens=200 * args.length, length=args.length)
    record = convert(args.source, args.out, calibrate=calibration, overwrite=True)
    print(record.proof, record.calibration, sep="\n")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(args.out), AutoTokenizer.from_pretrained(args.out)
    train(model.float(), tokenizer, texts, args, args.out)
    # FIRE has seen more text by now: compare along a row, not between them.
    print(tables(evaluate([args.source, args.out], EvaluationOptions(text=held_out))))


if __name__ == "__main__":
    main()
