"""The Mixture-of-Transformers, as two networks that share only keys and values.

The und (text) tower is causal and sees neither the noise nor the timestep, so it runs once a prompt: `UndTower.prefill`
keeps every layer's rotated keys and values, the Prefix. The gen tower runs once a step over all generated tokens, which
attend to themselves and to the Prefix: `GenTower.velocity`.

Two weight trees: after the prefill the und tower's can leave the device. Of its last layer only keys and values are ever
read, so only they exist here. Reference: diffusers 0.42.1, models/transformers/transformer_cosmos3.py.
"""

import jax
import jax.numpy as jnp
from flax import nnx, struct

from cosmos3_jax.axes import constrain
from cosmos3_jax.config import TransformerConfig
from cosmos3_jax.latents import Latents
from cosmos3_jax.models.layers import MLP, RMSNorm, Rotary, TimestepEmbedding, attention, rotate
from cosmos3_jax.weights import product, stack, vector, weight


@struct.dataclass
class Prefix:
    """What the gen tower knows of the text: rotated keys and values, and each branch's real length."""

    k: jax.Array  # [L, B, S, K, H], or [B, S, K, H] of one layer
    v: jax.Array  # likewise
    length_B: jax.Array


class KeysValues(nnx.Module):
    """The keys and values of an und layer, and the normed input they come from. The last und layer is this alone."""

    def __init__(self, config: TransformerConfig):
        self.norm = RMSNorm(config, "D")
        self.k = weight(config, "KHD")
        self.v = weight(config, "KHD")
        self.k_norm = RMSNorm(config, "H") if config.qk_norm_for_text else None
        for_gen = config.use_und_k_norm_for_gen and not config.qk_norm_for_text
        self.k_norm_for_gen = RMSNorm(config, "H") if for_gen else None

    def __call__(self, x_BSD: jax.Array, rotary: Rotary):
        """(normed input, k, v, k for the gen tower), keys rotated."""
        normed_BSD = self.norm(x_BSD)
        k_BSKH = product("BSD,KHD->BSKH", normed_BSD, self.k)
        v_BSKH = product("BSD,KHD->BSKH", normed_BSD, self.v)
        if self.k_norm is not None:
            k_BSKH = self.k_norm(k_BSKH)
        k_gen_BSKH = k_BSKH if self.k_norm_for_gen is None else self.k_norm_for_gen(k_BSKH)
        return normed_BSD, rotate(k_BSKH, rotary), v_BSKH, rotate(k_gen_BSKH, rotary)


class UndLayer(nnx.Module):
    """One layer of the text tower: causal self-attention, then the MLP."""

    def __init__(self, config: TransformerConfig):
        self.keys_values = KeysValues(config)
        self.q = weight(config, "NHD")
        self.q_norm = RMSNorm(config, "H") if config.qk_norm_for_text else None
        self.o = weight(config, "DNH", inputs="NH")
        self.mlp_norm = RMSNorm(config, "D")
        self.mlp = MLP(config)

    def __call__(self, x_BSD: jax.Array, rotary: Rotary):
        """(output, (k, v) for the gen tower)."""
        normed_BSD, k_BSKH, v_BSKH, k_gen_BSKH = self.keys_values(x_BSD, rotary)
        q_BSNH = product("BSD,NHD->BSNH", normed_BSD, self.q)
        if self.q_norm is not None:
            q_BSNH = self.q_norm(q_BSNH)
        full_B = jnp.full(x_BSD.shape[0], x_BSD.shape[1], jnp.int32)  # the padding is on the right: causal hides it
        mixed_BSNH = attention(rotate(q_BSNH, rotary), k_BSKH, v_BSKH, full_B, causal=True)
        x_BSD = constrain(x_BSD + product("BSNH,DNH->BSD", mixed_BSNH, self.o), "BSD")
        x_BSD = constrain(x_BSD + self.mlp(self.mlp_norm(x_BSD)), "BSD")
        return x_BSD, (k_gen_BSKH, v_BSKH)


