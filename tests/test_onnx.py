"""Models as ONNX: what another runtime makes of them is what PyTorch does."""

import pytest
import torch
from helpers import random_ids, tiny_model


onnxruntime = pytest.importorskip("onnxruntime", reason="pip install onnxruntime onnxscript")
pytest.importorskip("onnxscript", reason="pip install onnxscript")


class Logits(torch.nn.Module):
    """Without the inputs that have defaults, which the older exporter would ask for."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids, attention_mask, use_cache=False).logits


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("name", ["fire", "sdpa", "eager"])
def test_export(name, dynamo, tmp_path):
    model, ids, mask = Logits(tiny_model(attn_implementation=name)), random_ids(2, 12), torch.ones(2, 12).long()
    mask[0, :3] = 0
    names = ["input_ids", "attention_mask"]
    torch.onnx.export(model, (ids, mask), tmp_path / "model.onnx", input_names=names, dynamo=dynamo)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    [logits] = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    expected = model(ids, mask)[mask == 1]
    torch.testing.assert_close(torch.from_numpy(logits)[mask == 1], expected, rtol=1e-4, atol=1e-4)
