"""Vision Transformer in timm's pre-norm form, with a merging plan threaded through its blocks.

    model = ViT(VARIANTS["S/16"], rngs=nnx.Rngs(0))
    logits = model(images)                              every token through every block
    logits = model(images, r=13)                        13 tokens fewer after every block
    logits = model(images, r=13, planner=yours)         any planner: from what a block `Seen`, and r, to a plan
    x, plan = model.features(images, r=13)              what the head reads, and which patch went where
    load.load(model, load.read("vit.safetensors"), torch_name)

Nothing here knows a mesh: shard the images over the batch, and every device merges its own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jaxtyping import Float

import jaxmerge as jm

Schedule = int | tuple[int, float] | Sequence[int]
AnyPlan = jm.Plan | jm.SoftPlan
Reduce = Literal["mean", "sum"]
Flash = Literal["xla", "cudnn", "mosaic_gpu", "mosaic_tpu"] | None


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The architecture. `pool="token"` reads the class token; "mean" averages the patches, as MAE's classifiers do."""

    width: int
    depth: int
    num_heads: int
    patch_size: int
    image_size: int = 224
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    channels: int = 3
    class_token: bool = True
    distilled: bool = False
    pool: Literal["token", "mean"] = "token"

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise ValueError(f"ViTConfig: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")
        if self.width % self.num_heads:
            raise ValueError(f"ViTConfig: width {self.width} is not a multiple of num_heads {self.num_heads}.")
        if not self.class_token and (self.pool == "token" or self.distilled):
            raise ValueError('ViTConfig: without a class token only pool="mean" is left, and no distillation token.')
        if self.distilled and self.pool != "token":
            raise ValueError('ViTConfig: a distilled model reads its two tokens; use pool="token".')

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches. They never merge."""
        return self.class_token + self.distilled

    @property
    def num_tokens(self) -> int:
        """n, what the first block reads."""
        return self.grid**2 + self.num_prefix


VARIANTS = {
    # arXiv:2010.11929, table 1 (B, L, H); arXiv:2012.12877, table 1 (Ti, S)
    "Ti/16": ViTConfig(width=192, depth=12, num_heads=3, patch_size=16),
    "S/16": ViTConfig(width=384, depth=12, num_heads=6, patch_size=16),
    "S/32": ViTConfig(width=384, depth=12, num_heads=6, patch_size=32),
    "B/16": ViTConfig(width=768, depth=12, num_heads=12, patch_size=16),
    "B/32": ViTConfig(width=768, depth=12, num_heads=12, patch_size=32),
    "L/16": ViTConfig(width=1024, depth=24, num_heads=16, patch_size=16),
    "L/32": ViTConfig(width=1024, depth=24, num_heads=16, patch_size=32),
    "H/14": ViTConfig(width=1280, depth=32, num_heads=16, patch_size=14),
}


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a planner may look at between a block's attention and its MLP. What it leaves alone is not computed.

    Attributes:
      x: `Float[Array, "b n d"]`, the tokens after the attention's residual: what will be merged.
      q, k, v: `Float[Array, "b n h f"]`, of the attention just computed.
      bias: `Float[Array, "b n"]`, the key bias it used, or None.
      protect: positions that must neither move nor receive.
      plan: which of the first block's tokens each token stands for, or None before the first merge.
    """

    x: Any
    q: Any
    k: Any
    v: Any
    bias: Any
    protect: tuple[int, ...]
    plan: AnyPlan | None

    @property
    def keys(self) -> Float[Array, "b n f"]:
        """The mean over heads of the keys, summed in float32, in their own dtype: Token Merging's metric."""
        return self.k.mean(axis=-2, dtype=jnp.float32).astype(self.k.dtype)

    @property
    def attention(self) -> Float[Array, "b h n n"]:
        """The attention's probabilities, float32: query by key."""
        logits = jnp.einsum("bqhf,bkhf->bhqk", self.q, self.k, preferred_element_type=jnp.float32) / self.q.shape[-1] ** 0.5
        return jax.nn.softmax(logits if self.bias is None else logits + self.bias[:, None, None, :], axis=-1)


Planner = Callable[[Seen, int], AnyPlan]


def token_merging(seen: Seen, r: int) -> jm.Plan:
    """Token Merging: bipartite matching on the mean keys (arXiv:2210.09461)."""
    return jm.tokens.bipartite_matching(seen.keys, r, protect=seen.protect)


