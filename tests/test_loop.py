import concurrent.futures
import contextlib
import dataclasses
import json
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

Event = pytest.importorskip("tensorboardX.proto.event_pb2").Event

from train import devices, loop, runs  # noqa: E402
from train.checkpoints import CheckpointError, Checkpoints, load_tree  # noqa: E402
from train.config import Config, FlagError, flag  # noqa: E402

X = jnp.linspace(-1, 1, 64)[:, None]
LINE = (X, 2 * X + 1)


class Noisy(nnx.Module):
    """A line behind a dropout, so that its state has random streams beside parameters."""

    def __init__(self, rate: float):
        self.linear = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(rate, rngs=nnx.Rngs(dropout=1))

    def __call__(self, x):
        return self.dropout(self.linear(x))


def squares(model, key, data):
    x, y = data
    batch = jax.random.randint(key, (16,), 0, len(x))
    return jnp.mean((model(x[batch]) - y[batch]) ** 2), {}


def fit(workdir, *, model=None, loss_fn=squares, **options):
    defaults = {
        "config": Config(),
        "key": jax.random.key(0),
        "steps": 200,
        "workdir": workdir,
    }
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
    model, figures, _ = fit(tmp_path, steps=230)
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
    model = fit(tmp_path).model
    empty = nnx.state(Noisy(0.0), nnx.Param)
    restored = load_tree(tmp_path / "params", empty)
    jax.tree.map(np.testing.assert_array_equal, restored, nnx.state(model, nnx.Param))


def test_random_streams_advance_and_the_model_given_is_left_alone(tmp_path):
    given = Noisy(0.5)
    before = np.asarray(given.linear.kernel[...])
    trained, *_ = fit(tmp_path, model=given, steps=30)
    assert given.dropout.rngs.count[...] == 0 and trained.dropout.rngs.count[...] == 30
    np.testing.assert_array_equal(given.linear.kernel[...], before)


def test_every_step_has_a_key_of_its_own(tmp_path):
    def loss_fn(model, key, data):
        return squares(model, key, data)[0], {"draw": jax.random.uniform(key)}

    fit(tmp_path, loss_fn=loss_fn, steps=5, log_every=1)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len({json.loads(line)["draw"] for line in lines}) == 5
    draws = [json.loads(line)["draw"] for line in lines]
    expected = [jax.random.uniform(jax.random.fold_in(jax.random.key(0), i)) for i in range(5)]
    np.testing.assert_allclose(draws, expected, rtol=1e-6)


def test_lines_do_not_change_the_result(tmp_path):
    often, *_ = fit(tmp_path / "often", log_every=7, model=Noisy(0.5))
    seldom, *_ = fit(tmp_path / "seldom", log_every=200, model=Noisy(0.5))
    np.testing.assert_array_equal(often.linear.kernel[...], seldom.linear.kernel[...])


def test_lines_wait_for_a_model_that_is_settled(tmp_path):
    """Of what an optimizer tries out for a step, nothing is written, evaluated or saved."""
    seen = []
    options = {"settled": lambda step: step % 100 != 50, "steps": 150}
    config = Config(checkpoint_every="50", keep=9)
    evaluate = lambda model, step: seen.append(step) or {}  # noqa: E731
    fit(tmp_path, config=config, evaluate=evaluate, evaluate_every=75, **options)
    assert [row["step"] for row in rows(tmp_path)] == [0, 51, 75, 100, 150]
    assert seen == [0, 75, 150]
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", read_only=True)) as saved:
        assert 50 not in saved.steps() and saved.steps()[0] == 150
    with pytest.raises(ValueError, match="steps: got 0, want at least 1"):
        fit(tmp_path / "none", steps=0)


def test_evaluation_sees_the_model_of_its_step(tmp_path):
    kernels = {}

    def evaluate(model, step):
        kernels[step] = model.linear.kernel
        return {"kernel": model.linear.kernel[0, 0]}

    model, *_ = fit(tmp_path, evaluate=evaluate, evaluate_every=80)
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
    averaged, *_ = fit(tmp_path / "averaged", steps=4, average=0.6)
    # Weights of the newest: 1, 1/2, then 0.4 instead of 1/3 and 1/4.
    expected = np.dot([0.5 * 0.36, 0.5 * 0.36, 0.4 * 0.6, 0.4], np.array(plain[1:]))
    np.testing.assert_allclose(averaged.linear.kernel[0, 0], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda loss, bad, kernel: jnp.where(bad, jnp.nan, loss), "the loss is nan"),
        (
            # The loss stays as it is, and its gradient is 0 times infinity.
            lambda loss, bad, kernel: loss + 1e-6 * jnp.sqrt((kernel * jnp.where(bad, 0, 1)) ** 2),
            "the gradient of linear/kernel is not finite",
        ),
    ],
)
def test_what_is_not_finite_is_named_and_the_state_before_it_saved(spoil, message, tmp_path):
    def fit_until(bad_step, folder, **options):
        bad_key = jax.random.fold_in(jax.random.key(0), bad_step)

        def loss_fn(model, key, data):
            loss, _ = squares(model, key, data)
            return spoil(loss, key == bad_key, model.linear.kernel[0, 0]), {}

        return fit(folder, loss_fn=loss_fn, **options)

    with pytest.raises(FloatingPointError, match=rf"{message} at step 67 of 200; .* step 66 is"):
        fit_until(66, tmp_path)
    assert [row["step"] for row in rows(tmp_path)] == [50]
    saved = state_of(tmp_path)
    undisturbed = fit_until(1000, tmp_path / "undisturbed", steps=66).model
    assert saved.step == 66
    np.testing.assert_array_equal(
        saved.tree["params/linear/kernel"], undisturbed.linear.kernel[...]
    )


