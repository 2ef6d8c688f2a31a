"""nanochat on the HuggingFace stack: train, load, score, publish and talk to a small ChatGPT of your own.

Importing registers the model with transformers' Auto classes; nothing else happens.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .model.configuration_nanochat_hf import NanoChatHFConfig
from .model.modeling_nanochat_hf import NanoChatHFForCausalLM, NanoChatHFModel

__version__ = "0.1.0"
__all__ = ["NanoChatHFConfig", "NanoChatHFForCausalLM", "NanoChatHFModel"]

AutoConfig.register("nanochat_hf", NanoChatHFConfig, exist_ok=True)
AutoModel.register(NanoChatHFConfig, NanoChatHFModel, exist_ok=True)
AutoModelForCausalLM.register(NanoChatHFConfig, NanoChatHFForCausalLM, exist_ok=True)
# What `save_pretrained` copies beside the weights, so that `trust_remote_code=True` works without this package.
NanoChatHFConfig.register_for_auto_class()
NanoChatHFModel.register_for_auto_class("AutoModel")
NanoChatHFForCausalLM.register_for_auto_class("AutoModelForCausalLM")
