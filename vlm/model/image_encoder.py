"""ImageEncoder: any timm backbone, from pixels to image tokens.

Letters: B images, H and W pixels, P image tokens, D their width, h x w the grid of patches or of the last feature map.
"""

from typing import Any, Self

import torch
import torch.nn.functional as F
from timm.data import resolve_model_data_config
from timm.layers import convert_sync_batchnorm, resample_abs_pos_embed
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlm.config import ImageConfig
from vlm.errors import ConfigError
from vlm.model.backbone import blocks_of, choose_attention, create_backbone, keep_stages, set_norm_eps
from vlm.model.folding import fold_frozen, weights_key
from vlm.model.grouped import TrainGroupedInFloat32
from vlm.model.image_weights import load_weights
from vlm.model.patches import hiding, patch_side


class ImageEncoder(nn.Module):
    """Image tokens of any timm model, for cross-attention and for the image embedding.

    A Transformer (ViT, DeiT, BEiT, EVA) gives all its tokens after its last norm, the class token first. A convolutional network gives its last
    feature map, row by row, brought to `config.width` where that is set, plus learned positions, which are interpolated where the image size
    changes.

    Attributes: `dim`, the width D; `image_size`, the side in pixels of the images that it was built for; `prefix`, how many tokens stand before
    the patches (class and register tokens); `backbone`, the timm model; buffers `mean` and `std` (1, 3, 1, 1), timm's for this model, which are
    part of the weights, so that a checkpoint keeps the normalisation that it was trained with.
    """

    backbone: Any  # an nn.Module with timm's further methods
    mean: Tensor
    std: Tensor

    def __init__(self, config: ImageConfig, load: bool = True) -> None:
        """Build from settings; `load=False` leaves out the pretrained weights, because a checkpoint follows.

        Raises ConfigError for a name or a setting that timm does not know, CheckpointError for a weights file that does not fit.
        """
        super().__init__()
        self.config = config
        self.backbone = create_backbone(config, download=load and config.pretrained and config.weights is None)
        if load and config.weights is not None:
            load_weights(self.backbone, config.weights, config.name)
        if config.stages is not None:
            keep_stages(self.backbone, config)
        if config.norm_eps is not None:
            set_norm_eps(self.backbone, config.norm_eps)
        # Not at creation: a model whose head normalises the pooled features needs those weights, and applies them to each token from here on.
        self.backbone.reset_classifier(0, "")

        data = resolve_model_data_config(self.backbone)
        native: int = data["input_size"][-1]
        built = getattr(getattr(self.backbone, "patch_embed", None), "img_size", None)
        self.image_size: int = built[0] if built is not None else native
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(data["std"]).view(1, 3, 1, 1))

        given = config.weights is not None or config.pretrained
        self.batch_norm = config.batch_norm or ("frozen" if given else "local")
        if self.batch_norm == "sync":
            self.backbone = convert_sync_batchnorm(self.backbone)
        if config.checkpointing:
            self.backbone.set_grad_checkpointing(True)

        self._folded: tuple[tuple[int, ...], Any] | None = None  # in a tuple: no part of the state
        self.projection: nn.Sequential | None = None
        self.positions: nn.Parameter | None = None  # (1, D, h, w)
        if hasattr(self.backbone, "num_prefix_tokens"):
            self.prefix = int(self.backbone.num_prefix_tokens)
            self.dim = int(self.backbone.embed_dim)
        else:
            self._probe()
        if config.width is not None and self.projection is None:
            raise ConfigError(
                f"image.width={config.width}: {config.name} gives tokens, not a feature map whose width could be changed; leave it out."
            )
        self.resize(config.image_size or native)
        self.frozen = config.frozen or config.trainable_blocks == 0
        self._freeze()
        self.train()

    def _probe(self) -> None:
        """Learn width and grid from one forward pass: the names that timm's networks give them differ."""
        features = self._probe_features(self.image_size)
        self.dim = features.shape[1] if features.ndim == 4 else features.shape[2]
        self.prefix = int(features.ndim == 3 and hasattr(self.backbone, "cls_token"))
        if features.ndim == 4:
            self.backbone.to(memory_format=torch.channels_last)
            if self.config.width is not None:
                self.projection = nn.Sequential(nn.Linear(self.dim, self.config.width), nn.LayerNorm(self.config.width))
                self.dim = self.config.width
            self.positions = nn.Parameter(torch.empty(1, self.dim, *features.shape[2:]))
            nn.init.trunc_normal_(self.positions, std=0.02)

    @torch.no_grad()
    def _probe_features(self, image_size: int) -> Tensor:
        training = self.training
        self.eval()
        features = self._features(self.mean.new_zeros(1, 3, image_size, image_size))
        self.train(training)
        return features

    def resize(self, image_size: int) -> Self:
        """Make it an encoder of images of another size: positions are interpolated in place, as `antialias` says.

        Raises ConfigError where the backbone cannot take that size.
        """
        if image_size == self.image_size:
            return self
        if hasattr(self.backbone, "set_input_size"):
            trained = {name: p.requires_grad for name, p in self.backbone.named_parameters()}
            positions, cells = getattr(self.backbone, "pos_embed", None), self.backbone.patch_embed.num_patches
            try:
                self.backbone.set_input_size(img_size=(image_size, image_size))
            except (AssertionError, ValueError) as error:
                raise ConfigError(f"image.image_size={image_size} does not suit {self.config.name}: {error}") from error
            if not self.config.antialias and positions is not None:
                prefix, grid = positions.shape[1] - cells, self.backbone.patch_embed.grid_size
                plain = resample_abs_pos_embed(positions.detach(), grid, num_prefix_tokens=prefix, antialias=False)
                self.backbone.pos_embed = nn.Parameter(plain)
            for name, p in self.backbone.named_parameters():
                p.requires_grad_(trained.get(name, True))
        elif self.backbone.pretrained_cfg.get("fixed_input_size"):
            raise ConfigError(
                f"{self.config.name} takes images of {self.image_size} px only, image.image_size={image_size}; leave it out."
            )
        if self.positions is not None:
            grid = self._probe_features(image_size).shape[2:]
            with torch.no_grad():
                resized = _interpolate(self.positions, (grid[0], grid[1]))
            self.positions = nn.Parameter(resized, requires_grad=self.positions.requires_grad)
        self.image_size = image_size
        return self

    def _freeze(self) -> None:
        """Stop the gradients of all parts of the backbone that the settings exclude from training."""
        blocks = self.config.trainable_blocks
        if self.frozen:
            self.backbone.requires_grad_(False)
        elif blocks is not None:
            groups = blocks_of(self.backbone)
            if blocks > len(groups):
                raise ConfigError(
                    f"image.trainable_blocks={blocks}, but {self.config.name} has {len(groups) - 1} blocks and a stem; null trains all."
                )
            excluded = {name for group in groups[: len(groups) - blocks] for name in group}
            for name, p in self.backbone.named_parameters():
                p.requires_grad_(name not in excluded)

    def train(self, mode: bool = True) -> Self:
        """As every module's, but what is not trained, and batch norm with frozen statistics, stays in evaluation mode."""
        super().train(mode)
        if not mode or not hasattr(self, "frozen"):
            return self
        for module in self.backbone.modules():
            parameters = list(module.parameters())
            untrained = bool(parameters) and not any(p.requires_grad for p in parameters)
            if untrained or (self.batch_norm == "frozen" and isinstance(module, _BatchNorm)):
                module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Image tokens (B, P, D) of images (B, 3, H, W): uint8 in 0..255, or float that is taken as normalised already; or of `frozen_tokens`.

        A Transformer takes images of `image_size` only (see `resize`), a convolutional network any size.
        """
        if images.ndim == 3:
            return self._from_frozen(images)
        self._check(images)
        x = self.normalize(images)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            choose_attention(self.backbone)
            x = self._features(x)
        if self.positions is None:
            return x
        return self._with_positions(x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3]))

    def frozen_tokens(self, images: Tensor) -> Tensor:
        """What the backbone alone makes of images (B, 3, S, S) of `image_size`: (B, P, `frozen_dim`), which `forward` takes in their place where it
        is frozen.
        """
        self._check(images)
        choose_attention(self.backbone)
        x = self._features(self.normalize(images))
        return x.flatten(2).transpose(1, 2) if self.positions is not None else x

    @property
    def frozen_dim(self) -> int:
        """Width of the backbone's tokens, before they are brought to `config.width`."""
        first = self.projection[0] if self.projection is not None else None
        return first.in_features if isinstance(first, nn.Linear) else self.dim

    def _from_frozen(self, tokens: Tensor) -> Tensor:
        if not self.frozen:
            raise ValueError(
                f"images: got {tuple(tokens.shape)}, tokens of a frozen backbone, but this one is trained; expected (B, 3, H, W)."
            )
        tokens = tokens.to(next(self.backbone.parameters()).dtype)
        return tokens if self.positions is None else self._with_positions(tokens, self.grid())

    def _with_positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """A feature map (B, P, D0), row by row, as tokens (B, P, D)."""
        assert self.positions is not None
        if self.projection is not None:
            x = self.projection(x)
        return x + _interpolate(self.positions, grid).flatten(2).transpose(1, 2).to(x.dtype)

    def masked(self, images: Tensor, at: Tensor, token: Tensor) -> Tensor:
        """As `forward`, but with the patches `at` (B, K) of each image hidden behind `token` (D,) before positions are added, and none dropped.

        Raises ConfigError for a backbone whose tokens are not patches, see `patch`.
        """
        assert self.patch
        with hiding(self.backbone, at, token):
            tokens: Tensor = self(images)
        return tokens

    @property
    def patch(self) -> int:
        """Side in pixels of the patches, which the tokens after the first `prefix` stand for, one each.

        Raises ConfigError where they do not: a convolutional network, a Transformer in stages, one with a convolutional stem.
        """
        return patch_side(self.backbone, self.config.name)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 (B, 3, H, W) to the backbone's range and dtype; float images pass as they are, in that dtype."""
        dtype = next(self.backbone.parameters()).dtype
        if images.dtype == torch.uint8:
            # Divided thrice, not multiplied once: equal to the last bit to transformers' rescale and normalize.
            images = images.to(self.mean.dtype).div(255).sub(self.mean).div(self.std)
        return images.to(dtype)

    def _features(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to tokens (B, P, D) or a feature map (B, D, h, w)."""
        if hasattr(self.backbone, "num_prefix_tokens"):
            x = self.backbone.forward_features(x)
            norm = getattr(self.backbone, "fc_norm", None)
            return norm(x) if norm is not None else x
        x = x.contiguous(memory_format=torch.channels_last)
        backbone = self._folded_backbone() if self.training else self.backbone
        checkpointing = (
            self.config.checkpointing
        )  # recomputes outside this function, thus would not see the same operations
        if x.is_cpu and torch.is_autocast_enabled("cpu") and not checkpointing and not torch.compiler.is_compiling():
            with TrainGroupedInFloat32():
                x = backbone(x)
        else:
            x = backbone(x)
        if x.ndim == 4 and getattr(self.backbone, "output_fmt", "NCHW") == "NHWC":
            x = x.permute(0, 3, 1, 2)
        return x

    def _folded_backbone(self) -> Any:
        """The backbone with its frozen batch norms folded, made anew after the frozen weights have changed; shares what is trained."""
        all_fixed = self.frozen or self.batch_norm == "frozen"
        if not all_fixed or torch.compiler.is_compiling():
            return self.backbone
        key = weights_key(self.backbone)
        if self._folded is None or self._folded[0] != key:
            example = self.mean.new_ones(1, 3, self.image_size, self.image_size).to(
                next(self.backbone.parameters()).dtype
            )
            self._folded = (key, fold_frozen(self.backbone, example))
        return self._folded[1]

    def pool(self, tokens: Tensor) -> Tensor:
        """One vector (B, D) for each image's tokens (B, P, D): the class token where there is one, else the mean over the patches."""
        if getattr(self.backbone, "cls_token", None) is not None:
            return tokens[:, 0]
        return tokens[:, self.prefix :].mean(1)

    def grid(self, image_size: int | None = None) -> tuple[int, int]:
        """Rows and columns of patches (tokens after the first `prefix`) for square images of that side; by default for `image_size`."""
        size = image_size or self.image_size
        if hasattr(self.backbone, "num_prefix_tokens"):
            patch = self.backbone.patch_embed.patch_size
            return size // patch[0], size // patch[1]
        if self.positions is not None and size == self.image_size:
            return self.positions.shape[2], self.positions.shape[3]
        features = self._probe_features(size)
        if features.ndim == 4:
            return features.shape[2], features.shape[3]
        side = int((features.shape[1] - self.prefix) ** 0.5)
        return side, side

    def tokens(self, image_size: int | None = None) -> int:
        """Number of tokens P for square images of that side."""
        h, w = self.grid(image_size)
        return self.prefix + h * w

    def _check(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != 3 or not (images.dtype == torch.uint8 or images.is_floating_point()):
            raise ValueError(
                f"images: got {tuple(images.shape)} {images.dtype}; expected (B, 3, H, W), uint8 or float."
            )
        size = (images.shape[2], images.shape[3])
        if self.positions is None and size != (self.image_size, self.image_size):
            raise ValueError(
                f"images of {size[0]}x{size[1]}, but {self.config.name} was built for {self.image_size}x{self.image_size}: "
                f"set image.image_size, or call resize({size[0]})."
            )


def _interpolate(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Learned positions (1, D, h, w) for another grid."""
    if (positions.shape[2], positions.shape[3]) == grid:
        return positions
    return F.interpolate(positions.float(), grid, mode="bicubic", antialias=True, align_corners=False).to(
        positions.dtype
    )
