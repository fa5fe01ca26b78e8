"""The first model card of a converted model."""

from huggingface_hub import ModelCard, ModelCardData

from .proof import Proof
from .source import Source


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
    "keep": "It computes what the source computes: the rotation (RoPE) is still there and FIRE's bias is 0. Training "
    "can turn the rotation down (`rope_angle_scale`) while the bias takes over.",
    None: "It computes what the source computes: FIRE's bias is the source's ALiBi, exactly so up to {max_length:.0f} "
    "tokens, and interpolated beyond.",
}
PROOFS = {
    "drop": "With the rotation kept, the same weights give the logits of the source in float32:",
    "keep": "In float32 the logits are those of the source:",
    None: "In float32 the logits are those of the source:",
}


def model_card(source: Source, title: str, rotation: str | None, max_length: float, proof: Proof | None) -> ModelCard:
    """
    Args:
        source ([`Source`]): the original, whose own card tells licence and language.
        title (`str`): the name of the converted model.
        rotation (`str`, *optional*): `"drop"`, `"keep"`, or `None` for ALiBi.
        max_length (`float`): `L`, in tokens.
        proof ([`Proof`], *optional*): its figures, if it was made.
    """
    data = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["fire", "custom_code"])
    if source.on_hub:
        data.base_model = source.name
    if (source.folder / "README.md").exists():
        original = ModelCard.load(source.folder / "README.md", ignore_metadata_errors=True).data
        for name in INHERITED:
            if name in original:
                data[name] = original[name]
    return ModelCard(
        CARD.format(
            metadata=data.to_yaml(),
            title=title,
            source=f"[{source.name}](https://huggingface.co/{source.name})" if source.on_hub else f"`{source.name}`",
            state=STATES[rotation].format(max_length=max_length),
            proof=f"{PROOFS[rotation]} {proof}." if proof is not None else "Not made (`--no-verify`).",
        )
    )