def test_a_figure_that_is_not_finite_ends_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match="error is inf at step 100 of 200"):
        fit(
            tmp_path,
            evaluate=lambda _, step: {"error": 1 / (100.0 - step) if step < 100 else np.inf},
            evaluate_every=50,
        )


class Killed(BaseException):
    """What ends a process that has no time to say so."""


def die_at(step):
    """A callback of the evaluation that kills once."""

    def evaluate(model, now):
        if now == step:
            raise Killed
        return {"kernel": model.linear.kernel[0, 0], "row": model.linear.kernel[0]}

    return evaluate


STOCHASTIC = {"steps": 200, "average": 0.9, "evaluate_every": 60, "log_every": 20}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    config = Config(checkpoint_every="40", keep=100)
    trained = fit(folder, model=Noisy(0.5), config=config, evaluate=die_at(None), **STOCHASTIC)
    return folder, trained


def state_of(folder):
    with contextlib.closing(Checkpoints(folder / "checkpoints", read_only=True)) as saved:
        return saved.restore()


def assert_same_run(folder, undisturbed):
    """Parameters, optimizer, random streams, metrics and evaluations, bit by bit."""
    one, other = state_of(folder), state_of(undisturbed)
    assert one.step == other.step
    jax.tree.map(np.testing.assert_array_equal, one.tree, other.tree)
    assert rows(folder) == rows(undisturbed)
    for step, results in runs.load_evaluations(undisturbed, one.step).items():
        np.testing.assert_equal(runs.load_evaluations(folder, one.step)[step], results)


def test_a_run_that_was_killed_ends_as_if_it_had_not_been(tmp_path, undisturbed):
    options = {"model": Noisy(0.5), "config": Config(checkpoint_every="40"), **STOCHASTIC}
    for step in (0, 120, 180):
        with pytest.raises(Killed):
            fit(tmp_path, evaluate=die_at(step), **options)
        with open(tmp_path / "metrics.jsonl", "a") as lines:
            lines.write('{"step": 190, "lo')
    leftover = tmp_path / "checkpoints" / "80.orbax-checkpoint-tmp-1"
    leftover.mkdir()
    trained = fit(tmp_path, evaluate=die_at(None), **options)
    assert not leftover.exists()
    assert list(trained.history) == [0, 60, 120, 180, 200]
    assert_same_run(tmp_path, undisturbed[0])


