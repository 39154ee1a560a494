"""CrocLayer: the pool, the reconstruction head and the loss, to be put into any multimodal LLM."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..attention.mask import MixedMask
from ..checks import check_choice
from ..replacement.api import reconstruction_loss, replace_tokens
from .arguments import check_loss, check_mask, check_packed, check_size
from .heads import INITIAL_STD, BertHead, linear_head
from .matching import Matching, current_rank, keep_all, match_micro_batches
from .normalization import l2_normalize
from .recipe_config import Recipe, get_recipe, masked_count, ratio_terms

POOL_INITS = ("randn", "unit")
METRICS = ("l2", "l2sq", "cosine")


class Replacement(NamedTuple):
    """What :meth:`CrocLayer.replace` made of a packed batch of images.

    Attributes:
        embeddings: (S, C) in the features' dtype: the features normalised, with the matched pool
            rows in the masked tokens' places.
        target: (S, C), the normalised features, detached: what the head shall reconstruct.
        masked: (S,) bool.
        pool_index: (S,) int64, -1 where the token is kept.
        num_masked: number of masked tokens.
        lengths: tokens of each image.
        status: of the matching, see :class:`Matching`.
    """

    embeddings: Tensor
    target: Tensor
    masked: Tensor
    pool_index: Tensor
    num_masked: int
    lengths: tuple[int, ...]
    status: Tensor | None = None


class CrocLayer(nn.Module):
    r"""Token reconstruction for one multimodal LLM: mask, match, replace, reconstruct.

    Between projector and LLM, :meth:`replace` normalises the visual tokens and puts pool rows in
    the place of ``ceil(mask_ratio * T)`` of each image's T tokens. After the LLM, :meth:`loss`
    predicts the original tokens from its last hidden states. The LLM runs with the attention of
    :meth:`mask`. Train on

    .. math:: L = L_\text{caption} + \texttt{loss\_weight} \cdot L_\text{reconstruction}.

    Nothing here waits for the device, and no step has a shape that depends on data: it captures
    into a CUDA graph (register an explicit generator with the graph) and compiles with
    ``fullgraph=True`` (with the default generator). The same generator state gives the same masks,
    see :mod:`croc_kernels.layer.matching`; inside a checkpointed region pass no ``generator``:
    recomputation rewinds the default one only.

    Under sharded training call it inside the root module's forward, where parameters are whole
    (FSDP2) or gathered on access (ZeRO-3), and add :meth:`touch` to the loss of a micro-batch
    without images.

    Args:
        hidden_size: C, width of the LLM.
        pool_size: M, rows of the pool.
        recipe: ``"croc"``, ``"croc-released"``, ``"victor"`` or a :class:`Recipe`.
        mask_ratio: part of each image's tokens that is masked, in [0, 1], read as the decimal it is
            written as.
        pool_init: ``"randn"`` as published: rows of norm about sqrt(C) against tokens of norm 1, so
            the row norms decide the first matchings. ``"unit"``: the same directions with norm 1.
        metric: of the matching, ``"l2"``, ``"l2sq"`` or ``"cosine"``.
        beta: of SmoothL1.
        loss_weight: for the caller; :meth:`loss` does not apply it.
        allow_reuse: where an image has n > M masked tokens, cut them at random into ceil(n / M)
            rounds of (nearly) equal size and match each round by itself, so that a row is used at
            most ceil(n / M) times. Otherwise such an image is refused. Nearest-row matching has no
            such limit.
        num_positions: position table of the released head.
        num_heads: heads of the released head, by default ``hidden_size // 64`` as published.
        device: of the parameters.
        dtype: of the parameters.

    Attributes:
        pool: (M, C) parameter.
        head: ``nn.Linear``, or :class:`BertHead` for the released recipe.
        recipe: the :class:`Recipe`.
        mask_rank: None: ranks draw different masks by their torch.distributed rank. Ranks that
            share images (tensor or sequence parallelism) must set it to their data-parallel rank.

    Raises:
        TypeError: a size is no integer.
        ValueError: an argument is out of range, or the recipe is unknown.

    Source: Croc, arXiv 2410.14332; deepglint/Croc; deepglint/Victor.
    """

    def __init__(
        self,
        hidden_size: int,
        pool_size: int = 2048,
        recipe: str | Recipe = "croc",
        *,
        mask_ratio: float = 0.75,
        pool_init: str = "randn",
        metric: str = "l2",
        beta: float = 0.01,
        loss_weight: float = 10.0,
        allow_reuse: bool = False,
        num_positions: int | None = None,
        num_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("hidden_size", hidden_size)
        check_size("pool_size", pool_size)
        if not 0.0 <= mask_ratio <= 1.0:
            raise ValueError(f"CrocLayer: mask_ratio must be in [0, 1], got {mask_ratio}")
        if not beta >= 0.0:
            raise ValueError(f"CrocLayer: beta must be at least 0, got {beta}")
        check_choice("CrocLayer", "pool_init", pool_init, POOL_INITS)
        check_choice("CrocLayer", "metric", metric, METRICS)
        self.hidden_size = hidden_size
        self.pool_size = pool_size
        self.recipe = get_recipe(recipe)
        self.mask_ratio = mask_ratio
        self.pool_init = pool_init
        self.metric = metric
        self.beta = beta
        self.loss_weight = loss_weight
        self.allow_reuse = allow_reuse
        self.mask_rank: int | None = None
        self._ratio = ratio_terms(mask_ratio)
        factory = {"device": device, "dtype": dtype}
        self.pool = nn.Parameter(torch.empty(pool_size, hidden_size, **factory))
        if self.recipe.head == "bert":
            positions = 576 if num_positions is None else num_positions
            check_size("num_positions", positions)
            self.head = BertHead(hidden_size, positions, num_heads, **factory)
        else:
            self.head = linear_head(hidden_size, **factory)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise all parameters in place; call it after ``to_empty`` of a layer made on the
        meta device.
        """
        with torch.no_grad():
            self.pool.normal_()
            if self.pool_init == "unit":
                # Not by the op, which knows no sharded pool.
                wide = torch.promote_types(self.pool.dtype, torch.float32)
                norm = torch.linalg.vector_norm(self.pool, dim=1, keepdim=True, dtype=wide)
                self.pool.div_(norm)
        if self.recipe.head == "bert":
            self.head.reset_parameters()
        else:
            nn.init.normal_(self.head.weight, std=INITIAL_STD)
            nn.init.zeros_(self.head.bias)

    def extra_repr(self) -> str:
        """Width, pool, recipe and what differs between runs."""
        return (
            f"{self.hidden_size}, pool_size={self.pool_size}, recipe={self.recipe.name!r}, "
            f"mask_ratio={self.mask_ratio}, metric={self.metric!r}, loss_weight={self.loss_weight}"
        )

    def normalize(self, features: Tensor) -> Tensor:
        """L2-normalise over the last dimension: arithmetic in float32 or wider, result in the
        features' dtype.
        """
        return l2_normalize(features)

    def num_masked(self, lengths: Sequence[int]) -> int:
        """Masked tokens of images with ``lengths`` tokens."""
        return sum(masked_count(length, self._ratio) for length in lengths)

    def num_loss_tokens(self, lengths: Sequence[int]) -> int:
        """Number of tokens that :meth:`loss` averages over; sum it over micro-batches for
        ``num_items``.
        """
        return self.num_masked(lengths) if self.recipe.loss_over == "masked" else sum(lengths)

    def replace(
        self,
        features: Tensor,
        lengths: Sequence[int],
        *,
        generator: torch.Generator | None = None,
        active: bool = True,
        matching: Matching | None = None,
    ) -> Replacement:
        """Normalise the visual tokens, mask part of them and put the matched pool rows in their
        place.

        Args:
            features: (S, C) projector output of all images of the batch, one after another, any
                floating dtype.
            lengths: tokens of each image, host integers that add up to S. No image at all (S = 0)
                is fine.
            generator: on the features' device; by default that device's own.
            active: False outside the stage: normalised features, nothing masked, nothing drawn.
            matching: of these features by :meth:`match_ahead`; nothing is drawn.

        Returns:
            The :class:`Replacement`. Gradients of its embeddings reach the kept tokens' features
            and the matched pool rows, nothing else. A NaN among an image's distances leaves the
            image unmasked and shows in ``status``; with nearest-row matching, the token alone.

        Raises:
            TypeError: features are not floating, or lengths are no host integers.
            ValueError: shapes disagree, or an image has more masked tokens than the pool has rows.
        """
        lengths = check_packed("CrocLayer.replace", features, lengths, self.hidden_size)
        normalized = self.normalize(features)
        target = normalized.detach()
        if not active:
            matching = None
        elif matching is None:
            matching = self._match("CrocLayer.replace", [target], [lengths], generator)[0]
        elif matching.lengths != lengths:
            raise ValueError(
                f"CrocLayer.replace: matching must be of images with lengths {lengths}, "
                f"got {matching.lengths}"
            )
        if matching is None or matching.num_masked == 0:
            matching = keep_all(features, lengths)
            return Replacement(normalized, target, *matching)
        masked, index = matching.masked, matching.pool_index
        embeddings = replace_tokens(normalized, masked, self.pool, index)
        return Replacement(embeddings, target, *matching)

    def match_ahead(
        self,
        batches: Sequence[tuple[Tensor, Sequence[int]]],
        *,
        generator: torch.Generator | None = None,
    ) -> list[Matching]:
        """Match all micro-batches of an optimizer step in one call: the pool does not change in
        between.

        Pass each result to :meth:`replace` as ``matching``. The masks are those that
        :meth:`replace` draws one by one from the same generator state, if nothing else draws from
        that generator meanwhile.

        Args:
            batches: (features, lengths) of each micro-batch, as :meth:`replace` takes them.
            generator: as for :meth:`replace`.

        Raises:
            TypeError: as :meth:`replace`.
            ValueError: as :meth:`replace`.
        """
        function = "CrocLayer.match_ahead"
        checked = [
            (features, check_packed(function, features, lengths, self.hidden_size))
            for features, lengths in batches
        ]
        if not checked:
            return []
        with torch.no_grad():
            tokens = [self.normalize(features) for features, _ in checked]
        return self._match(function, tokens, [lengths for _, lengths in checked], generator)

    def loss(
        self,
        hidden: Tensor,
        replacement: Replacement,
        *,
        num_items: Tensor | float | None = None,
        visible: Tensor | None = None,
    ) -> Tensor:
        """Reconstruction loss, unweighted: SmoothL1 of the head's prediction against the normalised
        features.

        Args:
            hidden: (S, C) last hidden states of the LLM at the visual positions, in the order of
                the features; in the head's dtype, or under autocast.
            replacement: of these tokens.
            num_items: tokens to average over instead of this batch's :meth:`num_loss_tokens`: their
                number over all micro-batches of an optimizer step, so that gradient accumulation
                changes nothing.
            visible: (S,) bool, False for tokens of dummy images, which no sample shows: they are
                left out.

        Returns:
            Scalar, float32 or wider. Without any token to average over it is :meth:`touch`.

        Raises:
            TypeError: an argument is no tensor, or ``visible`` is not bool.
            ValueError: ``hidden`` or ``visible`` has another shape than the replaced features.
        """
        check_loss(hidden, replacement.target, visible)
        masked_only = self.recipe.loss_over == "masked"
        if (replacement.num_masked if masked_only else hidden.shape[0]) == 0:
            return self.touch()
        bert = self.recipe.head == "bert"
        prediction = self.head(hidden, replacement.lengths) if bert else self.head(hidden)
        where = replacement.masked if masked_only else None
        if visible is not None:
            where = visible if where is None else where & visible
        return reconstruction_loss(
            prediction, replacement.target, where, self.beta, num_items=num_items
        )

    def mask(
        self,
        is_visual: Tensor,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> MixedMask:
        """The recipe's attention, built once per step and shared by all layers.

        Args:
            is_visual: (B, L) bool; each run of True is one image.
            attention_mask: (B, L), 0 at padding.
            labels: (B, L), -100 where unsupervised. The prefix recipe can't do without.
            document_ids: (B, L), where several documents are packed in one row.

        Returns:
            The mask of these B rows of L tokens, for :func:`croc_kernels.mixed_attention`.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: shapes disagree, the recipe needs labels and got none, or its attention is
                not defined for packed documents.
        """
        check_mask(is_visual, labels)
        common = {"attention_mask": attention_mask}
        if self.recipe.attention == "visual":
            return MixedMask.from_token_types(is_visual, document_ids=document_ids, **common)
        if self.recipe.attention == "causal":
            batch, length = is_visual.shape
            common |= {"document_ids": document_ids, "device": is_visual.device}
            return MixedMask.causal(batch, length, **common)
        if labels is None:
            raise ValueError(
                f"CrocLayer.mask: labels must be given for recipe {self.recipe.name!r}, whose "
                "prefix ends at the first supervised label, got None; outside the stage use "
                "MixedMask.causal"
            )
        if document_ids is not None:
            raise ValueError(
                f"CrocLayer.mask: document_ids must be None for recipe {self.recipe.name!r}, which "
                "has one prefix per row, got a tensor"
            )
        return MixedMask.from_labels(labels, **common)

    def touch(self) -> Tensor:
        """Zero that depends on all parameters: added to a loss, it lets sharded ranks without
        images keep step.
        """
        row = self.pool.new_zeros(1, self.hidden_size)
        prediction = self.head(row, (1,)) if self.recipe.head == "bert" else self.head(row)
        return self.pool[:0].sum() + prediction[:0].sum()

    def _match(
        self,
        function: str,
        tokens: Sequence[Tensor],
        lengths: Sequence[tuple[int, ...]],
        generator: torch.Generator | None,
    ) -> list[Matching]:
        """Draw and match micro-batches of normalised (S, C) tokens together; one Matching each."""
        counts = [tuple(masked_count(x, self._ratio) for x in group) for group in lengths]
        nearest = self.recipe.matching == "nearest"
        most = max([0, *(count for group in counts for count in group)])
        if most > self.pool_size and not nearest and not self.allow_reuse:
            raise ValueError(
                f"{function}: an image must have at most pool_size = {self.pool_size} masked "
                f"tokens to get distinct pool rows, got {most}; enlarge the pool or pass "
                "allow_reuse=True"
            )
        return match_micro_batches(
            tokens,
            self.pool,
            lengths,
            counts,
            nearest=nearest,
            metric=self.metric,
            rank=current_rank() if self.mask_rank is None else self.mask_rank,
            generator=generator,
        )
