"""FIRE (arXiv 2310.04418) for Hugging Face transformers. Importing this package registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .attention_fire import fire_attention
from .configuration_fire import FireConfig
from .modeling_fire import (
    FireForCausalLM,
    FireForQuestionAnswering,
    FireForSequenceClassification,
    FireForTokenClassification,
    FireModel,
)
from .position_bias_fire import FirePositionBias
from .positions_fire import FirePositions


# With the package installed its classes load and no downloaded code is run; saved folders still carry the code.
AutoConfig.register("fire", FireConfig)
FireConfig.register_for_auto_class()
for _auto_class, _model_class in (
    (AutoModel, FireModel),
    (AutoModelForCausalLM, FireForCausalLM),
    (AutoModelForSequenceClassification, FireForSequenceClassification),
    (AutoModelForTokenClassification, FireForTokenClassification),
    (AutoModelForQuestionAnswering, FireForQuestionAnswering),
):
    _auto_class.register(FireConfig, _model_class)
    _model_class.register_for_auto_class(_auto_class.__name__)

__all__ = [
    "FireConfig",
    "FireForCausalLM",
    "FireForQuestionAnswering",
    "FireForSequenceClassification",
    "FireForTokenClassification",
    "FireModel",
    "FirePositionBias",
    "FirePositions",
    "fire_attention",
]
