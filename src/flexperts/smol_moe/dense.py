"""Reading the dense SmolLM2 model from a GGUF file (dequantised here) or a transformers folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexperts.errors import ModelError
from flexperts.smol_moe.sources import DenseSource

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from numpy.typing import NDArray
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

EOS_ID, PAD_ID, BOS_ID = 2, 0, 1
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_CONFIG_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "vocab_size": "vocab_size",
}


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
            raise ModelError(
                f"dense weights at {self.source.path}",
                f"do not fit a Llama ({(missing + unexpected)[:3]})",
                "give the weights of SmolLM2-135M-Instruct",
            )
        model.tie_weights()
        return model.eval()


def load_dense(source: DenseSource) -> DenseModel:
    """Read the dense model from a source.

    Args:
        source: A transformers folder or a `.gguf` file (about 6 s to read on one core).
    """
    if source.path.suffix == ".gguf":
        config, state = read_gguf(source.path)
    else:
        config, state = read_folder(source.path)
    return DenseModel(config, state, load_tokenizer(source.path), source)


def read_gguf(path: Path) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """Dequantise a Llama GGUF file to float32, with q and k in transformers' row order.

    Returns:
        The config and the state dict.
    """
    import numpy as np
    import torch
    from gguf import GGUFReader, dequantize

    try:
        reader = GGUFReader(str(path))
    except (ValueError, OSError, IndexError) as error:
        raise ModelError(
            f"file {path}", f"is not a GGUF file ({error})", "give a GGUF file of SmolLM2-135M-Instruct"
        ) from error
    config = _gguf_config(reader, path)
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        name = transformers_name(tensor.name, path)
        values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        state[name] = torch.from_numpy(unpermute(values, heads.get(name.split(".")[-2])))
    return config, state


def transformers_name(name: str, path: Path) -> str:
    """Return transformers' name for a GGUF tensor name of a Llama."""
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{suffix}"
    block = stem.split(".")
    if len(block) == 3 and block[0] == "blk" and block[2] in _BLOCK_NAMES:
        return f"model.layers.{block[1]}.{_BLOCK_NAMES[block[2]]}.{suffix}"
    raise ModelError(
        f"tensor {name!r} in {path}", "is not a Llama parameter", "give the weights of SmolLM2-135M-Instruct"
    )


def unpermute(values: NDArray[Any], heads: int | None) -> NDArray[Any]:
    """Undo llama.cpp's reordering of rotary pairs.

    Args:
        values: Weight [heads * head_dim, hidden], rows in interleaved rotary order.
        heads: Number of heads in the rows; None returns the weight unchanged.

    Returns:
        The same rows in transformers' half-split order, contiguous.
    """
    if heads is None:
        return values
    pairs = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape).copy()


def _gguf_config(reader: GGUFReader, path: Path) -> LlamaConfig:
    from transformers import LlamaConfig

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return None if field is None else field.contents()

    if value("general.architecture") != "llama":
        raise ModelError(
            f"file {path}", "is not of architecture llama", "give the weights of SmolLM2-135M-Instruct"
        )
    sizes = {ours: value(f"llama.{theirs}") for ours, theirs in _CONFIG_KEYS.items()}
    theta = float(value("llama.rope.freq_base") or 10000.0)
    return LlamaConfig(
        **sizes,
        rms_norm_eps=float(f"{value('llama.attention.layer_norm_rms_epsilon'):.3g}"),
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        **special_ids(),
    )


def read_folder(path: Path) -> tuple[LlamaConfig, dict[str, torch.Tensor]]:
    """Read a transformers folder of a Llama as float32."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    if config.model_type != "llama":
        raise ModelError(
            f"folder {path} with model_type {config.model_type!r}",
            "must contain a llama",
            "give the weights of SmolLM2-135M-Instruct",
        )
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, use_safetensors=True)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    for key, token in special_ids().items():
        setattr(model.config, key, token)
    return model.config, state


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """Load and prepare the tokenizer from a folder or a GGUF file (about 5 s)."""
    from transformers import AutoTokenizer

    if path.suffix == ".gguf":
        return prepare_tokenizer(
            AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        )
    return prepare_tokenizer(AutoTokenizer.from_pretrained(path, trust_remote_code=False))


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
