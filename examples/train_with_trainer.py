"""
Trains a FIRE model from scratch with transformers' Trainer: tokenizer, model, training, and a text that it writes.

    python examples/train_with_trainer.py
    python examples/train_with_trainer.py --text "books/*.txt" --steps 5000

The text is Python's standard library, unless you name files. Other examples take the model that this leaves.
"""

import argparse
import math
from glob import glob
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments, set_seed

from modeling_fire import FireConfig, FireForCausalLM


LENGTH = 128  # of the training texts, in tokens; the model may read and write longer ones


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    settings = {"special_tokens": ["<end>"], "initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
    bpe.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=1024, **settings))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>", pad_token="<end>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=str(Path(argparse.__file__).with_name("[a-s]*.py")), help="files")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", default="outputs/examples/model")
    args = parser.parse_args()
    texts = [Path(name).read_text(encoding="utf-8") for name in sorted(glob(args.text))]
    set_seed(0)
    tokenizer = train_tokenizer(texts)
    ids = [token for ids in tokenizer(texts).input_ids for token in [*ids, tokenizer.eos_token_id]]
    blocks = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH + 1, LENGTH)]
    data = [{"input_ids": block, "labels": block} for block in blocks]
    shape = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = FireForCausalLM(FireConfig(vocab_size=len(tokenizer), max_position_embeddings=LENGTH, **shape, **special))
    options = {"max_steps": args.steps, "learning_rate": 3e-3, "save_strategy": "no", "report_to": "none"}
    trainer = Trainer(model, TrainingArguments(args.out, **options), train_dataset=data[:-64], eval_dataset=data[-64:])
    trainer.train()
    print(f"Perplexity of held-out text: {math.exp(trainer.evaluate()['eval_loss']):.1f}")
    trainer.save_model()  # the folder as it would go to the Hub: weights, config, the code of the model ...
    tokenizer.save_pretrained(args.out)  # ... and the tokenizer
    inputs = tokenizer("def ", return_tensors="pt").to(model.device)
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=60, do_sample=True, top_p=0.9)[0]))


if __name__ == "__main__":
    main()