class Attention(nnx.Module):
    """Self-attention with fused q, k, v; returns them too, which are what planners look at. What it returns lacks `proj.bias`:
    that is added to the residual with what else is added there."""

    def __init__(self, config: ViTConfig, *, dtype: Any, attention: Flash = None, rngs: nnx.Rngs):
        self.num_heads, self.dtype = config.num_heads, dtype
        self.implementation: Flash = attention
        self.qkv = _linear(config.width, 3 * config.width, dtype, rngs)
        self.proj = _linear(config.width, config.width, dtype, rngs)

    def __call__(self, x: Float[Array, "b n d"], bias: Float[Array, "b n"] | None) -> tuple[Array, tuple[Array, Array, Array]]:
        product, offset = self._packed(x)
        n = x.shape[1]
        out = jm.attention.packed_attention(product, bias, offset=offset, length=n, implementation=self.implementation)
        q, k, v = ((product[:, :n, i] + offset[None, None, i]).astype(self.dtype) for i in range(3))
        return self._projected(out), (q, k, v)

    def with_keys(
        self, x: Float[Array, "b n d"], bias: Float[Array, "b n"] | None
    ) -> tuple[Float[Array, "b n d"], Float[Array, "b n f"]]:
        """The same, and instead of q, k, v the mean of the keys over heads, `Seen.keys`: our kernels add them up on the way."""
        product, offset = self._packed(x)
        options: Any = dict(offset=offset, length=x.shape[1], implementation=self.implementation)
        out, keys = jm.attention.packed_attention(product, bias, mean_keys=True, **options)
        return self._projected(out), keys

    def _packed(self, x: Float[Array, "b n d"]) -> tuple[Float[Array, "b rows 3 h f"], Float[Array, "3 h f"]]:
        """q, k and v, but for their bias; and that."""
        eights = -x.shape[1] % 8 if self.implementation == "mosaic_gpu" else 0  # which it reads where they lie
        heads = lambda a: a.reshape(*a.shape[:-1], 3, self.num_heads, x.shape[2] // self.num_heads)
        return heads(_product(self.qkv, jnp.pad(x, ((0, 0), (0, eights), (0, 0))))), heads(bias_of(self.qkv))

    def _projected(self, out: Float[Array, "b n h f"]) -> Float[Array, "b n d"]:
        return _product(self.proj, out.reshape(*out.shape[:2], -1))


class MLP(nnx.Module):
    """Two layers with the exact GELU between."""

    def __init__(self, config: ViTConfig, *, dtype: Any, rngs: nnx.Rngs):
        hidden = int(config.width * config.mlp_ratio)
        self.fc1 = _linear(config.width, hidden, dtype, rngs)
        self.fc2 = _linear(hidden, config.width, dtype, rngs)

    def __call__(self, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        h = self.fc1(x).astype(jnp.float32)
        return self.fc2(0.5 * h * (1 + jax.lax.erf(h * 0.5**0.5)))  # jax.nn.gelu's erfc takes twice as long on a GPU


class Block(nnx.Module):
    """Attention, merge, MLP: a plan goes in and a plan comes out."""

    def __init__(self, config: ViTConfig, *, dtype: Any, attention: Flash = None, rngs: nnx.Rngs):
        self.protect = tuple(range(config.num_prefix))
        self.norm1, self.norm2 = _norm(config.width, rngs), _norm(config.width, rngs)
        self.attn = Attention(config, dtype=dtype, attention=attention, rngs=rngs)
        self.mlp = MLP(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "b n d"],
        plan: AnyPlan | None,
        sizes: Float[Array, "b n"] | None,
        r: int,
        *,
        planner: Planner,
        proportional: bool,
        reduce: Reduce,
    ) -> tuple[Float[Array, "b m d"], AnyPlan | None, Float[Array, "b m"] | None]:
        bias = jm.attention.key_bias(sizes) if proportional and sizes is not None else None
        offset = bias_of(self.attn.proj)
        if r and planner is token_merging and reduce == "mean":  # one kernel where there is one
            y, keys = self.attn.with_keys(self.norm1(x), bias)
            merged = jm.tokens.merge_step(
                keys, x, r, sizes=sizes, residual=y, offset=offset, norm=self.next_norm, protect=self.protect
            )
            assert merged.normed is not None
            plan = merged.plan if plan is None else jm.compose(merged.plan, plan)
            return merged.x + self.mlp(merged.normed), plan, merged.sizes
        y, qkv = self.attn(self.norm1(x), bias)
        x = x + (y + offset.astype(y.dtype)[None, None])
        if r:
            seen = Seen(x, *qkv, bias, self.protect, plan)
            step = planner(seen, r)
            x = jm.merge(step, x, weight=sizes if reduce == "mean" else None, reduce=reduce)
            plan = step if plan is None else jm.compose(step, plan)
            sizes = plan.sizes.astype(jnp.float32)
        return x + self.mlp(self.norm2(x)), plan, sizes

    @property
    def next_norm(self) -> jm.tokens.LayerNorm:
        """The norm before the MLP, as the product that reads it wants its result."""
        scale, bias = self.norm2.scale, self.norm2.bias
        assert scale is not None and bias is not None
        return jm.tokens.LayerNorm(scale[...], bias[...], self.norm2.epsilon, self.mlp.fc1.dtype)


class PatchEmbed(nnx.Module):
    """One linear map per patch: a convolution whose stride is its width, taken as the product that it is."""

    def __init__(self, config: ViTConfig, *, dtype: Any, rngs: nnx.Rngs):
        p = config.patch_size
        self.proj = nnx.Conv(config.channels, config.width, (p, p), strides=(p, p), padding="VALID", rngs=rngs)
        self.dtype = dtype

    def __call__(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        b, h, w, c = images.shape
        p, _, _, d = self.proj.kernel.shape
        x = images.reshape(b, h // p, p, w, c).reshape(b, h // p, p, w // p, p, c)
        assert self.proj.bias is not None
        x, kernel, bias = (a.astype(self.dtype) for a in (x, self.proj.kernel[...], self.proj.bias[...]))
        return jnp.einsum("bipjqc,pqcd->bijd", x, kernel).reshape(b, -1, d) + bias.reshape(1, 1, d)


class ViT(nnx.Module):
    """A Vision Transformer that can merge tokens as it goes.

    Args:
      config: from `VARIANTS`, or your own.
      attention: of `jm.attention.packed_attention`: "mosaic_gpu" on Hopper or "cudnn" on any GPU, both in bfloat16, and
        "mosaic_tpu" on TPU.
      dtype: of the matrix products (jnp.bfloat16 on accelerators). Parameters, residuals, norms, softmax and logits
        stay float32.
      rngs: `nnx.Rngs(seed)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from models.vit import ViT, ViTConfig
      >>> config = ViTConfig(width=32, depth=2, num_heads=2, patch_size=4, image_size=16, num_classes=10)
      >>> model, features = ViT(config, rngs=nnx.Rngs(0)), nnx.jit(ViT.features, static_argnames="r")
      >>> x, plan = features(model, jnp.ones((1, 16, 16, 3)), r=4)
      >>> x.shape, plan.num_positions, plan.num_segments
      ((1, 9, 32), 17, 9)

    Source: arXiv:2010.11929, as in timm's `vision_transformer`; merging as in arXiv:2210.09461; the size-weighted mean
    pooling as in its MAE models.
    """

    def __init__(self, config: ViTConfig, *, dtype: Any = jnp.float32, attention: Flash = None, rngs: nnx.Rngs):
        self.config = config
        d, token = config.width, nnx.initializers.truncated_normal(0.02)
        self.patch_embed = PatchEmbed(config, dtype=dtype, rngs=rngs)
        if config.class_token:
            self.cls_token = nnx.Param(token(rngs.params(), (1, 1, d)))
        if config.distilled:
            self.dist_token = nnx.Param(token(rngs.params(), (1, 1, d)))
        self.pos_embed = nnx.Param(token(rngs.params(), (1, config.num_tokens, d)))
        self.blocks = nnx.List([Block(config, dtype=dtype, attention=attention, rngs=rngs) for _ in range(config.depth)])
        if config.pool == "mean":
            self.fc_norm = _norm(d, rngs)  # after pooling; timm's and MAE's name
        else:
            self.norm = _norm(d, rngs)
        self.head = _linear(d, config.num_classes, jnp.float32, rngs)
        if config.distilled:
            self.head_dist = _linear(d, config.num_classes, jnp.float32, rngs)

    def __call__(
        self,
        images: Float[Array, "b h w c"],
        *,
        r: Schedule = 0,
        proportional: bool = True,
        planner: Planner = token_merging,
        reduce: Reduce = "mean",
    ) -> Float[Array, "b classes"]:
        """Logits, float32.

        Args:
          images: as `config` says; already normalised.
          r: tokens removed per block, as `jm.tokens.schedule` reads it. An int or a pair is clamped to what Token Merging
            can remove of the tokens left; a list, one int per block, is taken at its word.
          proportional: let merged keys weigh as many as they stand for. Off for models trained without (MAE).
          planner: from what the block has `Seen` and r to a plan, hard or soft.
          reduce: "mean" weighs tokens by their sizes; "sum" takes a soft plan's rows as they are (GTP-ViT).
        """
        x, plan = self.features(images, r=r, proportional=proportional, planner=planner, reduce=reduce)
        return self.classify(x, plan)

    def features(
        self,
        images: Float[Array, "b h w c"],
        *,
        r: Schedule = 0,
        proportional: bool = True,
        planner: Planner = token_merging,
        reduce: Reduce = "mean",
    ) -> tuple[Float[Array, "b m d"], AnyPlan]:
        """The tokens after the last block, and the composed plan from the n of the first; arguments as in a call.

        `jm.unmerge(plan, x)` gives dense features back; `plan.segment_ids[:, config.num_prefix:]` is the picture.
        """
        x = self.tokens(images)
        plan = sizes = None
        clamp = {} if isinstance(r, list) else dict(n=x.shape[1], protected=self.config.num_prefix)
        layers = jm.tokens.schedule(len(self.blocks), r, **clamp)
        for block, r_block in zip(self.blocks, layers, strict=False):
            x, plan, sizes = block(x, plan, sizes, r_block, planner=planner, proportional=proportional, reduce=reduce)
        return x, jm.identity(x.shape[1], like=x) if plan is None else plan

    def tokens(self, images: Float[Array, "b h w c"]) -> Float[Array, "b n d"]:
        """What the first block reads: the prefix and the patches, with their positions."""
        expected = (self.config.image_size, self.config.image_size, self.config.channels)
        if images.shape[1:] != expected:
            raise ValueError(f"ViT: images must have shape (batch, {', '.join(map(str, expected))}), got {images.shape}.")
        x = self.patch_embed(images).astype(jnp.float32)
        prefix = [getattr(self, t)[...] for t in ("cls_token", "dist_token") if hasattr(self, t)]
        return jnp.concatenate([token + jnp.zeros_like(x[:, :1]) for token in prefix] + [x], axis=1) + self.pos_embed[...]

    def classify(self, x: Float[Array, "b m d"], plan: AnyPlan) -> Float[Array, "b classes"]:
        """Logits from `features`. The mean over patches weighs each token by the patches it stands for."""
        first = self.config.num_prefix
        if self.config.pool == "mean":
            weight = plan.sizes[:, first:, None].astype(jnp.float32)
            return self.head(self.fc_norm((x[:, first:] * weight).sum(axis=1) / self.config.grid**2))
        x = self.norm(x[:, :first])
        if self.config.distilled:
            return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2
        return self.head(x[:, 0])


def torch_name(path: str) -> str:
    """timm's name for a parameter, for `models.load`.

    Example:
      >>> torch_name("blocks.0.norm1.scale"), torch_name("head.kernel"), torch_name("cls_token")
      ('blocks.0.norm1.weight', 'head.weight', 'cls_token')
    """
    stem, dot, last = path.rpartition(".")
    return stem + dot + {"kernel": "weight", "scale": "weight"}.get(last, last)


def _linear(inputs: int, outputs: int, dtype: Any, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, dtype=dtype, kernel_init=nnx.initializers.xavier_uniform(), rngs=rngs)


def _product(linear: nnx.Linear, x: Array) -> Array:
    """What a linear map gives, but for its bias."""
    dtype, over = linear.dtype, (((x.ndim - 1,), (0,)), ((), ()))
    return linear.dot_general(x.astype(dtype), linear.kernel[...].astype(dtype), over, precision=linear.precision)


def bias_of(linear: nnx.Linear) -> Array:
    """The bias that a linear map has."""
    assert linear.bias is not None
    return linear.bias[...]


def _norm(width: int, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(width, epsilon=1e-6, dtype=jnp.float32, rngs=rngs)
