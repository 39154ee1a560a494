"""Heads that predict the original visual tokens from the language model's last hidden states."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .packing import padding, scatter_back

# What the released model classes give every linear and embedding through transformers' post_init.
INITIAL_STD = 0.02


def linear_head(
    hidden_size: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> nn.Linear:
    """The head of the paper and of ViCToR."""
    return nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype)


class BertHead(nn.Module):
    """The released Croc's head: position embedding, one BERT layer, linear.

    The layer attends within each image, never across images. Its maths is BERT's: post-norm, exact
    GELU, four times the width in between, eps 1e-12, dropout on attention probabilities and on both
    residual branches.

    Args:
        hidden_size: C.
        num_positions: the most tokens one image may have.
        num_heads: by default ``hidden_size // 64``, at least 1.
        dropout: active in training, as published.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: ``num_heads`` does not divide ``hidden_size``.

    Source: deepglint/Croc, the module ``transform_block``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_positions: int = 576,
        num_heads: int | None = None,
        *,
        dropout: float = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        num_heads = max(1, hidden_size // 64) if num_heads is None else num_heads
        if num_heads < 1 or hidden_size % num_heads:
            raise ValueError(
                f"BertHead: num_heads must divide hidden_size = {hidden_size}, got {num_heads}"
            )
        self.num_positions = num_positions
        self.position = nn.Embedding(num_positions, hidden_size, device=device, dtype=dtype)
        self.layer = nn.TransformerEncoderLayer(
            hidden_size,
            num_heads,
            dim_feedforward=4 * hidden_size,
            dropout=dropout,
            activation="gelu",
            layer_norm_eps=1e-12,
            batch_first=True,
            device=device,
            dtype=dtype,
        )
        # BERT has no dropout between the two feed-forward matrices.
        self.layer.dropout = nn.Identity()
        self.output = nn.Linear(hidden_size, hidden_size, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialise all parameters in place, after ``to_empty`` too."""
        attention = self.layer.self_attn
        weights = [self.position.weight, attention.in_proj_weight, attention.out_proj.weight]
        linears = (self.layer.linear1, self.layer.linear2, self.output)
        for weight in (*weights, *(linear.weight for linear in linears)):
            nn.init.normal_(weight, std=INITIAL_STD)
        for bias in (attention.in_proj_bias, attention.out_proj.bias, *(x.bias for x in linears)):
            nn.init.zeros_(bias)
        self.layer.norm1.reset_parameters()
        self.layer.norm2.reset_parameters()

    def forward(self, hidden: Tensor, lengths: Sequence[int]) -> Tensor:
        """Predict (S, C) from the packed (S, C) hidden states of images with ``lengths`` tokens.

        Raises:
            ValueError: an image has more tokens than the position table.
        """
        if hidden.shape[0] == 0:
            return self.output(hidden)
        longest = max(lengths)
        if longest > self.num_positions:
            raise ValueError(
                f"BertHead: an image must have at most num_positions = {self.num_positions} "
                f"tokens, got {longest}"
            )
        # An image without tokens has no key to attend to: its softmax would be NaN.
        lengths = [length for length in lengths if length]
        images, valid = padding(lengths, hidden.device)
        out = hidden.view(*images.shape, -1) if valid is None else hidden[images]
        out = out + self.position.weight[:longest]
        out = self.layer(out, src_key_padding_mask=None if valid is None else ~valid)
        out = out.reshape(-1, out.shape[-1])
        if valid is not None:
            slots = torch.arange(images.numel(), device=hidden.device)
            out = out[scatter_back(images, valid, slots, hidden.shape[0], 0)]
        return self.output(out)
