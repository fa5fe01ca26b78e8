"""Forward passes of a tiny model in float64 with padding, packed documents or a mask, for comparison."""

import torch
from helpers import random_ids, tiny_model


LENGTH = 13


def arguments(scenario: str) -> dict:
    """Arguments of a forward pass with two sequences of `LENGTH` tokens."""
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    match scenario:
        case "left padding":
            mask[0, :4] = 0
            return {"attention_mask": mask}
        case "right padding":
            mask[1, -5:] = 0
            return {"attention_mask": mask}
        case "packed":
            starts = [torch.cat([torch.arange(n), torch.arange(LENGTH - n)]) for n in (5, 9)]
            return {"position_ids": torch.stack(starts), "use_cache": False}
        case "4D mask":
            seen = torch.rand(2, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) > 0.3
            seen = (seen | torch.eye(LENGTH, dtype=torch.bool)).tril()
            hidden = torch.finfo(torch.float64).min
            return {"attention_mask": torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, hidden)}
    return {}


SCENARIOS = ["causal", "left padding", "right padding", "packed", "4D mask"]


def model_and_logits(name: str, scenario: str, **changes):
    """A model in float64 (RMS norms would compute in float32) and its logits, 0 where the input is padding."""
    model = tiny_model(attn_implementation=name, norm_type="layer_norm", **changes).double()
    given = arguments(scenario)
    logits = model(random_ids(2, LENGTH), **given).logits
    if "padding" in scenario:
        logits = logits * given["attention_mask"][..., None]
    return model, logits


def logits_and_gradients(name: str, scenario: str, **changes) -> dict[str, torch.Tensor]:
    """Of a loss that weighs every logit; gradients by the names of their parameters."""
    model, logits = model_and_logits(name, scenario, **changes)
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (logits * weights).sum().backward()
    return {"logits": logits.detach()} | {key: parameter.grad for key, parameter in model.named_parameters()}
