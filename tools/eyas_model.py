"""eyas as a torch module, for training only: a Falcon of the 7B layout, with Hugging Face's tensor names.

It computes what `transformers.FalconForCausalLM` computes (`train_eyas.py` compares the two before it finishes).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from eyas_tokenizer import CONTEXT_LENGTH, VOCABULARY_SIZE, write_json

# B rows, T tokens in a row, D hidden, N query heads, E head size, V vocabulary


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of the model."""

    hidden: int = 256
    layers: int = 6
    heads: int = 4
    rope_theta: float = 10_000.0
    epsilon: float = 1e-5
    vocabulary: int = VOCABULARY_SIZE
    context: int = CONTEXT_LENGTH

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


class Attention(nn.Module):
    """Rotary multi-query attention: the fused projection gives all queries, then the one key and the one value."""

    def __init__(self, shape: Shape) -> None:
        """Make the two projections."""
        super().__init__()
        self.heads, self.head_size = shape.heads, shape.head_size
        self.query_key_value = nn.Linear(shape.hidden, shape.hidden + 2 * shape.head_size, bias=False)
        self.dense = nn.Linear(shape.hidden, shape.hidden, bias=False)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        """Causal self-attention of every row."""
        B, T, D = x_BTD.shape
        fused = self.query_key_value(x_BTD).view(B, T, self.heads + 2, self.head_size).transpose(1, 2)
        rotated = rotate(fused[:, : self.heads + 1], cos_TE, sin_TE)
        q_BNTE, k_BNTE = rotated[:, : self.heads], rotated[:, self.heads :].expand(-1, self.heads, -1, -1)
        v_BNTE = fused[:, self.heads + 1 :].expand(-1, self.heads, -1, -1)
        mixed_BNTE = functional.scaled_dot_product_attention(q_BNTE, k_BNTE, v_BNTE, is_causal=True)
        return self.dense(mixed_BNTE.transpose(1, 2).reshape(B, T, D))


class FeedForward(nn.Module):
    """Two matrices with an exact GELU between them."""

    def __init__(self, shape: Shape) -> None:
        """Make the two projections."""
        super().__init__()
        self.dense_h_to_4h = nn.Linear(shape.hidden, 4 * shape.hidden, bias=False)
        self.dense_4h_to_h = nn.Linear(4 * shape.hidden, shape.hidden, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Transform each position on its own."""
        return self.dense_4h_to_h(functional.gelu(self.dense_h_to_4h(x_BTD)))


class Block(nn.Module):
    """Attention and feed-forward side by side on one normalised input."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        """dropout: share of the block's output that is dropped in training."""
        super().__init__()
        self.input_layernorm = nn.LayerNorm(shape.hidden, eps=shape.epsilon)
        self.self_attention = Attention(shape)
        self.mlp = FeedForward(shape)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BTD: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
        """Add the block's output to the residual stream."""
        normal = self.input_layernorm(x_BTD)
        return x_BTD + self.dropout(self.mlp(normal) + self.self_attention(normal, cos_TE, sin_TE))


class Trunk(nn.Module):
    """Everything below the head; the names are those of the checkpoint's tensors."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        """Make embedding, blocks and final norm."""
        super().__init__()
        self.word_embeddings = nn.Embedding(shape.vocabulary, shape.hidden)
        self.h = nn.ModuleList(Block(shape, dropout) for _ in range(shape.layers))
        self.ln_f = nn.LayerNorm(shape.hidden, eps=shape.epsilon)


class Eyas(nn.Module):
    """The whole model; the head is the embedding."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape, dropout: float = 0.0) -> None:
        """Initialise the weights from torch's global generator."""
        super().__init__()
        self.shape = shape
        self.transformer = Trunk(shape, dropout)
        self.dropout = nn.Dropout(dropout)
        cos, sin = rotary_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # The outputs of 2 * layers branches add up in the residual stream; the factor keeps its size at one.
                outward = name.endswith(("dense.weight", "dense_4h_to_h.weight"))
                nn.init.normal_(weight, std=0.02 * ((2 * shape.layers) ** -0.5 if outward else 1.0))

    def forward(self, ids_BT: Tensor) -> Tensor:
        """Logits [B, T, V] of rows that all start at position 0."""
        T = ids_BT.shape[1]
        x_BTD = self.dropout(self.transformer.word_embeddings(ids_BT))
        for block in self.transformer.h:
            x_BTD = block(x_BTD, self.cos[:T], self.sin[:T])
        return functional.linear(self.transformer.ln_f(x_BTD), self.transformer.word_embeddings.weight)


def rotary_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, E] of every position, each half holding the same frequencies."""
    powers = torch.arange(0, shape.head_size, 2, dtype=torch.float32) / shape.head_size
    angles = torch.outer(torch.arange(shape.context, dtype=torch.float32), shape.rope_theta**-powers)
    both_halves = torch.cat((angles, angles), dim=-1)
    return both_halves.cos(), both_halves.sin()


def rotate(x_BNTE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    """Rotate the pairs (i, i + E/2) of every head by the angle of its position."""
    first, second = x_BNTE.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return x_BNTE * cos_TE.to(x_BNTE.dtype) + turned * sin_TE.to(x_BNTE.dtype)


def num_parameters(model: nn.Module) -> int:
    """Distinct weights: the shared head counts once."""
    return sum(weight.numel() for weight in model.parameters())


def save_model(model: Eyas, folder: Path, eos_token_id: int) -> None:
    """Write config.json, generation_config.json and the weights, rounded to bfloat16."""
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves it readable to its owner alone
    shape = model.shape
    config = {
        "activation": "gelu",
        "alibi": False,
        "architectures": ["FalconForCausalLM"],
        "attention_dropout": 0.0,
        "bias": False,
        "bos_token_id": None,
        "dtype": "float32",
        "eos_token_id": eos_token_id,
        "ffn_hidden_size": 4 * shape.hidden,
        "hidden_dropout": 0.0,
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "layer_norm_epsilon": shape.epsilon,
        "max_position_embeddings": shape.context,
        "model_type": "falcon",
        "multi_query": True,
        "new_decoder_architecture": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "pad_token_id": None,
        "parallel_attn": True,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }
    write_json(config, folder / "config.json")
    write_json({"eos_token_id": eos_token_id}, folder / "generation_config.json")
