"""Reading the dense SmolLM2 model from a GGUF file or a transformers folder."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexperts.errors import ModelError
from flexperts.smol_moe.sources import DenseSource

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

EOS_ID, PAD_ID, BOS_ID = 2, 0, 1
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class DenseModel:
    """A dense Llama as plain data.

    Attributes:
        config: The model's `LlamaConfig`.
        state: transformers' parameter name -> float32 tensor; without `lm_head` if embeddings are tied.
        tokenizer: The tokenizer with our chat template, pad and eos (see `prepare_tokenizer`).
        source: Where the model came from.
    """

    config: LlamaConfig
    state: dict[str, torch.Tensor]
    tokenizer: PreTrainedTokenizerBase
    source: DenseSource

    def model(self) -> LlamaForCausalLM:
        """Return a new float32 `LlamaForCausalLM` in eval mode with these weights."""
        import torch
        from transformers import LlamaForCausalLM

        with torch.random.fork_rng(devices=[]):  # the caller's random state must not depend on a build
            model = LlamaForCausalLM(self.config)
        missing, unexpected = model.load_state_dict(self.state, strict=False)
        if unexpected or any(name != "lm_head.weight" for name in missing):
            raise _unfit(self.source.path, f"do not fit a Llama ({(missing + unexpected)[:3]})")
        model.tie_weights()
        return model.eval()


def load_dense(source: DenseSource) -> DenseModel:
    """Read the dense model from a source.

    Args:
        source: A transformers folder or a `.gguf` file (about 20 s to read on one core).
    """
    config, state = read_weights(source.path)
    return DenseModel(config, state, load_tokenizer(source.path), source)


def read_weights(path: Path) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """Read the config and the float32 parameters of a Llama from a transformers folder or a GGUF file."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    try:
        config = AutoConfig.from_pretrained(**_place(path), trust_remote_code=False)
        if config.model_type != "llama":
            raise _unfit(path, f"has model_type {config.model_type!r}, not llama")
        with redirect_stderr(StringIO()):  # the GGUF reader shows a bar that no setting of transformers hides
            model, found = LlamaForCausalLM.from_pretrained(
                **_place(path), config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
    except ModelError:
        raise
    except (OSError, ValueError, struct.error) as error:
        raise _unfit(path, f"cannot be read ({error})") from error
    if found["missing_keys"]:
        raise _unfit(path, f"lacks {sorted(found['missing_keys'])[:3]}")
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for key, token in special_ids().items():
        setattr(model.config, key, token)
    model.config.rms_norm_eps = float(f"{config.rms_norm_eps:.3g}")  # a GGUF file has it in float32
    return model.config, state


def _place(path: Path) -> dict[str, Any]:
    """Return the arguments with which transformers finds a folder or a GGUF file."""
    if path.suffix == ".gguf":
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    return {"pretrained_model_name_or_path": path}


def _unfit(path: Path, rule: str) -> ModelError:
    return ModelError(f"dense weights at {path}", rule, "give the weights of SmolLM2-135M-Instruct")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load and prepare the tokenizer from a folder or a GGUF file (about 5 s)."""
    from transformers import AutoTokenizer

    return prepare_tokenizer(AutoTokenizer.from_pretrained(**_place(path), trust_remote_code=False))


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Set a pad token other than eos and a ChatML template without a system prompt."""
    if tokenizer.convert_ids_to_tokens([PAD_ID, BOS_ID, EOS_ID]) != [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]:
        raise ModelError("the tokenizer", "is not SmolLM2-Instruct's", "give the files of SmolLM2-135M-Instruct")
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = 8192
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def special_ids() -> Mapping[str, int]:
    """Return the special token ids of config and generation config."""
    return {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
