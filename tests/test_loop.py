import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

Event = pytest.importorskip("tensorboardX.proto.event_pb2").Event

from train import loop  # noqa: E402

X = jnp.linspace(-1, 1, 64)[:, None]
LINE = (X, 2 * X + 1)


class Noisy(nnx.Module):
    """A line behind a dropout, so that its state has random streams beside parameters."""

    def __init__(self, rate: float):
        self.linear = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(rate, rngs=nnx.Rngs(dropout=1))

    def __call__(self, x):
        return self.dropout(self.linear(x))


def squares(model, key, step, data):
    del step
    x, y = data
    batch = jax.random.randint(key, (16,), 0, len(x))
    return jnp.mean((model(x[batch]) - y[batch]) ** 2), {}


def fit(workdir, *, model=None, loss_fn=squares, **options):
    defaults = {"key": jax.random.key(0), "steps": 200, "workdir": workdir}
    model = Noisy(0.0) if model is None else model
    return loop.train(model, optax.adam(0.05), loss_fn, LINE, **(defaults | options))


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def events(path):
    """Reads TensorBoard's records: a length, its checksum, the event, its checksum."""
    content, start = path.read_bytes(), 0
    while start < len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        yield Event.FromString(content[start + 12 : start + 12 + length])
        start += length + 16


def test_loss_falls_and_is_logged(tmp_path):
    model, figures = fit(tmp_path, steps=230)
    np.testing.assert_allclose(model.linear.kernel[...], 2, atol=0.05)
    assert [row["step"] for row in rows(tmp_path)] == [50, 100, 150, 200, 230]
    assert figures["steps"] == 230
    assert figures["loss"] == rows(tmp_path)[-1]["loss"] < 0.1 * rows(tmp_path)[0]["loss"]
    assert figures["compile_seconds"] > 0 and figures["train_seconds"] > 0


def test_events_hold_the_same_figures(tmp_path):
    fit(tmp_path)
    (path,) = tmp_path.glob("events.out.tfevents.*")
    scalars = [(event.step, v.simple_value) for event in events(path) for v in event.summary.value]
    assert [step for step, _ in scalars] == [50, 100, 150, 200]
    np.testing.assert_allclose([loss for _, loss in scalars], [r["loss"] for r in rows(tmp_path)])


def test_params_restore(tmp_path):
    model, _ = fit(tmp_path)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "params")
    expected = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_random_streams_advance_and_the_model_given_is_left_alone(tmp_path):
    given = Noisy(0.5)
    before = np.asarray(given.linear.kernel[...])
    trained, _ = fit(tmp_path, model=given, steps=30)
    assert given.dropout.rngs.count[...] == 0 and trained.dropout.rngs.count[...] == 30
    np.testing.assert_array_equal(given.linear.kernel[...], before)


def test_steps_see_their_number_and_a_new_key(tmp_path):
    def loss_fn(model, key, step, data):
        return squares(model, key, step, data)[0], {"step": step, "draw": jax.random.uniform(key)}

    fit(tmp_path, loss_fn=loss_fn, steps=5, log_every=1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len({json.loads(line)["draw"] for line in lines}) == 5
    draws = [json.loads(line)["draw"] for line in lines]
    expected = [jax.random.uniform(jax.random.fold_in(jax.random.key(0), i)) for i in range(5)]
    np.testing.assert_allclose(draws, expected, rtol=1e-6)


def test_lines_do_not_change_the_result(tmp_path):
    often, _ = fit(tmp_path / "often", log_every=7, model=Noisy(0.5))
    seldom, _ = fit(tmp_path / "seldom", log_every=200, model=Noisy(0.5))
    np.testing.assert_array_equal(often.linear.kernel[...], seldom.linear.kernel[...])


def test_evaluation_sees_the_model_of_its_step(tmp_path):
    kernels = {}

    def evaluate(model, step):
        kernels[step] = model.linear.kernel
        return {"kernel": model.linear.kernel[0, 0]}

    model, _ = fit(tmp_path, evaluate=evaluate, evaluate_every=80)
    assert list(kernels) == [0, 80, 160, 200]
    np.testing.assert_array_equal(kernels[0][...], Noisy(0.0).linear.kernel[...])
    np.testing.assert_array_equal(kernels[200][...], model.linear.kernel[...])
    logged = [row["kernel"] for row in rows(tmp_path) if "kernel" in row]
    assert logged == [float(kernel[0, 0]) for kernel in kernels.values()]


def test_average_starts_as_a_mean_and_forgets(tmp_path):
    plain = []
    fit(
        tmp_path / "plain",
        steps=4,
        evaluate=lambda model, step: plain.append(model.linear.kernel[0, 0]) or {},
        evaluate_every=1,
    )
    averaged, _ = fit(tmp_path / "averaged", steps=4, average=0.6)
    # Weights of the newest: 1, 1/2, then 0.4 instead of 1/3 and 1/4.
    expected = np.dot([0.5 * 0.36, 0.5 * 0.36, 0.4 * 0.6, 0.4], np.array(plain[1:]))
    np.testing.assert_allclose(averaged.linear.kernel[0, 0], expected, rtol=1e-5)


def test_loss_that_is_not_finite_names_its_step(tmp_path):
    def loss_fn(model, key, step, data):
        loss, _ = squares(model, key, step, data)
        return jnp.where(step == 66, jnp.nan, loss), {}

    with pytest.raises(FloatingPointError, match="the loss is nan at step 67 of 200"):
        fit(tmp_path, loss_fn=loss_fn)
    assert [row["step"] for row in rows(tmp_path)] == [50]
    assert not (tmp_path / "params").exists()
