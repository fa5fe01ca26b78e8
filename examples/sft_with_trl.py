"""
Teaches a FIRE model to answer, with TRL's SFTTrainer: pairs of prompt and completion, of which the completion counts.

    python examples/train_with_trainer.py  # leaves the model that is taken by default
    python examples/sft_with_trl.py
    python examples/sft_with_trl.py --model someone/their-fire-model --pairs questions.jsonl --steps 2000

Needs `pip install trl`. By default it learns what the methods of Python's `str` do, from their docstrings.
"""

import argparse
import inspect
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from modeling_fire import FireForCausalLM


MODEL = "outputs/examples/model"
TEMPLATE = """{% for message in messages %}{% if message.role == "user" %}Question: {{ message.content }}
Answer:{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"""


def pair(name: str, method) -> dict[str, list]:
    prompt = {"role": "user", "content": f"What is {name}?"}
    completion = {"role": "assistant", "content": inspect.getdoc(method).partition("\n")[0]}
    return {"prompt": [prompt], "completion": [completion]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL, help="a folder or a Hub id")
    parser.add_argument("--pairs", help="JSON lines with `prompt` and `completion`, each a list of messages")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", default="outputs/examples/assistant")
    args = parser.parse_args()
    if args.model == MODEL and not Path(MODEL).exists():
        parser.error("run examples/train_with_trainer.py first, or name a --model")
    methods = inspect.getmembers(str, inspect.ismethoddescriptor)
    pairs = [pair(f"str.{name}", method) for name, method in methods if not name.startswith("__")]
    data = Dataset.from_json(args.pairs) if args.pairs else Dataset.from_list(pairs)
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.chat_template = tokenizer.chat_template or TEMPLATE
    settings = {"max_steps": args.steps, "learning_rate": 2e-3, "logging_steps": 50, "report_to": "none"}
    arguments = SFTConfig(args.out, save_strategy="no", gradient_checkpointing=False, bf16=False, **settings)
    model = FireForCausalLM.from_pretrained(args.model)
    SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer).train()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    inputs = tokenizer.apply_chat_template(data[0]["prompt"], add_generation_prompt=True, return_tensors="pt")
    print(tokenizer.decode(model.generate(**inputs.to(model.device), max_new_tokens=40, do_sample=False)[0]))


if __name__ == "__main__":
    main()
