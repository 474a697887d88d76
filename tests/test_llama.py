"""The Llama: its pure functions, its NNX model, its weights; and Hugging Face's."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from cachedattn_jax.model.checkpoint import load_hugging_face
from cachedattn_jax.model.config import RopeScaling, preset
from cachedattn_jax.model.layers import join_qkv
from cachedattn_jax.model.llama import (
    Llama,
    abstract_params,
    apply_layer,
    embed,
    init_params,
    model_of,
    params_of,
    unembed,
    weights_digest,
)

GOLDEN = Path(__file__).parent / "golden" / "hugging_face"

CASES = {
    "plain": {},
    "tied": {"tie_embeddings": True},
    "one kv head": {"num_kv_heads": 1},
    "linear": {"rope_scaling": RopeScaling(kind="linear", factor=4.0)},
    "bfloat16": {"dtype": "bfloat16"},
}


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def case(request):
    config = preset("tiny", num_layers=2, **request.param)
    return config, init_params(config, seed=1)


def tokens_of(config, shape, seed=0):
    ids = np.random.default_rng(seed).integers(0, config.vocab_size, shape)
    return jnp.asarray(ids, jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def dense_logits(config, params, tokens):
    return model_of(config, params)(tokens)


def relative_error(got, expected):
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.abs(got - expected).max() / np.abs(expected).max()


def numpy_logits(config, params, tokens):
    """The model once more, in float64 NumPy, one sequence, one head at a time."""
    weights = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    size, group = config.head_dim, config.num_heads // config.num_kv_heads
    angles = np.arange(len(tokens))[:, None] * config.inverse_frequencies()
    turn = np.exp(1j * angles)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale

    def rotated(x):  # [seq, head_dim]; pairs (i, i + head_dim/2) as complex numbers
        pairs = (x[:, : x.shape[1] // 2] + 1j * x[:, x.shape[1] // 2 :]) * turn
        return np.concatenate([pairs.real, pairs.imag], axis=1)

    x = weights.embedding[np.asarray(tokens)]
    for layer in weights.layers:
        normed = norm(x, layer["input_norm"]["scale"])
        qkv = normed @ layer["attention"]["qkv_proj"]["kernel"]
        heads = []
        for head in range(config.num_heads):
            # Of each kv head: the queries of its group, its key, its value.
            first = head // group * (group + 2)
            places = first + head % group, first + group, first + group + 1
            query, key, value = (qkv[:, i * size : (i + 1) * size] for i in places)
            scores = rotated(query) @ rotated(key).T / np.sqrt(config.head_dim)
            scores = np.exp(np.tril(scores - scores.max())) * np.tri(len(tokens))
            heads.append(scores / scores.sum(-1, keepdims=True) @ value)
        x = x + np.concatenate(heads, 1) @ layer["attention"]["o_proj"]["kernel"]
        normed = norm(x, layer["post_attention_norm"]["scale"])
        gate = normed @ layer["mlp"]["gate_proj"]["kernel"]
        up = normed @ layer["mlp"]["up_proj"]["kernel"]
        x = x + gate / (1 + np.exp(-gate)) * up @ layer["mlp"]["down_proj"]["kernel"]
    head = weights.embedding.T if weights.lm_head is None else weights.lm_head
    return norm(x, weights.final_norm) @ head


def test_dense_model_agrees_with_numpy(case):
    config, params = case
    # Larger weights than at the start of training, so that attention is uneven.
    params = jax.tree.map(lambda x: x * 8 if x.ndim == 2 else x, params)
    tokens = tokens_of(config, (2, 33))
    got = dense_logits(config, params, tokens)
    assert got.dtype == jnp.float32
    tolerance = 1e-5 if config.dtype == "float32" else 5e-2
    for row in range(2):
        expected = numpy_logits(config, params, tokens[row])
        assert relative_error(got[row], expected) < tolerance


@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 5])
def test_joined_columns_go_by_kv_head(group, num_kv_heads):
    rng, size, hidden = np.random.default_rng(group), 4, 6
    counts = (num_kv_heads * group, num_kv_heads, num_kv_heads)
    kernels = [rng.standard_normal((hidden, n * size), np.float32) for n in counts]
    joined = np.asarray(join_qkv(*map(jnp.asarray, kernels), num_kv_heads=num_kv_heads))
    columns = list(range(joined.shape[1]))
    queries, keys, values = [], [], []
    for _ in range(num_kv_heads):
        for found, count in ((queries, group), (keys, 1), (values, 1)):
            found += columns[: count * size]
            del columns[: count * size]
    assert not columns
    for found, kernel in zip((queries, keys, values), kernels, strict=True):
        np.testing.assert_array_equal(joined[:, found], kernel)


def test_attention_is_given_the_heads_of_the_separate_kernels(case):
    config, params = case
    rng = np.random.default_rng(2)
    counts = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    shapes = [(config.hidden_size, n * config.head_dim) for n in counts]
    kernels = [rng.integers(-3, 4, shape).astype(config.dtype) for shape in shapes]
    joined = join_qkv(*map(jnp.asarray, kernels), num_kv_heads=config.num_kv_heads)
    layer = params.layers[0]
    attention = layer["attention"] | {"qkv_proj": {"kernel": joined}}
    given = []

    def attend(*heads):
        given.extend(heads)
        return heads[0]

    x = jnp.ones((5, config.hidden_size), config.dtype)
    apply_layer(config, {**layer, "attention": attention}, x, attend)
    for heads, kernel, count in zip(given, kernels, counts, strict=True):
        expected = np.ones((5, config.hidden_size)) @ kernel.astype(np.float64)
        expected = expected.reshape(5, count, config.head_dim)
        tolerance = 1e-4 if config.dtype == "float32" else 1e-2
        assert relative_error(heads, expected) < tolerance


def test_logits_do_not_depend_on_later_tokens(case):
    config, params = case
    tokens = tokens_of(config, (1, 12))
    changed = tokens.at[0, 8:].set((tokens[0, 8:] + 1) % config.vocab_size)
    before = dense_logits(config, params, tokens)
    after = dense_logits(config, params, changed)
    np.testing.assert_array_equal(before[:, :8], after[:, :8])
    assert np.abs(before[:, 8:] - after[:, 8:]).min(axis=-1).max() > 0


@pytest.mark.parametrize("leading", [(), (3,), (2, 5)])
def test_layers_take_any_leading_axes(case, leading):
    config, params = case
    x = embed(config, params, tokens_of(config, leading))
    shapes = []

    def attend(query, key, value):
        shapes.append((query.shape, key.shape, value.shape))
        return query

    assert apply_layer(config, params.layers[0], x, attend).shape == x.shape
    kv_shape = (*leading, config.num_kv_heads, config.head_dim)
    assert shapes == [((*leading, config.num_heads, config.head_dim), *[kv_shape] * 2)]
    logits = unembed(config, params, x)
    assert logits.shape == (*leading, config.vocab_size)
    assert logits.dtype == jnp.float32


def test_model_and_params_convert_into_each_other(case):
    config, params = case
    again = params_of(model_of(config, params))
    assert jax.tree.structure(again) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_abstract_params_have_the_shapes_and_dtypes_of_the_weights(case):
    config, params = case
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    assert abstract_params(config) == shapes
    assert sum(x.size for x in jax.tree.leaves(params)) == config.num_parameters
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {config.dtype}


def test_published_shapes_are_abstract_without_memory():
    config = preset("llama-3-70b")
    leaves = jax.tree.leaves(abstract_params(config))
    assert sum(leaf.size for leaf in leaves) == config.num_parameters


def test_weights_follow_the_seed_and_differ_from_layer_to_layer():
    config = preset("tiny", num_layers=2)
    first, again, other = (init_params(config, seed) for seed in (7, 7, 8))
    assert weights_digest(first) == weights_digest(again) != weights_digest(other)
    qkv, next_qkv = (layer["attention"]["qkv_proj"] for layer in first.layers)
    assert np.abs(qkv["kernel"] - next_qkv["kernel"]).max() > 0
    kernel = np.asarray(first.layers[1]["mlp"]["up_proj"]["kernel"])
    assert 0.018 < kernel.std() < 0.022
    np.testing.assert_array_equal(first.final_norm, 1.0)


def test_nnx_model_and_its_params_compute_the_same():
    config = preset("tiny", num_layers=1)
    tokens = tokens_of(config, (1, 3))

    @jax.jit
    def build_and_run():
        model = Llama(config, rngs=nnx.Rngs(0))
        return params_of(model), model(tokens)

    params, logits = build_and_run()
    assert relative_error(dense_logits(config, params, tokens), logits) < 1e-5


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seeds_that_do_not_fit_are_refused(seed):
    with pytest.raises(ValueError, match=f"seed={seed} must lie in 0..4294967295"):
        init_params(preset("tiny"), seed)


def recipe_params(dtype):
    """Weights whose bits do not depend on any library's random numbers."""
    target = abstract_params(preset("tiny", num_layers=1, dtype=dtype))
    return jax.tree.map(
        lambda leaf: (
            (jnp.arange(leaf.size, dtype=jnp.int32) % 251)
            .reshape(leaf.shape)
            .astype(leaf.dtype)
        ),
        target,
    )


