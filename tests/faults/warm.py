"""What every child needs, imported once in the server it is forked from."""

import accelerate.utils  # noqa: F401
import bitsandbytes  # noqa: F401
import peft.tuners.lora.bnb  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import loratune.cli
import loratune.training.run  # noqa: F401
import tests.tiny  # noqa: F401
