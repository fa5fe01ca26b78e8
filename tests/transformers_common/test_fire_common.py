"""Runs transformers' own tests of a model, unchanged, on every class of the FIRE model.

These are the tests that a model inside transformers must pass: common modelling tests on the base model and all heads;
training, tensor parallelism and FSDP on the causal language model. See `transformers_tests` for where they come from.
"""

import os
import unittest
from unittest import mock

import pytest
import transformers
from packaging.version import Version
from transformers.models.auto import modeling_auto
from transformers_tests import test_fsdp_mixin, test_tensor_parallel_mixin
from transformers_tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester
from transformers_tests.distributed_testing_utils import _start_rank_processes
from transformers_tests.test_fsdp_mixin import FSDPTesterMixin
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from modeling_fire import (
    FireConfig,
    FireForCausalLM,
    FireForQuestionAnswering,
    FireForSequenceClassification,
    FireForTokenClassification,
    FireModel,
)


# Elsewhere in our tests they are ignored; one of transformers' tests waits for one.
pytestmark = pytest.mark.filterwarnings("default::FutureWarning")

# `Auto*.register` fills only the mappings of classes. The tests find a model's kind, and with it the labels it needs,
# in these mappings of names, which transformers fills for its own models alone.
NAMES = {
    "MODEL_MAPPING_NAMES": FireModel,
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": FireForCausalLM,
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": FireForSequenceClassification,
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": FireForTokenClassification,
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": FireForQuestionAnswering,
}

ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}


class FireModelTester(CausalLMModelTester):
    config_class = FireConfig
    base_model_class = FireModel
    causal_lm_class = FireForCausalLM
    sequence_classification_class = FireForSequenceClassification
    token_classification_class = FireForTokenClassification
    question_answering_class = FireForQuestionAnswering
    rope_parameters = None

    def get_config(self):
        config = super().get_config()
        config.rope_parameters = self.rope_parameters
        # Shorter than the inputs, so that the normaliser is constant in one part of them and grows in the other.
        config.fire_init_L = 4.0
        return config


class FireEveryOptionTester(FireModelTester):
    """A model in which all modules and parameters exist that are optional."""

    rope_parameters = ROPE

    def get_config(self):
        config = super().get_config()
        config.norm_type = "layer_norm"
        config.embedding_norm = True
        config.qk_norm = True
        config.attention_bias = config.attention_output_bias = config.mlp_bias = True
        config.fire_mlp_depth = 2
        config.fire_share_layers = True
        return config


class FireModelTest(
    CausalLMModelTest, TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin, unittest.TestCase
):
    model_tester_class = FireModelTester
    model_tester = None  # an abstract property of the mixins; each test gets its own in setUp
    all_model_classes = tuple(NAMES.values())
    # transformers skips this test for models of before 2023, by a copyright line that our files do not have.
    test_can_init_all_missing_weights_before_2023 = True
    # Read by the test of compiled training, which runs on an accelerator only.
    _torch_compile_train_cls = FireForCausalLM

    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        patches = [mock.patch.dict(getattr(modeling_auto, name), fire=model.__name__) for name, model in NAMES.items()]
        # transformers runs the distributed tests for a few model types only, to save time.
        patches += [
            mock.patch.object(test_fsdp_mixin, "FSDP_DISTRIBUTED_TEST_MODEL_TYPES", {"fire"}),
            mock.patch.object(test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES", {"fire"}),
        ]
        # They also ask for as many cores as there are ranks, which is a matter of speed only.
        patches.append(mock.patch("os.cpu_count", return_value=max(4, os.cpu_count())))
        # In transformers 5.17 they spawn the ranks themselves, which is slow, and now and then a rank aborts on exit.
        patches.append(mock.patch("torch.multiprocessing.spawn", _start_rank_processes))
        for patch in patches:
            patch.start()
            cls.addClassCleanup(patch.stop)

    def setUp(self):
        super().setUp()
        # The tests of rotary embeddings read `rope_parameters` as a dictionary; FIRE has none unless asked to rotate.
        if "model_rope" in self._testMethodName:
            self.model_tester.rope_parameters = ROPE

    @unittest.skipIf(
        Version(transformers.__version__) < Version("5.22"),
        "FIRE refuses tensor-parallel training with it: the gradients of the bias are not summed before 5.22",
    )
    def test_tp_backward(self):
        super().test_tp_backward()

    def test_sdpa_can_dispatch_non_composite_models(self):
        # Theirs takes "sdpa" for the default of every model that supports it; here "fire" is.
        for model_class in self.all_model_classes:
            config, _ = self.model_tester.prepare_config_and_inputs_for_common()
            for name in ("sdpa", "eager", "fire"):
                model = model_class._from_config(config, attn_implementation=name)
                assert {layer.self_attn.config._attn_implementation for layer in model.base_model.layers} == {name}


class FireEveryOptionTest(FireModelTest):
    model_tester_class = FireEveryOptionTester