class UndTower(nnx.Module):
    """The text tower."""

    def __init__(self, config: TransformerConfig):
        self.embed = weight(config, "VD")
        self.layers = stack(config.num_hidden_layers - 1, UndLayer(config))
        self.last = KeysValues(config)

    def prefill(self, ids_BS: jax.Array, length_B: jax.Array, rotary: Rotary, *, remat: bool = False) -> Prefix:
        """The Prefix of right-padded prompts: token ids, their real lengths, rotary of positions 0..S-1 ([1, S, H/2]).

        `remat` is for training: layers are computed once more on the way back, so that nothing within them is kept.
        """
        graph, weights = nnx.split(self.layers)

        def layer(x_BSD, w):
            return nnx.merge(graph, w)(x_BSD, rotary)

        x_BSD = constrain(self.embed[...][ids_BS], "BSD")
        layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        x_BSD, (k_LBSKH, v_LBSKH) = jax.lax.scan(layer, x_BSD, weights)
        _, _, v_BSKH, k_BSKH = self.last(x_BSD, rotary)
        k_LBSKH = jnp.concatenate([k_LBSKH, k_BSKH[None]])
        v_LBSKH = jnp.concatenate([v_LBSKH, v_BSKH[None]])
        return Prefix(constrain(k_LBSKH, "LBSKH"), constrain(v_LBSKH, "LBSKH"), length_B)


class GenLayer(nnx.Module):
    """One layer of the generating tower: generated tokens attend to all of themselves and to the text."""

    def __init__(self, config: TransformerConfig):
        self.norm = RMSNorm(config, "D")
        self.q = weight(config, "NHD")
        self.k = weight(config, "KHD")
        self.v = weight(config, "KHD")
        self.q_norm = RMSNorm(config, "H")
        self.k_norm = RMSNorm(config, "H")
        self.o = weight(config, "DNH", inputs="NH")
        self.mlp_norm = RMSNorm(config, "D")
        self.mlp = MLP(config)

    def __call__(self, x_BGD: jax.Array, rotary: Rotary, prefix: Prefix) -> jax.Array:
        """`prefix` is this layer's."""
        normed_BGD = self.norm(x_BGD)
        q_BGNH = rotate(self.q_norm(product("BGD,NHD->BGNH", normed_BGD, self.q)), rotary)
        k_BGKH = rotate(self.k_norm(product("BGD,KHD->BGKH", normed_BGD, self.k)), rotary)
        v_BGKH = product("BGD,KHD->BGKH", normed_BGD, self.v)
        # Keys are already rotated, so their order is free: text last makes its padding the tail, and a length the mask.
        k_BMKH = jnp.concatenate([k_BGKH, prefix.k], axis=1)
        v_BMKH = jnp.concatenate([v_BGKH, prefix.v], axis=1)
        mixed_BGNH = attention(q_BGNH, k_BMKH, v_BMKH, x_BGD.shape[1] + prefix.length_B)
        x_BGD = constrain(x_BGD + product("BGNH,DNH->BGD", mixed_BGNH, self.o), "BGD")
        return constrain(x_BGD + self.mlp(self.mlp_norm(x_BGD)), "BGD")


class Heads(nnx.Module):
    """From the channels of one modality's latents to tokens, and from tokens to their velocity; `channels` is a letter."""

    def __init__(self, config: TransformerConfig, channels: str):
        self.w_in = weight(config, "D" + channels)
        self.b_in = vector(config, "D")
        self.w_out = weight(config, channels + "D")
        self.b_out = vector(config, channels)

    def tokens(self, x_GC: jax.Array) -> jax.Array:
        """[G, D] of latents in any dtype."""
        return x_GC.astype(self.w_in.dtype) @ self.w_in[...].T + self.b_in[...]

    def velocity(self, x_BGD: jax.Array) -> jax.Array:
        """[B, G, C]. Unlike diffusers: float32, because guidance multiplies the rounding of each branch."""
        velocity_BGC = jnp.einsum("BGD,CD->BGC", x_BGD, self.w_out[...], preferred_element_type=jnp.float32)
        return velocity_BGC + self.b_out[...].astype(jnp.float32)


