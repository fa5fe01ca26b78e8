"""
Someone who has transformers and not this package loads what he is told to, and writes down what came of it.

    python -I stranger.py FOLDER

`FOLDER/jobs.pt` maps names to jobs: the `kind` names one of the functions below, the rest are its arguments.
`FOLDER/results.pt` has for each name what the function found, or the `error`: the names of its classes, and its text.
"""

import sys


sys.modules["modeling_fire"] = None  # from here on importing the package fails, installed or not

import socket  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402


def model(
    auto_class: str,
    source: str,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    adapter: str | None = None,
    save: str | None = None,
    push: str | None = None,
    **arguments,
) -> dict:
    """What a model computes, and from where and how it was loaded; then saves or pushes it, if told to."""
    auto = getattr(transformers, auto_class)
    loaded, info = auto.from_pretrained(source, output_loading_info=True, **arguments)
    if adapter is not None:
        from peft import PeftModel  # takes seconds

        loaded = PeftModel.from_pretrained(loaded, adapter).merge_and_unload()
    loaded.eval()
    with torch.no_grad():
        outputs = loaded(ids, attention_mask=mask, output_hidden_states=True)
    found = {
        "module": type(loaded).__module__,
        "config_module": type(loaded.config).__module__,
        "class": type(loaded).__name__,
        "missing": set(info["missing_keys"]),
        "unexpected": set(info["unexpected_keys"]),
        "dtypes": {name: parameter.dtype for name, parameter in loaded.named_parameters()},
        "layers": {name: type(module).__name__ for name, module in loaded.named_modules()},
        "hidden": outputs.hidden_states[-1],
        "output": outputs[0],
    }
    if loaded.can_generate():
        found["generated"] = loaded.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    if save is not None:
        loaded.save_pretrained(save)
    if push is not None:
        loaded.push_to_hub(push)
    return found


def dequantised(source: str, ids: torch.Tensor, **arguments) -> dict:
    """What the model of the rounded weights computes, as plain numbers."""
    # At once: on a CPU, bitsandbytes lays the weights out anew at the first forward, and then reads them wrongly.
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, **arguments).dequantize().eval()
    with torch.no_grad():
        return {"output": loaded(ids).logits}


def config(source: str, **arguments) -> dict:
    return {"module": type(transformers.AutoConfig.from_pretrained(source, **arguments)).__module__}


def pipeline(source: str, prompt: str, **arguments) -> dict:
    pipe = transformers.pipeline("text-generation", model=source, **arguments)
    return {"text": pipe(prompt, max_new_tokens=4, do_sample=False)[0]["generated_text"]}


def tokenizer(source: str, text: str, **arguments) -> dict:
    return {"ids": transformers.AutoTokenizer.from_pretrained(source, **arguments)(text).input_ids}


def dataset(source: str, **arguments) -> dict:
    from datasets import load_dataset

    return {"rows": list(load_dataset(source, split="train", **arguments))}


def alone() -> dict:
    """From here on whatever contacts something or starts a program gets an error, and is written down."""

    def refuse(event: str, arguments: tuple) -> None:
        if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork")):
            ATTEMPTS.append(event)
            raise PermissionError(event)

    sys.addaudithook(refuse)
    return {}


def attempts() -> dict:
    """What was tried since `alone`; the last is our own, so that none cannot mean that nobody looks."""
    try:
        socket.create_connection(("127.0.0.1", 9))
    except PermissionError:
        return {"attempts": ATTEMPTS}


ATTEMPTS: list[str] = []
KINDS = (model, dequantised, config, pipeline, tokenizer, dataset, alone, attempts)


def main() -> None:
    work = Path(sys.argv[1])
    kinds = {kind.__name__: kind for kind in KINDS}
    results = {}
    for name, job in torch.load(work / "jobs.pt").items():
        try:
            results[name] = kinds[job.pop("kind")](**job)
        except Exception as error:  # whatever it is, a test looks at it
            results[name] = {"error": [each.__name__ for each in type(error).__mro__], "message": str(error)}
    try:
        import modeling_fire  # noqa: F401
    except ImportError:
        torch.save(results, work / "results.pt")


if __name__ == "__main__":
    main()