def test_steps_may_grow_and_a_finished_run_is_left_as_it_is(tmp_path, undisturbed):
    options = {"model": Noisy(0.5), "evaluate": die_at(None), **STOCHASTIC}
    for steps in (100, 160, 200):
        trained = fit(tmp_path, **(options | {"steps": steps}))
    np.testing.assert_array_equal(
        trained.model.linear.kernel[...], undisturbed[1].model.linear.kernel[...]
    )
    before = (tmp_path / "metrics.jsonl").read_text()
    again = fit(tmp_path, **options)
    np.testing.assert_array_equal(
        again.model.linear.kernel[...], undisturbed[1].model.linear.kernel[...]
    )
    assert again.figures == trained.figures and list(again.history) == list(trained.history)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "removed":
        path.unlink()
        return
    if how == "flipped":
        content[len(content) // 2] ^= 16
    path.write_bytes(content[: len(content) // 2] if how == "truncated" else content)


@pytest.mark.parametrize("how", ["flipped", "truncated", "removed"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(how, tmp_path, undisturbed, capsys):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    for step in (160, 200):
        damage(folder / "checkpoints" / str(step) / "default" / "manifest.ocdbt", how)
    options = {"model": Noisy(0.5), "evaluate": die_at(None), **STOCHASTIC}
    fit(folder, config=Config(checkpoint_every="40", keep=100), **options)
    errors = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
    assert [line.split(" is damaged")[0] for line in errors] == [
        f"the checkpoint {folder / 'checkpoints' / step}" for step in ("200", "160")
    ]
    assert_same_run(folder, undisturbed[0])
    assert {path.name for path in (folder / "damaged").iterdir()} == {"160", "200"}


def test_no_usable_checkpoint_is_an_error_and_deletes_nothing(tmp_path, undisturbed):
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    for path in (folder / "checkpoints").glob("*/default/manifest.ocdbt"):
        path.unlink()
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=r"no checkpoint is usable.*200.*40"):
        fit(folder, model=Noisy(0.5), evaluate=die_at(None), **STOCHASTIC)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["config.json", "model.json", "metrics.jsonl"])
def test_any_file_of_a_run_may_be_damaged(name, tmp_path, undisturbed):
    """What says what the run is must be right; metrics are kept as far as they can be read."""
    folder = shutil.copytree(undisturbed[0], tmp_path / "run")
    (folder / name).write_bytes(b"\xff{")
    options = {"model": Noisy(0.5), "evaluate": die_at(None), **STOCHASTIC}
    if name == "metrics.jsonl":
        fit(folder, **(options | {"steps": 220}))
        assert [row["step"] for row in rows(folder)] == [220]
    else:
        with pytest.raises(FlagError, match=name):
            fit(folder, **options)


def test_the_best_is_kept_beside_the_last(tmp_path):
    scores = {0: 9.0, 50: 1.0, 100: 3.0, 150: 2.0, 200: 2.0}
    fit(
        tmp_path,
        config=Config(checkpoint_every="50", keep=1),
        evaluate=lambda model, step: {"score": scores[step]},
        evaluate_every=50,
        best=lambda figures: figures["score"],
    )
    with contextlib.closing(Checkpoints(tmp_path / "checkpoints", read_only=True)) as saved:
        assert saved.steps() == [200, 100]
    assert state_of(tmp_path).info["best"] == {"step": 100, "score": 3.0}


def test_another_model_or_flag_is_refused(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Other(Config):
        width: int = flag(1, "Of something.")

    fit(tmp_path, steps=1, config=Other())
    with pytest.raises(FlagError, match=r"--seed=1 \(the run: 0\), --width=2 \(the run: 1\)"):
        fit(tmp_path, steps=1, config=Other(seed=1, width=2))
    with pytest.raises(FlagError, match="a model of"):
        fit(tmp_path, steps=1, config=Other(), inputs=(3,))
    fit(tmp_path, steps=1, config=Other(keep=7))


def test_a_folder_has_one_owner(tmp_path):
    with runs.owned(tmp_path), concurrent.futures.ThreadPoolExecutor() as pool:
        with pytest.raises(FlagError, match="is in use by another run"):
            pool.submit(fit, tmp_path, steps=1).result()
        fit(tmp_path, steps=1)
    fit(tmp_path, steps=2)


def test_a_step_that_does_not_fit_is_refused_before_it_is_compiled(tmp_path):
    def loss_fn(model, key, data):
        return jnp.ones((2**20, 2**20, 2**10)).sum() * squares(model, key, data)[0], {}

    with pytest.raises(FlagError, match=r"1048576,1048576,1024.* would take 4.19e\+06 GiB"):
        fit(tmp_path / "run", loss_fn=loss_fn)
    assert not (tmp_path / "run").exists()


def test_devices_do_not_change_the_result(tmp_path):
    """A batch over 4 devices, and large parameters over 2: the same draws, and figures alike."""

    class Wide(nnx.Module):
        def __init__(self):
            self.layers = nnx.List(
                [nnx.Linear(1, 128, rngs=nnx.Rngs(0)), nnx.Linear(128, 128, rngs=nnx.Rngs(1))]
            )
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(dropout=2))

        def __call__(self, x):
            return self.layers[1](self.dropout(jnp.tanh(self.layers[0](x)))).mean(-1)

    def loss_fn(model, key, data):
        chosen = jax.random.randint(key, (16,), 0, len(data[0]))
        x, y = devices.shard((data[0][chosen], data[1][chosen]))
        return jnp.mean((model(x) - y[:, 0]) ** 2), {"drawn": chosen.sum()}

    options = {"model": Wide(), "loss_fn": loss_fn, "batch_size": 16, "steps": 20}
    one, other = (
        fit(tmp_path / name, config=Config(mesh=mesh), **options)
        for name, mesh in (("one", "data:1"), ("other", "data:2,model:2"))
    )
    assert [row["drawn"] for row in rows(tmp_path / "other")] == [
        row["drawn"] for row in rows(tmp_path / "one")
    ]
    # On other devices it is continued, as on one.
    options["steps"] = 40
    one, other = (
        fit(tmp_path / name, config=Config(mesh=mesh), **options)
        for name, mesh in (("one", "data:1"), ("other", "data:4"))
    )
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(x.model, nnx.Param)) for x in (one, other)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "message"),
    [("data:16", "want 16 devices, have 8"), ("data:3", "3 devices do not divide a batch of 16")],
)
def test_a_mesh_that_cannot_be_is_refused(mesh, message, tmp_path):
    with pytest.raises(FlagError, match=message):
        fit(tmp_path / "run", config=Config(mesh=mesh), batch_size=16)
    assert not (tmp_path / "run").exists()