class SoundHeads(Heads):
    """Those of sound, whose tokens are marked as such."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config, "A")
        self.mark = vector(config, "D")

    def tokens(self, x_GC: jax.Array) -> jax.Array:
        return super().tokens(x_GC) + self.mark[...]


class GenTower(nnx.Module):
    """The generating tower, from noisy latents to their velocity. Tokens are the video's patches, then the sound's latents."""

    def __init__(self, config: TransformerConfig):
        self.patch_size = config.latent_patch_size
        self.vision = Heads(config, "C")
        self.sound = SoundHeads(config) if config.sound_gen else None
        self.timestep_embedding = TimestepEmbedding(config)
        self.layers = stack(config.num_hidden_layers, GenLayer(config))
        self.norm = RMSNorm(config, "D")

    def velocity(
        self, x: Latents, timestep: jax.Array, is_given_t: jax.Array, rotary: Rotary, prefix: Prefix, *, unroll: int = 1
    ) -> Latents:
        """The velocity, float32, [B] in front, of latents that all branches share.

        `timestep` in [0, 1000]. A given latent frame is clean and gets no timestep embedding; sound is never given.
        """
        x_GD = self._tokens(x, timestep, is_given_t)
        x_BGD = constrain(jnp.broadcast_to(x_GD, (prefix.length_B.shape[0], *x_GD.shape)), "BGD")
        return self._velocity(x_BGD, x.video.shape, rotary, prefix, unroll=unroll)

    def velocities(
        self, x: Latents, timestep_B: jax.Array, is_given_Bt: jax.Array, rotary: Rotary, prefix: Prefix, *, remat: bool = False
    ) -> Latents:
        """The velocity of latents that differ, [B] in front of them too: a batch to train on. `remat` as in `prefill`."""
        x_BGD = constrain(jax.vmap(self._tokens)(x, timestep_B, is_given_Bt), "BGD")
        return self._velocity(x_BGD, x.video.shape[1:], rotary, prefix, remat=remat)

    def _tokens(self, x: Latents, timestep: jax.Array, is_given_t: jax.Array) -> jax.Array:
        """[G, D]: the video's patches, then the sound's latents, each told the timestep unless it is given."""
        x_GD = self.vision.tokens(patchify(x.video, self.patch_size))
        is_given_G = jnp.repeat(is_given_t, x_GD.shape[0] // is_given_t.shape[0])
        if x.sound is not None:
            assert self.sound is not None
            x_GD = jnp.concatenate([x_GD, self.sound.tokens(x.sound)])
            is_given_G = jnp.pad(is_given_G, (0, x.sound.shape[0]))
        return x_GD + jnp.where(is_given_G[:, None], 0, self.timestep_embedding(timestep).astype(x_GD.dtype))

    def _velocity(
        self, x_BGD: jax.Array, shape: tuple[int, ...], rotary: Rotary, prefix: Prefix, *, unroll: int = 1, remat: bool = False
    ) -> Latents:
        """Of tokens; `shape` is that of the video's latents, [t, h, w, c]."""
        graph, weights = nnx.split(self.layers)

        def layer(x_BGD, inputs):
            w, k_BSKH, v_BSKH = inputs
            return nnx.merge(graph, w)(x_BGD, rotary, Prefix(k_BSKH, v_BSKH, prefix.length_B)), None

        layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
        x_BGD, _ = jax.lax.scan(layer, x_BGD, (weights, prefix.k, prefix.v), unroll=unroll)
        x_BGD = self.norm(x_BGD)
        patches = count_patches(shape, self.patch_size)
        video = unpatchify(self.vision.velocity(x_BGD[:, :patches]), shape, self.patch_size)
        return Latents(video, self.sound.velocity(x_BGD[:, patches:]) if self.sound and patches < x_BGD.shape[1] else None)


def count_patches(shape_thwc: tuple[int, ...], size: int) -> int:
    """The tokens of a video: patches of size x size latents, cut off ones too."""
    t, h, w, _ = shape_thwc
    return t * -(-h // size) * -(-w // size)


def patchify(x_thwc: jax.Array, size: int) -> jax.Array:
    """Latents as one row for each patch, [G, C]: frames outermost, a patch's values in the order (row, column, channel).

    Odd rows and columns get zeros at their end.
    """
    t, h, w, c = x_thwc.shape
    padded = jnp.pad(x_thwc, ((0, 0), (0, -h % size), (0, -w % size), (0, 0)))
    rows, columns = padded.shape[1] // size, padded.shape[2] // size
    grid = padded.reshape(t, rows, size, columns, size, c).transpose(0, 1, 3, 2, 4, 5)
    return grid.reshape(t * rows * columns, size * size * c)


def unpatchify(x_BGC: jax.Array, shape_thwc: tuple[int, ...], size: int) -> jax.Array:
    """The inverse of `patchify` for each branch: [B, t, h, w, c], the padding cut off."""
    t, h, w, c = shape_thwc
    rows, columns = -(-h // size), -(-w // size)
    grid = x_BGC.reshape(-1, t, rows, columns, size, size, c).transpose(0, 1, 2, 4, 3, 5, 6)
    return grid.reshape(-1, t, rows * size, columns * size, c)[:, :, :h, :w]
