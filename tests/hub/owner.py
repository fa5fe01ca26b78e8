"""
The author of models pushes them, as the README and `test_push.py` say.

    python owner.py FOLDER

Everything that is pushed from memory is saved under `FOLDER` as well, so that both can be compared. `FOLDER/pushed.pt`
has the commits, and the errors of pushes that were interrupted.
"""

import sys
from pathlib import Path

import torch
from checkpoints import save_tokenizer
from clients import AUTO_CLASSES
from datasets import Dataset
from helpers import tiny_model
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model

from modeling_fire import FireForCausalLM


def push(thing, name: str, work: Path, **arguments) -> str:
    """Pushes and saves; returns the commit."""
    shards = {key: arguments[key] for key in ("max_shard_size",) if key in arguments}
    thing.save_pretrained(work / name, **shards)
    return thing.push_to_hub(f"owner/{name}", **arguments).oid


def push_revisions(work: Path) -> dict[str, str]:
    """Three models in one repository: one has a tag, one a branch, and one is the latest."""
    api = HfApi()
    model = tiny_model(seed=0)
    save_tokenizer(work / "tokenizer").push_to_hub("owner/model")
    commits = {"v1": push(model, "model", work)}
    api.create_tag("owner/model", tag="v1")
    api.create_branch("owner/model", branch="variant")
    commits["variant"] = tiny_model(seed=1).push_to_hub("owner/model", revision="variant").oid
    commits["main"] = tiny_model(seed=2).push_to_hub("owner/model").oid
    return commits


def push_adapter(work: Path) -> None:
    """LoRA of the model that is on the Hub, with a position bias of its own, all of it random."""
    base = FireForCausalLM.from_pretrained("owner/model", revision="v1")
    lora = LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["position_bias"], init_lora_weights=False)
    torch.manual_seed(1)
    push(get_peft_model(base, lora), "adapter", work)


def push_folder(folder: Path, name: str) -> list[list[str]]:
    """Until it works; returns the errors on the way."""
    errors: list[list[str]] = []
    while True:
        try:
            HfApi().create_repo(f"owner/{name}", exist_ok=True)
            HfApi().upload_folder(repo_id=f"owner/{name}", folder_path=folder)
            return errors
        except Exception as error:
            errors.append([each.__name__ for each in type(error).__mro__])
            if len(errors) == 3:
                return errors


def main() -> None:
    work = Path(sys.argv[1])
    commits = push_revisions(work)
    for model_class in AUTO_CLASSES.values():
        push(tiny_model(model_class), model_class.__name__, work)
    push(tiny_model(), "sharded", work, max_shard_size="20KB")
    push(tiny_model(dtype="bfloat16"), "half", work)
    push(tiny_model(), "private", work, private=True)
    push(tiny_model(), "gated", work)
    push_adapter(work)
    Dataset.from_dict({"text": ["A fire", "needs fuel."]}).push_to_hub("owner/data")
    names = ("cut-upload", "cut-commit", "unanswered")
    interrupted = {name: push_folder(work / "interrupted", name) for name in names}
    torch.save((commits, interrupted), work / "pushed.pt")


if __name__ == "__main__":
    main()
