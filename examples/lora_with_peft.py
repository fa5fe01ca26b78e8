"""
Adapts a FIRE model to another kind of text with LoRA: a small adapter beside the frozen weights.

    python examples/train_with_trainer.py  # leaves the model that is taken by default
    python examples/lora_with_peft.py
    python examples/lora_with_peft.py --model someone/their-fire-model --text novel.txt --steps 1000

By default a model of Python's source learns the English of Python's documentation (what `help()` shows).
"""

import argparse
import math
from pathlib import Path
from pydoc_data.topics import topics

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer, Trainer, TrainingArguments, set_seed

from modeling_fire import FireForCausalLM


MODEL, LENGTH = "outputs/examples/model", 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--text", help="a file")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", default="outputs/examples/adapter")
    args = parser.parse_args()
    if args.model == MODEL and not Path(MODEL).exists():
        parser.error("run examples/train_with_trainer.py first, or name a --model")
    text = Path(args.text).read_text(encoding="utf-8") if args.text else "\n\n".join(topics.values())
    set_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids, n = tokenizer(text, verbose=False).input_ids, LENGTH
    data = [{"input_ids": ids[i : i + n], "labels": ids[i : i + n]} for i in range(0, len(ids) - n + 1, n)]
    # PEFT asks for the names of the layers. The bias is small and trains whole: it needs no low rank.
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=8, target_modules=layers, modules_to_save=["position_bias"], task_type="CAUSAL_LM")
    model = get_peft_model(FireForCausalLM.from_pretrained(args.model), lora)
    model.print_trainable_parameters()
    options = {"max_steps": args.steps, "learning_rate": 5e-3, "save_strategy": "no", "report_to": "none"}
    trainer = Trainer(model, TrainingArguments(args.out, **options), train_dataset=data[:-64], eval_dataset=data[-64:])
    before = math.exp(trainer.evaluate()["eval_loss"])
    trainer.train()
    print(f"Perplexity of held-out text: {before:.1f} before, {math.exp(trainer.evaluate()['eval_loss']):.1f} after")
    model.save_pretrained(args.out)  # the adapter alone
    adapted = PeftModel.from_pretrained(FireForCausalLM.from_pretrained(args.model), args.out)  # anywhere, later
    inputs = tokenizer("The ", return_tensors="pt")
    print(tokenizer.decode(adapted.generate(**inputs, max_new_tokens=60, do_sample=True, top_p=0.9)[0]))


if __name__ == "__main__":
    main()
