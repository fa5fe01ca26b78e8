"""The first model card of a converted model."""

from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData

from .source import Source


if TYPE_CHECKING:
    from . import Conversion


# What the card takes over from that of the source.
INHERITED = ("license", "license_name", "license_link", "language")

CARD = """\
---
{metadata}
---

# {title}

{source} with [FIRE](https://arxiv.org/abs/2310.04418) as its position encoding, made by `fire convert`.

{state}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{title}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{title}")
```

## Proof of the conversion

{proof}
"""

STATES = {
    "drop": "The source's rotation (RoPE) is gone and FIRE's bias is still 0: this model has to be trained before it "
    "is of use.",
    "calibrated": "The source's rotation (RoPE) is gone. Layer by layer, without training the model as a whole, "
    "FIRE's bias took over what the rotation did, as far as it could: {calibration}. Training recovers the rest.",
    "keep": "It computes what the source computes: the rotation (RoPE) is still there and FIRE's bias is 0. Training "
    "can turn the rotation down (`rope_angle_scale`) while the bias takes over.",
    None: "It computes what the source computes: FIRE's bias is the source's ALiBi, exactly so up to {max_length:.0f} "
    "tokens, and interpolated beyond.",
}
PROOFS = {
    "drop": "With the rotation kept, the weights as they were converted give the logits of the source in float32:",
    "keep": "In float32 the logits are those of the source:",
    None: "In float32 the logits are those of the source:",
}


def model_card(source: Source, title: str, record: "Conversion") -> ModelCard:
    """
    Args:
        source ([`Source`]): the original, whose own card tells licence and language.
        title (`str`): the name of the converted model.
        record ([`Conversion`]): what was done, with its figures.
    """
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["fire", "custom_code"])
    if source.on_hub:
        data.base_model = source.name
    if (source.folder / "README.md").exists():
        original = ModelCard.load(source.folder / "README.md", ignore_metadata_errors=True).data
        for name in INHERITED:
            if name in original:
                data[name] = original[name]
    state = STATES["calibrated" if record.calibration is not None else record.rotation]
    proof = "Not made (`--no-verify`)." if record.proof is None else f"{PROOFS[record.rotation]} {record.proof}."
    return ModelCard(
        CARD.format(
            metadata=data.to_yaml(),
            title=title,
            source=f"[{source.name}](https://huggingface.co/{source.name})" if source.on_hub else f"`{source.name}`",
            state=state.format(max_length=record.max_length, calibration=record.calibration),
            proof=proof,
        )
    )