@pytest.mark.parametrize(
    ("dtype", "digest"),
    [
        ("float32", "1e5caf9cdd7b70b50b80b1e51e1f1102"),
        ("bfloat16", "4a46c3b31b1ab7b04ecea85b44dcc816"),
    ],
)
def test_weights_digest_stays_the_same_across_versions(dtype, digest):
    """Stores on disk are tied to it."""
    assert weights_digest(recipe_params(dtype)) == digest


def with_kernels(params, **kernels):
    """The weights with other kernels in the MLP of the first layer."""
    layer = params.layers[0]
    mlp = layer["mlp"] | {name: {"kernel": x} for name, x in kernels.items()}
    return replace(params, layers=({**layer, "mlp": mlp}, *params.layers[1:]))


def test_weights_digest_sees_a_bit_a_sign_of_zero_and_every_exchange():
    params = init_params(preset("tiny", num_layers=2), seed=0)
    up = params.layers[0]["mlp"]["up_proj"]["kernel"]
    gate = params.layers[0]["mlp"]["gate_proj"]["kernel"]
    zeroed = up.at[3, 4].set(0.0)
    variants = [
        params,
        with_kernels(params, up_proj=up.at[5, 7].set(jnp.nextafter(up[5, 7], 1.0))),
        with_kernels(params, up_proj=zeroed),
        with_kernels(params, up_proj=zeroed.at[3, 4].set(-0.0)),
        with_kernels(params, up_proj=up.at[0, 0].set(up[0, 1]).at[0, 1].set(up[0, 0])),
        with_kernels(params, up_proj=up[::-1]),
        with_kernels(params, up_proj=gate, gate_proj=up),
        replace(params, layers=params.layers[::-1]),
    ]
    digests = [weights_digest(variant) for variant in variants]
    assert len(set(digests)) == len(variants)
    assert weights_digest(with_kernels(params, up_proj=up + 0.0)) == digests[0]


@pytest.mark.parametrize("name", ["default", "linear", "llama3"])
def test_logits_agree_with_the_golden_hugging_face_ones(name):
    config, params = load_hugging_face(GOLDEN / name, dtype="float32")
    golden = np.load(GOLDEN / name / "logits.npz")
    got = dense_logits(config, params, jnp.asarray(golden["token_ids"]))
    assert relative_error(got, golden["logits"]) < 1e-5


@pytest.mark.parametrize("name", ["linear", "llama3"])
def test_golden_logits_depend_on_the_rope_scaling(name):
    config, params = load_hugging_face(GOLDEN / name, dtype="float32")
    golden = np.load(GOLDEN / name / "logits.npz")
    unscaled = replace(config, rope_scaling=None)
    got = dense_logits(unscaled, params, jnp.asarray(golden["token_ids"]))
    assert relative_error(got, golden["logits"]) > 1e-2


@pytest.mark.parametrize("name", ["default", "linear", "llama3"])
def test_logits_agree_with_hugging_face_running_here(name, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_hugging_face import build, compute_logits

    model = build(name, seed=11)
    model.save_pretrained(tmp_path)
    config, params = load_hugging_face(tmp_path)
    tokens = tokens_of(config, (3, 65), seed=5)
    expected = compute_logits(model, np.array(tokens))
    assert relative_error(dense_logits(config, params, tokens), expected) < 1e-5
